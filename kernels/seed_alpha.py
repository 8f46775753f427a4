"""How much of its blueprint each seed blends in, by the linear schedule, and whether any seed computes at all.

    progress = min(max(epochs / period, 0), 1)         of seeds that graft, kept with their accuracy and a count
    alpha    = tuned_share where a seed is fine-tuned, else what its schedule last said

One program takes some seeds. The first one looks at all of them besides, since statistics of a layer without an active
seed go elsewhere; no other kernel may change their lifecycle meanwhile, and this one does not.

Source: Kasmina's linear alpha schedule and its PyTorch layer. Shapes: S seeds, K numbers of a schedule's memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance

from . import _rows, _seeds

ACCURACY = tl.constexpr(1)
"""Column of the figures [S, 4]."""
ALPHA, LAST_ACCURACY, SEEN = tl.constexpr(0), tl.constexpr(3), tl.constexpr(7)
"""Columns of a schedule's memory [S, K]."""
LEAST_COLUMNS = 8
BLOCK = 128
AT_ONCE = 1024
"""Lifecycles that the first program looks at together."""


@torch.no_grad()
def seed_alpha_reference(
    state: Tensor, figures: Tensor, memory: Tensor, period: float, tuned_share: float
) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`seed_alpha`."""
    life = state[:, _seeds.LIFECYCLE.value]
    grafting = life == _seeds.GRAFTING.value
    progress = (state[:, _seeds.EPOCHS.value].to(memory.dtype) / period).clamp(0.0, 1.0)
    for column, new in ((ALPHA, progress), (LAST_ACCURACY, figures[:, ACCURACY.value].to(memory.dtype))):
        memory[:, column.value] = torch.where(grafting, new, memory[:, column.value])
    memory[:, SEEN.value] += grafting
    tuned = life == _seeds.FINE_TUNING.value
    alpha = memory[:, ALPHA.value].masked_fill(tuned, tuned_share).to(figures.dtype)
    return alpha, (grafting | tuned | (life == _seeds.TRAINING.value)).any()


@triton.jit(do_not_specialize=["seeds"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    state, figures, memory, alpha, active, seeds, columns, period, tuned_share,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK seeds: state [seeds, 8], figures [seeds, 4], memory [seeds, columns], alpha [seeds]."""
    seed = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = seed < seeds
    life = tl.load(state + seed * 8 + _seeds.LIFECYCLE, mask=there, other=0)
    epochs = tl.load(state + seed * 8 + _seeds.EPOCHS, mask=there, other=0)
    row = memory + seed * columns
    grafting = life == _seeds.GRAFTING
    now = tl.minimum(tl.maximum(epochs.to(tl.float64) / period, 0.0), 1.0)
    now = tl.where(grafting, now, tl.load(row + ALPHA, mask=there, other=0.0))
    accuracy = tl.load(figures + seed * 4 + ACCURACY, mask=there, other=0.0).to(tl.float64)
    seen = tl.load(row + SEEN, mask=there, other=0.0)
    tl.store(row + ALPHA, now, mask=there & grafting)
    tl.store(row + LAST_ACCURACY, accuracy, mask=there & grafting)
    tl.store(row + SEEN, seen + 1.0, mask=there & grafting)
    share = tl.where(life == _seeds.FINE_TUNING, tuned_share, now.to(tl.float32))
    tl.store(alpha + seed, share, mask=there)
    if tl.program_id(0) == 0:
        found = tl.zeros([AT_ONCE], tl.int32)
        for first in range(0, seeds, AT_ONCE):
            other = (first + tl.arange(0, AT_ONCE)).to(tl.int64)
            its = tl.load(state + other * 8 + _seeds.LIFECYCLE, mask=other < seeds, other=0)
            is_active = (its == _seeds.TRAINING) | (its == _seeds.GRAFTING) | (its == _seeds.FINE_TUNING)
            found = found | is_active.to(tl.int32)
        tl.store(active, tl.max(found, 0) != 0)


def seed_alpha(
    state: Tensor, figures: Tensor, memory: Tensor, period: float, tuned_share: float
) -> tuple[Tensor, Tensor]:
    """Alpha [S], float32, and whether a seed trains, grafts or is fine-tuned, bool []. No host sync.

    Args:
        state: [S, 8], int32, contiguous; columns 0 and 2 are the lifecycle and the epochs in it. S is at least 1.
        figures: [S, 4], float32, contiguous; column 1 is the accuracy.
        memory: of the schedule, [S, K], float64, contiguous, K at least 8; columns 0, 3 and 7 are alpha, the last
            accuracy and how often it was asked, and are written where a seed grafts.
        period: epochs until alpha is 1, above 0; a number that float32 holds.
        tuned_share: alpha of a seed that is fine-tuned.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here, or the period is not positive.
    """
    if _rows.watched():
        watched: tuple[Tensor, Tensor] = torch.ops.kernbench.seed_alpha.default(
            state, figures, memory, period, tuned_share
        )
        return watched
    return _launch(state, figures, memory, period, tuned_share)


def _launch(state: Tensor, figures: Tensor, memory: Tensor, period: float, tuned_share: float) -> tuple[Tensor, Tensor]:
    seeds = _check(state, figures, memory, period)
    alpha, active = figures.new_empty(seeds), torch.empty((), dtype=torch.bool, device=state.device)
    with _rows.on_device(state):
        _kernel[(triton.cdiv(seeds, BLOCK),)](
            state, figures, memory, alpha, active, seeds, memory.shape[1], float(period), tuned_share,
            BLOCK, AT_ONCE, num_warps=4,
        )  # fmt: skip
    torch.autograd.graph.increment_version(memory)
    return alpha, active


def _check(state: Tensor, figures: Tensor, memory: Tensor, period: float) -> int:
    """How many seeds there are, if all fits."""
    seeds, columns = state.shape[0], memory.shape[-1]
    if not (
        seeds and state.shape == (seeds, 8) and figures.shape == (seeds, 4) and memory.shape == (seeds, columns)
        and columns >= LEAST_COLUMNS and period > 0
        and state.dtype == torch.int32 and figures.dtype == torch.float32 and memory.dtype == torch.float64
        and state.get_device() == figures.get_device() == memory.get_device()
        and state.is_contiguous() and figures.is_contiguous() and memory.is_contiguous()
    ):  # fmt: skip
        described = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in (state, figures, memory))
        raise ValueError(
            f"seed_alpha takes contiguous int32 state [S, 8], float32 figures [S, 4] and float64 memory [S, 8 or more] "
            f"on one device and a positive period; they are {described} and {period}"
        )
    return seeds


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "seed_alpha(Tensor state, Tensor figures, Tensor(a!) memory, float period, float tuned_share) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("seed_alpha", _launch, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "kernbench::seed_alpha",
    lambda state, figures, memory, period, tuned_share: (
        figures.new_empty(figures.shape[0]),
        torch.empty((), dtype=torch.bool, device=state.device),
    ),
    lib=_LIBRARY,
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Seeds in the middle of a run, some of them beyond the end of their ramp; in some cases none is active."""
    generator = torch.Generator(device).manual_seed(seed)
    seeds = case["seeds"]
    state = torch.randint(2 * case["period"], (seeds, 8), generator=generator, device=device, dtype=torch.int32)
    life = torch.randint(11, (seeds,), generator=generator, device=device, dtype=torch.int32)
    idle = _seeds.TRAINING.value - 1
    state[:, _seeds.LIFECYCLE.value] = life.clamp(max=idle) if case["idle"] else life

    def drawn(columns: int, like: torch.dtype) -> Tensor:
        return torch.rand(seeds, columns, generator=generator, device=device, dtype=torch.float64).to(like)

    return {
        "state": state,
        "figures": drawn(4, dtype),
        "memory": drawn(18, torch.float64),
        "period": float(case["period"]),
        "tuned_share": 0.9,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Lifecycle, epochs, accuracy and three numbers of a memory read, those three and alpha written, of each seed."""
    seeds = float(case["seeds"])
    return Cost(flops=2 * seeds, bytes_read=(4 + 4 + 4 + 2 * 8) * seeds, bytes_written=(4 + 3 * 8) * seeds + 1)


SPEC = KernelSpec(
    name="seed_alpha",
    reference=seed_alpha_reference,
    optimized=seed_alpha,
    make_inputs=make_inputs,
    cases=(
        Case("one", seeds=1, period=50, idle=0),
        Case("ragged", seeds=141, period=50, idle=0),
        Case("idle", seeds=130, period=7, idle=1),
        Case("many", seeds=1100, period=100_000, idle=0),
        Case("1000-seeds", large=True, seeds=1000, period=100_000, idle=0),
        Case("10000-seeds", large=True, seeds=10_000, period=100_000, idle=0),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("memory",),
    sizes={
        "seeds": Sizes(least=1, most=300, block=BLOCK),
        "period": Sizes(least=1, most=1000),
        "idle": Sizes(most=1),
    },
    sweeps=(
        Sweep(
            size="seeds",
            values=_seeds.SWEPT,
            sizes=lambda seeds: {"seeds": seeds, "period": 100_000, "idle": 0},
            fixed="the seeds alone, so bytes grow with them",
        ),
    ),
    source="Kasmina's linear alpha schedule (tachyon-beep/esperlite, RC1)",
)
