"""The three backward kernels of presynaptic attention; letters and units as in the forward kernels.

With P the weights, A = F a and E = F eps of a key, e = exp(L) relative to the query's normalizer, d = dP - dy.y:

    P = e (A sigma + E),  dA = sum e d sigma,  dL = e d (A (sigma + sigma') + E) + sigma dS1 [|L| <= 20] + sigma' dS2

dS1 and dS2 of a key are known only when dA is, the sum over its queries. So a program with keys either streams the
queries twice, for dv, dA and the first part of dk, then for the rest of dk; or once, with sums of sigma(L) q and
sigma'(L) q beside the others, which dS1 and dS2 multiply at the end. dq follows in a kernel of its own, without
atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _presyn_drawn_kernels as drawn_queries
from . import _presyn_keys, _rows
from . import _presyn_parts as parts
from ._presyn_forward_kernels import barrier_factor


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def deltas_kernel(  # type: ignore[no-untyped-def]
    y, rest, dy, deltas, y_batch, y_head, y_token, dy_batch, dy_head, dy_token, tokens, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program takes dy.(y + rest) of M queries of one head, to ``deltas`` [B, H, T]; grid is B * H * T / M.

    Of a y that was rounded to 16 bits the differences dP - dy.y would be half rounding where few keys matter.
    """
    batch, head, pair, first = parts.place(tokens, heads, M, False)
    offsets = parts.pointers(batch * y_batch + head * y_head, y_token, M, COLUMNS)
    dy_block = parts.pointers(dy + batch * dy_batch + head * dy_head, dy_token, M, COLUMNS)
    product = parts.rows(y + offsets, first, y_token, tokens, DIM, False).to(tl.float32)
    if rest is not None:
        product += parts.rows(rest + offsets, first, y_token, tokens, DIM, False).to(tl.float32)
    product *= parts.rows(dy_block, first, dy_token, tokens, DIM, False).to(tl.float32)
    query = first + tl.arange(0, M)
    tl.store(deltas + pair * tokens + query, tl.sum(product, 1), mask=query < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _through_weights(  # type: ignore[no-untyped-def]
    dk, dv, da, driven, docked, k, v, slope, floor, q_block, dy_block, normalizers, deltas, first, end, key, q_token,
    dy_token, tokens, scale, M: tl.constexpr, DIM: tl.constexpr, DIAGONAL: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Adds what queries from first to end give keys k, v [N, D] through their weights: dk, dv, and dA [N, LANES].

    With ``ONCE`` what they give dk through a key's sums is added up too, but for the factor that is not known yet:
    ``driven`` is the sum of sigma(L) q, ``docked`` that of sigma'(L) q, [N, D] each.
    """
    N: tl.constexpr = k.shape[0]
    limit = parts.DRIVE_LIMIT * parts.LOG2_E / scale
    for start in range(first, end, M):
        query = start + tl.arange(0, M)
        inside = query < tokens
        q = parts.rows(q_block, start, q_token, tokens, DIM, False)
        dy = parts.rows(dy_block, start, dy_token, tokens, DIM, False)
        normalizer = tl.load(normalizers + query, mask=inside, other=float("inf"))
        delta = tl.load(deltas + query, mask=inside, other=0.0)
        s = parts.dot(k, tl.trans(q))
        dp = parts.dot(v, tl.trans(dy))
        e = parts.exp2(s * scale - normalizer[None, :])
        if DIAGONAL:
            e = tl.where(query[None, :] >= key[:, None], e, 0.0)
        sigma, derivative = parts.sigma_and_slope(s, scale)
        if ONCE:
            if DIAGONAL:
                sigma = tl.where(query[None, :] >= key[:, None], sigma, 0.0)
                derivative = sigma - sigma * sigma
            driven = parts.dot(_rows.narrow(tl.where(tl.abs(s) <= limit, sigma, 0.0), q.dtype), q, driven)
            docked = parts.dot(_rows.narrow(derivative, q.dtype), q, docked)
        p = e * (slope[:, None] * sigma + floor[:, None])
        ed = e * (dp - delta[None, :])
        if DIAGONAL:
            # The first query sees one key, whose weight is one whatever happens; the difference would be rounding.
            ed = tl.where((query > 0)[None, :], ed, 0.0)
        dv = parts.dot(_rows.narrow(p, dy.dtype), dy, dv)
        dl = ed * (slope[:, None] * (sigma + derivative) + floor[:, None])
        dk = parts.dot(_rows.narrow(dl, q.dtype), q, dk)
        if parts.INTERPRETED:
            da += tl.sum(tl.reshape(ed * sigma, [N, M // parts.LANES, parts.LANES]), 1)
        else:
            da += tl.reduce(tl.reshape(ed * sigma, [N, M // parts.LANES, parts.LANES]), 1, parts.add)
    return dk, dv, da, driven, docked


@triton.jit  # type: ignore[untyped-decorator]
def _through_sums(  # type: ignore[no-untyped-def]
    dk, k, d_soft, d_sigma, q_block, first, end, key, q_token, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds what queries from first to end give dk through the two sums of a key; those that are none are zeros."""
    limit = parts.DRIVE_LIMIT * parts.LOG2_E / scale
    for start in range(first, end, M):
        query = start + tl.arange(0, M)
        q = parts.rows(q_block, start, q_token, tokens, DIM, False)
        s = parts.dot(k, tl.trans(q))
        sigma, derivative = parts.sigma_and_slope(s, scale)
        driven = tl.where(tl.abs(s) <= limit, sigma, 0.0)
        dl = driven * d_soft[:, None] + derivative * d_sigma[:, None]
        if DIAGONAL:
            dl = tl.where(query[None, :] >= key[:, None], dl, 0.0)
        dk = parts.dot(_rows.narrow(dl, q.dtype), q, dk)
    return dk


@triton.jit  # type: ignore[untyped-decorator]
def _through_all_sums(  # type: ignore[no-untyped-def]
    dk, k, d_soft, d_sigma, q_block, begin, below, key, q_token, tokens, scale, M: tl.constexpr, DIM: tl.constexpr
):
    """:func:`_through_sums` over the queries from begin on; those before ``below`` may not see keys."""
    dk = _through_sums(dk, k, d_soft, d_sigma, q_block, begin, below, key, q_token, tokens, scale, M, DIM, True)
    return _through_sums(dk, k, d_soft, d_sigma, q_block, below, tokens, key, q_token, tokens, scale, M, DIM, False)


@triton.jit  # type: ignore[untyped-decorator]
def _past_queries(  # type: ignore[no-untyped-def]
    k, v, slope, floor, q_block, dy_block, normalizers, deltas, begin, below, key, q_token, dy_token, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """What :func:`_through_weights` adds up over the queries from begin on; those before ``below`` may not see keys."""
    N: tl.constexpr = k.shape[0]
    COLUMNS: tl.constexpr = k.shape[1]
    d_keys = tl.zeros([N, COLUMNS], tl.float32)
    d_values = tl.zeros([N, COLUMNS], tl.float32)
    d_slope = tl.zeros([N, parts.LANES], tl.float32)
    driven, docked = 0.0, 0.0
    if ONCE:
        driven = tl.zeros([N, COLUMNS], tl.float32)
        docked = tl.zeros([N, COLUMNS], tl.float32)
    d_keys, d_values, d_slope, driven, docked = _through_weights(
        d_keys, d_values, d_slope, driven, docked, k, v, slope, floor, q_block, dy_block, normalizers, deltas, begin,
        below, key, q_token, dy_token, tokens, scale, M, DIM, True, ONCE,
    )  # fmt: skip
    return _through_weights(
        d_keys, d_values, d_slope, driven, docked, k, v, slope, floor, q_block, dy_block, normalizers, deltas, below,
        tokens, key, q_token, dy_token, tokens, scale, M, DIM, False, ONCE,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _through_step(  # type: ignore[no-untyped-def]
    calcium, buffer, pool, reserve, primed, clamp, energy,
    d_new_calcium, d_new_buffer, d_new_pool, d_new_reserve, d_new_primed, d_new_energy, sums, release, everything,
    d_slope, d_scaled, d_g, d_calcium, d_buffer, d_pool, d_reserve, d_primed, d_clamp, d_energy, d_sums,
    place, inside, total, key, tokens, R: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the state and of both sums at place, and returns the latter, [N] each."""
    c, b, p, r, s, blocked, e, d_influx, d_release = _presyn_keys.gradients(
        tl.load(calcium + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(buffer + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(pool + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(reserve + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(primed + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(clamp + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(energy + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(sums + place, mask=inside, other=0.0),
        release, everything,
        tl.load(d_new_calcium + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(d_new_buffer + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(d_new_pool + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(d_new_reserve + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(d_new_primed + place, mask=inside, other=0.0).to(tl.float32),
        tl.load(d_new_energy + place, mask=inside, other=0.0).to(tl.float32),
        d_slope, d_scaled, d_g, R, STOCHASTIC,
    )  # fmt: skip
    parts.store(d_calcium + place, c, inside)
    parts.store(d_buffer + place, b, inside)
    parts.store(d_pool + place, p, inside)
    parts.store(d_reserve + place, r, inside)
    parts.store(d_primed + place, s, inside)
    parts.store(d_clamp + place, blocked, inside)
    parts.store(d_energy + place, e, inside)
    # Keys beyond the last would divide by zero.
    d_soft = tl.where(inside, d_influx / tl.maximum(tokens - key, 1).to(tl.float32), 0.0)
    tl.store(d_sums + place, d_soft, mask=inside)
    tl.store(d_sums + total + place, d_release, mask=inside)
    return d_soft, d_release


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def keys_kernel(  # type: ignore[no-untyped-def]
    q, k, v, dy, calcium, buffer, pool, reserve, primed, clamp, energy,
    d_new_calcium, d_new_buffer, d_new_pool, d_new_reserve, d_new_primed, d_new_energy,
    sums, factors, normalizers, deltas, dk, dv, d_calcium, d_buffer, d_pool, d_reserve, d_primed, d_clamp, d_energy,
    d_sums, drawn, seed, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, dy_batch,
    dy_head, dy_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, tokens, heads, scale, root, multiplier,
    R: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ONCE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One program takes dk, dv and the state's gradients of N keys of one head; grid as in the forward pass.

    Writes ``d_sums`` [2, B H T] too, gradients of what a key adds up to, for those of the queries.
    """
    batch, head, pair, first = parts.place(tokens, heads, N, False)
    key = first + tl.arange(0, N)
    inside = key < tokens
    place = pair * tokens + key
    total = tl.num_programs(0) // ((tokens + N - 1) // N) * tl.cast(tokens, tl.int64)
    q_base, dy_base = q + batch * q_batch + head * q_head, dy + batch * dy_batch + head * dy_head
    k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
    v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
    k = parts.rows(k_block, first, k_token, tokens, DIM, False)
    v = parts.rows(v_block, first, v_token, tokens, DIM, False)
    q_block = parts.pointers(q_base, q_token, M, COLUMNS)
    dy_block = parts.pointers(dy_base, dy_token, M, COLUMNS)
    slope = tl.load(factors + place, mask=inside, other=0.0)
    floor = tl.load(factors + total + place, mask=inside, other=0.0)
    normalizers, deltas = normalizers + pair * tokens, deltas + pair * tokens
    begin = first // M * M
    below = tl.minimum((first + N + M - 1) // M * M, (tokens + M - 1) // M * M)
    d_keys, d_values, d_slope, driven, docked = _past_queries(
        k, v, slope, floor, q_block, dy_block, normalizers, deltas, begin, below, key, q_token, dy_token, tokens, scale,
        M, DIM, ONCE,
    )  # fmt: skip
    release = tl.load(sums + total + place, mask=inside, other=0.0)
    everything, d_scaled, d_g = release, 0.0, 0.0
    if STOCHASTIC:
        everything = tl.load(sums + 2 * total + place, mask=inside, other=0.0)
        g = tl.load(factors + 2 * total + place, mask=inside, other=0.0)
        scaled = tl.load(factors + 3 * total + place, mask=inside, other=0.0)
        drawn += pair * (tokens + 1)
        d_keys, d_values, d_g, d_scaled, clipped = drawn_queries.through_moved_weights(
            d_keys, d_values, k, v, floor, g, scaled, q_base, dy_base, normalizers + total, deltas, drawn, seed, pair,
            key, q_token, dy_token, tokens, scale, M, DIM, R.stochastic_quanta,
        )  # fmt: skip
        release -= clipped
    whole = inside[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
    target = dv + batch * dv_batch + head * dv_head + first.to(tl.int64) * dv_token
    tl.store(parts.pointers(target, dv_token, N, COLUMNS), _rows.narrow(d_values, dv.dtype.element_ty), mask=whole)
    factor = multiplier * barrier_factor(key, tokens, R)
    d_soft, d_release = _through_step(
        calcium, buffer, pool, reserve, primed, clamp, energy, d_new_calcium, d_new_buffer, d_new_pool, d_new_reserve,
        d_new_primed, d_new_energy, sums, release, everything, tl.sum(d_slope, 1) * factor, d_scaled * factor, d_g,
        d_calcium, d_buffer, d_pool, d_reserve, d_primed, d_clamp, d_energy, d_sums, place, inside, total, key, tokens,
        R, STOCHASTIC,
    )  # fmt: skip
    if ONCE:
        d_keys += d_soft[:, None] * driven + d_release[:, None] * docked
    else:
        d_keys = _through_all_sums(
            d_keys, k, d_soft, d_release, q_block, begin, below, key, q_token, tokens, scale, M, DIM
        )
    if STOCHASTIC:
        d_keys = drawn_queries.less_clipped(
            d_keys, k, g, d_release, q_base, drawn, seed, pair, key, q_token, tokens, scale, M, DIM, R.stochastic_quanta
        )
    target = dk + batch * dk_batch + head * dk_head + first.to(tl.int64) * dk_token
    gradient = _rows.narrow(d_keys * root, dk.dtype.element_ty)
    tl.store(parts.pointers(target, dk_token, N, COLUMNS), gradient, mask=whole)


@triton.jit  # type: ignore[untyped-decorator]
def _to_queries(  # type: ignore[no-untyped-def]
    dq, q, dy, normalizer, delta, k_block, v_block, factors, d_sums, first, end, query, k_token, v_token, tokens,
    total, scale, N: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys from first to end give queries q [M, D], through their weights and through their sums."""
    limit = parts.DRIVE_LIMIT * parts.LOG2_E / scale
    for start in range(first, end, N):
        k = parts.rows(k_block, start, k_token, tokens, DIM, not MASKED)
        v = parts.rows(v_block, start, v_token, tokens, DIM, not MASKED)
        key = start + tl.arange(0, N)
        # Those beyond the last key are above the diagonal of every query that there is.
        there = key < tokens
        slope = tl.load(factors + key, mask=there, other=0.0)
        floor = tl.load(factors + total + key, mask=there, other=0.0)
        d_soft = tl.load(d_sums + key, mask=there, other=0.0)
        d_sigma = tl.load(d_sums + total + key, mask=there, other=0.0)
        s = parts.dot(q, tl.trans(k))
        dp = parts.dot(dy, tl.trans(v))
        ed = parts.exp2(s * scale - normalizer[:, None]) * (dp - delta[:, None])
        if MASKED:
            ed = tl.where((query > 0)[:, None], ed, 0.0)
        sigma, derivative = parts.sigma_and_slope(s, scale)
        dl = ed * (slope[None, :] * (sigma + derivative) + floor[None, :])
        dl += tl.where(tl.abs(s) <= limit, sigma, 0.0) * d_soft[None, :] + derivative * d_sigma[None, :]
        if MASKED:
            dl = tl.where(query[:, None] >= key[None, :], dl, 0.0)
        dq = parts.dot(_rows.narrow(dl, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, dy, factors, d_sums, normalizers, deltas, dq,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, dy_batch, dy_head, dy_token,
    dq_batch, dq_head, dq_token, tokens, heads, scale, root,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program takes dq of M queries of one head; grid is B * H * T / M, rounded up, late queries first."""
    batch, head, pair, first = parts.place(tokens, heads, M, True)
    query = first + tl.arange(0, M)
    inside = query < tokens
    q_block = parts.pointers(q + batch * q_batch + head * q_head, q_token, M, COLUMNS)
    dy_block = parts.pointers(dy + batch * dy_batch + head * dy_head, dy_token, M, COLUMNS)
    q = parts.rows(q_block, first, q_token, tokens, DIM, False)
    dy = parts.rows(dy_block, first, dy_token, tokens, DIM, False)
    normalizer = tl.load(normalizers + pair * tokens + query, mask=inside, other=float("inf"))
    delta = tl.load(deltas + pair * tokens + query, mask=inside, other=0.0)
    k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
    v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
    total = tl.num_programs(0) // ((tokens + M - 1) // M) * tl.cast(tokens, tl.int64)
    factors += pair * tokens
    d_sums += pair * tokens
    d_queries = tl.zeros([M, COLUMNS], tl.float32)
    full = first // N * N
    end = tl.minimum(first + M, tokens)
    d_queries = _to_queries(
        d_queries, q, dy, normalizer, delta, k_block, v_block, factors, d_sums, 0, full, query, k_token, v_token,
        tokens, total, scale, N, DIM, False,
    )  # fmt: skip
    d_queries = _to_queries(
        d_queries, q, dy, normalizer, delta, k_block, v_block, factors, d_sums, full, end, query, k_token, v_token,
        tokens, total, scale, N, DIM, True,
    )  # fmt: skip
    column = tl.arange(0, COLUMNS)
    target = dq + batch * dq_batch + head * dq_head + first.to(tl.int64) * dq_token
    d_queries = _rows.narrow(d_queries * root, dq.dtype.element_ty)
    mask = inside[:, None] & (column < DIM)[None, :]
    tl.store(parts.pointers(target, dq_token, M, COLUMNS), d_queries, mask=mask)
