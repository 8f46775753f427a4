"""Inputs, cost and a peer of expert_moves: the tensors of one mixture's inner layer, router and optimizer states."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernbench import philox
from kernbench.spec import Case, Cost, Inputs

from ._expert_codes import (
    AVERAGED,
    CHILD,
    COPIED,
    EMPTIED,
    ENZYME,
    ENZYME_SHARE,
    ERASED,
    HALVED,
    KEPT,
    KIND,
    MERGE,
    NOISY,
    PARENT,
    RESET,
    RESTED,
    SEED,
    SHARED,
    SPLIT,
    TURNED,
)

NOISE, EMBEDDING_NOISE = 0.02, 0.05
EMBEDDED = 24
MANY = 8
"""Moves from which on every one is made."""


class Kind(NamedTuple):
    """A tensor of an expert: its shape, and what moves do to it."""

    shape: tuple[int, ...]
    take: int
    become: int
    noise: float = 0.0


def kinds(case: Case) -> list[Kind]:
    """Weights, fast state, router, embedding and metabolism, and two optimizer states of the weights."""
    matrix, rows = (case["inputs"], case["outputs"]), (case["inputs"],)
    states = COPIED if case["inherit"] else EMPTIED
    found = [
        Kind(matrix, SHARED.value, NOISY.value, NOISE),
        Kind(matrix, KEPT.value, states.value),
        Kind(rows, SHARED.value, HALVED.value),
        Kind((1,), ENZYME.value, COPIED.value),
        Kind(rows, AVERAGED.value, COPIED.value),
        Kind(rows, KEPT.value, COPIED.value if case["inherit"] else ERASED.value),
        Kind((EMBEDDED,), KEPT.value, TURNED.value, EMBEDDING_NOISE),
        Kind((), KEPT.value, RESTED.value),
    ]
    # In a measurement the matrices are what they are in a mixture: two weights with two states each, and H.
    return [*found, found[0], *[found[1]] * 3, Kind(matrix, SHARED.value, EMPTIED.value)] if case.large else found


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Tensors of all experts and disjoint moves; where there are three, the last one starts from an earlier child."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = []
    for kind in kinds(case):
        shape = (case["experts"], *kind.shape)
        tensor = torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
        if kind.become == TURNED.value:
            tensor = torch.nn.functional.normalize(tensor, dim=-1)
        tensors.append(tensor.to(dtype))
    moves = case["moves"]
    inputs: Inputs = {
        "tensors": tensors,
        "takes": [kind.take for kind in kinds(case)],
        "becomes": [kind.become for kind in kinds(case)],
        "noises": [kind.noise for kind in kinds(case)],
        "moves": torch.zeros(moves, 4, dtype=torch.int64, device=device),
        "shares": torch.rand(moves, generator=generator, device=device).double(),
    }
    next_inputs(inputs, seed)
    return inputs


def next_inputs(inputs: Inputs, seed: int) -> None:
    """Other moves, in place: merges and splits of disjoint pairs in turn; one in four is none, unless they are many."""
    moves = inputs["moves"]
    generator = torch.Generator(moves.device).manual_seed(seed)
    experts, count = len(inputs["tensors"][0]), len(moves)
    order = torch.randperm(experts, generator=generator, device=moves.device)
    at = torch.arange(count, device=moves.device)
    pair = at % (experts // 2)
    moves[:, KIND.value] = torch.where(at % 2 == 0, MERGE.value, SPLIT.value)
    if count < MANY:
        moves[3::4, KIND.value] = 0
    moves[:, PARENT.value], moves[:, CHILD.value] = order[2 * pair], order[2 * pair + 1]
    moves[:, SEED.value] = (seed << 20) + 16 * at
    if count == 3:
        moves[2, KIND.value] = RESET.value
        moves[2, PARENT.value] = moves[0, CHILD.value]
        moves[2, CHILD.value] = order[-1] if experts > 2 else moves[0, PARENT.value]


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """A merge reads and writes both experts; a split reads one and writes one; what becomes zero or one is not read."""
    read = written = 0.0
    for at in range(case["moves"]):
        if at % 4 == 3 and case["moves"] < MANY:
            continue
        merging = at % 2 == 0 and not (case["moves"] == 3 and at == 2)
        for kind in kinds(case):
            elements = math.prod(kind.shape)
            mixes = merging and kind.take != KEPT.value
            copies = kind.become in (COPIED.value, NOISY.value, HALVED.value, TURNED.value)
            read += elements * (2 if mixes else int(copies))
            written += elements * (2 if mixes else case["experts"] if kind.become == ERASED.value else 1)
    return Cost(flops=0.0, bytes_read=4 * read, bytes_written=4 * written)


def normal(like: Tensor, seeds: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like`` for each seed [M]; number n is word n mod 4 of block n div 4."""
    block = torch.arange(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words = torch.stack(philox.randn4x(seeds.unsqueeze(1), block.expand(len(seeds), -1), dtype=like.dtype), 2)
    return words.flatten(1)[:, : like.numel()].view(-1, *like.shape)


@torch.no_grad()
def by_index(
    tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float], moves: Tensor, shares: Tensor
) -> None:
    """All moves of a tensor at once, with rows taken and put back by index; for moves of disjoint experts, all made.

    Raises:
        ValueError: one of the moves is none, or starts from another.
    """
    if 3 <= len(moves) < MANY:
        raise ValueError("rows taken by index are those before any move, and each move is made")
    kind, parents, children, seeds = moves.unbind(1)
    stream = 0
    for tensor, take, become, noise in zip(tensors, takes, becomes, noises, strict=True):
        column = (-1, *[1] * (tensor.dim() - 1))
        rows, other = tensor[parents], tensor[children]
        if take != KEPT.value:
            fixed = ENZYME_SHARE.value if take == ENZYME.value else 0.5
            own = shares.double() if take == SHARED.value else torch.full_like(shares, fixed, dtype=torch.float64)
            mixed = rows * own.to(rows.dtype).view(column) + (1 - own).to(rows.dtype).view(column) * other
            rows = torch.where((kind == MERGE.value).view(column), mixed, rows)
            tensor[parents] = rows
        if become in (NOISY.value, TURNED.value):
            drawn = normal(rows[0], seeds + stream)
            stream += 1
            if become == TURNED.value:
                drawn = drawn - (drawn * rows).sum(1, keepdim=True) * rows
            rows = rows + noise * drawn
            rows = torch.nn.functional.normalize(rows, dim=1) if become == TURNED.value else rows
        elif become == HALVED.value:
            rows = rows * 0.5
        elif become != COPIED.value:
            rows = torch.full_like(rows, 1.0 if become == RESTED.value else 0.0)
        if become == ERASED.value:
            tensor.zero_()
        else:
            tensor[children] = rows


CASES = (
    Case("one", experts=2, inputs=3, outputs=5, moves=1, inherit=0),
    Case("ragged", experts=5, inputs=33, outputs=37, moves=3, inherit=0),
    Case("aligned", experts=6, inputs=32, outputs=48, moves=2, inherit=1),
    Case("moe-8", large=True, experts=8, inputs=768, outputs=3072, moves=2, inherit=1),
    Case("moe-64", large=True, experts=64, inputs=768, outputs=3072, moves=2, inherit=1),
    Case("moe-64-zero", large=True, experts=64, inputs=768, outputs=3072, moves=2, inherit=0),
    Case("all-of-64", large=True, experts=64, inputs=768, outputs=3072, moves=32, inherit=1),
)
