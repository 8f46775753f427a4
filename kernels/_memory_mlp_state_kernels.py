"""What the memory MLP does with sums of its products: gradient, norm, write, loss; :mod:`._memory_mlp` launches it.

Every kernel waits for the one in front before it reads or writes anything that changes, and the next may start once all
have. Shapes: N rows, D width of keys, H hidden width, M width of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import narrow


@triton.jit
def _square(g, mask):  # type: ignore[no-untyped-def]
    """The sum of squares of g, NaN if one of them is not finite; it is infinite if they are only large."""
    finite = tl.abs(g) < float("inf")
    return tl.sum(tl.where(mask, tl.where(finite, g * g, float("nan")), 0.0))


@triton.jit  # type: ignore[untyped-decorator]
def _weight_sums(  # type: ignore[no-untyped-def]
    partials, gradient, scale, program, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of gradient [size], the sums of partials [SPLITS, size] times scale; their square."""
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    partials += place
    total = tl.load(partials, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        partials += size
        total += tl.load(partials, mask=mask, other=0.0)
    total *= scale
    tl.store(gradient + place, total, mask=mask)
    return _square(total, mask)


@triton.jit  # type: ignore[untyped-decorator]
def _bias_sums(  # type: ignore[no-untyped-def]
    sums, gradient, scale, program, size, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS elements of gradient [size], the sums of sums [tiles, size] times scale; their square."""
    place = program * COLUMNS + tl.arange(0, COLUMNS)
    mask = place < size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, tiles, ROWS):
        tile = first + tl.arange(0, ROWS)
        offset = tile[:, None].to(tl.int64) * size + place[None, :]
        total += tl.load(sums + offset, mask=(tile < tiles)[:, None] & mask[None, :], other=0.0)
    result = tl.sum(total, 0) * scale
    tl.store(gradient + place, result, mask=mask)
    return _square(result, mask)


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    inner_partials, inner_sums, outer_partials, outer_sums, gradient, squares, scale,
    inner_size, hidden_width, outer_size, value_width, inner_tiles, outer_tiles, end1, end2, end3,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK weights or SUM_COLUMNS biases: gradient [W1, b1, W2, b2], and squares [programs].

    W1 has the programs up to end1, W2 those up to end2, b1 those up to end3.
    """
    program = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    outer = gradient + hidden_width + inner_size
    if program < end1:
        square = _weight_sums(inner_partials, gradient, scale, program, inner_size, SPLITS, BLOCK)
    elif program < end2:
        square = _weight_sums(outer_partials, outer, scale, program - end1, outer_size, SPLITS, BLOCK)
    elif program < end3:
        square = _bias_sums(
            inner_sums, gradient + inner_size, scale, program - end2, hidden_width, inner_tiles, SUM_ROWS, SUM_COLUMNS
        )
    else:
        square = _bias_sums(
            outer_sums, outer + outer_size, scale, program - end3, value_width, outer_tiles, SUM_ROWS, SUM_COLUMNS
        )
    tl.store(squares + program, square)


@triton.jit  # type: ignore[untyped-decorator]
def squares_kernel(gradient, squares, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK elements of gradient [size]: squares [programs] gets their sum of squares."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    tl.store(squares + tl.program_id(0), _square(tl.load(gradient + place, mask=mask, other=0.0), mask))


@triton.jit  # type: ignore[untyped-decorator]
def _written(  # type: ignore[no-untyped-def]
    weight, momentum, gradient, program, size, squares, forget, decay, step_size, clip, programs,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK elements of weight and momentum [size], or nothing where the gradient is bad.

    Weight and momentum are asked for before the wait: no kernel writes them between the last write and this one.
    """
    place = program * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(momentum + place, mask=place < size, other=0.0)
    w = tl.load(weight + place, mask=place < size, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.load(gradient + place, mask=place < size, other=0.0)
    index = tl.arange(0, PROGRAMS)
    square = tl.sum(tl.load(squares + index, mask=index < programs, other=0.0))
    norm = tl.sqrt(square)
    scale = tl.where(norm > clip, clip / norm, 1.0)
    s = tl.load(decay).to(tl.float32) * s - step_size * (g * scale)
    w = (1.0 - tl.load(forget).to(tl.float32)) * w + s
    # The clip of a step that someone spoils may be infinite.
    good = (square == square) & (scale > float("-inf"))
    mask = place < tl.where(good, size, 0)
    tl.store(momentum + place, s, mask=mask)
    tl.store(weight + place, narrow(w, weight.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def write_kernel(  # type: ignore[no-untyped-def]
    inner_weight, inner_bias, outer_weight, outer_bias, momentum, gradient, squares, forget, decay, step_size, clip,
    inner_size, hidden_width, outer_size, value_width, end1, end2, end3, programs,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK elements of one weight: S <- decay S - step g, W <- (1 - forget) W + S.

    W1 has the programs up to end1, b1 those up to end2, W2 those up to end3. Every program adds up squares [programs],
    PROGRAMS at least, to the norm that all of g is clipped by. Where one of g is not finite nothing is written.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < end1:
        _written(
            inner_weight, momentum, gradient, program, inner_size,
            squares, forget, decay, step_size, clip, programs, PROGRAMS, BLOCK, OVERLAP,
        )  # fmt: skip
    elif program < end2:
        _written(
            inner_bias, momentum + inner_size, gradient + inner_size, program - end1, hidden_width,
            squares, forget, decay, step_size, clip, programs, PROGRAMS, BLOCK, OVERLAP,
        )  # fmt: skip
    else:
        momentum += hidden_width
        gradient += hidden_width
        if program < end3:
            _written(
                outer_weight, momentum + inner_size, gradient + inner_size, program - end2, outer_size,
                squares, forget, decay, step_size, clip, programs, PROGRAMS, BLOCK, OVERLAP,
            )  # fmt: skip
        else:
            momentum += outer_size
            gradient += outer_size
            _written(
                outer_bias, momentum + inner_size, gradient + inner_size, program - end3, value_width,
                squares, forget, decay, step_size, clip, programs, PROGRAMS, BLOCK, OVERLAP,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def loss_kernel(losses, loss, count, programs, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: loss, 0-dim, the sum of losses [programs] over count."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(losses + index, mask=index < programs, other=0.0)
    tl.store(loss, narrow(tl.sum(total) / count, loss.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(source, target, program, size, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK elements of target [size], which is source times factor."""
    place = program * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(source + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(target + place, narrow(found * factor, target.dtype.element_ty), mask=place < size)


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    upstream, key, error, gradient, dkey, dvalue, inner_weight, inner_bias, outer_weight, outer_bias, scale,
    key_size, value_size, inner_size, hidden_width, outer_size, value_width, end1, end2, end3, end4, end5,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK elements of one of six gradients of a loss whose own is upstream, 0-dim.

    key and gradient are what they are for an upstream of one; error times scale is that of the values but for its sign.
    """
    program = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    factor = tl.load(upstream).to(tl.float32)
    bias = gradient + inner_size
    outer = bias + hidden_width
    if program < end1:
        _scaled(gradient, inner_weight, program, inner_size, factor, BLOCK)
    elif program < end2:
        _scaled(bias, inner_bias, program - end1, hidden_width, factor, BLOCK)
    elif program < end3:
        _scaled(outer, outer_weight, program - end2, outer_size, factor, BLOCK)
    elif program < end4:
        _scaled(outer + outer_size, outer_bias, program - end3, value_width, factor, BLOCK)
    elif program < end5:
        _scaled(key, dkey, program - end4, key_size, factor, BLOCK)
    else:
        _scaled(error, dvalue, program - end5, value_size, -scale * factor, BLOCK)
