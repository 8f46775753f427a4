"""The Triton kernels of add_rms_norm and how they are launched; :mod:`.add_rms_norm` says what they compute.

Up to ``WHOLE`` columns a row stays in registers from load to store; a longer one is walked over twice. The backward
pass needs no more than summed: it takes the mean square again, from the row that it reads anyway. Each of its programs
adds up dw of its own rows, and a second, small kernel adds up the programs, always in one order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._rows import narrow


@triton.jit
def _sum(x, residual, offset, mask):  # type: ignore[no-untyped-def]
    """x + residual as stored, and in float32."""
    left = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    total = narrow(left + right, x.dtype.element_ty)
    return total, total.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(value, scale, factor, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """value * scale * factor; value and scale are float32, factor is of dtype."""
    return narrow(narrow(value * scale, dtype).to(tl.float32) * factor.to(tl.float32), dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, normed, summed, dim, x_stride, residual_stride, eps,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program handles one row of x, residual, normed and summed [rows, dim]; grid is rows."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    residual += row * residual_stride
    normed += row * dim
    summed += row * dim
    DTYPE: tl.constexpr = normed.dtype.element_ty
    if WHOLE:
        column = tl.arange(0, BLOCK)
        mask = column < dim
        # Asked for before the sum over the row, so that it is there when that is.
        factor = tl.load(weight + column, mask=mask, other=0.0)
        total, value = _sum(x, residual, column, mask)
        tl.store(summed + column, total, mask=mask)
        scale = tl.rsqrt(tl.sum(value * value) / dim + eps)
        tl.store(normed + column, _normed(value, scale, factor, DTYPE), mask=mask)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK).to(tl.int64)
            total, value = _sum(x, residual, column, column < dim)
            tl.store(summed + column, total, mask=column < dim)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares) / dim + eps)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK).to(tl.int64)
            factor = tl.load(weight + column, mask=column < dim, other=0.0)
            # Added up once more, because another thread may have stored what this one would load.
            _, value = _sum(x, residual, column, column < dim)
            tl.store(normed + column, _normed(value, scale, factor, DTYPE), mask=column < dim)


@triton.jit
def _load(pointer, offset, mask):  # type: ignore[no-untyped-def]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dnormed, dsummed, summed, weight, dx, partial, rows, dim, dnormed_stride, dsummed_stride, eps, chunk,
    HAS_DSUMMED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program handles chunk rows of dnormed, dsummed, summed and dx [rows, dim], one after another; grid is P.

    Each leaves its share of dw in partial [P, dim]. dim is at most BLOCK.
    """
    column = tl.arange(0, BLOCK)
    mask = column < dim
    DTYPE: tl.constexpr = dx.dtype.element_ty
    factor = _load(weight, column, mask)
    share = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for step in tl.range(0, tl.minimum(chunk, rows - first), num_stages=STAGES):
        at = first + step
        upstream = _load(dnormed + at * dnormed_stride, column, mask)
        value = _load(summed + at * dim, column, mask)
        product = narrow(upstream * factor, DTYPE).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / dim + eps)
        mean = tl.sum(product * value) * scale / dim
        value *= scale
        gradient = scale * (product - value * mean)
        if HAS_DSUMMED:
            gradient += _load(dsummed + at * dsummed_stride, column, mask)
        tl.store(dx + at * dim + column, narrow(gradient, DTYPE), mask=mask)
        share += upstream * narrow(value, DTYPE).to(tl.float32)
    pointer = partial + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(pointer, narrow(share, partial.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_long_kernel(  # type: ignore[no-untyped-def]
    dnormed, dsummed, summed, weight, dx, scales, dim, dnormed_stride, dsummed_stride, eps,
    HAS_DSUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles one row of dnormed, dsummed, summed and dx [rows, dim], and leaves r in scales [rows]."""
    row = tl.program_id(0).to(tl.int64)
    dnormed += row * dnormed_stride
    summed += row * dim
    DTYPE: tl.constexpr = dx.dtype.element_ty
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = column < dim
        value = _load(summed, column, mask)
        product = narrow(_load(dnormed, column, mask) * _load(weight, column, mask), DTYPE).to(tl.float32)
        squares += value * value
        products += product * value
    scale = tl.rsqrt(tl.sum(squares) / dim + eps)
    mean = tl.sum(products) * scale / dim
    tl.store(scales + row, scale)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = column < dim
        value = _load(summed, column, mask) * scale
        product = narrow(_load(dnormed, column, mask) * _load(weight, column, mask), DTYPE).to(tl.float32)
        gradient = scale * (product - value * mean)
        if HAS_DSUMMED:
            gradient += _load(dsummed + row * dsummed_stride, column, mask)
        tl.store(dx + row * dim + column, narrow(gradient, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def _weight_kernel(  # type: ignore[no-untyped-def]
    dnormed, summed, scales, partial, rows, dim, dnormed_stride, chunk, BLOCK: tl.constexpr
):
    """One program adds up dw over chunk rows and BLOCK columns, into partial [P, dim]; grid is (P, dim / BLOCK)."""
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < dim
    DTYPE: tl.constexpr = summed.dtype.element_ty
    share = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for step in range(tl.minimum(chunk, rows - first)):
        at = first + step
        normed = narrow(_load(summed + at * dim, column, mask) * tl.load(scales + at), DTYPE).to(tl.float32)
        share += _load(dnormed + at * dnormed_stride, column, mask) * normed
    pointer = partial + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(pointer, narrow(share, partial.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _add_up_kernel(  # type: ignore[no-untyped-def]
    partial, total, count, dim, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds up GROUP rows and BLOCK columns of partial [count, dim], ROWS at a time, into total [G, dim].

    Grid is (G, dim / BLOCK).
    """
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * GROUP
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, tl.minimum(GROUP, count - first), ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < dim)[None, :]
        sums += tl.load(partial + row[:, None] * dim + column[None, :], mask=mask, other=0.0)
    pointer = total + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(pointer, narrow(tl.sum(sums, 0), total.dtype.element_ty), mask=column < dim)


_SMALL = _rows.INTERPRETED.value
"""The interpreter takes every way at sizes that it can walk through."""
WHOLE = 256 if _SMALL else 8192
"""Longest row that is kept in registers: 16 elements a thread, of three tensors at once in the backward pass."""
LONG_BLOCK = 256 if _SMALL else 4096
WEIGHT_BLOCK = 256 if _SMALL else 1024
MOST_ROWS = 4 if _SMALL else 128
"""Most rows of one program in the backward pass: so many make dw's partial sums small beside what the rows take."""
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
        _forward_kernel[(rows,)](
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
    plan = _plan(summed.numel() // dim, dim, summed.element_size())
    several = plan.programs > 1
    partial = torch.empty(plan.programs, dim, dtype=torch.float32, device=dx.device) if several else dweight
    weight = weight.contiguous()
    with _rows.on_device(dx):
        if dim <= WHOLE:
            _backward_kernel[(plan.programs,)](
                dnormed, dsummed, summed, weight, dx, partial, plan.rows, dim, dnormed_stride, dsummed_stride, eps,
                plan.chunk, HAS_DSUMMED=dsummed_stride > 0, BLOCK=plan.block, STAGES=plan.stages, num_warps=plan.warps,
            )  # fmt: skip
        else:
            scales = torch.empty(plan.rows, dtype=torch.float32, device=dx.device)
            _backward_long_kernel[(plan.rows,)](
                dnormed, dsummed, summed, weight, dx, scales, dim, dnormed_stride, dsummed_stride, eps,
                HAS_DSUMMED=dsummed_stride > 0, BLOCK=plan.block, num_warps=plan.warps,
            )  # fmt: skip
            _weight_kernel[(plan.programs, triton.cdiv(dim, WEIGHT_BLOCK))](
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
    _add_up_kernel[(groups, triton.cdiv(dim, ADD_UP_COLUMNS))](
        partial, sums, count, dim, GROUP=ADD_UP_GROUP, ROWS=ADD_UP_ROWS, BLOCK=ADD_UP_COLUMNS, num_warps=8
    )
    if groups > 1:
        _add_up(sums, total)


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
    return min(MOST_ROWS, -(-rows // _rows.resident(on_each)))
