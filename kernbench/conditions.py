"""The hostile conditions a kernel is called under: poisoned memory, guarded and awkward layouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernbench.compare import map_tensors, same_bits

BAND = 67
"""Elements of a guard band. Odd, so that the tensor behind it starts at no multiple of 16 bytes."""
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def poisoned() -> Iterator[None]:
    """Everything allocated uninitialized in here is filled: NaN, or a large integer; so what is not written shows."""
    with mock.patch.multiple(torch, **_filling(torch)), mock.patch.multiple(torch.Tensor, **_filling(torch.Tensor)):
        yield


def _filling(owner: Any) -> dict[str, Any]:
    return {name: _filled(getattr(holder, name)) for holder, name in ALLOCATORS if holder is owner}


def _filled(allocate: Any) -> Any:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(_poison(tensor.dtype)) if not torch.compiler.is_compiling() else tensor

    return wrapper


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 3


@dataclass
class Guarded:
    """Inputs of which each tensor lies between two bands of poison in one storage."""

    bands: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def embed(self, inputs: Any) -> Any:
        """Contiguous copies of all tensors, each ``BAND`` elements into a storage of its own."""
        return map_tensors(inputs, self._embed)

    def _embed(self, tensor: Tensor) -> Tensor:
        count = tensor.numel()
        # An index read past the end must stay a valid one, so integers are guarded by zeros.
        fill = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
        storage = torch.full((count + 2 * BAND,), fill, dtype=tensor.dtype, device=tensor.device)
        inside = storage[BAND : BAND + count].view(tensor.shape)
        inside.copy_(tensor.detach())
        self.bands += [(band, band.clone()) for band in (storage[:BAND], storage[BAND + count :])]
        return inside

    def intact(self) -> bool:
        """Whether nothing was written into a band."""
        return all(same_bits(band, before) for band, before in self.bands)


def strided(inputs: Any) -> Any:
    """Copies of which every element is followed by a gap of one: no stride is what contiguous memory has."""
    return map_tensors(inputs, _with_gaps)


def _with_gaps(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor.detach().clone()
    fill = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    wide = torch.full((*tensor.shape, 2), fill, dtype=tensor.dtype, device=tensor.device)
    inside = wide[..., 0]
    inside.copy_(tensor.detach())
    return inside
