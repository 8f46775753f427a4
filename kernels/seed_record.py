"""What a forward pass leaves of each seed: its figures, an epoch more, and the step on of those that grafted enough.

    n = numbers that the seed owns,  squares = n (variance + mean^2)
    figures = variance + 0.1 sparsity, 1 - sparsity, 1 / (1 + variance), min(1, root of squares)

go to figures and moments where any seed is active, else n mean and squares go to the sums. Then epochs grow by one,
and a seed that grafts with ``least_epochs`` or more becomes one that stabilises: (from, to) goes to its ring of
history, its parent is what it came from, and its epochs begin at 0.

One launch; a program takes some seeds, and no two programs share a number.

Source: Kasmina's PyTorch layer (performance, telemetry) and state manager. Shapes: S seeds, L entries of a history.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance, Values

from . import _rows, _seeds

SPARSE_SHARE = 0.1
BLOCK = 128


@torch.no_grad()
def seed_record_reference(
    mean: Tensor, variance: Tensor, sparsity: Tensor, active: Tensor, state: Tensor, history: Tensor, pointer: Tensor,
    figures: Tensor, moments: Tensor, sums: Tensor, batch: int, features: int, chunk: int, least_epochs: int,
) -> None:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`seed_record`."""
    seed = torch.arange(len(state), device=state.device)
    count = (batch * (features - seed * chunk).clamp(0, chunk)).to(mean.dtype)
    squares = count * (variance + mean * mean)
    found = [variance + SPARSE_SHARE * sparsity, 1 - sparsity, 1 / (1 + variance), squares.sqrt().clamp(max=1.0)]
    figures.copy_(torch.where(active, torch.stack(found, 1), figures))
    moments.copy_(torch.where(active, torch.stack([mean, variance], 1), moments))
    sums.copy_(torch.where(active, sums, torch.stack([count * mean, squares], 1)))
    life, epochs = state[:, _seeds.LIFECYCLE.value].clone(), state[:, _seeds.EPOCHS.value] + 1
    moving = (life == _seeds.GRAFTING.value) & (epochs >= least_epochs)
    state[:, _seeds.EPOCHS.value] = epochs.masked_fill(moving, 0)
    state[:, _seeds.PARENT.value] = torch.where(moving, life, state[:, _seeds.PARENT.value])
    state[:, _seeds.LIFECYCLE.value] = life.masked_fill(moving, _seeds.STABILIZATION.value)
    place = pointer.long()
    entry = torch.stack([life, torch.full_like(life, _seeds.STABILIZATION.value)], 1)
    history[seed, place] = torch.where(moving[:, None], entry, history[seed, place])
    pointer.copy_(torch.where(moving, (pointer + 1) % history.shape[1], pointer))


@triton.jit(do_not_specialize=["seeds", "batch", "features", "chunk", "least_epochs"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    mean, variance, sparsity, active, state, history, pointer, figures, moments, sums,
    seeds, length, batch, features, chunk, least_epochs, sparse_share, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK seeds of mean, variance, sparsity and pointer [seeds], state [seeds, 8], history
    [seeds, length, 2], figures [seeds, 4], moments and sums [seeds, 2]; active is one bool."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    seed = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = seed < seeds
    life = tl.load(state + seed * 8 + _seeds.LIFECYCLE, mask=there, other=0)
    epochs = tl.load(state + seed * 8 + _seeds.EPOCHS, mask=there, other=0) + 1
    slot = tl.load(pointer + seed, mask=there, other=0)
    counted = tl.load(active + tl.zeros_like(seed), mask=there, other=0).to(tl.int32)
    average = tl.load(mean + seed, mask=there, other=0.0)
    spread = tl.load(variance + seed, mask=there, other=0.0)
    sparse = tl.load(sparsity + seed, mask=there, other=0.0)
    owned = tl.minimum(tl.maximum(features - seed * chunk, 0), chunk) * batch
    count = owned.to(tl.float32)
    squares = count * (spread + average * average)
    to_figures = there & (counted != 0)
    tl.store(figures + seed * 4, spread + sparse_share * sparse, mask=to_figures)
    tl.store(figures + seed * 4 + 1, 1.0 - sparse, mask=to_figures)
    tl.store(figures + seed * 4 + 2, tl.math.div_rn(tl.full([BLOCK], 1.0, tl.float32), 1.0 + spread), mask=to_figures)
    root = tl.math.sqrt_rn(squares)
    # A NaN stays one, as clamp has it.
    tl.store(figures + seed * 4 + 3, tl.where(root > 1.0, 1.0, root), mask=to_figures)
    tl.store(moments + seed * 2, average, mask=to_figures)
    tl.store(moments + seed * 2 + 1, spread, mask=to_figures)
    to_sums = there & (counted == 0)
    tl.store(sums + seed * 2, count * average, mask=to_sums)
    tl.store(sums + seed * 2 + 1, squares, mask=to_sums)
    moving = there & (life == _seeds.GRAFTING) & (epochs >= least_epochs)
    tl.store(state + seed * 8 + _seeds.EPOCHS, tl.where(moving, 0, epochs), mask=there)
    tl.store(state + seed * 8 + _seeds.PARENT, life, mask=moving)
    tl.store(state + seed * 8 + _seeds.LIFECYCLE, life * 0 + _seeds.STABILIZATION, mask=moving)
    entry = history + (seed * length + slot) * 2
    tl.store(entry, life, mask=moving)
    tl.store(entry + 1, life * 0 + _seeds.STABILIZATION, mask=moving)
    tl.store(pointer + seed, (slot + 1) % length, mask=moving)


def seed_record(
    mean: Tensor, variance: Tensor, sparsity: Tensor, active: Tensor, state: Tensor, history: Tensor, pointer: Tensor,
    figures: Tensor, moments: Tensor, sums: Tensor, batch: int, features: int, chunk: int, least_epochs: int,
) -> None:  # fmt: skip
    """Write what a forward pass tells of every seed, in place. No host sync.

    Args:
        mean, variance, sparsity: of what each seed saw, [S], float32, as :func:`seed_telemetry` gives them. S is at
            least 1.
        active: whether any seed is, bool [], as :func:`seed_alpha` gives it.
        state: [S, 8], int32; columns 0, 2 and 4 are the lifecycle, the epochs in it, and the parent.
        history: [S, L, 2], int32: rings of (from, to).
        pointer: where each ring goes on, [S], int32, each from 0 to L - 1.
        figures: loss, accuracy, stability and efficiency as upstream names them, [S, 4], float32.
        moments: mean and variance, [S, 2], float32.
        sums: sum and sum of squares, [S, 2], float32.
        batch: rows that the seeds saw.
        features: columns of the layer.
        chunk: columns of a seed, 1 or more.
        least_epochs: after how many a seed has grafted enough.

    All are contiguous and on one device.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here.
    """
    tensors = (mean, variance, sparsity, active, state, history, pointer, figures, moments, sums)
    if _rows.watched():
        torch.ops.kernbench.seed_record.default(*tensors, batch, features, chunk, least_epochs)
    else:
        _launch(*tensors, batch, features, chunk, least_epochs)


def _launch(
    mean: Tensor, variance: Tensor, sparsity: Tensor, active: Tensor, state: Tensor, history: Tensor, pointer: Tensor,
    figures: Tensor, moments: Tensor, sums: Tensor, batch: int, features: int, chunk: int, least_epochs: int,
) -> None:  # fmt: skip
    tensors = (mean, variance, sparsity, active, state, history, pointer, figures, moments, sums)
    seeds, length = _check(tensors)
    with _rows.on_device(state):
        overlap = _rows.overlaps()
        _kernel[(triton.cdiv(seeds, BLOCK),)](
            *tensors, seeds, length, batch, features, chunk, least_epochs, SPARSE_SHARE, BLOCK,
            overlap, num_warps=4, **_rows.overlapping(overlap),
        )  # fmt: skip
    torch.autograd.graph.increment_version([state, history, pointer, figures, moments, sums])


def _check(tensors: tuple[Tensor, ...]) -> tuple[int, int]:
    """How many seeds, and entries of a history, there are, if all fits."""
    mean, _, _, active, state, history, pointer, *_ = tensors
    seeds, length = state.shape[0], history.shape[1] if history.dim() == 3 else 0
    shapes = [(seeds,)] * 3 + [(), (seeds, 8), (seeds, length, 2), (seeds,), (seeds, 4), (seeds, 2), (seeds, 2)]
    dtypes = [torch.float32] * 3 + [torch.bool] + [torch.int32] * 3 + [torch.float32] * 3
    fits = all(
        one.shape == shape and one.dtype == dtype and one.is_contiguous() and one.get_device() == mean.get_device()
        for one, shape, dtype in zip(tensors, shapes, dtypes, strict=True)
    )
    if not (fits and seeds and length):
        described = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in tensors)
        raise ValueError(
            "seed_record takes contiguous float32 mean, variance and sparsity [S], a bool, int32 state [S, 8], history "
            "[S, L, 2] and pointer [S], float32 figures [S, 4], moments and sums [S, 2], on one device; they are "
            f"{described}"
        )
    return seeds, length


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "seed_record(Tensor mean, Tensor variance, Tensor sparsity, Tensor active, Tensor(a!) state, Tensor(b!) history, "
    "Tensor(c!) pointer, Tensor(d!) figures, Tensor(e!) moments, Tensor(f!) sums, int batch, int features, int chunk, "
    "int least_epochs) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("seed_record", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Seeds in the middle of a run, half of those that graft about to move on."""
    generator = torch.Generator(device).manual_seed(seed)
    seeds, length = case["seeds"], case["length"]

    def drawn(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device, dtype=torch.int32)

    def real(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device).to(dtype)

    state = drawn(100, seeds, 8)
    state[:, _seeds.LIFECYCLE.value] = drawn(11, seeds)
    return {
        "mean": real(seeds) - 0.5,
        "variance": real(seeds),
        "sparsity": real(seeds),
        "active": torch.tensor(bool(case["active"]), device=device),
        "state": state,
        "history": drawn(11, seeds, length, 2),
        "pointer": drawn(length, seeds),
        "figures": real(seeds, 4),
        "moments": real(seeds, 2),
        "sums": real(seeds, 2),
        **{name: case[name] for name in ("batch", "features", "chunk")},
        "least_epochs": 50,
    }


def next_inputs(inputs: Inputs, seed: int) -> None:
    """What the next forward pass saw, in place."""
    generator = torch.Generator(inputs["mean"].device).manual_seed(seed)
    for name in ("mean", "variance", "sparsity"):
        inputs[name].uniform_(0.0, 1.0, generator=generator)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Of each seed three statistics and four numbers of state read, figures and epochs written."""
    seeds = float(case["seeds"])
    written = (4 + 2 if case["active"] else 2) * dtype.itemsize + 4
    return Cost(flops=12 * seeds, bytes_read=(3 * dtype.itemsize + 3 * 4) * seeds + 1, bytes_written=written * seeds)


SPEC = KernelSpec(
    name="seed_record",
    reference=seed_record_reference,
    optimized=seed_record,
    make_inputs=make_inputs,
    cases=(
        Case("one", seeds=1, length=1, batch=1, features=1, chunk=1, active=1),
        Case("ragged", seeds=141, length=10, batch=7, features=900, chunk=7, active=1),
        Case("idle", seeds=130, length=10, batch=32, features=1000, chunk=8, active=0),
        Case("1000-seeds", large=True, seeds=1000, length=10, batch=64, features=16_000, chunk=16, active=1),
        Case("10000-seeds", large=True, seeds=10_000, length=10, batch=128, features=640_000, chunk=64, active=1),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("state", "history", "pointer", "figures", "moments", "sums"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={
        "seeds": Sizes(least=1, most=300, block=BLOCK),
        "length": Sizes(least=1, most=12),
        "batch": Sizes(least=1, most=64),
        "features": Sizes(least=1, most=1000),
        "chunk": Sizes(least=1, most=64),
        "active": Sizes(most=1),
    },
    values={"variance": Values(least=0.0)},
    sweeps=(
        Sweep(
            size="seeds",
            values=_seeds.SWEPT,
            sizes=lambda seeds: {**_seeds.swept_sizes(seeds), "length": 10, "active": 1},
            fixed="the seeds alone, so bytes grow with them",
        ),
    ),
    source="Kasmina's PyTorch layer and state manager (tachyon-beep/esperlite, RC1)",
)
