"""Parts of the attention of one token: a rotated head, a share of the cache, its rows, and where slots meet."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _decode


@triton.jit  # type: ignore[untyped-decorator]
def rotated_head(  # type: ignore[no-untyped-def]
    head, weight, turned_weight, cosine, sine, column, turned, mask, eps,
    DIM: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A head [DIM] over its root mean square, times its weight, rotated; ``turned`` has each column's other half."""
    x = tl.load(head + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(head + turned, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / DIM + eps)
    x = _decode.round_to(_decode.round_to(x * scale, DTYPE) * weight, DTYPE)
    y = _decode.round_to(_decode.round_to(y * scale, DTYPE) * turned_weight, DTYPE)
    return _decode.round_to(_decode.round_to(x * cosine, PRODUCT) + _decode.round_to(y * sine, PRODUCT), DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def share(place, SHARES: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First position of this program's share of those up to place, and the one behind its last; it may be empty."""
    span = tl.cdiv(tl.cdiv(place + 1, SHARES), TOKENS) * TOKENS
    first = (tl.program_id(0) % SHARES) * span
    return first, tl.minimum(first + span, place + 1)


@triton.jit  # type: ignore[untyped-decorator]
def ask_for(cache, first, length, DIM: tl.constexpr, LINES: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Has rows of cache [length, DIM] from first on brought to the L2 cache, LINES of 128 bytes each."""
    LINE: tl.constexpr = 1024 // cache.dtype.element_ty.primitive_bitwidth
    token = tl.minimum(tl.maximum(first + tl.arange(0, TOKENS), 0), length - 1)
    address = (cache + token[:, None].to(tl.int64) * DIM + tl.minimum(tl.arange(0, LINES) * LINE, DIM - 1)[None, :]).to(
        tl.int64
    )
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit  # type: ignore[untyped-decorator]
def rows(cache, token, limit, column, mask, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows token [TOKENS] of a cache of rows [DIM], those below limit, as float32; zeros beyond."""
    inside = (token < limit)[:, None] & mask[None, :]
    pointer = cache + token[:, None].to(tl.int64) * DIM + column[None, :]
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def combine_when_last(  # type: ignore[no-untyped-def]
    arrived, partial, y, head, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr
):
    """As :func:`combine`, in the last program of a head's shares to come here."""
    if is_last(arrived + head, SHARES):
        combine(partial, y, head, HEADS, DIM, COLUMNS, SHARES)


@triton.jit  # type: ignore[untyped-decorator]
def combine(  # type: ignore[no-untyped-def]
    partial, y, head, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr
):
    """Row head of y [HEADS, DIM] from partial: mixed values, weights and largest scores [HEADS, SHARES, ...].

    Shares are taken in their order, whichever was there first.
    """
    share = head * SHARES + tl.arange(0, SHARES)
    column = tl.arange(0, COLUMNS)
    mask = column < DIM
    rows = partial + share[:, None] * DIM + column[None, :]
    # From the L2 cache: other programs may have written them a moment ago.
    mixed = tl.load(rows, mask=mask[None, :], other=0.0, cache_modifier=".cg")
    weights = tl.load(partial + HEADS * SHARES * DIM + share, cache_modifier=".cg")
    largest = tl.load(partial + HEADS * SHARES * (DIM + 1) + share, cache_modifier=".cg")
    _, weights, mixed = met(largest, weights, mixed)
    DTYPE: tl.constexpr = y.dtype.element_ty
    tl.store(y + head * DIM + column, _decode.round_to(mixed / weights, DTYPE).to(DTYPE), mask=mask)


@triton.jit
def is_last(counter, expected):  # type: ignore[no-untyped-def]
    """Whether this one is the last of the expected programs to come here; it then sees what all of them wrote.

    The last one puts the counter, int32, back to zero; the next launch that counts with it has to wait for this one.
    """
    # One thread counts for the program, after the others have written.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def met(largest, weights, mixed):  # type: ignore[no-untyped-def]
    """Largest score, sum of weights and mixed values [D] of all slots; zeros if none has seen a token."""
    most = tl.max(largest, 0)
    factor = tl.exp(largest - pivot(most))
    return most, tl.sum(weights * factor, 0), tl.sum(mixed * factor[:, None], 0)


@triton.jit
def pivot(largest):  # type: ignore[no-untyped-def]
    """What scores are taken relative to: the largest, or zero where there is none, as infinities have no difference."""
    return tl.where(largest == float("-inf"), 0.0, largest)
