"""Indices that lie outside of what they index, found before a GPU meets them.

A CPU raises IndexError there. A GPU stops with an assertion, after which the process can use it no more; so a wrong
kernel whose wrong numbers become indices would take all checks after it along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

from kernbench.parity.operators import Call, operator_of

INDEXED = {
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce", "take", "put"), "index"),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_fill", "index_reduce"), "index"),
    **dict.fromkeys(("embedding", "embedding_dense_backward"), "indices"),
}
"""Operators that take one tensor of indices, and the argument that it is."""
INDEXED_BY_DIMENSION = frozenset({"index", "index_put", "_index_put_impl"})
NEGATIVE_TOO = INDEXED_BY_DIMENSION | {"take", "put", "index_fill"}
"""Those that count negative indices from the end; to others they are out of bounds."""


class Indexed(NamedTuple):
    """Indices, how many they may choose from, and their place among the call's indices where it takes several."""

    indices: Tensor
    size: int
    place: int = 0


def check(function: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Let a call pass whose indices all lie within bounds; those of a GPU are read for it.

    Raises:
        IndexError: one does not.
    """
    if not _takes_indices(function):
        return
    call = Call.of(function, args, kwargs)
    for indices, size, _ in indexed(call):
        if not indices.numel():
            continue
        least, most = (int(bound) for bound in indices.aminmax())
        if most >= size or least < (-size if call.operator in NEGATIVE_TOO else 0):
            raise IndexError(f"{call.label} takes an index from {least} to {most} where there are {size}")


@cache
def _takes_indices(function: OpOverload) -> bool:
    return operator_of(function) in INDEXED.keys() | INDEXED_BY_DIMENSION


def indexed(call: Call) -> Iterator[Indexed]:
    """All indices of a call."""
    if call.operator in INDEXED:
        yield Indexed(call[INDEXED[call.operator]], _rows(call))
    elif call.operator in INDEXED_BY_DIMENSION:
        dimension = 0
        for place, index in enumerate(call["indices"]):
            # A mask goes along as many dimensions as it has, and holds no indices.
            mask = index is not None and index.dtype.itemsize == 1
            if index is not None and not mask:
                yield Indexed(index, call["self"].shape[dimension], place)
            dimension += index.dim() if mask else 1


def _rows(call: Call) -> int:
    """How many places the indices of a call choose from that takes one tensor of them."""
    if call.operator == "embedding_dense_backward":
        return int(call["num_weights"])
    if call.operator == "embedding":
        return int(call["weight"].shape[0])
    tensor: Tensor = call["self"]
    if call.operator in ("take", "put"):
        return tensor.numel()
    return tensor.shape[call["dim"]] if tensor.dim() else 1
