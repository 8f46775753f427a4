"""What ranks have to agree on, where torch.distributed has a group: gradients, and who merges and splits.

Every rank calls the same collectives in the same order. Plastic state is each rank's own, as upstream has it: it comes
from the tokens that the rank saw. So are the scores, until they are logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BUCKET_NUMBERS = 1 << 24
"""Gradients that are sent in one piece, at most, unless one tensor has more."""


def world() -> tuple[int, int]:
    """This rank and how many there are; (0, 1) without a group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients in pieces of one dtype and no more than ``BUCKET_NUMBERS``, the last ones first, as backward ends."""
    found: list[list[Tensor]] = []
    size = 0
    for gradient in reversed(gradients):
        fits = found and found[-1][0].dtype == gradient.dtype and size + gradient.numel() <= BUCKET_NUMBERS
        if not fits:
            found.append([])
            size = 0
        found[-1].append(gradient)
        size += gradient.numel()
    return found


def from_first_rank(rows: list[list[float]], most: int, width: int, device: torch.device) -> list[list[float]]:
    """The first rank's rows on every rank, no more than ``most`` of ``width`` numbers each, by one broadcast."""
    if world()[1] == 1:
        return rows
    table = torch.full((most + 1, width), float(len(rows)), dtype=torch.float64, device=device)
    if rows:
        table[1 : len(rows) + 1] = torch.tensor(rows, dtype=torch.float64)
    torch.distributed.broadcast(table, 0)
    count, *received = table.tolist()
    return received[: int(count[0])]
