"""Indices that lie outside of what they index, found before a GPU meets them.

A CPU raises IndexError there. A GPU stops with an assertion, after which the process can use it no more; so a wrong
kernel whose wrong numbers become indices would take all checks after it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kernbench.parity.operators import Call

ALONG_A_DIMENSION = frozenset(
    {"gather", "scatter", "scatter_add", "scatter_reduce"}
    | {"index_select", "index_add", "index_copy", "index_fill", "index_reduce"}
)
NEGATIVE_TOO = frozenset({"take", "put", "index", "index_put", "_index_put_impl", "index_fill"})
"""Those that count negative indices from the end; to others they are out of bounds."""


class Indexed(NamedTuple):
    """Indices, and how many they may choose from."""

    indices: Tensor
    size: int


def check(call: Call) -> None:
    """Let a call pass whose indices all lie within bounds; those of a GPU are read for it.

    Raises:
        IndexError: one does not.
    """
    for indices, size in _indexed(call):
        if not indices.numel():
            continue
        least, most = (int(bound) for bound in indices.aminmax())
        if most >= size or least < (-size if call.operator in NEGATIVE_TOO else 0):
            raise IndexError(f"{call.label} takes an index from {least} to {most} where there are {size}")


def _indexed(call: Call) -> Iterator[Indexed]:
    operator, tensor = call.operator, call.tensor("self")
    index = call.tensor("index")
    if operator in ALONG_A_DIMENSION and tensor is not None and index is not None:
        yield Indexed(index, tensor.shape[call["dim"]] if tensor.dim() else 1)
    elif operator in ("take", "put") and tensor is not None and index is not None:
        yield Indexed(index, tensor.numel())
    elif operator in ("index", "index_put", "_index_put_impl") and tensor is not None:
        for place, chosen in _places(call["indices"]):
            yield Indexed(chosen, tensor.shape[place])
    elif operator == "embedding":
        yield Indexed(call["indices"], call["weight"].shape[0])
    elif operator == "embedding_dense_backward":
        yield Indexed(call["indices"], call["num_weights"])


def _places(indices: list[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """Each index with the dimension that it goes along; a mask goes along as many as it has, and is no index."""
    place = 0
    for index in indices:
        if index is None:
            place += 1
        elif index.dtype.itemsize == 1:
            place += index.dim()
        else:
            yield place, index
            place += 1
