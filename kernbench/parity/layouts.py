"""Layouts that a tensor may come in: the same numbers (one excepted), stored as no kernel should take for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

BAND = 67
"""Elements of a guard band. Odd, so that the tensor behind it starts at no multiple of 16 bytes."""


def contiguous(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def strided(tensor: Tensor) -> Tensor:
    """A copy of which every element is followed by a gap of one, so that no stride is what contiguous memory has."""
    if tensor.dim() == 0:
        return contiguous(tensor)
    wide = torch.full((*tensor.shape, 2), gap(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    return wide[..., 0].copy_(tensor.detach())


def offset(tensor: Tensor) -> Tensor:
    """A contiguous copy that starts at no multiple of 16 bytes, between two bands of poison."""
    return between_bands(tensor)[0]


def transposed(tensor: Tensor) -> Tensor:
    """A copy with the last two dimensions stored the other way round; of fewer than two, one with gaps."""
    if tensor.dim() < 2:
        return strided(tensor)
    return contiguous(tensor.detach().transpose(-1, -2)).transpose(-1, -2)


def expanded(tensor: Tensor) -> Tensor:
    """The first row in place of every row, with a stride of zero: other numbers, so judge by a truth about these."""
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return contiguous(tensor)
    return contiguous(tensor[:1]).expand(tensor.shape)


def between_bands(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A contiguous copy, and the bands of poison before and behind it in the same storage."""
    count = tensor.numel()
    storage = torch.full((count + 2 * BAND,), gap(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    inside = storage[BAND : BAND + count].view(tensor.shape)
    inside.copy_(tensor.detach())
    return inside, [storage[:BAND], storage[BAND + count :]]


def gap(dtype: torch.dtype) -> float:
    """What lies around the elements of an input: NaN, but zero for integers, which an index read there must survive."""
    return float("nan") if dtype.is_floating_point or dtype.is_complex else 0


LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "contiguous": contiguous,
        "strided": strided,
        "offset": offset,
        "transposed": transposed,
        "expanded": expanded,
    }
)
