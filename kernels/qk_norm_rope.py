"""RMS norm and rotation of queries and keys in one launch, forward and backward: for training and prefill.

    q' = rotate(n * w),  n = q / sqrt(mean(q^2) + eps), and k' alike with a weight of its own
    with g the incoming gradient rotated back, u = g * w and r = 1 / sqrt(mean(q^2) + eps):
    dq = r * (u - n * mean(u * n)),  dw = sum over rows of g * n

Forward, a program handles some heads of some tokens of q or k, read and written once. Backward, it goes over a few such
tiles and leaves its share of dw in a buffer, which a small second launch sums in an order that does not change.

Cast order, forward: that of an unfused model, in ``_rope``. Backward is float32, results are rounded once.

Source: Qwen3's attention (query and key norm before the rotation); Zhang and Sennrich, Root Mean Square Layer
Normalization, 2019; Su et al., RoFormer, 2021.
Shapes: B batch, T tokens, Hq and Hk heads, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernbench.spec import Case, Cost, Inputs, KernelSpec

from . import _rope, _rows

NAME = "qk_norm_rope"
PAIRS = 1024
"""Of a tile: with four warps every thread has one access of 16 bytes to each half, in bfloat16."""
# On a GPU nine times the programs that an H200 runs at once, so that the last ones end together.
BACKWARD_PROGRAMS, MOST_TURNS = (2, 2) if _rows.INTERPRETED.value else (6144, 64)
"""Tiles are shared out to so many programs, or to more of them that handle the most each."""
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 512, 16, 8


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`qk_norm_rope`."""
    queries = _rope.rotated(_rope.normed(q, q_weight, eps).transpose(1, 2), cos, sin)
    return queries, _rope.rotated(_rope.normed(k, k_weight, eps).transpose(1, 2), cos, sin)


@triton.jit(do_not_specialize=["tokens", "q_tiles"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_batch, q_token, q_head, k_batch, k_token, k_head,
    tokens, q_tiles, eps, HALF: tl.constexpr, COLUMNS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE_HEADS: tl.constexpr, Q_TILE_TOKENS: tl.constexpr, K_TILE_HEADS: tl.constexpr, K_TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program handles one tile of q [B, T, Hq, D] or k [B, T, Hk, D]; grid is those of q, then those of k.

    q_out and k_out have the shapes of q and k and are contiguous.
    """
    index = tl.program_id(0)
    if index < q_tiles:
        row = Q_HEADS * 2 * HALF
        _rope.norm_and_rotate(
            q, q_batch, q_token, q_head, q_weight, cos, sin, q_out, row * tokens.to(tl.int64), row, 2 * HALF,
            index, 0, tokens, tokens, eps, Q_HEADS, Q_TILE_HEADS, Q_TILE_TOKENS, False, HALF, COLUMNS,
        )  # fmt: skip
    else:
        row = K_HEADS * 2 * HALF
        _rope.norm_and_rotate(
            k, k_batch, k_token, k_head, k_weight, cos, sin, k_out, row * tokens.to(tl.int64), row, 2 * HALF,
            index - q_tiles, 0, tokens, tokens, eps, K_HEADS, K_TILE_HEADS, K_TILE_TOKENS, False, HALF, COLUMNS,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_tiles(  # type: ignore[no-untyped-def]
    dy, dy_batch, dy_head, dy_token, x, x_batch, x_token, x_head, weight, cos, sin, dx, partial,
    start, stop, tokens, eps, HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles start to stop of dx [B, T, HEADS, D], contiguous, and their share of the weight's gradient, partial [D]."""
    column = tl.arange(0, COLUMNS)[None, :]
    whole = tl.zeros([TILE_HEADS * TILE_TOKENS, COLUMNS], tl.int32) + column
    first_weight, second_weight = _rope.load_halves(weight + whole, whole < HALF, HALF)
    first_sum = tl.zeros([TILE_HEADS * TILE_TOKENS, COLUMNS], tl.float32)
    second_sum = tl.zeros([TILE_HEADS * TILE_TOKENS, COLUMNS], tl.float32)
    for index in range(start, stop):
        entry, head, token, is_token = _rope.tile(index, tokens, HEADS, TILE_HEADS, TILE_TOKENS, True)
        mask = is_token & (column < HALF)
        cosine = tl.load(cos + token * HALF + column, mask=mask, other=0.0).to(tl.float32)
        sine = tl.load(sin + token * HALF + column, mask=mask, other=0.0).to(tl.float32)
        source = dy + entry * dy_batch + head * dy_head + token * dy_token + column
        first, second = _rope.load_halves(source, mask, HALF)
        source = x + entry * x_batch + token * x_token + head * x_head + column
        first_x, second_x = _rope.load_halves(source, mask, HALF)
        # Without eps, rows beyond the last token would give NaN to the sums.
        scale = tl.where(is_token, _rope.inverse_rms(first_x, second_x, eps, HALF), 0.0)
        first_x *= scale
        second_x *= scale
        first, second = first * cosine + second * sine, second * cosine - first * sine
        first_sum += first * first_x
        second_sum += second * second_x
        first *= first_weight
        second *= second_weight
        mean = tl.sum(first * first_x + second * second_x, axis=1, keep_dims=True) / (2 * HALF)
        target = dx + ((entry * tokens + token) * HEADS + head) * (2 * HALF) + column
        first = scale * (first - first_x * mean)
        _rope.store_halves(target, first, scale * (second - second_x * mean), mask, HALF)
    column = tl.arange(0, COLUMNS)
    tl.store(partial + column, tl.sum(first_sum, axis=0), mask=column < HALF)
    tl.store(partial + HALF + column, tl.sum(second_sum, axis=0), mask=column < HALF)


@triton.jit(do_not_specialize=["tokens", "turns", "q_tiles", "k_tiles", "q_programs"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, dq, dk, partial,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, q_batch, q_token, q_head, k_batch, k_token, k_head,
    tokens, turns, q_tiles, k_tiles, q_programs, eps,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE_HEADS: tl.constexpr, Q_TILE_TOKENS: tl.constexpr, K_TILE_HEADS: tl.constexpr, K_TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program handles ``turns`` tiles of q or k and one row of partial [programs, D]; those of q come first.

    dq_out [B, Hq, T, D] and dk_out [B, Hk, T, D] arrive; dq [B, T, Hq, D] and dk [B, T, Hk, D] are contiguous.
    """
    program = tl.program_id(0)
    partial += program.to(tl.int64) * (2 * HALF)
    if program < q_programs:
        start = program * turns
        _backward_tiles(
            dq_out, dq_batch, dq_head, dq_token, q, q_batch, q_token, q_head, q_weight, cos, sin, dq, partial,
            start, tl.minimum(start + turns, q_tiles), tokens, eps, Q_HEADS, Q_TILE_HEADS, Q_TILE_TOKENS, HALF, COLUMNS,
        )  # fmt: skip
    else:
        start = (program - q_programs) * turns
        _backward_tiles(
            dk_out, dk_batch, dk_head, dk_token, k, k_batch, k_token, k_head, k_weight, cos, sin, dk, partial,
            start, tl.minimum(start + turns, k_tiles), tokens, eps, K_HEADS, K_TILE_HEADS, K_TILE_TOKENS, HALF, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_programs", "programs"])  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    partial, q_gradient, k_gradient, q_programs, programs, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program sums COLUMNS columns of the rows of q or k in partial [programs, D]; grid is (D / COLUMNS, 2)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_key = tl.program_id(1)
    stop = tl.where(is_key == 1, programs, q_programs)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(is_key * q_programs, stop, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row.to(tl.int64) * DIM + column, mask=(row < stop) & (column < DIM), other=0.0)
    gradient = tl.sum(total, axis=0, keep_dims=True)
    DTYPE: tl.constexpr = q_gradient.dtype.element_ty
    if is_key == 1:
        tl.store(k_gradient + column, _rows.narrow(gradient, DTYPE), mask=column < DIM)
    else:
        tl.store(q_gradient + column, _rows.narrow(gradient, DTYPE), mask=column < DIM)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k normed per head and rotated by their tokens' rows of the tables; differentiable once, but for the tables.

    Args:
        q: queries [B, T, Hq, D], D even, float32, bfloat16 or float16, any strides; copied only if it has gaps in D.
        k: keys [B, T, Hk, D], as q.
        q_weight: of the norm, [D].
        k_weight: of the norm, [D].
        cos: [T, D / 2], in the dtype of q or float32.
        sin: as cos.
        eps: added to the mean square.

    Returns:
        [B, Hq, T, D] and [B, Hk, T, D], in memory as [B, T, H, D].

    Raises:
        ValueError: a tensor has another shape, dtype or device than said here, or a table needs a gradient.
    """
    both: tuple[Tensor, Tensor]
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{NAME} has no gradient for cos and sin; detach them")
    given = (q, k, q_weight, k_weight)
    if _rows.watched():
        both = torch.ops.kernbench.qk_norm_rope.default(*given, cos, sin, eps)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        both = _QKNormRope.apply(*given, cos, sin, eps)  # type: ignore[no-untyped-call]
    else:
        both = _forward(*given, cos, sin, eps)
    return both


class _Plan(NamedTuple):
    """How tensors of certain shapes, strides, dtypes and devices are launched; ``copied`` if some have gaps in D."""

    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    q_tiling: _rope.Tiling
    k_tiling: _rope.Tiling
    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    copied: bool


_plans: dict[Any, _Plan] = {}


def _plan(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> _Plan:
    # Checks take longer than the launch, so they are made once for all tensors that look like these.
    look = (
        q.shape, q.stride(), k.shape, k.stride(), q_weight.shape, k_weight.shape, cos.shape, sin.shape,
        q.dtype, k.dtype, q_weight.dtype, k_weight.dtype, cos.dtype, sin.dtype,
        q.device, k.device, q_weight.device, k_weight.device, cos.device, sin.device,
    )  # fmt: skip
    plan = _plans.get(look)
    if plan is None:
        _check(q, k, q_weight, k_weight, cos, sin)
        plan = _rope.kept(_plans, look, _planned(q, k))
    return plan


def _planned(q: Tensor, k: Tensor) -> _Plan:
    batch, tokens, q_heads, dim = q.shape
    k_heads = k.shape[2]
    columns, rows = _rope.rows_for(dim, PAIRS)
    q_tiling = _rope.tiling(batch, q_heads, tokens, rows, by_token=True)
    k_tiling = _rope.tiling(batch, k_heads, tokens, rows, by_token=True)
    return _Plan(
        q_strides=(tokens * q_heads * dim, dim, q_heads * dim, 1),
        k_strides=(tokens * k_heads * dim, dim, k_heads * dim, 1),
        q_tiling=q_tiling,
        k_tiling=k_tiling,
        grid=(q_tiling.programs + k_tiling.programs,),
        numbers=(*q.stride()[:3], *k.stride()[:3], tokens, q_tiling.programs),
        constants=(dim // 2, columns, q_heads, k_heads, *q_tiling[:2], *k_tiling[:2]),
        copied=any(x.stride(3) != 1 and x.numel() for x in (q, k)),
    )


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{NAME} takes q and k [batch, tokens, heads, dim] of one batch and as many tokens; they are "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    _rope.check_heads(NAME, cos, sin, q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    if q_weight.dim() != 1 or k_weight.dim() != 1:
        raise ValueError(
            f"{NAME} takes weights [{q.shape[3]}], not {tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        )
    if cos.shape[0] != q.shape[1]:
        raise ValueError(f"{NAME} takes tables of one row for each of the {q.shape[1]} tokens, not of {cos.shape[0]}")


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    plan = _plan(q, k, q_weight, k_weight, cos, sin)
    if plan.copied:
        return _forward(q.contiguous(), k.contiguous(), q_weight, k_weight, cos, sin, eps)
    batch, tokens, heads, dim = q.shape
    q_out = q.new_empty_strided((batch, heads, tokens, dim), plan.q_strides)
    k_out = k.new_empty_strided((batch, k.shape[2], tokens, dim), plan.k_strides)
    if plan.grid[0]:
        with _rows.on_device(q):
            _forward_kernel[plan.grid](
                q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), q_out, k_out,
                *plan.numbers, eps, *plan.constants, num_warps=_rope.WARPS,
            )  # fmt: skip
    return q_out, k_out


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _plan(q, k, q_weight, k_weight, cos, sin)
    if plan.copied:
        return _backward(dq_out, dk_out, q.contiguous(), k.contiguous(), q_weight, k_weight, cos, sin, eps)
    dq_out, dk_out = (dy if dy.stride(3) == 1 else dy.contiguous() for dy in (dq_out, dk_out))
    dim, tiles = q.shape[3], (plan.q_tiling.programs, plan.k_tiling.programs)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight, dk_weight = q_weight.new_empty((dim,)), k_weight.new_empty((dim,))
    turns = min(triton.cdiv(sum(tiles), BACKWARD_PROGRAMS) or 1, MOST_TURNS)
    q_programs, k_programs = (triton.cdiv(count, turns) for count in tiles)
    programs = q_programs + k_programs
    partial = torch.empty((programs, dim), dtype=torch.float32, device=q.device)
    with _rows.on_device(q):
        if programs:
            _backward_kernel[(programs,)](
                dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
                dq, dk, partial, *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
                q.shape[1], turns, *tiles, q_programs, eps, *plan.constants, num_warps=_rope.WARPS,
            )  # fmt: skip
        _sum_kernel[(triton.cdiv(dim, SUM_COLUMNS), 2)](
            partial, dq_weight, dk_weight, q_programs, programs, dim, SUM_ROWS, SUM_COLUMNS, num_warps=SUM_WARPS
        )
    return dq, dk, dq_weight, dk_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    backward: Any = torch.ops.kernbench.qk_norm_rope_backward.default if _rows.watched() else _backward
    return (*backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps), None, None, None)


class _QKNormRope(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _keep(ctx, inputs, inputs[:2])
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dq_out, dk_out)


def _like_outputs(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape).transpose(1, 2), k.new_empty(k.shape).transpose(1, 2)


def _like_gradients(dq_out: Tensor, dk_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_GIVEN = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps"
for _name, _schema, _implementation, _fake in (
    (NAME, f"({_GIVEN}) -> (Tensor, Tensor)", _forward, _like_outputs),
    (
        f"{NAME}_backward", f"(Tensor dq_out, Tensor dk_out, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
        _backward, _like_gradients,
    ),
):  # fmt: skip
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kernbench::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(f"kernbench::{NAME}", _gradients, setup_context=_keep, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Projections with a scale of their own for q and k, weights around one; tables are float32 in wide cases.

    eps is larger than in models, so that it matters.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, dim = case["batch"], case["tokens"], case["dim"]

    def normal(*shape: int, scale: float, mean: float) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale + mean
        return drawn.to(dtype).requires_grad_()

    cos, sin = _rope.tables(generator, tokens, dim, dtype, wide=case["wide"])
    return {
        "q": normal(batch, tokens, case["query_heads"], dim, scale=2.0, mean=0.3),
        "k": normal(batch, tokens, case["key_heads"], dim, scale=0.5, mean=-0.1),
        "q_weight": normal(dim, scale=0.2, mean=1.0), "k_weight": normal(dim, scale=0.2, mean=1.0),
        "cos": cos, "sin": sin, "eps": 1e-2,
    }  # fmt: skip


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """q, k, the tables and weights read, q' and k' written."""
    return _rope.cost_of(case, dtype, flops=7.0, vectors=2)


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Incoming gradients, q, k, tables and weights read, those of q and k written; those of the weights are small."""
    return _rope.cost_of(case, dtype, flops=20.0, reads=2, vectors=2)


SPEC = KernelSpec(
    name=NAME,
    reference=qk_norm_rope_reference,
    optimized=qk_norm_rope,
    make_inputs=make_inputs,
    cases=(
        Case("one", batch=1, tokens=1, query_heads=1, key_heads=1, dim=2, wide=1),
        Case("token", batch=1, tokens=1, query_heads=3, key_heads=1, dim=16, wide=0),
        Case("ragged", batch=2, tokens=37, query_heads=2, key_heads=1, dim=22, wide=0),
        *_rope.talker_cases(),
    ),
    tolerance=_rope.TOLERANCE,
    cost=cost,
    backward_cost=backward_cost,
    sizes=_rope.SIZES,
    values=_rope.VALUES | _rope.WEIGHT_VALUES,
    differentiable=True,
    source="Qwen3 attention, transformers.models.qwen3; Zhang and Sennrich, 2019; Su et al., RoFormer, 2021",
)
