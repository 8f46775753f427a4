"""Mean, population variance and sparsity of what each seed saw, from the statistics of tiles that seed_blend leaves.

    n = sum n_i,  mean = sum n_i mean_i / n,  variance = (sum squares_i + sum n_i (mean_i - mean)^2) / n
    sparsity = sum zeros_i / n

n_i follows from the sizes. A program handles some seeds and walks over their tiles twice, for the mean and then for the
variance, always in one order. Nothing of the size of mean^2 is subtracted, so a large mean costs no digits.

Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
Shapes: S seeds; P x Q tiles, as ``_seeds.tiles_of`` says.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance, Values

from . import _rows, _seeds


def seed_telemetry_reference(
    means: Tensor, squares: Tensor, zeros: Tensor, batch: int, features: int, seeds: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`seed_telemetry`."""
    tiles = _seeds.tiles_of(batch, features, seeds, chunk)
    part = torch.arange(tiles.parts, device=means.device)
    granule = torch.arange(tiles.granules, device=means.device)
    rows = (batch - part * tiles.rows).clamp(max=tiles.rows)
    columns = (features - granule * tiles.width).clamp(max=tiles.width)
    seed = granule // (chunk // tiles.width)
    counts = (rows[:, None] * columns).to(means.dtype)

    def of_seeds(values: Tensor) -> Tensor:
        return values.new_zeros(seeds).index_add(0, seed, values.sum(0))

    total = of_seeds(counts).clamp(min=1)
    mean = of_seeds(counts * means) / total
    variance = of_seeds(squares + counts * (means - mean[seed]).square()) / total
    return mean, variance, of_seeds(zeros) / total


@triton.jit
def _sum(tile):  # type: ignore[no-untyped-def]
    """Sums of each seed over a tile [PARTS, SEEDS, GRANULES], [1, SEEDS, 1]."""
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit(do_not_specialize=["batch", "features", "parts", "granules", "seeds"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    means, squares, zeros, mean, variance, sparsity, batch, features, parts, granules, seeds, per_seed,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, SEEDS: tl.constexpr, GRANULES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles SEEDS seeds of mean, variance and sparsity [seeds]; grid is seeds / SEEDS.

    means, squares and zeros are [parts, granules]; a seed has per_seed granules. PARTS x SEEDS x GRANULES
    of them are handled at once. ``OVERLAP`` says that it is launched before the kernel in front has ended.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    seed = tl.program_id(0) * SEEDS + tl.arange(0, SEEDS)
    # What a seed owns: all rows of some columns, of which the last ones may not be there.
    owned = tl.minimum(tl.maximum(features - seed.to(tl.int64) * per_seed * WIDTH, 0), per_seed * WIDTH)
    count = tl.maximum(owned.to(tl.float32) * batch, 1.0)[None, :, None]
    average = tl.zeros([1, SEEDS, 1], tl.float32)
    spread = tl.zeros([1, SEEDS, 1], tl.float32)
    share = tl.zeros([1, SEEDS, 1], tl.float32)
    for second in tl.static_range(2):
        total = tl.zeros([PARTS, SEEDS, GRANULES], tl.float32)
        sparse = tl.zeros([PARTS, SEEDS, GRANULES], tl.float32)
        for first_part in range(0, parts, PARTS):
            part = first_part + tl.arange(0, PARTS)[:, None, None]
            rows = tl.minimum(batch - part * ROWS, ROWS)
            for first_granule in range(0, per_seed, GRANULES):
                inner = first_granule + tl.arange(0, GRANULES)[None, None, :]
                granule = seed.to(tl.int64)[None, :, None] * per_seed + inner
                columns = tl.minimum(features - granule * WIDTH, WIDTH)
                mask = (part < parts) & (inner < per_seed) & (granule < granules)
                offset = part.to(tl.int64) * granules + granule
                value = tl.load(means + offset, mask=mask, other=0.0)
                here = (rows * columns).to(tl.float32)
                if second:
                    value -= average
                    value = here * value * value + tl.load(squares + offset, mask=mask, other=0.0)
                    total += tl.where(mask, value, 0.0)
                    sparse += tl.load(zeros + offset, mask=mask, other=0.0)
                else:
                    total += tl.where(mask, value * (here / count), 0.0)
        if second:
            spread = _sum(total) / count
            share = _sum(sparse) / count
        else:
            average = _sum(total)
    mask = seed < seeds
    tl.store(mean + seed, tl.reshape(average, [SEEDS]), mask=mask)
    tl.store(variance + seed, tl.reshape(spread, [SEEDS]), mask=mask)
    tl.store(sparsity + seed, tl.reshape(share, [SEEDS]), mask=mask)


BLOCK = 2048
"""Tiles at once: eight for each of 256 threads."""
MOST_SEEDS = 16
"""At once; more would leave multiprocessors without a program where seeds are few."""
WARPS = 8


class _Plan(NamedTuple):
    tiles: _seeds.Tiles
    parts: int
    seeds: int
    granules: int


@lru_cache(maxsize=1024)
def _plan(batch: int, features: int, seeds: int, chunk: int) -> _Plan:
    """Tiles of the statistics, and how many parts, seeds and granules of a seed a program takes at once."""
    if batch < 0 or features < 0 or seeds < 1 or chunk < 1:
        raise ValueError(
            f"seed_telemetry takes at least one seed and one column of each, not {seeds} seeds with chunks of {chunk} "
            f"on [{batch}, {features}]"
        )
    tiles = _seeds.tiles_of(batch, features, seeds, chunk)
    granules = min(64, triton.next_power_of_2(chunk // tiles.width))
    at_once = min(MOST_SEEDS, max(1, 64 // granules), triton.next_power_of_2(seeds))
    parts = min(BLOCK // (granules * at_once), triton.next_power_of_2(max(1, tiles.parts)))
    return _Plan(tiles, parts, at_once, granules)


def seed_telemetry(
    means: Tensor, squares: Tensor, zeros: Tensor, batch: int, features: int, seeds: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population variance and share of near zeros of the columns that each seed owns, [S] each.

    All are 0 where it owns none. With n numbers, their norm is the root of n (variance + mean^2).

    Args:
        means: mean of each tile, [P, Q], float32, as :func:`seed_blend` gives it for sizes as those that follow.
        squares: squared distances from it, added up, [P, Q], float32.
        zeros: how many numbers of each tile are near zero, [P, Q], float32.
        batch: rows of x.
        features: columns of x.
        seeds: S, 1 or more.
        chunk: columns of a seed, 1 or more.

    Raises:
        ValueError: means, squares and zeros do not have the shape that follows from the sizes, or another dtype.
    """
    if _rows.watched():
        watched: tuple[Tensor, Tensor, Tensor] = torch.ops.kernbench.seed_telemetry.default(
            means, squares, zeros, batch, features, seeds, chunk
        )
        return watched
    return _launch(means, squares, zeros, batch, features, seeds, chunk)


def _launch(
    means: Tensor, squares: Tensor, zeros: Tensor, batch: int, features: int, seeds: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    tiles, parts, at_once, granules = _plan(batch, features, seeds, chunk)
    _check(means, squares, zeros, tiles[2:])
    mean, variance, sparsity = means.new_empty(seeds), means.new_empty(seeds), means.new_empty(seeds)
    means, squares, zeros = means.contiguous(), squares.contiguous(), zeros.contiguous()
    with _rows.on_device(means):
        overlap = _rows.overlaps()
        _kernel[(triton.cdiv(seeds, at_once),)](
            means, squares, zeros, mean, variance, sparsity, batch, features, tiles.parts, tiles.granules, seeds,
            chunk // tiles.width, tiles.rows, tiles.width, parts, at_once, granules, overlap,
            num_warps=WARPS, **_rows.overlapping(overlap),
        )  # fmt: skip
    return mean, variance, sparsity


def _check(means: Tensor, squares: Tensor, zeros: Tensor, shape: tuple[int, ...]) -> None:
    device = means.get_device()
    if not (
        means.shape == squares.shape == zeros.shape == shape
        and means.dtype == squares.dtype == zeros.dtype == torch.float32
        and squares.get_device() == zeros.get_device() == device
    ):
        described = ", ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}" for one in (means, squares, zeros))
        raise ValueError(
            f"seed_telemetry takes float32 means, squares and zeros {shape} for these sizes, on one device; they are "
            f"{described}"
        )


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "seed_telemetry(Tensor means, Tensor squares, Tensor zeros, int batch, int features, int seeds, int chunk)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("seed_telemetry", _launch, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "kernbench::seed_telemetry",
    lambda means, squares, zeros, batch, features, seeds, chunk: tuple(means.new_empty(seeds) for _ in range(3)),
    lib=_LIBRARY,
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Statistics of numbers with a mean of a few standard deviations."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {name: case[name] for name in ("batch", "features", "seeds", "chunk")}
    tiles = _seeds.tiles_of(case["batch"], case["features"], case["seeds"], case["chunk"])

    def normal() -> Tensor:
        return torch.randn(tiles.parts, tiles.granules, generator=generator, device=device)

    shape = tiles.parts, tiles.granules
    zeros = torch.randint(tiles.rows * tiles.width + 1, shape, generator=generator, device=device)
    means, squares = normal() + 3, normal().square() * tiles.rows * tiles.width
    return {"means": means.to(dtype), "squares": squares.to(dtype), "zeros": zeros.to(dtype), **sizes}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """The statistics of all tiles read once, those of all seeds written once."""
    tiles = _seeds.tiles_of(case["batch"], case["features"], case["seeds"], case["chunk"])
    count = float(tiles.parts * tiles.granules)
    return Cost(
        flops=8 * count, bytes_read=3 * dtype.itemsize * count, bytes_written=3.0 * dtype.itemsize * case["seeds"]
    )


SPEC = KernelSpec(
    name="seed_telemetry",
    reference=seed_telemetry_reference,
    optimized=seed_telemetry,
    make_inputs=make_inputs,
    cases=(
        Case("one", batch=1, features=1, seeds=1, chunk=1),
        Case("ragged", batch=67, features=97, seeds=5, chunk=24),
        Case("uncovered", batch=130, features=100, seeds=3, chunk=32),
        Case("empty-seeds", batch=70, features=130, seeds=5, chunk=64),
        Case("wide", batch=3, features=4500, seeds=1, chunk=4480),
        Case("small", large=True, batch=32, features=512, seeds=8, chunk=64),
        Case("extreme", large=True, batch=4096, features=8192, seeds=128, chunk=64),
        Case("5000-seeds", large=True, batch=128, features=640_000, seeds=5000, chunk=128),
        Case("100-seeds", large=True, batch=128, features=640_000, seeds=100, chunk=6400),
        Case("10000-seeds", large=True, batch=128, features=640_000, seeds=10_000, chunk=64),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    sizes={
        "batch": Sizes(most=300, block=_seeds.ROWS),
        "features": Sizes(most=600, block=_seeds.MOST_WIDTH),
        "seeds": Sizes(least=1, most=40, block=MOST_SEEDS),
        "chunk": Sizes(least=1, most=300, block=_seeds.MOST_WIDTH),
    },
    values={
        "means": Values(least=-1e15, most=1e15, nonfinite=True),
        "squares": Values(least=0.0, nonfinite=True),
        "zeros": Values(least=0.0),
    },
    sweeps=(Sweep(size="seeds", values=_seeds.SWEPT, sizes=_seeds.swept_sizes, fixed=_seeds.SWEPT_FIXED),),
    source="Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Sample Variances, 1979",
)
