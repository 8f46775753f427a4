"""Many changes of seeds' state at once: fields by mask, transitions with their trace in the history, in place.

An update says which fields it sets, a bit each: lifecycle 1, blueprint 2, epochs 4, strategy 8. To set the lifecycle is
a transition: (from, to) goes to the seed's ring of history, the parent becomes what it came from, and its epochs begin
at 0, unless the same update sets them. Updates of one seed count one after the other, in the order of the batch, as if
each had been a call of its own. Updates of seeds that do not exist change nothing.

The first update of a seed does the work for all of its updates. Which one that is, and how far to look for others, two
integer maxima per seed say, which come out the same in any order; up to ``PAIRS`` updates are compared with each other
instead, in one launch. Without seed ids update s is that of seed s, and there is nothing to look for.

Source: Kasmina's state manager (transitions) and its Triton state kernel (masks).
Shapes: S seeds, L entries of a history, U updates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance

from . import _rows
from ._seeds import BLUEPRINT, EPOCHS, LIFECYCLE, PARENT, STRATEGY, SWEPT

SET_LIFECYCLE, SET_BLUEPRINT, SET_EPOCHS, SET_STRATEGY = (tl.constexpr(1 << bit) for bit in range(4))
COLUMNS = tl.constexpr(8)


@torch.no_grad()
def seed_state_update_reference(
    state: Tensor, history: Tensor, pointer: Tensor, seeds: Tensor | None, values: Tensor, fields: Tensor
) -> None:
    """In plain PyTorch, without a loop over updates; arguments as in :func:`seed_state_update`."""
    count, length = history.shape[:2]
    if not len(fields):
        return
    # Seed number ``count`` takes what is for nobody.
    ids = torch.arange(count, device=state.device) if seeds is None else seeds.long()
    ids = torch.where((ids >= 0) & (ids < count), ids, count)
    order = torch.argsort(ids, stable=True)
    ids, values, fields = ids[order], values[order], fields[order]
    place = torch.arange(len(ids), device=state.device)
    moves = (fields & SET_LIFECYCLE.value) != 0
    last_move = torch.where(moves, place, -1).cummax(0).values
    previous = torch.cat([last_move.new_full((1,), -1), last_move[:-1]])
    begin = torch.searchsorted(ids, ids)
    own = torch.nn.functional.pad(state[:, LIFECYCLE.value], (0, 1))[ids]
    came_from = torch.where(previous >= begin, values[previous.clamp(min=0), LIFECYCLE.value], own)
    made = moves.cumsum(0) - moves.long()
    earlier = made - made[begin]
    moved = ids.new_zeros(count + 1).index_add(0, ids, moves.long())
    slot = (torch.nn.functional.pad(pointer, (0, 1))[ids] + earlier) % length
    kept = moves & (ids < count) & (earlier >= moved[ids] - length)
    ring = torch.nn.functional.pad(history.reshape(-1, 2), (0, 0, 0, 1))
    entries = torch.stack([came_from, values[:, LIFECYCLE.value]], 1)
    ring[torch.where(kept, ids * length + slot, count * length)] = entries
    history.copy_(ring[:-1].view_as(history))
    pointer.copy_((pointer + moved[:-1]) % length)

    def last(field: int) -> Tensor:
        setting = torch.where((fields & field) != 0, place, -1)
        return place.new_full((count + 1,), -1).scatter_reduce(0, ids, setting, "amax")[:-1]

    moved_at, renewed_at = last(SET_LIFECYCLE.value), last(SET_EPOCHS.value)
    state[:, PARENT.value] = torch.where(moved_at >= 0, came_from[moved_at.clamp(min=0)], state[:, PARENT.value])
    state[:, EPOCHS.value] = torch.where(moved_at > renewed_at, 0, state[:, EPOCHS.value])
    winners = {LIFECYCLE: moved_at, BLUEPRINT: last(SET_BLUEPRINT.value), STRATEGY: last(SET_STRATEGY.value)}
    winners[EPOCHS] = torch.where(renewed_at >= moved_at, renewed_at, -1)
    for column, at in winners.items():
        new = values[at.clamp(min=0), column.value]
        state[:, column.value] = torch.where(at >= 0, new, state[:, column.value])


@triton.jit(do_not_specialize=["updates", "count"])  # type: ignore[untyped-decorator]
def _claim_kernel(seeds, claims, updates, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK updates; claims [2, count], zeros before, tell the first and the last of each seed."""
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + update, mask=update < updates, other=-1).to(tl.int64)
    exists = (seed >= 0) & (seed < count)
    tl.atomic_max(claims + seed, updates - update, mask=exists, sem="relaxed")
    tl.atomic_max(claims + count + seed, update + 1, mask=exists, sem="relaxed")


@triton.jit(do_not_specialize=["updates", "count"])  # type: ignore[untyped-decorator]
def _update_kernel(  # type: ignore[no-untyped-def]
    state, history, pointer, seeds, values, fields, claims, updates, count, length,
    BY_ID: tl.constexpr, IN_PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK updates, and all of those seeds of which it has the first update.

    state [count, 8], history [count, length, 2], pointer [count], seeds and fields [updates], values [updates, 4].
    """
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = update < updates
    first, last = update, update
    seed = update.to(tl.int64)
    if BY_ID:
        seed = tl.load(seeds + update, mask=there, other=-1).to(tl.int64)
    there &= (seed >= 0) & (seed < count)
    if IN_PAIRS:
        other = tl.arange(0, BLOCK)[None, :]
        same = (tl.load(seeds + other, mask=other < updates, other=-1) == seed[:, None]) & there[:, None]
        first = tl.min(tl.where(same, other, BLOCK), 1)
        last = tl.max(tl.where(same, other, -1), 1)
    elif BY_ID:
        first = updates - tl.load(claims + seed, mask=there, other=0)
        last = tl.load(claims + count + seed, mask=there, other=0) - 1
    leads = there & (first == update)
    word = state + seed * COLUMNS
    lifecycle = tl.load(word + LIFECYCLE, mask=leads, other=0)
    blueprint = tl.load(word + BLUEPRINT, mask=leads, other=0)
    epochs = tl.load(word + EPOCHS, mask=leads, other=0)
    strategy = tl.load(word + STRATEGY, mask=leads, other=0)
    parent = tl.load(word + PARENT, mask=leads, other=0)
    slot = tl.load(pointer + seed, mask=leads, other=0)
    furthest = tl.max(tl.where(leads, last - first, 0), 0)
    for step in range(furthest + 1):
        at = update + step
        mine = leads & (at <= last)
        if BY_ID:
            mine &= tl.load(seeds + at, mask=mine, other=-1).to(tl.int64) == seed
        field = tl.load(fields + at, mask=mine, other=0)
        new = values + at.to(tl.int64) * 4
        moves = (field & SET_LIFECYCLE) != 0
        target = tl.load(new + LIFECYCLE, mask=moves, other=0)
        entry = history + (seed * length + slot) * 2
        tl.store(entry, lifecycle, mask=moves)
        tl.store(entry + 1, target, mask=moves)
        parent = tl.where(moves, lifecycle, parent)
        lifecycle = tl.where(moves, target, lifecycle)
        slot = tl.where(moves, (slot + 1) % length, slot)
        epochs = tl.where(moves, 0, epochs)
        epochs = tl.load(new + EPOCHS, mask=(field & SET_EPOCHS) != 0, other=epochs)
        blueprint = tl.load(new + BLUEPRINT, mask=(field & SET_BLUEPRINT) != 0, other=blueprint)
        strategy = tl.load(new + STRATEGY, mask=(field & SET_STRATEGY) != 0, other=strategy)
    tl.store(word + LIFECYCLE, lifecycle, mask=leads)
    tl.store(word + BLUEPRINT, blueprint, mask=leads)
    tl.store(word + EPOCHS, epochs, mask=leads)
    tl.store(word + STRATEGY, strategy, mask=leads)
    tl.store(word + PARENT, parent, mask=leads)
    tl.store(pointer + seed, slot, mask=leads)


BLOCK = 128
PAIRS = 64
"""Up to so many updates, one program compares all of them with each other."""


def seed_state_update(
    state: Tensor, history: Tensor, pointer: Tensor, seeds: Tensor | None, values: Tensor, fields: Tensor
) -> None:
    """Apply a batch of updates in place, in its order, duplicates too. No host sync.

    Args:
        state: [S, 8], int32, contiguous; columns lifecycle, blueprint, epochs in it, strategy, parent, and three that
            stay as they are.
        history: [S, L, 2], int32, contiguous: rings of (from, to).
        pointer: where each ring goes on, [S], int32, contiguous, each from 0 to L - 1.
        seeds: whom each update is for, [U], int32 or int64; others than 0 to S - 1 are left out. None: update s is for
            seed s, and U is S.
        values: lifecycle, blueprint, epochs and strategy, [U, 4], int32.
        fields: which of those to set, [U], int32, the sum of 1, 2, 4 and 8; 0 for no update.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here.
    """
    if _rows.watched():
        torch.ops.kernbench.seed_state_update.default(state, history, pointer, seeds, values, fields)
    else:
        _launch(state, history, pointer, seeds, values, fields)


def _launch(
    state: Tensor, history: Tensor, pointer: Tensor, seeds: Tensor | None, values: Tensor, fields: Tensor
) -> None:
    count, length, updates = _sizes(state, history, pointer, seeds, values, fields)
    if not updates or not count:
        return
    by_id, pairs = seeds is not None, seeds is not None and updates <= PAIRS
    seeds = fields if seeds is None else seeds.contiguous()
    with _rows.on_device(state):
        claims = fields
        if by_id and not pairs:
            claims = torch.zeros(2 * count, dtype=torch.int32, device=state.device)
            _claim_kernel[(triton.cdiv(updates, BLOCK),)](seeds, claims, updates, count, BLOCK, num_warps=4)
        block = PAIRS if pairs else BLOCK
        _update_kernel[(triton.cdiv(updates, block),)](
            state, history, pointer, seeds, values.contiguous(), fields.contiguous(), claims, updates, count,
            length, by_id, pairs, block, num_warps=4,
        )  # fmt: skip
    torch.autograd.graph.increment_version([state, history, pointer])


def _sizes(
    state: Tensor, history: Tensor, pointer: Tensor, seeds: Tensor | None, values: Tensor, fields: Tensor
) -> tuple[int, int, int]:
    """How many seeds, entries of a history and updates there are, if all fits."""
    count, updates, device = state.shape[0], fields.shape[0], state.get_device()
    length = history.shape[1] if history.dim() == 3 else 0
    if not (
        state.shape == (count, 8) and history.shape == (count, length, 2) and pointer.shape == (count,) and length
        and values.shape == (updates, 4) and fields.shape == (updates,)
        and state.dtype == history.dtype == pointer.dtype == values.dtype == fields.dtype == torch.int32
        and history.get_device() == pointer.get_device() == values.get_device() == fields.get_device() == device
    ):  # fmt: skip
        tensors = (state, history, pointer, values, fields)
        described = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in tensors)
        raise ValueError(
            f"seed_state_update takes int32 state [S, 8], history [S, L, 2], pointer [S], values [U, 4] and fields "
            f"[U], on one device; they are {described}"
        )
    if not (state.is_contiguous() and history.is_contiguous() and pointer.is_contiguous()):
        raise ValueError("seed_state_update writes into state, history and pointer, which have to be contiguous")
    if seeds is None and updates != count:
        raise ValueError(f"without seed ids give one update per seed: {count}, not {updates}")
    if seeds is not None and (
        seeds.shape != (updates,) or seeds.dtype not in (torch.int32, torch.int64) or seeds.get_device() != device
    ):
        raise ValueError(
            f"seed_state_update takes one int32 or int64 seed id per update on {state.device}, not {seeds.dtype} "
            f"{tuple(seeds.shape)} on {seeds.device}"
        )
    return count, length, updates


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "seed_state_update(Tensor(a!) state, Tensor(b!) history, Tensor(c!) pointer, Tensor? seeds, Tensor values, "
    "Tensor fields) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("seed_state_update", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Seeds in the middle of a run, and updates of which a tenth is for nobody; the dtype does not matter."""
    generator = torch.Generator(device).manual_seed(seed)
    count, length = case["seeds"], case["length"]

    def drawn(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device, dtype=torch.int32)

    updates = case["updates"] if case["by_id"] else count
    inputs: Inputs = {
        "state": drawn(11, count, 8),
        "history": drawn(11, count, length, 2),
        "pointer": drawn(length, count),
        "seeds": drawn(1, updates) if case["by_id"] else None,
        "values": drawn(1, updates, 4),
        "fields": drawn(1, updates),
    }
    next_inputs(inputs, seed)
    return inputs


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The next batch of updates, in place."""
    generator = torch.Generator(inputs["fields"].device).manual_seed(seed)
    inputs["fields"].random_(0, 16, generator=generator)
    inputs["values"].random_(0, 11, generator=generator)
    if inputs["seeds"] is not None:
        # Below 0 as often as beyond the last one.
        beyond = -(-len(inputs["state"]) // 20)
        inputs["seeds"].random_(-beyond, len(inputs["state"]) + beyond, generator=generator)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Updates read; of each seed that has one, six numbers read and written, and its entry of the history."""
    updates = case["updates"] if case["by_id"] else case["seeds"]
    seeds = min(updates, case["seeds"])
    return Cost(
        flops=0.0,
        bytes_read=4.0 * ((6 if case["by_id"] else 5) * updates + 6 * seeds),
        bytes_written=4.0 * (6 + 2) * seeds,
    )


SPEC = KernelSpec(
    name="seed_state_update",
    reference=seed_state_update_reference,
    optimized=seed_state_update,
    make_inputs=make_inputs,
    cases=(
        Case("one", updates=1, seeds=1, length=1, by_id=1),
        Case("ragged", updates=37, seeds=19, length=10, by_id=1),
        Case("duplicates", updates=150, seeds=5, length=10, by_id=1),
        Case("all", updates=0, seeds=141, length=10, by_id=0),
        Case("100-seeds", large=True, updates=0, seeds=100, length=10, by_id=0),
        Case("1000-seeds", large=True, updates=0, seeds=1000, length=10, by_id=0),
        Case("10000-seeds", large=True, updates=0, seeds=10_000, length=10, by_id=0),
        Case("50-by-id", large=True, updates=50, seeds=1000, length=10, by_id=1),
        Case("10000-by-id", large=True, updates=10_000, seeds=10_000, length=10, by_id=1),
        Case("million-seeds", large=True, updates=0, seeds=1_000_000, length=10, by_id=0),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("state", "history", "pointer"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={
        "updates": Sizes(most=200, block=BLOCK),
        "seeds": Sizes(least=1, most=200, block=BLOCK),
        "length": Sizes(least=1, most=12),
        "by_id": Sizes(most=1),
    },
    sweeps=(
        Sweep(
            size="seeds",
            values=SWEPT,
            sizes=lambda seeds: {"updates": 0, "seeds": seeds, "length": 10, "by_id": 0},
            fixed="one update of each seed, so bytes grow with them",
        ),
    ),
    source="Kasmina's state manager and state kernel (tachyon-beep/esperlite, RC1)",
)
