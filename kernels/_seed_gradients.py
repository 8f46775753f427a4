"""The backward pass of seed_blend, which has the formulas.

A program handles rows x columns of dy once, and of x where it matters. It leaves its share of t of each column and of
the gradient of alpha of each granule; a second kernel adds up the programs, always in one order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows, _seeds
from ._rows import narrow

AT_ONCE = 2048
"""Numbers that a program adds up at once: sixteen for each of 128 threads, all of them under way together."""
MOST_PARTS, LEAST_LANES, MOST_LANES = 64, 32, 512
"""Of these so many parts, and columns or granules: few where there are many parts, so that no multiprocessor idles."""


@triton.jit(do_not_specialize=["batch", "blocks", "granules", "bank_rows"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, bank, choices, alpha, dx, sums, shares, batch, features, blocks, granules, per_seed, bank_rows,
    dy_stride, x_stride, bank_stride, alpha_stride, SIMPLE: tl.constexpr, TO_X: tl.constexpr, TO_SEEDS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS rows and N granules of WIDTH columns of dy, x and dx [batch, features].

    ``TO_X`` asks for dx; ``TO_SEEDS`` for the program's share of t, of active seeds alone, in sums [parts, features],
    and of da in shares [parts, granules]. choices and alpha are [seeds].
    """
    part = (tl.program_id(0) // blocks).to(tl.int64)
    granule = (tl.program_id(0) % blocks) * N + tl.arange(0, N)[None, :, None]
    row = part * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = granule.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = EVEN | ((row < batch) & (column < features))
    upstream = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    covered = EVEN | (granule < granules)
    seed = (granule // per_seed).to(tl.int64)
    choice = tl.load(choices + seed, mask=covered, other=-1)
    a = tl.load(alpha + seed * alpha_stride, mask=covered, other=0.0)
    weight = _seeds.weight_of(bank, choice, column, features, bank_rows, bank_stride)
    if TO_X:
        scale, _ = _seeds.scale_and_shift(choice, a, weight, SIMPLE)
        tl.store(dx + row * features + column, narrow(upstream * scale, dx.dtype.element_ty), mask=inside)
    if TO_SEEDS:
        active = choice >= 0
        # Where w is added, x is not needed, and where nothing is blended neither is.
        multiplied = active & ((choice & 3) < (1 if SIMPLE else 2))
        factor = tl.load(x + row * x_stride + column, mask=inside & multiplied, other=1.0).to(tl.float32)
        total = tl.sum(upstream * factor, 0, keep_dims=True)
        tl.store(sums + part * features + column, total, mask=active & (column < features))
        if not SIMPLE:
            lerped = active & ((choice & 3) == 0) & (column < features)
            share = tl.sum(tl.where(lerped, total * weight - total, 0.0), 2, keep_dims=True)
            tl.store(shares + part * granules + granule, share, mask=covered)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_columns(  # type: ignore[no-untyped-def]
    index, sums, choices, alpha, dbank, features, parts, granules, per_seed, bank_rows, alpha_stride,
    SIMPLE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES columns of sums [parts, features], and from them those of dbank [bank_rows, features]."""
    column = index.to(tl.int64) * LANES + tl.arange(0, LANES)
    granule = column // WIDTH
    mask = (granule < granules) & (column < features)
    choice = tl.load(choices + granule // per_seed, mask=mask, other=-1)
    total = tl.zeros([PARTS, LANES], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        there = (part < parts) & (choice >= 0)[None, :]
        total += tl.load(sums + part * features + column[None, :], mask=there, other=0.0)
    operator = choice & 3
    if SIMPLE:
        factor = tl.where(operator <= 1, 1.0, 0.5)
    else:
        a = tl.load(alpha + granule // per_seed * alpha_stride, mask=mask, other=0.0)
        factor = tl.where(operator == 0, a, 1.0)
    gradient = tl.sum(total, 0) * factor
    for row in range(bank_rows):
        here = tl.where((choice >> 2) == row, gradient, 0.0)
        tl.store(dbank + tl.cast(row, tl.int64) * features + column, here, mask=column < features)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["features", "parts", "granules", "bank_rows", "seeds", "column_programs"]
)
def _add_up_kernel(  # type: ignore[no-untyped-def]
    sums, shares, choices, alpha, dbank, dalpha, features, parts, granules, per_seed, bank_rows, seeds,
    column_programs, alpha_stride, SIMPLE: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr, GRANULES: tl.constexpr,
):  # fmt: skip
    """Adds up sums [parts, features] into dbank [bank_rows, features] and shares [parts, granules] into dalpha [seeds].

    The first column_programs programs handle LANES columns each, the others LANES / GRANULES seeds each.
    """
    index = tl.program_id(0)
    if index < column_programs:
        _add_up_columns(
            index, sums, choices, alpha, dbank, features, parts, granules, per_seed, bank_rows, alpha_stride,
            SIMPLE, WIDTH, PARTS, LANES,
        )  # fmt: skip
    else:
        SEEDS: tl.constexpr = LANES // GRANULES
        seed = (index - column_programs).to(tl.int64) * SEEDS + tl.arange(0, SEEDS)
        total = tl.zeros([PARTS, SEEDS, GRANULES], tl.float32)
        if not SIMPLE:
            for first in range(0, parts, PARTS):
                part = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None, None]
                for start in range(0, per_seed, GRANULES):
                    inner = start + tl.arange(0, GRANULES)[None, None, :]
                    granule = seed[None, :, None] * per_seed + inner
                    there = (part < parts) & (inner < per_seed) & (granule < granules)
                    total += tl.load(shares + part * granules + granule, mask=there, other=0.0)
        tl.store(dalpha + seed, tl.sum(tl.sum(total, 2), 0), mask=seed < seeds)


def backward(
    dy: Tensor, x: Tensor, bank: Tensor, choices: Tensor, alpha: Tensor, chunk: int, table: str,
    to_x: bool, to_seeds: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, bank and alpha, as seed_blend had them; empty are those not asked for."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if to_x else x.new_empty(0)
    dbank = torch.empty_like(bank, memory_format=torch.contiguous_format) if to_seeds else bank.new_empty(0)
    seeds = len(alpha)
    dalpha = alpha.new_empty(seeds if to_seeds else 0)
    if not x.numel():
        return dx, dbank.zero_(), dalpha.zero_()
    batch, features, bank_rows = math.prod(x.shape[:-1]), x.shape[-1], bank.shape[0]
    tiles, grid = _seeds.plan_of(batch, features, seeds, chunk, x.itemsize, _seeds.BACKWARD)
    per_seed = chunk // tiles.width
    sums = bank.new_empty(tiles.parts, features) if to_seeds else dbank
    shares = bank.new_empty(tiles.parts, tiles.granules) if to_seeds else dalpha
    dy, dy_stride = _rows.as_rows(dy)
    x, x_stride = _rows.as_rows(x)
    bank, bank_stride = _rows.as_rows(bank)
    simple, alpha_stride = table == "simple", alpha.stride(0)
    with _rows.on_device(x):
        _backward_kernel[(tiles.parts * grid.blocks,)](
            dy, x, bank, choices, alpha, dx, sums, shares, batch, features, grid.blocks, tiles.granules, per_seed,
            bank_rows, dy_stride, x_stride, bank_stride, alpha_stride, simple, to_x, to_seeds,
            tiles.rows, grid.granules, tiles.width, grid.even, num_warps=grid.warps,
        )  # fmt: skip
        if to_seeds:
            parts = min(MOST_PARTS, triton.next_power_of_2(tiles.parts))
            lanes = max(LEAST_LANES, min(MOST_LANES, AT_ONCE // parts))
            column_programs, at_once = triton.cdiv(features, lanes), min(lanes, triton.next_power_of_2(per_seed))
            _add_up_kernel[(column_programs + triton.cdiv(seeds * at_once, lanes),)](
                sums, shares, choices, alpha, dbank, dalpha, features, tiles.parts, tiles.granules, per_seed,
                bank_rows, seeds, column_programs, alpha_stride, simple, tiles.width,
                parts, lanes, at_once, num_warps=4,
            )  # fmt: skip
    return dx, dbank, dalpha
