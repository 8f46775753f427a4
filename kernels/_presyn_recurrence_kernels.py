"""The three kernels of the presynaptic recurrence: sums of rows, the state from row to row, and attention.

Shapes: B batch, H heads, T tokens, D head size; M rows (queries) and N keys at once. Units as in the kernels of
presynaptic attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _presyn_keys as keys
from . import _presyn_parts as parts
from . import _rows
from ._presyn_forward_kernels import sums_of_tile


@triton.jit  # type: ignore[untyped-decorator]
def _add_keys(  # type: ignore[no-untyped-def]
    soft, sigma, q, block, first, end, query, stride, tokens, scale,
    N: tl.constexpr, DIM: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    for start in range(first, end, N):
        k = parts.rows(block, start, stride, tokens, DIM, not DIAGONAL)
        s = parts.dot(q, tl.trans(k))
        if DIAGONAL:
            key = start + tl.arange(0, N)
            s = tl.where(query[:, None] >= key[None, :], s, float("-inf"))
        more_soft, more_sigma = sums_of_tile(s, scale)
        soft += more_soft
        sigma += more_sigma
    return soft, sigma


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def sums_kernel(  # type: ignore[no-untyped-def]
    q, k, influx, release, q_batch, q_head, q_token, k_batch, k_head, k_token, tokens, heads, scale,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program handles M rows of one head: mean softplus and sum of sigma over the keys that each sees.

    Grid is B * H * T / M, rounded up, late rows first; ``influx`` and ``release`` are [B, H, T].
    """
    batch, head, pair, first = parts.place(tokens, heads, M, True)
    query = first + tl.arange(0, M)
    q = parts.rows(
        parts.pointers(q + batch * q_batch + head * q_head, q_token, M, COLUMNS), first, q_token, tokens, DIM, False
    )
    block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
    soft = tl.zeros([M, parts.LANES], tl.float32)
    sigma = tl.zeros([M, parts.LANES], tl.float32)
    full = first // N * N
    end = tl.minimum(first + M, tokens)
    soft, sigma = _add_keys(soft, sigma, q, block, 0, full, query, k_token, tokens, scale, N, DIM, False)
    soft, sigma = _add_keys(soft, sigma, q, block, full, end, query, k_token, tokens, scale, N, DIM, True)
    inside = query < tokens
    place = pair * tokens + query
    tl.store(influx + place, tl.sum(soft, 1) * parts.LN_2 / (query + 1).to(tl.float32), mask=inside)
    tl.store(release + place, tl.sum(sigma, 1), mask=inside)


@triton.jit(do_not_specialize=["tokens", "pairs"])  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    influx, release, clamp, carried, states, slopes, tokens, pairs, multiplier, R: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program walks PAIRS heads through all rows; grid is B * H / PAIRS, rounded up.

    Reads ``influx``, ``release`` and ``clamp`` [B, H, T] and ``carried`` [6, B H]; writes ``states`` [6, B H, T], the
    state after each row, and ``slopes`` [B, H, T], the a of its bias times ``multiplier``.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    calcium = tl.load(carried + pair, mask=inside, other=0.0)
    buffer = tl.load(carried + pairs + pair, mask=inside, other=0.0)
    pool = tl.load(carried + 2 * pairs + pair, mask=inside, other=0.0)
    reserve = tl.load(carried + 3 * pairs + pair, mask=inside, other=0.0)
    primed = tl.load(carried + 4 * pairs + pair, mask=inside, other=0.0)
    energy = tl.load(carried + 5 * pairs + pair, mask=inside, other=0.0)
    place = pair * tokens
    last = place + tokens - 1
    all_pairs = tl.cast(pairs, tl.int64) * tokens
    next_influx = tl.load(influx + place, mask=inside, other=0.0)
    next_release = tl.load(release + place, mask=inside, other=0.0)
    next_clamp = tl.load(clamp + place, mask=inside, other=0.0).to(tl.float32)
    for _ in range(tokens):
        row_influx, row_release, row_clamp = next_influx, next_release, next_clamp
        # The next row's are under way while this one is worked on.
        ahead = tl.minimum(place + 1, last)
        next_influx = tl.load(influx + ahead, mask=inside, other=0.0)
        next_release = tl.load(release + ahead, mask=inside, other=0.0)
        next_clamp = tl.load(clamp + ahead, mask=inside, other=0.0).to(tl.float32)
        c, b, p, r, s, e = keys.recovered(calcium, buffer, pool, reserve, primed, energy, row_influx, R)
        calcium, buffer = tl.maximum(c, 0.0), tl.clamp(b, 0.0, 1.0)
        p, r, s, e = tl.clamp(p, 0.0, 1.0), tl.clamp(r, 0.0, 1.0), tl.clamp(s, 0.0, 1.0), tl.clamp(e, 0.0, 1.6)
        raw = keys.fired(calcium, p, row_clamp, R) * r
        total = raw * row_release
        binds = (total > 0.0) & (r <= total)
        used = tl.where(binds, r, total)
        pool, reserve, primed, energy = keys.settled(r, s, p, e, used, R)
        pool, reserve, primed = tl.clamp(pool, 0.0, 1.0), tl.clamp(reserve, 0.0, 1.0), tl.clamp(primed, 0.0, 1.0)
        energy = tl.clamp(energy, 0.0, 1.6)
        kept = tl.where(binds, r / tl.where(binds, row_release, 1.0), raw)
        a = kept * R.qmax * parts.sigmoid(R.q_beta * (energy - 0.5))
        tl.store(states + place, calcium, mask=inside)
        tl.store(states + all_pairs + place, buffer, mask=inside)
        tl.store(states + 2 * all_pairs + place, pool, mask=inside)
        tl.store(states + 3 * all_pairs + place, reserve, mask=inside)
        tl.store(states + 4 * all_pairs + place, primed, mask=inside)
        tl.store(states + 5 * all_pairs + place, energy, mask=inside)
        tl.store(slopes + place, a * multiplier, mask=inside)
        place += 1


@triton.jit  # type: ignore[untyped-decorator]
def _mix(  # type: ignore[no-untyped-def]
    mixed, weights, largest, q, slope, floor, k_block, v_block, first, end, query, k_token, v_token, tokens, scale,
    barrier, N: tl.constexpr, DIM: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    for start in range(first, end, N):
        k = parts.rows(k_block, start, k_token, tokens, DIM, not DIAGONAL)
        v = parts.rows(v_block, start, v_token, tokens, DIM, not DIAGONAL)
        key = start + tl.arange(0, N)
        s = parts.dot(q, tl.trans(k)) * scale
        if DIAGONAL:
            s = tl.where(query[:, None] >= key[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))
        e = parts.exp2(s - larger[:, None])
        one = tl.maximum(parts.exp2(-larger), parts.LEAST)
        sigma = e * parts.reciprocal(e + one[:, None])
        p = e * (slope[:, None] * sigma + floor) * parts.exp2(barrier * (key - tokens).to(tl.float32))[None, :]
        kept = parts.exp2(largest - larger)
        weights = weights * kept + tl.sum(p, 1)
        mixed = parts.dot(_rows.narrow(p, v.dtype), v, mixed * kept[:, None])
        largest = larger
    return mixed, weights, largest


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def mix_kernel(  # type: ignore[no-untyped-def]
    q, k, v, slopes, y,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, y_batch, y_head, y_token,
    tokens, heads, scale, floor, barrier,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program mixes values for M rows of one head; grid is B * H * T / M, rounded up, late rows first.

    A row's weights are exp(L) (slope sigma(L) + ``floor``) 2^(``barrier`` (j - T)); the others read and write as they
    do in presynaptic attention.
    """
    batch, head, pair, first = parts.place(tokens, heads, M, True)
    query = first + tl.arange(0, M)
    inside = query < tokens
    q = parts.rows(
        parts.pointers(q + batch * q_batch + head * q_head, q_token, M, COLUMNS), first, q_token, tokens, DIM, False
    )
    slope = tl.load(slopes + pair * tokens + query, mask=inside, other=0.0)
    k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
    v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
    mixed = tl.zeros([M, COLUMNS], tl.float32)
    weights = tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    full = first // N * N
    end = tl.minimum(first + M, tokens)
    mixed, weights, largest = _mix(
        mixed, weights, largest, q, slope, floor, k_block, v_block, 0, full, query, k_token, v_token, tokens, scale,
        barrier, N, DIM, False,
    )  # fmt: skip
    mixed, weights, largest = _mix(
        mixed, weights, largest, q, slope, floor, k_block, v_block, full, end, query, k_token, v_token, tokens, scale,
        barrier, N, DIM, True,
    )  # fmt: skip
    column = tl.arange(0, COLUMNS)
    target = parts.pointers(y + batch * y_batch + head * y_head + first.to(tl.int64) * y_token, y_token, M, COLUMNS)
    mixed = _rows.narrow(mixed / weights[:, None], y.dtype.element_ty)
    tl.store(target, mixed, mask=inside[:, None] & (column < DIM)[None, :])
