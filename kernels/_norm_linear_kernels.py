"""The Triton kernels of rms_norm_linear and layer_norm_linear; :mod:`._norm_linear` says which of them run when.

Shapes: R rows, K inner, N outputs. CENTRED tells a layer norm, which subtracts the mean of a row, from an RMS norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import INTERPRETED, narrow


@triton.jit
def _load(pointer, mask):  # type: ignore[no-untyped-def]
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _centred(value, mask, inner, eps, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row less its mean, if that is asked for, and the reciprocal of its root mean square."""
    if CENTRED:
        value = tl.where(mask, value - tl.sum(value) / inner, 0.0)
    return value, tl.rsqrt(tl.sum(value * value) / inner + eps)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(normed, scale, shift, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    result = normed * scale
    if SHIFTED:
        result += shift
    return result


@triton.jit
def _gelu(z):  # type: ignore[no-untyped-def]
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit  # type: ignore[untyped-decorator]
def normalise_kernel(  # type: ignore[no-untyped-def]
    x, scale, shift, normed, inner, x_stride, eps, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One program handles one row of x and normed [R, K]; grid is R. K is at most BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < inner
    # Asked for before the sum over the row, so that they are there when that is.
    factor = _load(scale + column, mask)
    addend = factor
    if SHIFTED:
        addend = _load(shift + column, mask)
    value, rstd = _centred(_load(x + row * x_stride + column, mask), mask, inner, eps, CENTRED)
    value = _scaled(value * rstd, factor, addend, SHIFTED)
    tl.store(normed + row * inner + column, narrow(value, normed.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    x_row, in_rows, inner, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """Mean and reciprocal root mean square of the rows that start at x_row [BLOCK_M].

    Sums are of differences from a row's first number: with one of its own numbers taken off, a row's variance is at
    least a K-th of its mean square, so that little of it is lost where the mean is large.
    """
    column = tl.arange(0, BLOCK_K)
    first = tl.zeros([BLOCK_M], tl.float32)
    if CENTRED:
        first = _load(x_row, in_rows)
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, inner, BLOCK_K):
        mask = in_rows[:, None] & (start + column < inner)[None, :]
        value = _load(x_row[:, None] + start + column[None, :], mask)
        if CENTRED:
            value = tl.where(mask, value - first[:, None], 0.0)
            total += tl.sum(value, 1)
        squares += tl.sum(value * value, 1)
    total /= inner
    return first + total, tl.rsqrt(tl.maximum(squares / inner - total * total, 0.0) + eps)


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x, scale, shift, weight, bias, y, z, rows, count, inner, x_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_M x BLOCK_N numbers of y [R, N] from x [R, K] and weight [N, K].

    The rows are normalised on the way to the product, as they would be stored. Grid is all tiles; GROUP tiles that
    share a block of weight follow each other. KEEP also stores z [R, N], the result before the GELU.
    """
    tile = tl.program_id(0)
    blocks = tl.cdiv(count, BLOCK_N)
    first = tile // (GROUP * blocks) * GROUP
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    inside = tile % (GROUP * blocks)
    row = ((first + inside % size) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    output = (inside // size * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = row < rows, output < count
    x_row = x + row * x_stride
    mean, rstd = _statistics(x_row, in_rows, inner, eps, BLOCK_M, BLOCK_K, CENTRED)
    DTYPE: tl.constexpr = y.dtype.element_ty
    column = tl.arange(0, BLOCK_K)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        at = start + column
        in_columns = at < inner
        factor = _load(scale + at, in_columns)[None, :]
        addend = factor
        if SHIFTED:
            addend = _load(shift + at, in_columns)[None, :]
        left = _load(x_row[:, None] + at[None, :], in_rows[:, None] & in_columns[None, :])
        if CENTRED:
            left -= mean[:, None]
        # Past the end of a row stand zeros times a scale of zero, and a shift of zero.
        left = narrow(_scaled(left * rstd[:, None], factor, addend, SHIFTED), DTYPE)
        right = tl.load(
            weight + output[None, :] * inner + at[:, None], mask=in_columns[:, None] & in_outputs[None, :], other=0.0
        )
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    if BIASED:
        result += _load(bias + output, in_outputs)[None, :]
    place = row[:, None] * count + output[None, :]
    mask = in_rows[:, None] & in_outputs[None, :]
    if GELU:
        if KEEP:
            tl.store(z + place, narrow(result, DTYPE), mask=mask)
        result = _gelu(result)
    tl.store(y + place, narrow(result, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def backward_rows_kernel(  # type: ignore[no-untyped-def]
    dnormed, x, scale, shift, dx, normed, dscale, dshift, rows, inner, dnormed_stride, x_stride, eps, chunk,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program handles chunk rows of dnormed, x, dx and normed [R, K], one after another; grid is P.

    Each leaves its shares of both gradients in dscale and dshift [P, K]. KEEP stores normed once more, for the gradient
    of the weight. K is at most BLOCK.
    """
    column = tl.arange(0, BLOCK)
    mask = column < inner
    DTYPE: tl.constexpr = dx.dtype.element_ty
    factor = _load(scale + column, mask)
    addend = factor
    if SHIFTED:
        addend = _load(shift + column, mask)
    share = tl.zeros([BLOCK], tl.float32)
    shift_share = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for step in tl.range(0, tl.minimum(chunk, rows - first), num_stages=STAGES):
        at = first + step
        upstream = _load(dnormed + at * dnormed_stride + column, mask)
        value, rstd = _centred(_load(x + at * x_stride + column, mask), mask, inner, eps, CENTRED)
        value *= rstd
        product = upstream * factor
        gradient = product - value * (tl.sum(product * value) / inner)
        if CENTRED:
            gradient -= tl.sum(product) / inner
        tl.store(dx + at * inner + column, narrow(rstd * gradient, DTYPE), mask=mask)
        if KEEP:
            tl.store(normed + at * inner + column, narrow(_scaled(value, factor, addend, SHIFTED), DTYPE), mask=mask)
        share += upstream * value
        if SHIFTED:
            shift_share += upstream
    place = tl.program_id(0).to(tl.int64) * inner + column
    tl.store(dscale + place, share, mask=mask)
    if SHIFTED:
        tl.store(dshift + place, shift_share, mask=mask)


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def gelu_backward_kernel(  # type: ignore[no-untyped-def]
    dy, z, dz, dbias, rows, count, dy_stride, chunk, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK columns of chunk rows of dy, z and dz [R, N]; grid is P x blocks of columns.

    Each leaves its share of the gradient of the bias in dbias [P, N].
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_columns = column < count
    share = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & in_columns[None, :]
        upstream = _load(dy + row[:, None] * dy_stride + column[None, :], mask)
        value = _load(z + row[:, None] * count + column[None, :], mask)
        normal = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        gradient = narrow(upstream * (normal + value * density), dz.dtype.element_ty)
        tl.store(dz + row[:, None] * count + column[None, :], gradient, mask=mask)
        share += tl.sum(gradient.to(tl.float32), 0)
    tl.store(dbias + tl.program_id(0).to(tl.int64) * count + column, share, mask=in_columns)
