"""What the rotating kernels share: tiles of heads and tokens, the norm of a head, the rotation, and their references.

A tile is HEADS x TOKENS rows of one tensor [batch, heads, tokens, dim], each row as two halves of dim / 2 columns, so
that a thread holds what it rotates into each other. HEADS divides the number of heads, so only tokens need a mask.
Where a token's heads lie side by side a tile takes all of them, and where a head's tokens do, it takes those: either
way a tile of a contiguous tensor is one piece of memory.

Cast order, that of an unfused model: the norm's mean square is float32; the normalised value is rounded, multiplied by
the weight and rounded; tables in the dtype of what they rotate make each product round before the sum, float32 ones do
not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Tolerance

from ._rows import DTYPES, narrow

TOLERANCE = {str(dtype).removeprefix("torch."): Tolerance() for dtype in DTYPES}
LARGEST_DIM = 1024
"""A row of it is 16 pairs a thread with 32 lanes; a larger one would not stay in registers."""
WARPS = 4
HEADS_FOR_TABLES = 4
"""Heads of a tile whose tokens lie side by side: with one, tables would be read as often as what they rotate."""
KEPT_PLANS = 4096

T = TypeVar("T")


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, rounded to its dtype, times weight [D]: plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] with its halves rotated by cos and sin [T, D / 2], in the wider of both dtypes: plain PyTorch."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def round_to(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, float32, rounded to DTYPE and float32 again."""
    return narrow(x, DTYPE).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def tile(  # type: ignore[no-untyped-def]
    index, tokens, HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr, BY_TOKEN: tl.constexpr
):
    """Batch entry, heads [ROWS, 1], tokens [ROWS, 1] and their mask of a tile; neighbours are neighbours in memory."""
    token_blocks = tl.cdiv(tokens, TILE_TOKENS)
    head_blocks: tl.constexpr = HEADS // TILE_HEADS
    if BY_TOKEN:
        entry = index // (head_blocks * token_blocks)
        token = (index // head_blocks) % token_blocks * TILE_TOKENS
        head = index % head_blocks * TILE_HEADS
    else:
        entry = index // (head_blocks * token_blocks)
        token = index % token_blocks * TILE_TOKENS
        head = (index // token_blocks) % head_blocks * TILE_HEADS
    row = tl.arange(0, TILE_HEADS * TILE_TOKENS)[:, None]
    token += row // TILE_HEADS
    return entry.to(tl.int64), (head + row % TILE_HEADS).to(tl.int64), token.to(tl.int64), token < tokens


@triton.jit  # type: ignore[untyped-decorator]
def load_halves(pointer, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of the rows that pointer points into, as float32."""
    first = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(pointer + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def store_halves(pointer, first, second, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store both halves, rounded to what pointer points to."""
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer, narrow(first, DTYPE), mask=mask)
    tl.store(pointer + HALF, narrow(second, DTYPE), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def inverse_rms(first, second, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """One over the root mean square of each row, [ROWS, 1]."""
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF) + eps)


@triton.jit  # type: ignore[untyped-decorator]
def norm(first, second, first_weight, second_weight, eps, DTYPE: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves over the root mean square of their row, rounded to DTYPE, times the weight, rounded."""
    scale = inverse_rms(first, second, eps, HALF)
    first = round_to(round_to(first * scale, DTYPE) * first_weight, DTYPE)
    return first, round_to(round_to(second * scale, DTYPE) * second_weight, DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def rotate(first, second, cosine, sine, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves rotated, each product rounded to DTYPE; what tables in a wider dtype need is float32."""
    turned = round_to(first * cosine, DTYPE) - round_to(second * sine, DTYPE)
    return turned, round_to(second * cosine, DTYPE) + round_to(first * sine, DTYPE)


class Tiling(NamedTuple):
    """Heads and tokens of a tile, and how many tiles there are."""

    heads: int
    tokens: int
    programs: int


def tiling(batch: int, heads: int, tokens: int, rows: int, *, by_token: bool) -> Tiling:
    """How a tensor [batch, heads, tokens, dim] is cut into tiles of at most ``rows`` rows, a power of two.

    ``by_token`` says that a token's heads are nearer to each other than a head's tokens.
    """
    # One token at a time is the usual decode; other numbers are not worth a build of the kernel each.
    together = 1 if tokens == 1 else rows
    tile_heads = math.gcd(heads, rows if by_token or tokens == 1 else min(rows, HEADS_FOR_TABLES))
    tile_tokens = min(together, rows // tile_heads)
    return Tiling(tile_heads, tile_tokens, batch * (heads // tile_heads) * triton.cdiv(tokens, tile_tokens))


def rows_for(dim: int, pairs: int) -> tuple[int, int]:
    """Columns of a tile, the power of two from dim / 2 on, and its rows, so that it holds about ``pairs`` pairs."""
    columns = triton.next_power_of_2(dim // 2)
    return columns, max(1, pairs // columns)


def kept(plans: dict[Any, T], look: Any, plan: T) -> T:
    """The plan, kept for the next tensors that look the same; all of them are dropped before they take much memory."""
    if len(plans) >= KEPT_PLANS:
        plans.clear()
    plans[look] = plan
    return plan


def check_heads(kernel: str, cos: Tensor, sin: Tensor, **tensors: Tensor) -> None:
    """Tensors [.., .., .., D] of one dtype and device, and tables of that dtype or float32.

    Raises:
        ValueError: one of them is something else.
    """
    first = next(iter(tensors.values()))
    dtype, dim = first.dtype, first.shape[-1]
    if dtype not in DTYPES:
        raise ValueError(f"{kernel} takes float32, bfloat16 and float16, not {dtype}")
    if dim % 2 or not 2 <= dim <= LARGEST_DIM:
        raise ValueError(f"{kernel} takes an even head dimension from 2 to {LARGEST_DIM}, not {dim}")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device != first.device or tensor.shape[-1] != dim:
            raise ValueError(
                f"{kernel} takes tensors of one dtype, head dimension and device; {name} is {tuple(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device}, {next(iter(tensors))} has {dim} of {dtype} on {first.device}"
            )
    if cos.dtype not in (dtype, torch.float32) or sin.dtype != cos.dtype:
        raise ValueError(f"{kernel} takes cos and sin both of {dtype} or float32, not {cos.dtype} and {sin.dtype}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != dim // 2:
        raise ValueError(
            f"{kernel} takes cos and sin [positions, {dim // 2}]; they are {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def tables(generator: torch.Generator, length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim / 2] of rotary angles; a shift makes those of position 0 differ from 1 and 0."""
    device = generator.device
    frequencies = 1e6 ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    shift = torch.rand((), generator=generator, device=device)
    angles = torch.outer(torch.arange(length, device=device) + shift, frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)
