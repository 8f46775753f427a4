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
    """Rows less their means, if that is asked for, and the reciprocals of their root mean squares."""
    if CENTRED:
        value = tl.where(mask, value - (tl.sum(value, 1) / inner)[:, None], 0.0)
    return value, tl.rsqrt(tl.sum(value * value, 1) / inner + eps)[:, None]


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
    x, scale, shift, normed, rows, inner, x_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS rows of x and normed [R, K]; grid is R over that. K is at most BLOCK."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)
    mask = (row < rows) & (column < inner)[None, :]
    # Asked for before the sum over the row, so that they are there when that is.
    factor = _load(scale + column, column < inner)[None, :]
    addend = factor
    if SHIFTED:
        addend = _load(shift + column, column < inner)[None, :]
    value, rstd = _centred(_load(x + row * x_stride + column[None, :], mask), mask, inner, eps, CENTRED)
    value = _scaled(value * rstd, factor, addend, SHIFTED)
    tl.store(normed + row * inner + column[None, :], narrow(value, normed.dtype.element_ty), mask=mask)


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
def _tile(  # type: ignore[no-untyped-def]
    x, scale, shift, weight, bias, y, z, block_row, block, rows, count, inner, x_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr,
    BIASED: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Rows are normalised on the way to the product, as they would be stored."""
    row = (block_row * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    output = (block * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
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
        result = tl.dot(left, right, result, input_precision="ieee")
    if BIASED:
        result += _load(bias + output, in_outputs)[None, :]
    place = row[:, None] * count + output[None, :]
    mask = in_rows[:, None] & in_outputs[None, :]
    if GELU:
        if KEEP:
            tl.store(z + place, narrow(result, DTYPE), mask=mask)
        result = _gelu(result)
    tl.store(y + place, narrow(result, DTYPE), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def tile_kernel(  # type: ignore[no-untyped-def]
    x, scale, shift, weight, bias, y, z, rows, count, inner, x_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_M x BLOCK_N numbers of y [R, N] from x [R, K] and weight [N, K]; grid is all tiles.

    GROUP tiles that share a block of weight follow each other. KEEP also stores z [R, N], the result before the GELU.
    """
    tile = tl.program_id(0)
    blocks = tl.cdiv(count, BLOCK_N)
    first = tile // (GROUP * blocks) * GROUP
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    inside = tile % (GROUP * blocks)
    _tile(
        x, scale, shift, weight, bias, y, z, first + inside % size, inside // size, rows, count, inner, x_stride, eps,
        BLOCK_M, BLOCK_N, BLOCK_K, CENTRED, SHIFTED, BIASED, GELU, KEEP,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(  # type: ignore[no-untyped-def]
    weight, scale, shift, bias, folded, sums, constant, count, inner,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS rows of weight and folded [N, K] and their sums and constants [N]; grid is N over that.

    CENTRED stores the sums of what was rounded, SHIFTED or BIASED the constants. K is at most BLOCK.
    """
    # The product may be launched at once; it waits for this kernel's end by itself.
    tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (column < inner)[None, :]
    place = row[:, None] * inner + column[None, :]
    value = _load(weight + place, mask)
    product = narrow(value * _load(scale + column, column < inner)[None, :], folded.dtype.element_ty)
    tl.store(folded + place, product, mask=mask)
    if CENTRED:
        tl.store(sums + row, tl.sum(product.to(tl.float32), 1), mask=row < count)
    if SHIFTED or BIASED:
        addend = tl.zeros([ROWS], tl.float32)
        if SHIFTED:
            addend += tl.sum(value * _load(shift + column, column < inner)[None, :], 1)
        if BIASED:
            addend += _load(bias + row, row < count)
        tl.store(constant + row, addend, mask=row < count)


@triton.jit  # type: ignore[untyped-decorator]
def repair_kernel(  # type: ignore[no-untyped-def]
    flags, x, scale, shift, weight, bias, y, z, rows, count, inner, x_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
    GELU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Blocks of rows of y [R, N] once more where flags [blocks of rows] say so; grid is those, and S.

    S programs share the outputs of a block of rows: few, because most have nothing to do.
    """
    block_row = tl.program_id(0)
    if tl.load(flags + block_row):
        for block in range(tl.program_id(1), tl.cdiv(count, BLOCK_N), tl.num_programs(1)):
            _tile(
                x, scale, shift, weight, bias, y, z, block_row, block, rows, count, inner, x_stride, eps,
                BLOCK_M, BLOCK_N, BLOCK_K, True, SHIFTED, BIASED, GELU, KEEP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "chunk"])  # type: ignore[untyped-decorator]
def backward_rows_kernel(  # type: ignore[no-untyped-def]
    dnormed, x, scale, shift, dx, normed, dscale, dshift, rows, inner, dnormed_stride, x_stride, eps, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program handles chunk rows of dnormed, x, dx and normed [R, K], ROWS at a time; grid is P.

    Each leaves its shares of both gradients in dscale and dshift [P, K]. KEEP stores normed once more, for the gradient
    of the weight. K is at most BLOCK.
    """
    column = tl.arange(0, BLOCK)
    in_columns = column < inner
    DTYPE: tl.constexpr = dx.dtype.element_ty
    factor = _load(scale + column, in_columns)[None, :]
    addend = factor
    if SHIFTED:
        addend = _load(shift + column, in_columns)[None, :]
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    shift_share = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, rows)
    for step in tl.range(0, tl.cdiv(last - first, ROWS), num_stages=STAGES):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < last) & in_columns[None, :]
        place = row * inner + column[None, :]
        upstream = _load(dnormed + row * dnormed_stride + column[None, :], mask)
        value, rstd = _centred(_load(x + row * x_stride + column[None, :], mask), mask, inner, eps, CENTRED)
        value *= rstd
        product = upstream * factor
        gradient = product - value * (tl.sum(product * value, 1) / inner)[:, None]
        if CENTRED:
            gradient -= (tl.sum(product, 1) / inner)[:, None]
        tl.store(dx + place, narrow(rstd * gradient, DTYPE), mask=mask)
        if KEEP:
            tl.store(normed + place, narrow(_scaled(value, factor, addend, SHIFTED), DTYPE), mask=mask)
        share += upstream * value
        if SHIFTED:
            shift_share += upstream
    place = tl.program_id(0).to(tl.int64) * inner + column
    tl.store(dscale + place, tl.sum(share, 0), mask=in_columns)
    if SHIFTED:
        tl.store(dshift + place, tl.sum(shift_share, 0), mask=in_columns)


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
