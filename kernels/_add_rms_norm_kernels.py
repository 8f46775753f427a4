"""The Triton kernels of add_rms_norm; :mod:`.add_rms_norm` says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

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
def forward_kernel(  # type: ignore[no-untyped-def]
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


@triton.jit
def _scale_and_mean(value, product, dim, eps):  # type: ignore[no-untyped-def]
    """r of a row, and the mean of product * n; both sums are exchanged between warps at once."""
    squares, products = tl.split(tl.sum(tl.join(value * value, product * value), 0))
    scale = tl.rsqrt(squares / dim + eps)
    return scale, products * scale / dim


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
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
        # In stages it is under way by itself; else it has to be asked for before the sums over the row.
        if HAS_DSUMMED and STAGES == 1:
            extra = _load(dsummed + at * dsummed_stride, column, mask)
        upstream = _load(dnormed + at * dnormed_stride, column, mask)
        value = _load(summed + at * dim, column, mask)
        product = narrow(upstream * factor, DTYPE).to(tl.float32)
        scale, mean = _scale_and_mean(value, product, dim, eps)
        value *= scale
        gradient = scale * (product - value * mean)
        if HAS_DSUMMED:
            if STAGES > 1:
                extra = _load(dsummed + at * dsummed_stride, column, mask)
            gradient += extra
        tl.store(dx + at * dim + column, narrow(gradient, DTYPE), mask=mask)
        share += upstream * narrow(value, DTYPE).to(tl.float32)
    pointer = partial + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(pointer, narrow(share, partial.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _row_of_dx(  # type: ignore[no-untyped-def]
    dnormed, dsummed, summed, weight, dx, at, dim, dnormed_stride, dsummed_stride, eps,
    HAS_DSUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of dx [rows, dim], which is at most BLOCK."""
    column = tl.arange(0, BLOCK)
    mask = column < dim
    DTYPE: tl.constexpr = dx.dtype.element_ty
    if HAS_DSUMMED:
        extra = _load(dsummed + at * dsummed_stride, column, mask)
    value = _load(summed + at * dim, column, mask)
    upstream = _load(dnormed + at * dnormed_stride, column, mask)
    product = narrow(upstream * _load(weight, column, mask), DTYPE).to(tl.float32)
    scale, mean = _scale_and_mean(value, product, dim, eps)
    gradient = scale * (product - value * scale * mean)
    if HAS_DSUMMED:
        gradient += extra
    tl.store(dx + at * dim + column, narrow(gradient, DTYPE), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of_dw(  # type: ignore[no-untyped-def]
    dnormed, summed, dweight, first, rows, dim, dnormed_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw [dim] from column first on; rows is at most ROWS, dim at most BLOCK."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    own = first + tl.arange(0, COLUMNS)
    inside = (row < rows) & (own < dim)[None, :]
    DTYPE: tl.constexpr = dweight.dtype.element_ty
    upstream = _load(dnormed + row * dnormed_stride, own[None, :], inside)
    value = _load(summed + row * dim, own[None, :], inside)
    squares = tl.zeros([ROWS, STEP], tl.float32)
    for start in tl.static_range(0, BLOCK, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        part = _load(summed + row * dim, column, (row < rows) & (column < dim))
        squares += part * part
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / dim + eps)
    # Where there is no row and eps is 0, scale is infinite.
    share = tl.where(inside, upstream * narrow(value * scale, DTYPE).to(tl.float32), 0.0)
    tl.store(dweight + own, narrow(tl.sum(share, 0), DTYPE), mask=own < dim)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def backward_few_kernel(  # type: ignore[no-untyped-def]
    dnormed, dsummed, summed, weight, dx, dweight, rows, dim, dnormed_stride, dsummed_stride, eps,
    HAS_DSUMMED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program handles one row of dx [rows, dim], or COLUMNS columns of dw; grid is rows + dim / COLUMNS."""
    index = tl.program_id(0)
    if index < rows:
        _row_of_dx(
            dnormed, dsummed, summed, weight, dx, index.to(tl.int64), dim, dnormed_stride, dsummed_stride, eps,
            HAS_DSUMMED, BLOCK,
        )  # fmt: skip
    else:
        first = (index - rows) * COLUMNS
        _columns_of_dw(dnormed, summed, dweight, first, rows, dim, dnormed_stride, eps, ROWS, BLOCK, STEP, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def backward_long_kernel(  # type: ignore[no-untyped-def]
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
def weight_kernel(  # type: ignore[no-untyped-def]
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
def add_up_kernel(  # type: ignore[no-untyped-def]
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
