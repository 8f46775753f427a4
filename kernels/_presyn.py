"""How the kernels of presynaptic attention are launched; :mod:`.presyn_attention` says what they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _presyn_backward_kernels as backward_kernels
from . import _presyn_drawn_kernels as drawn_kernels
from . import _presyn_forward_kernels as forward_kernels
from . import _rows
from ._presyn_keys import Rates, constants_of

LARGEST_DIM = 128
MOST_BARRIER = 50.0
"""Of the barrier over a whole sequence; weights are products with exp(-barrier), which float32 holds up to here."""
STATE = ("calcium", "buffer", "pool", "reserve", "primed", "clamp", "energy")
_INTERPRETED = _rows.INTERPRETED.value


class Tile(NamedTuple):
    """What one program handles: M queries and N keys at once, warps, and loads under way.

    ``once`` says that the backward pass over keys walks over its queries once, not twice, for two more accumulators.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    once: bool = False


class Tiles(NamedTuple):
    """Of the four kernels that stream, and of the two for drawn queries; see :func:`tiles_for`."""

    forward_keys: Tile
    forward_queries: Tile
    backward_keys: Tile
    backward_queries: Tile
    drawn: Tile


def tiles_for(columns: int, itemsize: int, tokens: int) -> Tiles:
    """By rows of so many columns, of numbers of so many bytes, in sequences of so many tokens."""
    if _INTERPRETED:
        size = interpreted_rows(tokens)
        # So that both ways of the backward pass are taken somewhere.
        return Tiles(*(Tile(size, size, 4, 1, columns <= 32) for _ in range(5)))
    return _compiled_tiles(columns, itemsize)


def interpreted_rows(tokens: int) -> int:
    """Rows of a tile where it is interpreted: few, so that few tokens make several blocks, unless there are more.

    What is interpreted takes the same time for a tile of any size; a step of the workload has 64 tokens.
    """
    return 16 if tokens <= 32 else 64


@lru_cache(maxsize=64)
def _compiled_tiles(columns: int, itemsize: int) -> Tiles:
    if itemsize == 4:
        # Products of float32 are taken one by one, and larger tiles of them take minutes to build.
        return Tiles(*(Tile(32, 32, 4, 1) for _ in range(5)))
    # The quickest of 10 to 14 tiles for each kernel alone, on an H200 in bfloat16 at B 4, H 12, T 2048, D 64. Four
    # warps beat eight; the third kernel walks over its queries once, which beat every tile that does it twice.
    if columns <= 64:
        return Tiles(
            Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 1, True), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)
        )
    # Not measured: chosen for registers, of which rows of 128 numbers take twice as many.
    return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 8, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1))


def forward(
    q: Tensor, k: Tensor, v: Tensor, calcium: Tensor, buffer: Tensor, pool: Tensor, reserve: Tensor, primed: Tensor,
    clamp: Tensor, energy: Tensor, rates: Sequence[float], seed: Tensor | None = None, keep: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, the six new quantities of the state and what was used; then, for the backward pass, what rounding left of y,
    sums, factors, normalizers and the drawn queries. There is nothing left of float32 or if nothing is to be kept, and
    no query is drawn without a seed."""
    check(q, k, v, (calcium, buffer, pool, reserve, primed, clamp, energy), rates, seed)
    batch, heads, tokens, dim = q.shape
    q, k, v = (dense(tensor) for tensor in (q, k, v))
    state = [tensor.contiguous() for tensor in (calcium, buffer, pool, reserve, primed, clamp, energy)]
    y = torch.empty_like(q)
    rest = torch.empty_like(q) if keep and q.itemsize < 4 else q.new_empty(0)
    after = [torch.empty_like(tensor) for tensor in state[:6]]
    used = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sums, factors, normalizers, drawn = left_behind(used, seed)
    if not q.numel():
        return y, *after, used, rest, sums, factors, normalizers, drawn
    columns = max(16, triton.next_power_of_2(dim))
    scale = math.log2(math.e) * dim**-0.5
    tiles = tiles or tiles_for(columns, q.itemsize, tokens)
    tile = tiles.forward_queries
    with _rows.on_device(q):
        if seed is not None:
            draw(seed, drawn, rates)
        step(q, k, state, after, used, sums, factors, drawn, seed, rates, tiles.forward_keys)
        forward_kernels.queries_kernel[(batch * heads * triton.cdiv(tokens, tile.queries),)](
            q, k, v, factors, y, _none_if_empty(rest), normalizers, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *y.stride()[:3], tokens, heads, scale, dim, columns, tile.queries, tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if seed is not None:
            tile = tiles.drawn
            drawn_kernels.queries_kernel[(batch * heads * triton.cdiv(tokens, tile.queries),)](
                q, k, v, factors, y, _none_if_empty(rest), normalizers, drawn, seed, *q.stride()[:3], *k.stride()[:3],
                *v.stride()[:3], *y.stride()[:3], tokens, heads, scale, Rates(*rates).stochastic_quanta,
                dim, columns, tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return y, *after, used, rest, sums, factors, normalizers, drawn


def left_behind(used: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, factors, normalizers and the drawn queries, not filled yet: more with a seed than without."""
    batch, heads, tokens = used.shape
    counts = (2, 2, 1) if seed is None else (3, 4, 2)
    sums, factors, normalizers = (used.new_empty(count, *used.shape) for count in counts)
    listed = 0 if seed is None else tokens + 1
    return sums, factors, normalizers, used.new_empty(batch, heads, listed, dtype=torch.int32)


def draw(seed: Tensor, drawn: Tensor, rates: Sequence[float]) -> None:
    """Lists the drawn queries of each head."""
    batch, heads, places = drawn.shape
    block = interpreted_rows(places - 1) if _INTERPRETED else 1024
    drawn_kernels.draw_kernel[(batch * heads,)](
        seed, drawn, places - 1, Rates(*rates).stochastic_train_frac, block, num_warps=4
    )


def step(
    q: Tensor, k: Tensor, state: Sequence[Tensor], after: Sequence[Tensor], used: Tensor, sums: Tensor,
    factors: Tensor, drawn: Tensor, seed: Tensor | None, rates: Sequence[float], tile: Tile,
) -> None:  # fmt: skip
    """The synapses' part of the forward pass, into what is given from ``after`` on."""
    batch, heads, tokens, dim = q.shape
    forward_kernels.keys_kernel[(batch * heads * triton.cdiv(tokens, tile.keys),)](
        q, k, *state, *after, used, sums, factors, drawn, seed, *q.stride()[:3], *k.stride()[:3], tokens, heads,
        math.log2(math.e) * dim**-0.5, multiplier(q.dtype, rates), constants_of(tuple(rates)), dim,
        max(16, triton.next_power_of_2(dim)), tile.queries, tile.keys, seed is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward(
    dy: Tensor | None, d_after: Sequence[Tensor | None], q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor],
    y: Tensor, rest: Tensor, sums: Tensor, factors: Tensor, normalizers: Tensor, drawn: Tensor, rates: Sequence[float],
    seed: Tensor | None = None, tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and the seven quantities of the state."""
    batch, heads, tokens, dim = q.shape
    q, k, v = (dense(tensor) for tensor in (q, k, v))
    state = [tensor.contiguous() for tensor in state]
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    d_state = [torch.empty_like(tensor) for tensor in state]
    if not q.numel():
        return dq, dk, dv, *d_state
    dy = torch.zeros_like(y) if dy is None else dense(dy)
    none = None if all(given is not None for given in d_after) else torch.zeros_like(state[0])
    given = [none if gradient is None else gradient.contiguous() for gradient in d_after]
    deltas = torch.empty_like(normalizers[0])
    d_sums = torch.empty_like(sums[:2])
    columns = max(16, triton.next_power_of_2(dim))
    root = dim**-0.5
    scale = math.log2(math.e) * root
    tiles = tiles or tiles_for(columns, q.itemsize, tokens)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3]]
    with _rows.on_device(q):
        rows = interpreted_rows(tokens) if _INTERPRETED else 64
        backward_kernels.deltas_kernel[(batch * heads * triton.cdiv(tokens, rows),)](
            y,
            _none_if_empty(rest),
            dy,
            deltas,
            *y.stride()[:3],
            *dy.stride()[:3],
            tokens,
            heads,
            dim,
            columns,
            rows,
            num_warps=4,
        )
        tile = tiles.backward_keys
        backward_kernels.keys_kernel[(batch * heads * triton.cdiv(tokens, tile.keys),)](
            q, k, v, dy, *state, *given, sums, factors, normalizers, deltas, dk, dv, *d_state, d_sums, drawn, seed,
            *strides, *dk.stride()[:3], *dv.stride()[:3], tokens, heads, scale, root,
            multiplier(q.dtype, rates), constants_of(tuple(rates)), dim, columns, tile.queries, tile.keys, tile.once,
            seed is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tiles.backward_queries
        backward_kernels.queries_kernel[(batch * heads * triton.cdiv(tokens, tile.queries),)](
            q, k, v, dy, factors, d_sums, normalizers, deltas, dq, *strides, *dq.stride()[:3], tokens, heads, scale,
            root, dim, columns, tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if seed is not None:
            tile = tiles.drawn
            drawn_kernels.query_gradients_kernel[(batch * heads * triton.cdiv(tokens, tile.queries),)](
                q, k, v, dy, factors, d_sums, normalizers, deltas, dq, drawn, seed, *strides, *dq.stride()[:3],
                tokens, heads, scale, root, Rates(*rates).stochastic_quanta, dim, columns, tile.queries, tile.keys,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return dq, dk, dv, *d_state


def _none_if_empty(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def multiplier(dtype: torch.dtype, rates: Sequence[float]) -> float:
    """What weights are multiplied by, so that in float16 the largest is 2^14 and epsilon no subnormal number."""
    if dtype != torch.float16:
        return 1.0
    return float(2.0 ** (14 - math.ceil(math.log2(max(1.0, Rates(*rates).qmax, Rates(*rates).epsilon)))))


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows have gaps inside or lie on each other."""
    covered = all(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    return tensor if covered and (tensor.shape[-1] == 1 or tensor.stride(-1) == 1) else tensor.contiguous()


def check(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], rates: Sequence[float], seed: Tensor | None
) -> None:
    """Raises ValueError where an argument of presyn_attention does not fit."""
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != q.device):
        raise ValueError(f"presyn_attention takes one int64 as seed on {q.device}; it is {seed.dtype} on {seed.device}")
    if not Rates(*rates).stochastic_quanta >= 1:
        raise ValueError("presyn_attention takes a stochastic_quanta of at least 1")
    check_rows("presyn_attention", q, k, v, rates)
    for name, one in zip(STATE, state, strict=True):
        if one.shape != q.shape[:3] or one.dtype != state[0].dtype or one.device != q.device:
            raise ValueError(
                f"presyn_attention takes a state {tuple(q.shape[:3])} of one dtype on {q.device}; {name} is "
                f"{tuple(one.shape)} {one.dtype} on {one.device}"
            )
    if state[0].dtype not in _rows.DTYPES:
        raise ValueError(f"presyn_attention takes a state of float32, bfloat16 or float16, not {state[0].dtype}")


def check_rows(kernel: str, q: Tensor, k: Tensor, v: Tensor, rates: Sequence[float]) -> None:
    """Raises ValueError where q, k, v or a rate does not fit."""
    alike = all(one.shape == q.shape and one.dtype == q.dtype and one.device == q.device for one in (k, v))
    if q.dim() != 4 or not alike or q.dtype not in _rows.DTYPES or not 1 <= q.shape[-1] <= LARGEST_DIM:
        described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in (q, k, v))
        raise ValueError(
            f"{kernel} takes q, k and v [B, H, T, D] of one dtype and device, D up to {LARGEST_DIM}; they are "
            f"{described}"
        )
    if not 0 <= Rates(*rates).barrier_strength <= MOST_BARRIER or not Rates(*rates).epsilon >= 1e-12:
        raise ValueError(f"{kernel} takes a barrier_strength from 0 to {MOST_BARRIER:g} and an epsilon from 1e-12 on")
