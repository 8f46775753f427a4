"""Rotary position embedding of queries and keys in one launch, forward and backward.

    rotate(x) = [x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2 of a head
    the gradient is rotated back: sin changes its sign

A program handles some heads of some tokens of q or k, read and written once. Heads, tokens and batch entries may lie
any distance apart, so transposed views of [B, T, H, D] are read as they are, and results lie in memory as inputs do.

Cast order: tables in the dtype of q and k make each product round before the sum, as in PyTorch; float32 ones do not.

Source: Su et al., RoFormer, 2021, with the halves that Llama rotates.
Shapes: B batch, T tokens, Hq and Hk heads, D head dimension.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes

from . import _rope, _rows

PAIRS = 1024
"""Of a tile: with four warps every thread has an access of 16 bytes to each half, in bfloat16."""


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`rope`."""
    return _rope.rotated(q, cos, sin), _rope.rotated(k, cos, sin)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_tile(  # type: ignore[no-untyped-def]
    x, x_batch, x_head, x_token, out, out_batch, out_head, out_token, cos, sin, index, tokens,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr, BY_TOKEN: tl.constexpr,
    INVERSE: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of x into out, both [B, HEADS, T, D]."""
    entry, head, token, is_token = _rope.tile(index, tokens, HEADS, TILE_HEADS, TILE_TOKENS, BY_TOKEN)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = is_token & (column < HALF)
    # Pointers of the tile's shape give the tables its layout: nothing is exchanged between threads.
    cosine = tl.load(cos + token * HALF + column, mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * HALF + column, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    source = x + entry * x_batch + head * x_head + token * x_token + column
    first, second = _rope.load_halves(source, mask, HALF)
    first, second = _rope.rotate(first, second, cosine, sine, cos.dtype.element_ty)
    target = out + entry * out_batch + head * out_head + token * out_token + column
    _rope.store_halves(target, first, second, mask, HALF)


@triton.jit(do_not_specialize=["tokens", "q_tiles"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token, tokens, q_tiles,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE_HEADS: tl.constexpr, Q_TILE_TOKENS: tl.constexpr, Q_BY_TOKEN: tl.constexpr,
    K_TILE_HEADS: tl.constexpr, K_TILE_TOKENS: tl.constexpr, K_BY_TOKEN: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program handles one tile; grid is the tiles of q [B, Hq, T, D], then those of k [B, Hk, T, D]."""
    index = tl.program_id(0)
    if index < q_tiles:
        _rotate_tile(
            q, q_batch, q_head, q_token, q_out, q_out_batch, q_out_head, q_out_token, cos, sin, index, tokens,
            Q_HEADS, Q_TILE_HEADS, Q_TILE_TOKENS, Q_BY_TOKEN, INVERSE, HALF, COLUMNS,
        )  # fmt: skip
    else:
        _rotate_tile(
            k, k_batch, k_head, k_token, k_out, k_out_batch, k_out_head, k_out_token, cos, sin, index - q_tiles, tokens,
            K_HEADS, K_TILE_HEADS, K_TILE_TOKENS, K_BY_TOKEN, INVERSE, HALF, COLUMNS,
        )  # fmt: skip


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by their tokens' rows of the tables; differentiable in q and k, twice too.

    Args:
        q: [B, Hq, T, D], D even, float32, bfloat16 or float16, any strides; copied only if it has gaps in D.
        k: [B, Hk, T, D], as q.
        cos: [T, D / 2], in the dtype of q or float32.
        sin: as cos.

    Returns:
        Both rotated, in memory as q and k: one of [B, T, H, D] transposed gives another.

    Raises:
        ValueError: a tensor has another shape, dtype or device than said here, or a table needs a gradient.
    """
    return _rotated(q, k, cos, sin, False)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor]
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope has no gradient for cos and sin; detach them")
    if _rows.watched():
        both = torch.ops.kernbench.rope.default(q, k, cos, sin, inverse)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        both = _Rope.apply(q, k, cos, sin, inverse)  # type: ignore[no-untyped-call]
    else:
        both = _launch(q, k, cos, sin, inverse)
    return both


class _Plan(NamedTuple):
    """How tensors of certain shapes, strides, dtypes and devices are launched; ``copied`` if some have gaps in D."""

    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    copied: bool


_plans: dict[Any, _Plan] = {}


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    # Checks take longer than the launch, so they are made once for all tensors that look like these.
    look = (
        q.shape, q.stride(), k.shape, k.stride(), cos.shape, sin.shape, q.dtype, k.dtype, cos.dtype, sin.dtype,
        q.device, k.device, cos.device, sin.device,
    )  # fmt: skip
    plan = _plans.get(look)
    if plan is None:
        _check(q, k, cos, sin)
        plan = _rope.kept(_plans, look, _planned(q, k, q_out, k_out))
    if plan.copied:
        return _launch(q.contiguous(), k.contiguous(), cos, sin, inverse)
    if plan.grid[0]:
        with _rows.on_device(q):
            _kernel[plan.grid](
                q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, *plan.numbers, *plan.constants, inverse,
                num_warps=_rope.WARPS,
            )  # fmt: skip
    return q_out, k_out


def _planned(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor) -> _Plan:
    batch, q_heads, tokens, dim = q.shape
    k_heads = k.shape[1]
    columns, rows = _rope.rows_for(dim, PAIRS)
    q_by_token, k_by_token = (x.stride(2) >= x.stride(1) for x in (q, k))
    q_tiling = _rope.tiling(batch, q_heads, tokens, rows, by_token=q_by_token)
    k_tiling = _rope.tiling(batch, k_heads, tokens, rows, by_token=k_by_token)
    strides = (stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3])
    return _Plan(
        grid=(q_tiling.programs + k_tiling.programs,),
        numbers=(*strides, tokens, q_tiling.programs),
        constants=(dim // 2, columns, q_heads, k_heads, *q_tiling[:2], q_by_token, *k_tiling[:2], k_by_token),
        copied=any(x.stride(3) != 1 and x.numel() for x in (q, k)),
    )  # fmt: skip


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"rope takes q and k [batch, heads, tokens, dim] of one batch and as many tokens; they are "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    _rope.check_heads("rope", cos, sin, q=q, k=k)
    if cos.shape[0] != q.shape[2]:
        raise ValueError(f"rope takes tables of one row for each of the {q.shape[2]} tokens, not of {cos.shape[0]}")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (*_rotated(dq, dk, cos, sin, not ctx.inverse), None, None, None)


class _Rope(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _keep(ctx, inputs, inputs[:2])
        return _launch(*inputs)

    backward = staticmethod(_gradients)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("rope", _launch, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "kernbench::rope", lambda q, k, cos, sin, inverse: (torch.empty_like(q), torch.empty_like(k)), lib=_LIBRARY
)
torch.library.register_autograd("kernbench::rope", _gradients, setup_context=_keep, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Heads, in cases by_token as projections leave them: views of [B, T, H, D]. Tables are float32 in wide cases."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, dim = case["batch"], case["tokens"], case["dim"]

    def heads(count: int, scale: float, mean: float) -> Tensor:
        outer = (tokens, count) if case["by_token"] else (count, tokens)
        x = (torch.randn((batch, *outer, dim), generator=generator, device=device) * scale + mean).to(dtype)
        return (x.transpose(1, 2) if case["by_token"] else x).requires_grad_()

    cos, sin = _rope.tables(generator, tokens, dim, dtype, wide=case["wide"])
    q, k = heads(case["query_heads"], 2.0, 0.3), heads(case["key_heads"], 0.5, -0.1)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """q, k and the tables read, q' and k' written; backward the same of their gradients."""
    return _rope.cost_of(case, dtype, flops=3.0)


def _liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In place where heads are by token, else in a copy. It reads half of each doubled table, so these will do."""
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    # From 0.8 on it takes tables of half the width for a head of which half is to be rotated, unless it is told.
    told = (None, 1, q.shape[-1]) if _takes_rotary_dim(LigerRopeFunction) else ()
    rotated: tuple[Tensor, ...] = LigerRopeFunction.apply(q, k, cos[None], sin[None], *told)
    return rotated[0], rotated[1]


@cache
def _takes_rotary_dim(function: Any) -> bool:
    return "rotary_dim" in signature(function.forward).parameters


LLAMA = {"batch": 4, "tokens": 4096, "query_heads": 32, "key_heads": 8, "dim": 128}

SPEC = KernelSpec(
    name="rope",
    reference=rope_reference,
    optimized=rope,
    make_inputs=make_inputs,
    cases=(
        Case("one", batch=1, tokens=1, query_heads=1, key_heads=1, dim=2, by_token=0, wide=1),
        Case("token", batch=1, tokens=1, query_heads=4, key_heads=2, dim=16, by_token=1, wide=0),
        Case("ragged", batch=2, tokens=7, query_heads=3, key_heads=1, dim=22, by_token=1, wide=0),
        Case("heads-apart", batch=1, tokens=37, query_heads=4, key_heads=1, dim=32, by_token=0, wide=1),
        *_rope.talker_cases(by_token=1),
        Case("llama", large=True, **LLAMA, by_token=1, wide=0),
        Case("llama-heads-apart", large=True, **LLAMA, by_token=0, wide=0),
    ),
    tolerance=_rope.TOLERANCE,
    cost=cost,
    backward_cost=cost,
    sizes=_rope.SIZES | {"by_token": Sizes(most=1)},
    values=_rope.VALUES,
    sweeps=(_rope.talker_sweep(by_token=1),),
    differentiable=True,
    peers={"liger": _liger},
    source="Su et al., RoFormer, 2021; half-split as in transformers.models.llama",
)
