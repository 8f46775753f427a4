"""How the Triton kernels of add_rms_norm are launched; :mod:`.add_rms_norm` says what they compute.

Up to ``WHOLE`` columns a row stays in registers from load to store; a longer one is walked over twice. The backward
pass needs no more than summed: it takes the mean square again, from the row that it reads anyway. Each of its programs
adds up dw of its own rows, and a second, small kernel adds up the programs, always in one order.

For few rows that second launch would take as long as the first. There some programs add up dw of some columns over all
rows, which they read themselves for the mean squares: more is read, from the L2 cache, and nobody waits for anybody.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _add_rms_norm_kernels as kernels
from . import _rows
from ._blocks import blocks_in

_SMALL = _rows.INTERPRETED.value
"""The interpreter takes every way at sizes that it can walk through."""
WHOLE = 256 if _SMALL else 8192
"""Longest row that is kept in registers: 16 elements a thread, of three tensors at once in the backward pass."""
LONG_BLOCK = 256 if _SMALL else 4096
WEIGHT_BLOCK = 256 if _SMALL else 1024
MOST_ROWS = 4 if _SMALL else 128
"""Most rows of one program in the backward pass: so many make dw's partial sums small beside what the rows take."""
FEW_BYTES = 2048 if _SMALL else 64 * 1024
"""Most that a program of the single launch for few rows holds, of all rows at once."""
FEW_ELEMENTS = 4 if _SMALL else 16
"""Of a thread at once."""
FEW_COLUMNS = 32
MOST_WARPS = 16
WARP_BYTES = 32 * 16
"""What a warp takes in one access of 16 bytes a thread."""
RESIDENT_WARPS = 24
"""Of those with one access; with two they need the registers of twice as many."""
ADD_UP_ROWS, ADD_UP_COLUMNS, ADD_UP_GROUP = (8, 128, 16) if _SMALL else (128, 32, 1024)
PIPELINE_BYTES = 96 * 1024
"""Shared memory for rows under way; a multiprocessor of an A100 has 164 KiB."""


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(normed)
    count, dim = x.numel(), x.shape[-1]
    if not count:
        return normed, summed
    x, x_stride = _rows.as_rows(x)
    residual, residual_stride = _rows.as_rows(residual)
    rows = count // dim
    block, warps = _forward_launch(rows, dim, x.element_size())
    with _rows.on_device(x):
        kernels.forward_kernel[(rows,)](
            x, residual, weight.contiguous(), normed, summed, dim, x_stride, residual_stride, eps,
            BLOCK=block, WHOLE=dim <= block, num_warps=warps,
        )  # fmt: skip
    return normed, summed


@lru_cache(maxsize=1024)
def _forward_launch(rows: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Columns at once, and warps.

    A few rows are all latency: one access of 16 bytes a thread and tensor. Many are all bandwidth: two accesses keep
    more bytes under way, and fewer warps have to wait for each other in the sum over a row.
    """
    block = triton.next_power_of_2(dim) if dim <= WHOLE else LONG_BLOCK
    accesses = 1 if rows <= _rows.multiprocessors() else 2
    return block, _warps(block * itemsize // accesses)


def _warps(bytes_at_once: int) -> int:
    """Warps of which each thread takes 16 bytes."""
    return max(1, min(MOST_WARPS, bytes_at_once // WARP_BYTES))


def backward(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum and of the weight, from what comes in for both results."""
    summed = summed.contiguous()
    dx = torch.empty_like(summed)
    if not summed.numel():
        return dx, torch.zeros_like(weight)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dim = weight.numel()
    dnormed, dnormed_stride = _rows.as_rows(dnormed)
    dsummed, dsummed_stride = (dnormed, 0) if dsummed is None else _rows.as_rows(dsummed)
    rows = summed.numel() // dim
    weight = weight.contiguous()
    if few := _few(rows, dim, summed.element_size()):
        with _rows.on_device(dx):
            kernels.backward_few_kernel[(rows + few.slices,)](
                dnormed, dsummed, summed, weight, dx, dweight, rows, dim, dnormed_stride, dsummed_stride, eps,
                HAS_DSUMMED=dsummed_stride > 0, ROWS=few.rows, BLOCK=few.block, STEP=few.step,
                COLUMNS=FEW_COLUMNS, num_warps=few.warps,
            )  # fmt: skip
        return dx, dweight
    plan = _plan(rows, dim, summed.element_size())
    several = plan.programs > 1
    partial = torch.empty(plan.programs, dim, dtype=torch.float32, device=dx.device) if several else dweight
    with _rows.on_device(dx):
        if dim <= WHOLE:
            kernels.backward_kernel[(plan.programs,)](
                dnormed, dsummed, summed, weight, dx, partial, plan.rows, dim, dnormed_stride, dsummed_stride, eps,
                plan.chunk, HAS_DSUMMED=dsummed_stride > 0, BLOCK=plan.block, STAGES=plan.stages, num_warps=plan.warps,
            )  # fmt: skip
        else:
            scales = torch.empty(plan.rows, dtype=torch.float32, device=dx.device)
            kernels.backward_long_kernel[(plan.rows,)](
                dnormed, dsummed, summed, weight, dx, scales, dim, dnormed_stride, dsummed_stride, eps,
                HAS_DSUMMED=dsummed_stride > 0, BLOCK=plan.block, num_warps=plan.warps,
            )  # fmt: skip
            kernels.weight_kernel[(plan.programs, triton.cdiv(dim, WEIGHT_BLOCK))](
                dnormed, summed, scales, partial, plan.rows, dim, dnormed_stride, plan.chunk,
                BLOCK=WEIGHT_BLOCK, num_warps=4,
            )  # fmt: skip
        if several:
            _add_up(partial, dweight)
    return dx, dweight


def _add_up(partial: Tensor, total: Tensor) -> None:
    """Sums of partial [P, D] into total [D], in one launch up to ``ADD_UP_GROUP`` rows."""
    count, dim = partial.shape
    groups = triton.cdiv(count, ADD_UP_GROUP)
    sums = partial.new_empty(groups, dim) if groups > 1 else total
    kernels.add_up_kernel[(groups, triton.cdiv(dim, ADD_UP_COLUMNS))](
        partial, sums, count, dim, GROUP=ADD_UP_GROUP, ROWS=ADD_UP_ROWS, BLOCK=ADD_UP_COLUMNS, num_warps=8
    )
    if groups > 1:
        _add_up(sums, total)


class _Few(NamedTuple):
    """How a backward pass over few rows is launched: its tile of all rows, columns of it that are squared at once, and
    how many programs add up dw."""

    rows: int
    block: int
    step: int
    slices: int
    warps: int


@lru_cache(maxsize=1024)
def _few(rows: int, dim: int, itemsize: int) -> _Few | None:
    """None for rows that are too many, and for one alone, whose program has all of dw."""
    tile, block = triton.next_power_of_2(rows), triton.next_power_of_2(dim)
    held = tile * block * itemsize
    if rows == 1 or dim > WHOLE or held > FEW_BYTES:
        return None
    warps = _warps(held // 2)
    return _Few(tile, block, min(block, FEW_ELEMENTS * 32 * warps // tile), triton.cdiv(dim, FEW_COLUMNS), warps)


class _Plan(NamedTuple):
    """How a backward pass is launched: programs that add up dw over chunk rows each, and what one works on at once."""

    rows: int
    chunk: int
    programs: int
    block: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def _plan(rows: int, dim: int, itemsize: int) -> _Plan:
    if dim > WHOLE:
        chunk = _chunk(rows, max(1, RESIDENT_WARPS * WEIGHT_BLOCK // dim))
        return _Plan(rows, chunk, triton.cdiv(rows, chunk), LONG_BLOCK, _warps(LONG_BLOCK * itemsize), 1)
    block = triton.next_power_of_2(dim)
    accesses = 1 if block * itemsize <= 8 * WARP_BYTES else 2
    warps = _warps(block * itemsize // accesses)
    # Programs that stay, each with the next rows under way while it works on one.
    on_each = max(1, RESIDENT_WARPS // (warps * accesses))
    chunk = _chunk(rows, on_each)
    stages = min(3, chunk, 1 + PIPELINE_BYTES // (3 * block * itemsize * on_each))
    return _Plan(rows, chunk, triton.cdiv(rows, chunk), block, warps, stages)


def _chunk(rows: int, on_each: int) -> int:
    """Rows of a program, if so many programs run on each multiprocessor."""
    return min(MOST_ROWS, blocks_in(rows, _rows.resident(on_each)))
