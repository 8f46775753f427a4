"""The matrix products of the memory MLP with what stands around them; :mod:`._memory_mlp` launches them.

Shapes: N rows, D width of keys, H hidden width, M width of values, I and J the inner and outer width of one layer.
Every kernel waits for the one in front before it reads or writes anything, and the next may start once all have.
Where PRECISION is "library" the product is made already and stands where its tile goes: kernels do the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import INTERPRETED, narrow


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    left, right, row, column, rows, columns, left_row, left_inner, right_inner, right_column, start, end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left [rows, inner] times right [inner, columns] over inner from start to end: a tile, float32.

    Rows and columns past the end repeat earlier ones, which is cheaper than to mask them: nobody stores what comes of
    them. EVEN says that the tiles of inner leave no rest.
    """
    row = row % rows
    column = column % columns
    inner = tl.arange(0, INNER)
    left += row[:, None].to(tl.int64) * left_row + (inner.to(tl.int64) + start)[None, :] * left_inner
    right += (inner.to(tl.int64) + start)[:, None] * right_inner + column[None, :].to(tl.int64) * right_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, INNER):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            there = inner < end - first
            a = tl.load(left, mask=there[None, :], other=0.0)
            b = tl.load(right, mask=there[:, None], other=0.0)
        if INTERPRETED:
            # The interpreter multiplies the bits of bfloat16 numbers, and all bits of float32 ones.
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            if PRECISION == "tf32":
                a = _tf32_cut(a)
                b = _tf32_cut(b)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += INNER * left_inner
        right += INNER * right_inner
    return total


@triton.jit
def _ready(product, row, column, rows, columns):  # type: ignore[no-untyped-def]
    """The tile of a product [rows, columns] that is made already, float32."""
    # Rows and columns past the end are of no use, as in _product.
    return tl.load(product + (row % rows)[:, None].to(tl.int64) * columns + (column % columns)[None, :])


@triton.jit
def _tf32_cut(x):  # type: ignore[no-untyped-def]
    """x, float32, as tensor cores see it in TF32: without its last 13 bits, which are not rounded."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def tf32_nearest(x):  # type: ignore[no-untyped-def]
    """The number of TF32 that is nearest to x, float32, even on ties, as every operand of a product in TF32 has to be.

    Neither tl.dot nor the tensor cores round. What they cut off has the sign of x, so that every product is too small
    and errors of a sum add up, where those of rounding cancel. Operands are rounded where they are written, since on a
    Hopper GPU the right one goes from memory to the tensor cores without passing a register.
    """
    bits = x.to(tl.uint32, bitcast=True)
    nearest = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit  # type: ignore[untyped-decorator]
def operand_kernel(  # type: ignore[no-untyped-def]
    key, key_ready, key_turned, inner, inner_ready, inner_turned, outer, outer_ready, outer_turned,
    rows, width, hidden_width, value_width, key_programs, inner_programs, key_across, hidden_across,
    BLOCK: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr, INNER_TURNED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program copies a tile of key [N, D], of inner [H, D] or of outer [M, H]; so many programs for each in turn.

    STRAIGHT asks for copies of the same shape, TURNED for turned ones, of inner only with INNER_TURNED.
    """
    program = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if program < key_programs:
        _copied(key, key_ready, key_turned, program, rows, width, key_across, BLOCK, STRAIGHT, TURNED, PRECISION)
    elif program < key_programs + inner_programs:
        program -= key_programs
        _copied(
            inner, inner_ready, inner_turned, program, hidden_width, width, key_across,
            BLOCK, STRAIGHT, INNER_TURNED, PRECISION,
        )  # fmt: skip
    else:
        program -= key_programs + inner_programs
        _copied(
            outer, outer_ready, outer_turned, program, value_width, hidden_width, hidden_across,
            BLOCK, STRAIGHT, TURNED, PRECISION,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _copied(  # type: ignore[no-untyped-def]
    source, straight, turned, program, rows, columns, across,
    BLOCK: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of source [rows, columns], to its place in straight [rows, columns] and turned [columns, rows]."""
    row = program // across * BLOCK + tl.arange(0, BLOCK)
    column = program % across * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    found = tl.load(source + place, mask=mask, other=0.0)
    if PRECISION == "tf32":
        found = tf32_nearest(found)
    if STRAIGHT:
        tl.store(straight + place, found, mask=mask)
    if TURNED:
        tl.store(turned + column[None, :].to(tl.int64) * rows + row[:, None], found, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def hidden_kernel(  # type: ignore[no-untyped-def]
    key, weight, bias, before, hidden, turned, rows, width, columns, across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles a tile of before and hidden [N, H] = silu(before), of key [N, D] and weight [H, D].

    With TURNED it goes to turned [H, N] too. The grid counts tiles, across in a row.
    """
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PRECISION == "library":
        total = _ready(before, row, column, rows, columns)
    else:
        total = _product(
            key, weight, row, column, rows, columns, width, 1, 1, width, 0, width,
            ROWS, COLUMNS, INNER, EVEN, PRECISION,
        )  # fmt: skip
    DTYPE: tl.constexpr = hidden.dtype.element_ty
    total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    z = narrow(total, DTYPE)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(before + place, z, mask=mask)
    z = z.to(tl.float32)
    silu = z / (1.0 + tl.exp(-z))
    if PRECISION == "tf32":
        silu = tf32_nearest(silu)
    if TURNED:
        tl.store(turned + column[None, :].to(tl.int64) * rows + row[:, None], silu, mask=mask)
    tl.store(hidden + place, narrow(silu, DTYPE), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def error_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, value, error, error_ready, turned, losses, sums, rows, width, columns, across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles a tile of error [N, M] = hidden [N, H] times weight [M, H], plus bias, minus value [N, M].

    As operand it goes to error_ready [N, M] in TF32, where without KEEP it goes nowhere else, and with TURNED to turned
    [M, N]. losses [programs] gets the sum of its squares, sums [tiles of N, M] those of its columns.
    """
    down = tl.program_id(0) // across
    row = down * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PRECISION == "library":
        total = _ready(error, row, column, rows, columns)
    else:
        total = _product(
            hidden, weight, row, column, rows, columns, width, 1, 1, width, 0, width,
            ROWS, COLUMNS, INNER, EVEN, PRECISION,
        )  # fmt: skip
    DTYPE: tl.constexpr = error.dtype.element_ty
    total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    target = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)
    missed = narrow(narrow(total, DTYPE).to(tl.float32) - target, DTYPE)
    if KEEP:
        tl.store(error + place, missed, mask=mask)
    missed = tl.where(mask, missed.to(tl.float32), 0.0)
    operand = missed
    if PRECISION == "tf32":
        operand = tf32_nearest(missed)
        tl.store(error_ready + place, operand, mask=mask)
    if TURNED:
        tl.store(turned + column[None, :].to(tl.int64) * rows + row[:, None], operand, mask=mask)
    tl.store(losses + tl.program_id(0), tl.sum(missed * missed))
    tl.store(sums + down.to(tl.int64) * columns + column, tl.sum(missed, 0), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _weight_tile(  # type: ignore[no-untyped-def]
    left, turned, right, partials, program, rows, inner, columns, length, across, down,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN_ROWS: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of left' right over length rows: partials [rows / length, I, J] of :func:`backward_kernel`."""
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    split = program // across // down
    row = program // across % down * ROWS + tl.arange(0, ROWS)
    start = split * length
    end = tl.minimum(start + length, rows)
    if TURNED:
        total = _product(
            turned, right, row, column, inner, columns, rows, 1, 1, rows, start, end,
            ROWS, COLUMNS, INNER, EVEN_ROWS, PRECISION,
        )  # fmt: skip
    else:
        total = _product(
            left, right, row, column, inner, columns, 1, inner, columns, 1, start, end,
            ROWS, COLUMNS, INNER, EVEN_ROWS, PRECISION,
        )  # fmt: skip
    place = (split * inner + row)[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(partials + place, total, mask=(row < inner)[:, None] & (column < columns)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _row_tile(  # type: ignore[no-untyped-def]
    left, weight, before, out, out_turned, sums, scale, program, rows, inner, columns, across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, SLOPE: tl.constexpr,
    TURNED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out [N, J] = left weight, with what follows it in :func:`backward_kernel`."""
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)
    if PRECISION == "library":
        total = _ready(out, row, column, rows, columns)
    else:
        total = _product(
            left, weight, row, column, rows, columns, inner, 1, 1 if TURNED else columns, inner if TURNED else 1,
            0, inner, ROWS, COLUMNS, INNER, EVEN, PRECISION,
        )  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if SLOPE:
        z = tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        total = narrow(total, DTYPE).to(tl.float32) * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
        result = narrow(total, DTYPE)
        kept = tl.where(mask, result.to(tl.float32), 0.0)
        tl.store(sums + (program // across).to(tl.int64) * columns + column, tl.sum(kept, 0), mask=column < columns)
        if PRECISION == "tf32":
            result = tf32_nearest(result)
        if TURNED:
            tl.store(out_turned + column[None, :].to(tl.int64) * rows + row[:, None], result, mask=mask)
    else:
        result = narrow(total * scale, DTYPE)
    if KEEP:
        tl.store(out + place, result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    left, turned, weight, right, before, out, out_turned, sums, partials, scale, rows, inner, columns, length,
    across, down, weight_programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, EVEN_ROWS: tl.constexpr,
    SLOPE: tl.constexpr, TURNED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The backward pass of a layer whose outputs have the gradient left [N, I]: two products, tile by tile.

    The first weight_programs programs handle a tile of left' right, of some rows each, with right [N, J] what the layer
    was given: partials [rows / length, I, J]. The others handle a tile of out [N, J] = left weight, weight [I, J]. With
    SLOPE that goes on through the SiLU of before [N, J], and sums [tiles of N, J] gets sums of columns; without, it is
    multiplied by scale.

    With TURNED both operands of each product have what is added up over next to each other, as TF32 wants it: turned
    [I, N], weight [J, I], right [J, N], and with SLOPE the result goes to out_turned [J, N]. Without KEEP it goes
    there alone.
    """
    program = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PRECISION == "library":
        _row_tile(
            left, weight, before, out, out_turned, sums, scale, program, rows, inner, columns, across,
            ROWS, COLUMNS, INNER, EVEN, SLOPE, TURNED, KEEP, PRECISION,
        )  # fmt: skip
    elif program < weight_programs:
        _weight_tile(
            left, turned, right, partials, program, rows, inner, columns, length, across, down,
            ROWS, COLUMNS, INNER, EVEN_ROWS, TURNED, PRECISION,
        )  # fmt: skip
    else:
        _row_tile(
            left, weight, before, out, out_turned, sums, scale, program - weight_programs, rows, inner, columns, across,
            ROWS, COLUMNS, INNER, EVEN, SLOPE, TURNED, KEEP, PRECISION,
        )  # fmt: skip
