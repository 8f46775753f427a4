"""RMS norm and rotation of queries and keys, and the cache write of keys and values, in one launch: for decoding.

    q' = rotate(q / rms(q) * q_weight),  k' = rotate(k / rms(k) * k_weight)
    rotate(x) = [x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2 of a head

Token t is rotated by row position + t of the tables; k' and v go to that place in the caches. The position is read on
the device, so a CUDA graph of one token can be replayed for all of them. A program handles some heads of some tokens of
q, k or v, read and written once. The cast order is that of an unfused model; ``_rope`` has it.

Source: Qwen3's attention (query and key norm before the rotation); Su et al., RoFormer, 2021.
Shapes: B batch, T tokens, Hq and Hk heads, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _rope, _rows

NAME = "qk_norm_rope_cache"
PAIRS = 1024
"""Of a tile: with four warps every thread has one access of 16 bytes to each half, in bfloat16."""


def qk_norm_rope_cache_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, position: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`qk_norm_rope_cache`."""
    places = position + torch.arange(q.shape[1], device=q.device)
    cosine, sine = cos[places], sin[places]
    keys = _rope.rotated(_rope.normed(k, k_weight, eps).transpose(1, 2), cosine, sine)
    key_cache.index_copy_(2, places, keys)
    value_cache.index_copy_(2, places, v.transpose(1, 2))
    return _rope.rotated(_rope.normed(q, q_weight, eps).transpose(1, 2), cosine, sine)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    x, x_batch, x_token, x_head, cache, cache_batch, cache_token, cache_head, tile, start, tokens, length,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of x [B, T, HEADS, D] as it is to its places in the cache."""
    entry, head, token, is_token = _rope.tile(tile, tokens, HEADS, TILE_HEADS, TILE_TOKENS, True)
    column = tl.arange(0, COLUMNS)[None, :]
    place = start + token
    inside = is_token & (column < HALF) & (place >= 0) & (place < length)
    source = x + entry * x_batch + token * x_token + head * x_head + column
    target = cache + entry * cache_batch + place * cache_token + head * cache_head + column
    first = tl.load(source, mask=inside)
    second = tl.load(source + HALF, mask=inside)
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length", "q_tiles", "k_tiles"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q, k, v, q_weight, k_weight, cos, sin, key_cache, value_cache, position, rotated,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    cache_batch, cache_head, cache_token, tokens, length, q_tiles, k_tiles, eps,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE_HEADS: tl.constexpr, Q_TILE_TOKENS: tl.constexpr, K_TILE_HEADS: tl.constexpr, K_TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program handles one tile; grid is the tiles of q, then those of k, then those of v.

    q [B, T, Hq, D], k and v [B, T, Hk, D] and the caches [B, Hk, length, D] have the strides that are named after them;
    rotated [B, T, Hq, D] is contiguous. Programs of one kind differ from those of another in their tiles alone.
    """
    tile = tl.program_id(0)
    start = tl.load(position)
    if tile < q_tiles:
        row = Q_HEADS * 2 * HALF
        _rope.norm_and_rotate(
            q, q_batch, q_token, q_head, q_weight, cos, sin, rotated, row * tokens.to(tl.int64), row, 2 * HALF,
            tile, start, tokens, length, eps, Q_HEADS, Q_TILE_HEADS, Q_TILE_TOKENS, False, HALF, COLUMNS,
        )  # fmt: skip
    elif tile < q_tiles + k_tiles:
        _rope.norm_and_rotate(
            k, k_batch, k_token, k_head, k_weight, cos, sin, key_cache, cache_batch, cache_token, cache_head,
            tile - q_tiles, start, tokens, length, eps, K_HEADS, K_TILE_HEADS, K_TILE_TOKENS, True, HALF, COLUMNS,
        )  # fmt: skip
    else:
        _copy(
            v, v_batch, v_token, v_head, value_cache, cache_batch, cache_token, cache_head,
            tile - q_tiles - k_tiles, start, tokens, length, K_HEADS, K_TILE_HEADS, K_TILE_TOKENS, HALF, COLUMNS,
        )  # fmt: skip


def qk_norm_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, position: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Rotated queries; rotated keys and the values go into the caches. No gradient, no host sync.

    Tokens that would go beyond the end of the caches are not written, and their queries are NaN: the position is not
    known on the host.

    Args:
        q: queries [B, T, Hq, D], D even, float32, bfloat16 or float16, any strides, as all that follow up to v.
        k: keys [B, T, Hk, D].
        v: values [B, T, Hk, D].
        q_weight: of the norm, [D].
        k_weight: of the norm, [D].
        cos: [length or more, D / 2], in the dtype of q or float32.
        sin: as cos.
        key_cache: [B, Hk, length, D], contiguous in D; written in place.
        value_cache: as key_cache, with its strides; written in place.
        position: place of the first token, [1], int64, on the device.
        eps: added to the mean square.

    Returns:
        [B, Hq, T, D], in memory as [B, T, Hq, D].

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here, or needs a gradient.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(f"{NAME} has no gradient; call it under torch.no_grad(), or train with qk_norm_rope")
    if _rows.watched():
        watched: Tensor = torch.ops.kernbench.qk_norm_rope_cache.default(
            q, k, v, q_weight, k_weight, cos, sin, key_cache, value_cache, position, eps
        )
        return watched
    return _launch(q, k, v, q_weight, k_weight, cos, sin, key_cache, value_cache, position, eps)


class _Plan(NamedTuple):
    """How tensors of certain shapes, strides, dtypes and devices are launched; ``copied`` if some have gaps in D."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    copied: bool


_plans: dict[Any, _Plan] = {}


def _launch(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, position: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    # Checks take longer than the launch, so they are made once for all tensors that look like these.
    look = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q_weight.shape, k_weight.shape,
        cos.shape, sin.shape, key_cache.shape, key_cache.stride(), value_cache.shape, value_cache.stride(),
        q.dtype, k.dtype, v.dtype, q_weight.dtype, k_weight.dtype, cos.dtype, sin.dtype, key_cache.dtype,
        value_cache.dtype, position.dtype, position.shape,
        q.device, k.device, v.device, q_weight.device, k_weight.device, cos.device, sin.device, key_cache.device,
        value_cache.device, position.device,
    )  # fmt: skip
    plan = _plans.get(look)
    if plan is None:
        _check(q, k, v, q_weight, k_weight, cos, sin, key_cache, value_cache, position)
        plan = _rope.kept(_plans, look, _planned(q, k, v, key_cache))
    if plan.copied:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return _launch(q, k, v, q_weight, k_weight, cos, sin, key_cache, value_cache, position, eps)
    rotated = q.new_empty_strided(plan.shape, plan.strides)
    if plan.grid[0]:
        with _rows.on_device(q):
            _kernel[plan.grid](
                q, k, v, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
                key_cache, value_cache, position, rotated, *plan.numbers, eps, *plan.constants, num_warps=_rope.WARPS,
            )  # fmt: skip
        torch.autograd.graph.increment_version((key_cache, value_cache))
    return rotated


def _planned(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor) -> _Plan:
    batch, tokens, q_heads, dim = q.shape
    k_heads = k.shape[2]
    columns, rows = _rope.rows_for(dim, PAIRS)
    q_tiling = _rope.tiling(batch, q_heads, tokens, rows, by_token=True)
    k_tiling = _rope.tiling(batch, k_heads, tokens, rows, by_token=True)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *key_cache.stride()[:3])
    return _Plan(
        shape=(batch, q_heads, tokens, dim),
        strides=(tokens * q_heads * dim, dim, q_heads * dim, 1),
        grid=(q_tiling.programs + 2 * k_tiling.programs,),
        numbers=(*strides, tokens, key_cache.shape[2], q_tiling.programs, k_tiling.programs),
        constants=(dim // 2, columns, q_heads, k_heads, *q_tiling[:2], *k_tiling[:2]),
        copied=any(x.stride(3) != 1 and x.numel() for x in (q, k, v)),
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    key_cache: Tensor, value_cache: Tensor, position: Tensor,
) -> None:  # fmt: skip
    _rope.check_heads(
        NAME, cos, sin, q=q, k=k, v=v, q_weight=q_weight, k_weight=k_weight, key_cache=key_cache,
        value_cache=value_cache,
    )  # fmt: skip
    if any(tensor.dim() != 4 for tensor in (q, k, v, key_cache, value_cache)):
        raise ValueError(f"{NAME} takes q, k and v [batch, tokens, heads, dim] and caches of four dimensions")
    batch, tokens, _, dim = q.shape
    heads, length = k.shape[2], key_cache.shape[2]
    if k.shape != (batch, tokens, heads, dim) or v.shape != k.shape:
        raise ValueError(f"{NAME} takes k and v alike in shape and of as many tokens as q {tuple(q.shape)}")
    if q_weight.dim() != 1 or k_weight.dim() != 1:
        raise ValueError(f"{NAME} takes weights [{dim}], not {tuple(q_weight.shape)} and {tuple(k_weight.shape)}")
    if key_cache.shape != (batch, heads, length, dim) or value_cache.shape != key_cache.shape:
        raise ValueError(f"{NAME} takes caches [{batch}, {heads}, length, {dim}], not {tuple(key_cache.shape)}")
    if key_cache.stride(3) != 1 or value_cache.stride() != key_cache.stride():
        raise ValueError(f"{NAME} takes caches with equal strides that are contiguous in the head dimension")
    if tokens > length or cos.shape[0] < length:
        raise ValueError(f"{NAME} got {tokens} tokens, a cache of {length} and tables of {cos.shape[0]} positions")
    if position.dtype != torch.int64 or position.numel() != 1 or position.device != q.device:
        raise ValueError(f"{NAME} takes the position as one int64 on {q.device}")


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "qk_norm_rope_cache(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor position, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _shaped(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device).transpose(1, 2)


for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": _shaped}.items():
    _LIBRARY.impl(NAME, _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Projections with a scale of their own per head, weights around one, caches with something in them.

    eps is larger than in models, so that it matters. Tables are float32 where the case says wide.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, heads, dim = case["batch"], case["tokens"], case["key_heads"], case["dim"]
    length = tokens + case["spare"]

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale + mean).to(dtype)

    cos, sin = _rope.tables(generator, length, dim, dtype, wide=case["wide"])
    return {
        "q": normal(batch, tokens, case["query_heads"], dim, scale=2.0, mean=0.3),
        "k": normal(batch, tokens, heads, dim, scale=0.5, mean=-0.1), "v": normal(batch, tokens, heads, dim),
        "q_weight": normal(dim, scale=0.2, mean=1.0), "k_weight": normal(dim, scale=0.2, mean=1.0),
        "cos": cos, "sin": sin,
        "key_cache": normal(batch, heads, length, dim), "value_cache": normal(batch, heads, length, dim),
        "position": torch.randint(case["spare"] + 1, (1,), generator=generator, device=device), "eps": 1e-2,
    }  # fmt: skip


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """q, k, v, weights and the tables' rows of these tokens read, q', k' and v written."""
    rotation = _rope.cost_of(case, dtype, flops=7.0, vectors=2)
    value_bytes = float(dtype.itemsize * case["batch"] * case["tokens"] * case["key_heads"] * case["dim"])
    return Cost(
        flops=rotation.flops,
        bytes_read=rotation.bytes_read + value_bytes,
        bytes_written=rotation.bytes_written + value_bytes,
    )


SPEC = KernelSpec(
    name=NAME,
    reference=qk_norm_rope_cache_reference,
    optimized=qk_norm_rope_cache,
    make_inputs=make_inputs,
    cases=(
        Case("one", batch=1, tokens=1, query_heads=1, key_heads=1, dim=2, spare=0, wide=1),
        Case("token", batch=1, tokens=1, query_heads=4, key_heads=2, dim=16, spare=7, wide=0),
        Case("ragged", batch=2, tokens=7, query_heads=3, key_heads=1, dim=22, spare=5, wide=0),
        Case("wide-tables", batch=1, tokens=5, query_heads=2, key_heads=1, dim=32, spare=3, wide=1),
        *_rope.talker_cases(spare=1008),
    ),
    tolerance=_rope.TOLERANCE,
    cost=cost,
    mutates=("key_cache", "value_cache"),
    sizes=_rope.SIZES | {"spare": Sizes(most=40)},
    values=_rope.VALUES | _rope.WEIGHT_VALUES | {"v": Values(least=-1e4, most=1e4)},
    sweeps=(_rope.talker_sweep(spare=1008),),
    source="Qwen3 attention, transformers.models.qwen3; Su et al., RoFormer, 2021",
)
