"""Triton kernels of fused_cms: propose updates, judge them by their norms, apply what holds.

Shapes: C blocks of elements, N tensors, L levels, K kinds of state: momentum, total, average, square.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _shared

LOG_SHARE = tl.constexpr(0.1)
LEAST = tl.constexpr(4.5399929762484854e-05)
"""e^-10: below, a feature is linear and no longer logarithmic."""
INVERSE_LEAST = tl.constexpr(22026.465794806718)
LOG2_E = tl.constexpr(1.4426950408889634)
PARTIALS = tl.constexpr(3)


@triton.jit
def _log_sign(x):  # type: ignore[no-untyped-def]
    """Size and sign of x as two features, continuous where the logarithm takes over."""
    size = tl.abs(x)
    large = size >= LEAST
    logarithm = tl.log(tl.where(large, size, 1.0)) * LOG_SHARE
    return tl.where(large, logarithm, -1.0), tl.where(large, tl.where(x > 0, 1.0, -1.0), x * INVERSE_LEAST)


@triton.jit  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    inputs, weights, IN: tl.constexpr, OUT: tl.constexpr, PAIRED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A linear layer with SiLU: inputs and outputs are tuples of [BLOCK], weights [OUT, IN] lie before biases [OUT]."""
    outputs = ()
    pairs = weights.to(tl.pointer_type(tl.int64))
    for unit in tl.static_range(OUT):
        total = tl.load(weights + OUT * IN + unit)
        if PAIRED:
            # Two weights a load: one for each would be a fifth of all instructions.
            for pair in tl.static_range(IN // 2):
                both = tl.load(pairs + (unit * IN // 2 + pair))
                total = inputs[2 * pair] * both.to(tl.int32).to(tl.float32, bitcast=True) + total
                total = inputs[2 * pair + 1] * (both >> 32).to(tl.int32).to(tl.float32, bitcast=True) + total
        else:
            for feature in tl.static_range(IN):
                total = inputs[feature] * tl.load(weights + unit * IN + feature) + total
        if INTERPRETED:
            active = total / (1.0 + tl.exp(-total))
        else:
            # SiLU in five instructions; a division would take eight more.
            power = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [total * -LOG2_E], tl.float32, True, 1
            )
            active = total * tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1
            )
        outputs = outputs + (active,)  # type: ignore[assignment]
    return outputs


@triton.jit  # type: ignore[untyped-decorator]
def _update_of(  # type: ignore[no-untyped-def]
    gradient, momentum, weights, WIDTH: tl.constexpr, LAYERS: tl.constexpr, PAIRED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The network's update [BLOCK]: one element never sees another one."""
    features = _log_sign(gradient) + _log_sign(momentum)
    hidden = _dense(features, weights, 4, WIDTH, PAIRED, INTERPRETED)
    weights += 5 * WIDTH
    # Not unrolled: the instructions of all layers would not fit the cache that holds them.
    for _ in range(LAYERS - 1):
        hidden = _dense(hidden, weights, WIDTH, WIDTH, PAIRED, INTERPRETED)
        weights += (WIDTH + 1) * WIDTH
    update = tl.load(weights + WIDTH)
    for unit in tl.static_range(WIDTH):
        update = hidden[unit] * tl.load(weights + unit) + update
    return update


@triton.jit(do_not_specialize=["active"])  # type: ignore[untyped-decorator]
def propose_kernel(  # type: ignore[no-untyped-def]
    chunks, table, weights, partials, ok, active, period, beta1, beta2, momentum_decay,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, LAYERS: tl.constexpr, TENSOR_BITS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PAIRED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program handles one block of one tensor, in steps, named by its entry of chunks [C]; grid is C.

    Table [N, 4] has addresses and sizes. Adds the gradient to the totals of all levels; for the first ``active`` levels
    updates average and square, leaves the update in place of the total, and writes partials [C, L, 3]: sums of squares
    of gradient and new momentum, and whether an update is NaN or Inf.
    """
    if not tl.load(ok):
        return
    chunk = tl.load(chunks + tl.program_id(0))
    row = table + (chunk & ((1 << TENSOR_BITS) - 1)) * 4
    state = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    count = tl.load(row + 2)
    grads = tl.load(row + 3).to(tl.pointer_type(DTYPE))
    first = (chunk >> TENSOR_BITS) * BLOCK
    end = tl.minimum(first + BLOCK, count)
    momenta = state
    totals = momenta + LEVELS * count
    averages = totals + LEVELS * count
    squares = averages + LEVELS * count
    partial = partials + tl.program_id(0).to(tl.int64) * (LEVELS * PARTIALS)
    span = 1.0
    for _ in range(active):
        gradient_square = 0.0
        momentum_square = 0.0
        bad = 0.0
        for start in range(first, end, STEP):
            offsets = start + tl.arange(0, STEP)
            mask = offsets < end
            gradient = tl.load(grads + offsets, mask=mask, other=0.0).to(tl.float32)
            gradient = (tl.load(totals + offsets, mask=mask, other=0.0) + gradient) / span
            average = tl.load(averages + offsets, mask=mask, other=0.0)
            square = tl.load(squares + offsets, mask=mask, other=0.0)
            tl.store(averages + offsets, average * beta1 + gradient * (1 - beta1), mask=mask)
            tl.store(squares + offsets, square * beta2 + (1 - beta2) * gradient * gradient, mask=mask)
            gradient_square += tl.sum(gradient * gradient)
            momentum = tl.load(momenta + offsets, mask=mask, other=0.0)
            update = _update_of(gradient, momentum, weights, WIDTH, LAYERS, PAIRED, INTERPRETED)
            tl.store(totals + offsets, update, mask=mask)
            # Read again, because the network needs every register.
            momentum = tl.load(momenta + offsets, mask=mask, other=0.0)
            moved = tl.where(mask, momentum * momentum_decay + update * (1 - momentum_decay), 0.0)
            momentum_square += tl.sum(moved * moved)
            wrong = mask & ((update != update) | (tl.abs(update) == float("inf")))
            bad = tl.maximum(bad, tl.max(wrong.to(tl.float32)))
        tl.store(partial, gradient_square)
        tl.store(partial + 1, momentum_square)
        tl.store(partial + 2, bad)
        span *= period
        partial += PARTIALS
        momenta += count
        totals += count
        averages += count
        squares += count
    for _ in range(active, LEVELS):
        for start in range(first, end, STEP):
            offsets = start + tl.arange(0, STEP)
            mask = offsets < end
            grad = tl.load(grads + offsets, mask=mask).to(tl.float32)
            tl.store(totals + offsets, tl.load(totals + offsets, mask=mask) + grad, mask=mask)
        totals += count


@triton.jit  # type: ignore[untyped-decorator]
def judge_kernel(  # type: ignore[no-untyped-def]
    ends, partials, verdicts, ok, share, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles one level of one tensor, whose partials end at ends [N]; grid is (N, active levels).

    Writes verdicts [N, L]: what its new momentum is multiplied by, or -1 where the level is skipped.
    """
    if not tl.load(ok):
        return
    tensor = tl.program_id(0)
    level = tl.program_id(1)
    end = tl.load(ends + tensor)
    start = tl.load(ends + tensor - 1, mask=tensor > 0, other=0)
    gradient = tl.zeros([BLOCK], tl.float32)
    momentum = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < end
        partial = partials + (index * LEVELS + level) * PARTIALS
        gradient += tl.load(partial, mask=mask, other=0.0)
        momentum += tl.load(partial + 1, mask=mask, other=0.0)
        bad += tl.load(partial + 2, mask=mask, other=0.0)
    largest = share * tl.sqrt(tl.sum(gradient))
    norm = tl.sqrt(tl.sum(momentum))
    scale = tl.where(norm > largest, largest / tl.where(norm > largest, norm, 1.0), 1.0)
    tl.store(verdicts + tensor * LEVELS + level, tl.where(tl.sum(bad) > 0, -1.0, scale))


@triton.jit(do_not_specialize=["active"])  # type: ignore[untyped-decorator]
def apply_kernel(  # type: ignore[no-untyped-def]
    chunks, table, verdicts, lrs, ok, active, weight_decay, momentum_decay,
    LEVELS: tl.constexpr, TENSOR_BITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program handles one block of one tensor, as in ``propose_kernel``; grid is C.

    Moves the momenta and the parameter by the updates that stand in place of the totals, and clears those.
    """
    if not tl.load(ok):
        return
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk & ((1 << TENSOR_BITS) - 1)
    row = table + tensor * 4
    params = tl.load(row).to(tl.pointer_type(DTYPE))
    state = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    count = tl.load(row + 2)
    offsets = (chunk >> TENSOR_BITS) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    momenta = state + offsets
    totals = momenta + LEVELS * count
    verdict = verdicts + tensor * LEVELS
    change = tl.zeros([BLOCK], tl.float32)
    kept = 0.0
    for _ in range(active):
        scale = tl.load(verdict)
        if scale >= 0:
            update = tl.load(totals, mask=mask, other=0.0)
            momentum = tl.load(momenta, mask=mask, other=0.0)
            moved = (momentum * momentum_decay + update * (1 - momentum_decay)) * scale
            tl.store(momenta, moved, mask=mask)
            change += update
            kept += 1.0
        tl.store(totals, tl.zeros([BLOCK], tl.float32), mask=mask)
        verdict += 1
        momenta += count
        totals += count
    if kept > 0:
        param = tl.load(params + offsets, mask=mask, other=0.0).to(tl.float32)
        param -= tl.load(lrs + tensor) * (change / tl.sqrt(kept) + weight_decay * param)
        if INTERPRETED and params.dtype.element_ty == tl.bfloat16:
            param = _shared.nearest_bfloat16(param)
        tl.store(params + offsets, param.to(DTYPE), mask=mask)
