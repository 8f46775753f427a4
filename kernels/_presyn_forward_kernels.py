"""The two forward kernels of presynaptic attention: one streams queries past keys, one keys past queries.

Shapes: B batch, H heads, T tokens, D head size; M queries and N keys at once. Logits are kept as products, in units in
which ``scale`` makes them powers of two. ``factors`` [2, B H T] has F a and F eps of every key: its weight in attention
is exp(L) (F a sigma(L) + F eps), where F has the barrier, of which the query's part falls out of a softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _presyn_drawn_kernels as drawn_queries
from . import _presyn_keys, _rows
from . import _presyn_parts as parts


@triton.jit
def _fractions(n1, d1, n2, d2):  # type: ignore[no-untyped-def]
    """n1 / d1 + n2 / d2 as one fraction, with the product of the denominators, whose logarithm is another sum."""
    return n1 * d2 + n2 * d1, d1 * d2


@triton.jit
def sums_of_tile(s, scale):  # type: ignore[no-untyped-def]
    """Of products s [N, M], softplus in base 2 and sigma added up over all queries but LANES of them, [N, LANES].

    With e = exp(min(L, 20)), softplus is log(1 + e) and sigma is e / (1 + e). Four fractions are added as fractions and
    four logarithms as a product, which (1 + e^20)^4 does not overflow, so that four pairs share a reciprocal and a
    logarithm. A product of minus infinity adds nothing.
    """
    N: tl.constexpr = s.shape[0]
    M: tl.constexpr = s.shape[1]
    e = parts.exp2(tl.minimum(s * scale, parts.DRIVE_LIMIT * parts.LOG2_E))
    if parts.INTERPRETED:
        # It would walk over each pair in Python.
        sigma = tl.sum(tl.reshape(e / (1.0 + e), [N, M // parts.LANES, parts.LANES]), 1)
        soft = tl.sum(tl.reshape(tl.log2(1.0 + e), [N, M // parts.LANES, parts.LANES]), 1)
    else:
        e = tl.reshape(e, [N, M // (4 * parts.LANES), 4, parts.LANES])
        numerator, product = tl.reduce((e, 1.0 + e), 2, _fractions)
        sigma = tl.reduce(numerator * parts.reciprocal(product), 1, parts.add)
        soft = tl.reduce(parts.log2(product), 1, parts.add)
    return soft, sigma


@triton.jit  # type: ignore[untyped-decorator]
def _drive(  # type: ignore[no-untyped-def]
    soft, sigma, k, block, first, end, key, stride, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the sums over queries from first to end, for keys k [N, D]."""
    for start in range(first, end, M):
        q = parts.rows(block, start, stride, tokens, DIM, not MASKED)
        s = parts.dot(k, tl.trans(q))
        if MASKED:
            query = start + tl.arange(0, M)
            s = tl.where((query[None, :] >= key[:, None]) & (query < tokens)[None, :], s, float("-inf"))
        more_soft, more_sigma = sums_of_tile(s, scale)
        soft += more_soft
        sigma += more_sigma
    return soft, sigma


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def keys_kernel(  # type: ignore[no-untyped-def]
    q, k, calcium, buffer, pool, reserve, primed, clamp, energy,
    new_calcium, new_buffer, new_pool, new_reserve, new_primed, new_energy, used, sums, factors, drawn, seed,
    q_batch, q_head, q_token, k_batch, k_head, k_token, tokens, heads, scale, multiplier,
    R: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One program updates the synapses of N keys of one head; grid is B * H * T / N, rounded up, early keys first.

    Reads q and k [B, H, T, D] and the state [B, H, T]; writes the new state, what was used, ``sums`` [2, B H T], that
    is S1 / (T - j) and S2, and ``factors``. ``multiplier`` keeps weights in the range of the dtype. With ``STOCHASTIC``
    three and four quantities go there: see the kernels of drawn queries.
    """
    batch, head, pair, first = parts.place(tokens, heads, N, False)
    key = first + tl.arange(0, N)
    k = parts.rows(
        parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS), first, k_token, tokens, DIM, False
    )
    block = parts.pointers(q + batch * q_batch + head * q_head, q_token, M, COLUMNS)
    soft = tl.zeros([N, parts.LANES], tl.float32)
    sigma = tl.zeros([N, parts.LANES], tl.float32)
    # Queries of the blocks that the diagonal crosses, of those below, and of one that is not full.
    begin = first // M * M
    below = tl.minimum((first + N + M - 1) // M * M, (tokens + M - 1) // M * M)
    full = tl.maximum(tokens // M * M, below)
    soft, sigma = _drive(soft, sigma, k, block, begin, below, key, q_token, tokens, scale, M, DIM, True)
    soft, sigma = _drive(soft, sigma, k, block, below, full, key, q_token, tokens, scale, M, DIM, False)
    soft, sigma = _drive(soft, sigma, k, block, full, tokens, key, q_token, tokens, scale, M, DIM, True)
    # Keys beyond the last would divide by zero.
    influx = tl.sum(soft, 1) * parts.LN_2 / tl.maximum(tokens - key, 1).to(tl.float32)
    release = tl.sum(sigma, 1)

    inside = key < tokens
    place = pair * tokens + key
    c, b, p, r, s, e, g = _presyn_keys.rested(
        tl.load(calcium + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(buffer + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(pool + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(reserve + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(primed + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(clamp + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(energy + place, mask=inside, other=0.0).to(tl.float32),
        influx, R,
    )  # fmt: skip
    total = g * release
    if STOCHASTIC:
        total += drawn_queries.moved_sums(
            q + batch * q_batch + head * q_head, k, g, drawn + pair * (tokens + 1), seed, pair, key, q_token, tokens,
            scale, M, DIM, R.stochastic_quanta,
        )  # fmt: skip
    pool_after, reserve_after, primed_after, energy_after, used_now, slope = _presyn_keys.released(p, r, s, e, total, R)
    parts.store(new_calcium + place, c, inside)
    parts.store(new_buffer + place, b, inside)
    parts.store(new_pool + place, pool_after, inside)
    parts.store(new_reserve + place, reserve_after, inside)
    parts.store(new_primed + place, primed_after, inside)
    parts.store(new_energy + place, energy_after, inside)
    tl.store(used + place, used_now, mask=inside)
    all_keys = tl.num_programs(0) // ((tokens + N - 1) // N) * tl.cast(tokens, tl.int64)
    tl.store(sums + place, influx, mask=inside)
    tl.store(sums + all_keys + place, release, mask=inside)
    factor = multiplier * barrier_factor(key, tokens, R)
    tl.store(factors + place, factor * slope * g, mask=inside)
    tl.store(factors + all_keys + place, factor * R.epsilon, mask=inside)
    if STOCHASTIC:
        tl.store(sums + 2 * all_keys + place, total, mask=inside)
        tl.store(factors + 2 * all_keys + place, g, mask=inside)
        tl.store(factors + 3 * all_keys + place, factor * slope, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def barrier_factor(key, tokens, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(barrier (j - T) / T), up to one: what the barrier leaves of key j's weight, but for its query's part."""
    return tl.exp(R.barrier_strength * (key - tokens).to(tl.float32) / tl.cast(tokens, tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    mixed, weights, largest, q, k_block, v_block, factors, first, end, query, k_token, v_token, tokens, total, scale,
    N: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds keys from first to end to what queries q [M, D] have mixed so far, relative to their largest logits."""
    for start in range(first, end, N):
        k = parts.rows(k_block, start, k_token, tokens, DIM, not MASKED)
        v = parts.rows(v_block, start, v_token, tokens, DIM, not MASKED)
        key = start + tl.arange(0, N)
        if MASKED:
            slope = tl.load(factors + key, mask=key < tokens, other=0.0)
            floor = tl.load(factors + total + key, mask=key < tokens, other=0.0)
        else:
            slope = tl.load(factors + key)
            floor = tl.load(factors + total + key)
        s = parts.dot(q, tl.trans(k))
        if MASKED:
            s = tl.where(query[:, None] >= key[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1) * scale)
        e = parts.exp2(s * scale - larger[:, None])
        # What exp(0) is in the same units: exp(L) / (exp(L) + 1) without a second exponential.
        one = tl.maximum(parts.exp2(-larger), parts.LEAST)
        sigma = e * parts.reciprocal(e + one[:, None])
        p = e * (slope[None, :] * sigma + floor[None, :])
        kept = parts.exp2(largest - larger)
        weights = weights * kept + tl.sum(p, 1)
        rounded = _rows.narrow(p, v.dtype)
        mixed = mixed * kept[:, None]
        if MASKED and v.dtype != tl.float32:
            # A query that sees few keys has nothing that rounding averages out over, and the backward pass takes y as
            # exact: without this the gradients of the first keys may be less so than eager's.
            mixed = parts.dot(_rows.narrow(p - rounded.to(tl.float32), v.dtype), v, mixed)
        mixed = parts.dot(rounded, v, mixed)
        largest = larger
    return mixed, weights, largest


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, factors, y, rest, normalizers,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, y_batch, y_head, y_token,
    tokens, heads, scale,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program mixes values for M queries of one head; grid is B * H * T / M, rounded up, late queries first.

    Reads q, k, v [B, H, T, D] and ``factors``; writes y [B, H, T, D], what rounding left of it to ``rest`` if not None,
    and ``normalizers`` [B, H, T], the logarithms to base 2 of what weights add up to.
    """
    batch, head, pair, first = parts.place(tokens, heads, M, True)
    query = first + tl.arange(0, M)
    q = parts.rows(
        parts.pointers(q + batch * q_batch + head * q_head, q_token, M, COLUMNS), first, q_token, tokens, DIM, False
    )
    k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
    v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
    total = tl.num_programs(0) // ((tokens + M - 1) // M) * tl.cast(tokens, tl.int64)
    factors += pair * tokens
    mixed = tl.zeros([M, COLUMNS], tl.float32)
    weights = tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    full = first // N * N
    end = tl.minimum(first + M, tokens)
    mixed, weights, largest = _attend(
        mixed, weights, largest, q, k_block, v_block, factors, 0, full, query, k_token, v_token, tokens, total, scale,
        N, DIM, False,
    )  # fmt: skip
    mixed, weights, largest = _attend(
        mixed, weights, largest, q, k_block, v_block, factors, full, end, query, k_token, v_token, tokens, total, scale,
        N, DIM, True,
    )  # fmt: skip
    inside = query < tokens
    tl.store(normalizers + pair * tokens + query, largest + tl.log2(weights), mask=inside)
    column = tl.arange(0, COLUMNS)
    offsets = parts.pointers(batch * y_batch + head * y_head + first.to(tl.int64) * y_token, y_token, M, COLUMNS)
    parts.store_mixed(y, rest, offsets, mixed / weights[:, None], inside[:, None] & (column < DIM)[None, :])
