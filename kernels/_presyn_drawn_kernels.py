"""Stochastic release: some queries are drawn, and what keys release to them is moved by noise and clipped.

A query is drawn if its uniform number is below a share. Release to it before scaling is

    moved = clip(g sigma(L) + (u - 1/2) / quanta, 0, 1)

with u the number of the pair, where it sees the key. Drawn queries are listed, so that only they pay for random
numbers: the other kernels treat all queries as if none was drawn, and these add what is different, or write over it.

Streams of Philox, as the reference draws them: query i of head h in batch b has number (b H + h) T + i of the seed, the
pair with key j has number ((b H + h) T + i) T + j of the seed plus 2^32.

Shapes and units as in the other kernels; ``drawn`` is [B H, T + 1], how many queries are drawn and then which.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _presyn_parts as parts
from . import _rows

PAIRS_STREAM = tl.constexpr(1 << 32)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    seed, drawn, tokens, SHARE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program lists the drawn queries of one head, in order; grid is B * H. ``seed`` is one int64."""
    pair = tl.program_id(0).to(tl.int64)
    drawn += pair * (tokens + 1)
    number = tl.load(seed)
    count = tl.program_id(0) * 0
    for start in range(0, tokens, BLOCK):
        query = start + tl.arange(0, BLOCK)
        hit = (tl.rand(number, pair * tokens + query) < SHARE) & (query < tokens)
        place = count + tl.cumsum(hit.to(tl.int32), 0)
        tl.store(drawn + place, query, mask=hit)
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(drawn, count)


@triton.jit  # type: ignore[untyped-decorator]
def listed(drawn, start, count, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """M drawn queries from place start on; -1, which sees no key, beyond the last."""
    place = start + tl.arange(0, M)
    return tl.load(drawn + 1 + place, mask=place < count, other=-1)


@triton.jit  # type: ignore[untyped-decorator]
def gathered(base, row, stride, DIM: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of base [ROWS, COLUMNS]; zeros for row -1."""
    column = tl.arange(0, COLUMNS)
    mask = (row >= 0)[:, None] & (column < DIM)[None, :]
    return tl.load(base + row[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def moved_of(raw, seed, pair, query, key, tokens, QUANTA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Release raw of pairs moved by noise and clipped, and where no clip acts; query and key of raw's shape."""
    offset = (pair * tokens + query) * tokens + key
    noisy = raw + (tl.rand(tl.load(seed) + PAIRS_STREAM, offset) - 0.5) / QUANTA
    moved = tl.clamp(noisy, 0.0, 1.0)
    return moved, moved == noisy


@triton.jit  # type: ignore[untyped-decorator]
def moved_sums(  # type: ignore[no-untyped-def]
    q, k, g, drawn, seed, pair, key, stride, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, QUANTA: tl.constexpr,
):  # fmt: skip
    """By how much noise changes the release of keys k [N, D] with factors g [N] to drawn queries, added up."""
    COLUMNS: tl.constexpr = k.shape[1]
    count = tl.load(drawn)
    changed = tl.zeros_like(g)
    for start in range(0, count, M):
        query = listed(drawn, start, count, M)
        s = parts.dot(k, tl.trans(gathered(q, query, stride, DIM, COLUMNS)))
        sigma, _ = parts.sigma_and_slope(s, scale)
        raw = g[:, None] * sigma
        moved, _ = moved_of(raw, seed, pair, query[None, :], key[:, None], tokens, QUANTA)
        changed += tl.sum(tl.where(query[None, :] >= key[:, None], moved - raw, 0.0), 1)
    return changed


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, factors, y, rest, normalizers, drawn, seed,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, y_batch, y_head, y_token,
    tokens, heads, scale,
    QUANTA: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program mixes values for M drawn queries of one head; grid is B * H * T / M, rounded up.

    Reads q, k, v and ``factors`` [4, B H T], of a key F a, F eps, g and F times what scales release to its weight.
    Writes y of drawn queries; their ``normalizers`` go behind those of all, [2, B H T], where infinity takes their
    place: a query of infinite normalizer has no part in what all have.
    """
    batch, head, pair, start = parts.place(tokens, heads, M, True)
    total = tl.num_programs(0) // ((tokens + M - 1) // M) * tl.cast(tokens, tl.int64)
    drawn += pair * (tokens + 1)
    count = tl.load(drawn)
    if start < count:
        query = listed(drawn, start, count, M)
        q_tile = gathered(q + batch * q_batch + head * q_head, query, q_token, DIM, COLUMNS)
        k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
        v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
        factors += pair * tokens
        mixed = tl.zeros([M, COLUMNS], tl.float32)
        weights = tl.zeros([M], tl.float32)
        largest = tl.full([M], -1e30, tl.float32)
        for first in range(0, tl.max(query, 0) + 1, N):
            k_tile = parts.rows(k_block, first, k_token, tokens, DIM, False)
            v_tile = parts.rows(v_block, first, v_token, tokens, DIM, False)
            key = first + tl.arange(0, N)
            there = key < tokens
            floor = tl.load(factors + total + key, mask=there, other=0.0)
            g = tl.load(factors + 2 * total + key, mask=there, other=0.0)
            slope = tl.load(factors + 3 * total + key, mask=there, other=0.0)
            s = parts.dot(q_tile, tl.trans(k_tile))
            sigma, _ = parts.sigma_and_slope(s, scale)
            moved, _ = moved_of(g[None, :] * sigma, seed, pair, query[:, None], key[None, :], tokens, QUANTA)
            s = tl.where(query[:, None] >= key[None, :], s, float("-inf"))
            larger = tl.maximum(largest, tl.max(s, 1) * scale)
            p = parts.exp2(s * scale - larger[:, None]) * (slope[None, :] * moved + floor[None, :])
            kept = parts.exp2(largest - larger)
            weights = weights * kept + tl.sum(p, 1)
            mixed = parts.dot(_rows.narrow(p, v_tile.dtype), v_tile, mixed * kept[:, None])
            largest = larger
        there = query >= 0
        weights = tl.where(there, weights, 1.0)
        everyone = normalizers + pair * tokens
        tl.store(everyone + total + query, largest + tl.log2(weights), mask=there)
        tl.store(everyone + query, float("inf"), mask=there)
        column = tl.arange(0, COLUMNS)
        offsets = batch * y_batch + head * y_head + query[:, None].to(tl.int64) * y_token + column[None, :]
        parts.store_mixed(y, rest, offsets, mixed / weights[:, None], there[:, None] & (column < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def through_moved_weights(  # type: ignore[no-untyped-def]
    dk, dv, k, v, floor, g, slope, q, dy, normalizers, deltas, drawn, seed, pair, key, q_token, dy_token, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, QUANTA: tl.constexpr,
):  # fmt: skip
    """Adds what drawn queries give dk and dv [N, D]; and dg, the derivative of slope, and the sum of sigma where a clip
    acts, [N] each.

    ``normalizers`` are those of drawn queries, by query.
    """
    COLUMNS: tl.constexpr = k.shape[1]
    count = tl.load(drawn)
    dg = tl.zeros_like(g)
    d_slope = tl.zeros_like(g)
    clipped = tl.zeros_like(g)
    for start in range(0, count, M):
        query = listed(drawn, start, count, M)
        q_tile = gathered(q, query, q_token, DIM, COLUMNS)
        dy_tile = gathered(dy, query, dy_token, DIM, COLUMNS)
        normalizer = tl.load(normalizers + query, mask=query >= 0, other=float("inf"))
        delta = tl.load(deltas + query, mask=query >= 0, other=0.0)
        s = parts.dot(k, tl.trans(q_tile))
        dp = parts.dot(v, tl.trans(dy_tile))
        visible = query[None, :] >= key[:, None]
        e = tl.where(visible, parts.exp2(s * scale - normalizer[None, :]), 0.0)
        sigma, derivative = parts.sigma_and_slope(s, scale)
        moved, free = moved_of(g[:, None] * sigma, seed, pair, query[None, :], key[:, None], tokens, QUANTA)
        ed = tl.where((query > 0)[None, :], e * (dp - delta[None, :]), 0.0)
        weight = slope[:, None] * moved + floor[:, None]
        dv = parts.dot(_rows.narrow(e * weight, dy_tile.dtype), dy_tile, dv)
        passed = tl.where(free, ed * slope[:, None], 0.0)
        dl = ed * weight + passed * g[:, None] * derivative
        dk = parts.dot(_rows.narrow(dl, q_tile.dtype), q_tile, dk)
        dg += tl.sum(passed * sigma, 1)
        d_slope += tl.sum(ed * moved, 1)
        clipped += tl.sum(tl.where(visible & (free == 0), sigma, 0.0), 1)
    return dk, dv, dg, d_slope, clipped


@triton.jit  # type: ignore[untyped-decorator]
def less_clipped(  # type: ignore[no-untyped-def]
    dk, k, g, d_sigma, q, drawn, seed, pair, key, q_token, tokens, scale,
    M: tl.constexpr, DIM: tl.constexpr, QUANTA: tl.constexpr,
):  # fmt: skip
    """Takes from dk what sums of release gave it for drawn queries where a clip acts."""
    COLUMNS: tl.constexpr = k.shape[1]
    count = tl.load(drawn)
    for start in range(0, count, M):
        query = listed(drawn, start, count, M)
        q_tile = gathered(q, query, q_token, DIM, COLUMNS)
        s = parts.dot(k, tl.trans(q_tile))
        sigma, derivative = parts.sigma_and_slope(s, scale)
        _, free = moved_of(g[:, None] * sigma, seed, pair, query[None, :], key[:, None], tokens, QUANTA)
        clipped = (query[None, :] >= key[:, None]) & (free == 0)
        dl = tl.where(clipped, -derivative * d_sigma[:, None], 0.0)
        dk = parts.dot(_rows.narrow(dl, q_tile.dtype), q_tile, dk)
    return dk


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def query_gradients_kernel(  # type: ignore[no-untyped-def]
    q, k, v, dy, factors, d_sums, normalizers, deltas, dq, drawn, seed,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, dy_batch, dy_head, dy_token,
    dq_batch, dq_head, dq_token, tokens, heads, scale, root,
    QUANTA: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program takes dq of M drawn queries of one head; grid is B * H * T / M, rounded up."""
    batch, head, pair, start = parts.place(tokens, heads, M, True)
    total = tl.num_programs(0) // ((tokens + M - 1) // M) * tl.cast(tokens, tl.int64)
    drawn += pair * (tokens + 1)
    count = tl.load(drawn)
    if start < count:
        query = listed(drawn, start, count, M)
        there = query >= 0
        q_tile = gathered(q + batch * q_batch + head * q_head, query, q_token, DIM, COLUMNS)
        dy_tile = gathered(dy + batch * dy_batch + head * dy_head, query, dy_token, DIM, COLUMNS)
        normalizer = tl.load(normalizers + total + pair * tokens + query, mask=there, other=float("inf"))
        delta = tl.load(deltas + pair * tokens + query, mask=there, other=0.0)
        k_block = parts.pointers(k + batch * k_batch + head * k_head, k_token, N, COLUMNS)
        v_block = parts.pointers(v + batch * v_batch + head * v_head, v_token, N, COLUMNS)
        factors += pair * tokens
        d_sums += pair * tokens
        limit = parts.DRIVE_LIMIT * parts.LOG2_E / scale
        d_queries = tl.zeros([M, COLUMNS], tl.float32)
        for first in range(0, tl.max(query, 0) + 1, N):
            k_tile = parts.rows(k_block, first, k_token, tokens, DIM, False)
            v_tile = parts.rows(v_block, first, v_token, tokens, DIM, False)
            key = first + tl.arange(0, N)
            inside = key < tokens
            floor = tl.load(factors + total + key, mask=inside, other=0.0)
            g = tl.load(factors + 2 * total + key, mask=inside, other=0.0)
            slope = tl.load(factors + 3 * total + key, mask=inside, other=0.0)
            d_soft = tl.load(d_sums + key, mask=inside, other=0.0)
            d_sigma = tl.load(d_sums + total + key, mask=inside, other=0.0)
            s = parts.dot(q_tile, tl.trans(k_tile))
            dp = parts.dot(dy_tile, tl.trans(v_tile))
            ed = parts.exp2(s * scale - normalizer[:, None]) * (dp - delta[:, None])
            ed = tl.where((query > 0)[:, None], ed, 0.0)
            sigma, derivative = parts.sigma_and_slope(s, scale)
            moved, free = moved_of(g[None, :] * sigma, seed, pair, query[:, None], key[None, :], tokens, QUANTA)
            through = ed * slope[None, :] * g[None, :] + d_sigma[None, :]
            dl = ed * (slope[None, :] * moved + floor[None, :]) + tl.where(free, derivative * through, 0.0)
            dl += tl.where(tl.abs(s) <= limit, sigma, 0.0) * d_soft[None, :]
            dl = tl.where(query[:, None] >= key[None, :], dl, 0.0)
            d_queries = parts.dot(_rows.narrow(dl, k_tile.dtype), k_tile, d_queries)
        column = tl.arange(0, COLUMNS)
        target = dq + batch * dq_batch + head * dq_head + query[:, None].to(tl.int64) * dq_token + column[None, :]
        d_queries = _rows.narrow(d_queries * root, dq.dtype.element_ty)
        tl.store(target, d_queries, mask=there[:, None] & (column < DIM)[None, :])
