"""Which experts of a mixture merge, split and are reset, decided on the device by one program.

Merges come first: of all pairs more alike than ``alike`` whose experts are both in poor health, the most similar, then
the most similar of those that share no expert with it, and so on; the healthier one of a pair wins and keeps the share
fatigue_w / (fatigue_w + fatigue_l). Then the strongest experts split into the weakest, each expert in at most one move.
Then the weakest of dead health that nobody touched are reset to copies of the healthiest.

Ties go as a sort by (similarity, i, j) downwards and a stable sort by health upwards have it. Health and shares are
compared and computed in float64, so that a threshold means the same as on the host. Each move that is made gets a seed
of its own, counted on the device.

Source: specification of bio-nanochat, section 7; kernel plan, phase 4.
Shapes: E experts, M moves: all that can be made, merges, splits, resets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _pointer_table, _rows
from ._expert_codes import CHILD, COLUMNS, KIND, MERGE, NONE, PARENT, RESET, SEED, SPLIT

FEW = tl.constexpr(1e-6)
EVEN_SHARE, FIXED_SHARE = tl.constexpr(0.5), tl.constexpr(0.6)
LARGEST = 1024
TILE = 4096
"""Pairs that are compared at once."""
INFINITE = tl.constexpr(float("inf"))


@torch.no_grad()
def expert_decisions_reference(
    health: Tensor, similar: Tensor, fatigue: Tensor, made: Tensor, limits: list[float], most: list[int],
    weighted: bool, seed: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch, move by move, without a read; arguments as in :func:`expert_decisions`."""
    experts = len(health)
    lane = torch.arange(experts, device=health.device)
    free = torch.ones_like(lane, dtype=torch.bool)
    exact, tired = health.double(), fatigue.double()
    alike, poor, strong, dead = limits
    ill = exact <= poor
    pairs = (similar > alike).triu(1) & ill & ill.unsqueeze(1)
    decided = []
    for _ in range(most[0]):
        allowed = pairs & free & free.unsqueeze(1)
        best = _last_best(similar.flatten(), allowed.flatten())
        i, j = best // experts, best % experts
        winner = torch.where(_at(exact, i) >= _at(exact, j), i, j)
        loser = i + j - winner
        free = _taken(free, lane, allowed.any(), winner, loser)
        decided.append((torch.where(allowed.any(), MERGE.value, NONE.value), winner, loser))
    for _ in range(most[1]):
        able = free & (exact >= strong)
        parent = _last_best(exact, able)
        others = free & (lane != parent)
        child = experts - 1 - _last_best(-exact.flip(0), others.flip(0))
        found = able.any() & others.any()
        free = _taken(free, lane, found, parent, child)
        decided.append((torch.where(found, SPLIT.value, NONE.value), parent, child))
    healthiest = _last_best(exact, torch.ones_like(free))
    for _ in range(most[2]):
        able = free & (exact <= dead) & (lane != healthiest)
        child = experts - 1 - _last_best(-exact.flip(0), able.flip(0))
        free = _taken(free, lane, able.any(), child, child)
        decided.append((torch.where(able.any(), RESET.value, NONE.value), healthiest, child))
    moves = torch.zeros(len(decided), COLUMNS.value, dtype=torch.int64, device=health.device)
    shares = torch.zeros(len(decided), dtype=torch.float64, device=health.device)
    for move, (kind, parent, child) in zip(moves, decided, strict=True):
        row = torch.stack([kind, parent, child, seed + made * stride])
        move.copy_(torch.where(kind > 0, row, 0))
        made += kind > 0
    for at in range(most[0]):
        own, other = _at(tired, moves[at, PARENT.value]), _at(tired, moves[at, CHILD.value])
        share = torch.where(own + other > FEW.value, own / (own + other), EVEN_SHARE.value)
        share = share if weighted else torch.full_like(share, FIXED_SHARE.value)
        shares[at].copy_(torch.where(moves[at, KIND.value] == MERGE.value, share, 0.0))
    return moves, shares


def _last_best(values: Tensor, allowed: Tensor) -> Tensor:
    """The index of the largest allowed value, the last of equal ones; any index where none is allowed."""
    best = torch.where(allowed, values, -float("inf")).max()
    there = allowed & (values == best)
    return (there * torch.arange(len(values), device=values.device)).max()


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.view(1))[0]


def _taken(free: Tensor, lane: Tensor, found: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return free & ~(found & ((lane == one) | (lane == other)))


@triton.jit  # type: ignore[untyped-decorator]
def _closest(  # type: ignore[no-untyped-def]
    health, similar, free, experts, ALIKE: tl.constexpr, POOR: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """The place i * EXPERTS + j of the most similar pair i < j that may merge, -1 if there is none."""
    column = tl.arange(0, EXPERTS)
    exact = tl.load(health + column, mask=column < experts, other=0.0).to(tl.float64)
    ill = free & (exact <= tl.full([], POOR, tl.float64))
    best = -INFINITE
    place = -1
    for top in range(0, EXPERTS, ROWS):
        row = top + tl.arange(0, ROWS)
        # A row's flag is that of the column of its number.
        row_ill = tl.max(tl.where(row[:, None] == column[None, :], ill[None, :].to(tl.int32), 0), 1) > 0
        allowed = row_ill[:, None] & ill[None, :] & (row[:, None] < column[None, :])
        value = tl.load(similar + row[:, None] * experts + column[None, :], mask=allowed, other=-INFINITE)
        allowed &= value > ALIKE
        highest = tl.max(tl.max(tl.where(allowed, value, -INFINITE), 1), 0)
        index = tl.where(allowed & (value == highest), row[:, None] * EXPERTS + column[None, :], -1)
        found = tl.max(tl.max(index, 1), 0)
        better = (found >= 0) & (highest >= best)
        best = tl.where(better, highest, best)
        place = tl.where(better, found, place)
    return place


@triton.jit
def _strongest(exact, allowed, lane):  # type: ignore[no-untyped-def]
    """The allowed expert of the best health, the last of equal ones; -1 if there is none."""
    best = tl.max(tl.where(allowed, exact, -INFINITE), 0)
    return tl.max(tl.where(allowed & (exact == best), lane, -1), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _weakest(exact, allowed, lane, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The allowed expert of the poorest health, the first of equal ones; EXPERTS if there is none."""
    worst = tl.min(tl.where(allowed, exact, INFINITE), 0)
    return tl.min(tl.where(allowed & (exact == worst), lane, EXPERTS), 0)


@triton.jit
def _write(move, kind, parent, child, seed):  # type: ignore[no-untyped-def]
    """One row of the moves; all zero where kind is."""
    there = kind > 0
    tl.store(move + KIND, kind.to(tl.int64))
    tl.store(move + PARENT, tl.where(there, parent, 0).to(tl.int64))
    tl.store(move + CHILD, tl.where(there, child, 0).to(tl.int64))
    tl.store(move + SEED, tl.where(there, seed, 0).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _decide_kernel(  # type: ignore[no-untyped-def]
    health, similar, fatigue, made, moves, shares, experts, seed, stride,
    ALIKE: tl.constexpr, POOR: tl.constexpr, STRONG: tl.constexpr, DEAD: tl.constexpr,
    MERGES: tl.constexpr, SPLITS: tl.constexpr, RESETS: tl.constexpr, WEIGHTED: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program decides for health and fatigue [experts] and similar [experts, experts]; grid is one.

    It writes moves [MERGES + SPLITS + RESETS, 4] and shares of as many, and counts the moves in made.
    """
    lane = tl.arange(0, EXPERTS)
    inside = lane < experts
    free = inside
    exact = tl.load(health + lane, mask=inside, other=0.0).to(tl.float64)
    tired = tl.load(fatigue + lane, mask=inside, other=0.0).to(tl.float64)
    count = tl.load(made)
    for at in range(MERGES):
        place = _closest(health, similar, free, experts, ALIKE, POOR, EXPERTS, ROWS)
        i, j = place // EXPERTS, place % EXPERTS
        found = place >= 0
        health_i = tl.sum(tl.where(lane == i, exact, 0.0), 0)
        health_j = tl.sum(tl.where(lane == j, exact, 0.0), 0)
        winner = tl.where(health_i >= health_j, i, j)
        loser = i + j - winner
        own = tl.sum(tl.where(lane == winner, tired, 0.0), 0)
        both = own + tl.sum(tl.where(lane == loser, tired, 0.0), 0)
        rested = both <= tl.full([], FEW, tl.float64)
        share = own / tl.where(rested, tl.full([], 1.0, tl.float64), both)
        share = tl.where(rested, tl.full([], EVEN_SHARE, tl.float64), share)
        if not WEIGHTED:
            share = tl.full([], FIXED_SHARE, tl.float64)
        tl.store(shares + at, tl.where(found, share, tl.full([], 0.0, tl.float64)))
        _write(moves + at * COLUMNS, tl.where(found, MERGE, NONE), winner, loser, seed + count * stride)
        count += found.to(tl.int64)
        free &= (lane != tl.where(found, winner, -1)) & (lane != tl.where(found, loser, -1))
    for at in range(MERGES, MERGES + SPLITS):
        parent = _strongest(exact, free & (exact >= tl.full([], STRONG, tl.float64)), lane)
        child = _weakest(exact, free & (lane != parent), lane, EXPERTS)
        found = (parent >= 0) & (child < EXPERTS)
        tl.store(shares + at, tl.full([], 0.0, tl.float64))
        _write(moves + at * COLUMNS, tl.where(found, SPLIT, NONE), parent, child, seed + count * stride)
        count += found.to(tl.int64)
        free &= (lane != tl.where(found, parent, -1)) & (lane != tl.where(found, child, -1))
    healthiest = _strongest(exact, inside, lane)
    for at in range(MERGES + SPLITS, MERGES + SPLITS + RESETS):
        dead = free & (exact <= tl.full([], DEAD, tl.float64)) & (lane != healthiest)
        child = _weakest(exact, dead, lane, EXPERTS)
        found = child < EXPERTS
        tl.store(shares + at, tl.full([], 0.0, tl.float64))
        _write(moves + at * COLUMNS, tl.where(found, RESET, NONE), healthiest, child, seed + count * stride)
        count += found.to(tl.int64)
        free &= lane != child
    tl.store(made, count)


def expert_decisions(
    health: Tensor, similar: Tensor, fatigue: Tensor, made: Tensor, limits: list[float], most: list[int],
    weighted: bool, seed: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Decide, with no host sync.

    Args:
        health: of every expert, [E], float32, contiguous, no NaN.
        similar: cosines of their embeddings, [E, E], float32, contiguous.
        fatigue: [E], float32, contiguous.
        made: moves made so far, 0-dim int64; those decided now are added.
        limits: the similarity above which pairs merge and the health up to which, the health from which experts split,
            and that up to which they are reset.
        most: merges, splits and resets to decide at most.
        weighted: weigh a merge by fatigue; otherwise the winner keeps 0.6.
        seed: of the first move of all, below 2^62.
        stride: from the seed of one move to that of the next.

    Returns:
        moves [M, 4], int64, as ``expert_moves`` takes them, and shares [M], float64.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device, or there are more than 1024 experts.
    """
    arguments = (health, similar, fatigue, made, limits, most, weighted, seed, stride)
    moves, shares = torch.ops.kernbench.expert_decisions.default(*arguments) if _rows.watched() else _launch(*arguments)
    return moves, shares


def _launch(
    health: Tensor, similar: Tensor, fatigue: Tensor, made: Tensor, limits: list[float], most: list[int],
    weighted: bool, seed: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    experts, device = len(health), health.device
    if not 1 <= experts <= LARGEST:
        raise ValueError(f"expert_decisions takes 1 to {LARGEST} experts, not {experts}")
    _pointer_table.check("health", health, (experts,), torch.float32, device)
    _pointer_table.check("similar", similar, (experts, experts), torch.float32, device)
    _pointer_table.check("fatigue", fatigue, (experts,), torch.float32, device)
    _pointer_table.check("made", made, (), torch.int64, device)
    moves = torch.empty(sum(most), COLUMNS.value, dtype=torch.int64, device=device)
    shares = torch.empty(sum(most), dtype=torch.float64, device=device)
    columns = max(16, triton.next_power_of_2(experts))
    with _rows.on_device(health):
        _decide_kernel[(1,)](
            health, similar, fatigue, made, moves, shares, experts, seed, stride, *limits, *most, weighted,
            columns, min(columns, TILE // columns), num_warps=4,
        )  # fmt: skip
    torch.autograd.graph.increment_version(made)
    return moves, shares


def _fake(
    health: Tensor, similar: Tensor, fatigue: Tensor, made: Tensor, limits: list[float], most: list[int],
    weighted: bool, seed: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    moves = health.new_empty((sum(most), COLUMNS.value), dtype=torch.int64)
    return moves, health.new_empty(sum(most), dtype=torch.float64)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "expert_decisions(Tensor health, Tensor similar, Tensor fatigue, Tensor(a!) made, float[] limits, int[] most, "
    "bool weighted, int seed, int stride) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("expert_decisions", _launch, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::expert_decisions", _fake, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Experts some of whom are alike, with some of equal health, in numbers that every dtype holds."""
    generator = torch.Generator(device).manual_seed(seed)
    experts = case["experts"]

    def drawn(*shape: int) -> Tensor:
        return torch.randint(0, 33, shape, generator=generator, device=device).to(dtype) / 32

    lower = drawn(experts, experts).tril(-1)
    return {
        "health": drawn(experts), "similar": lower + lower.T + torch.eye(experts, device=device, dtype=dtype),
        "fatigue": drawn(experts), "made": torch.tensor(case["made"], device=device),
        "limits": [0.85, 0.6, 0.5, 0.25], "most": [case["merges"], case["splits"], case["resets"]],
        "weighted": bool(case["weighted"]), "seed": 3 << 20, "stride": 8 * experts,
    }  # fmt: skip


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Similarities, health and fatigue read, and the moves written."""
    experts, moves = float(case["experts"]), case["merges"] + case["splits"] + case["resets"]
    return Cost(flops=0.0, bytes_read=4 * (experts * experts + 2 * experts) + 8, bytes_written=40.0 * moves + 8)


SPEC = KernelSpec(
    name="expert_decisions",
    reference=expert_decisions_reference,
    optimized=expert_decisions,
    make_inputs=make_inputs,
    cases=(
        Case("one", experts=1, merges=1, splits=1, resets=1, weighted=1, made=0),
        Case("ragged", experts=13, merges=2, splits=2, resets=2, weighted=1, made=5),
        Case("many", experts=70, merges=3, splits=3, resets=1, weighted=0, made=1000),
        Case("moe-8", large=True, experts=8, merges=1, splits=1, resets=1, weighted=1, made=9),
        Case("moe-64", large=True, experts=64, merges=1, splits=1, resets=1, weighted=1, made=9),
        Case("all-of-64", large=True, experts=64, merges=16, splits=16, resets=0, weighted=1, made=9),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("made",),
    sizes={
        "experts": Sizes(least=1, most=80, block=64),
        "merges": Sizes(most=3),
        "splits": Sizes(most=3),
        "resets": Sizes(most=2),
        "weighted": Sizes(most=1),
        "made": Sizes(most=10),
    },
    values={"health": Values(fixed=True), "similar": Values(fixed=True), "fatigue": Values(fixed=True)},
    source="bio-nanochat, section 7; kernel plan, phase 4",
)
