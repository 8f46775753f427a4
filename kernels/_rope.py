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

from kernbench.spec import Case, Cost, Sizes, Sweep, Tolerance, Values

from ._rows import DTYPES, narrow

TOLERANCE = {str(dtype).removeprefix("torch."): Tolerance() for dtype in DTYPES}
LARGEST_DIM = 1024
"""A row of it is 16 pairs a thread with 32 lanes; a larger one would not stay in registers."""
WARPS = 4
HEADS_FOR_TABLES = 4
"""Heads of a tile whose tokens lie side by side: with one, tables would be read as often as what they rotate."""
KEPT_PLANS = 4096
TALKER_TOKENS = (1, 16, 512, 16384)

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


@triton.jit  # type: ignore[untyped-decorator]
def norm_and_rotate(  # type: ignore[no-untyped-def]
    x, x_batch, x_token, x_head, weight, cos, sin, target, target_batch, target_token, target_head,
    index, start, tokens, length, eps, HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    CACHED: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of x [B, T, HEADS, D], normed and rotated by the tables' rows from ``start`` on, into target.

    A token goes to its own place there or, if ``CACHED``, to that of its row. Rows from ``length`` on are NaN.
    """
    entry, head, token, is_token = tile(index, tokens, HEADS, TILE_HEADS, TILE_TOKENS, True)
    column = tl.arange(0, COLUMNS)[None, :]
    place = start + token
    mask = is_token & (column < HALF)
    inside = mask & (place >= 0) & (place < length)
    # Pointers of the tile's shape give tables and weight its layout: nothing is exchanged between threads.
    cosine = tl.load(cos + place * HALF + column, mask=inside, other=float("nan")).to(tl.float32)
    sine = tl.load(sin + place * HALF + column, mask=inside, other=float("nan")).to(tl.float32)
    source = x + entry * x_batch + token * x_token + head * x_head + column
    first, second = load_halves(source, mask, HALF)
    first_weight, second_weight = load_halves(weight + tl.zeros_like(place) + column, mask, HALF)
    first, second = norm(first, second, first_weight, second_weight, eps, x.dtype.element_ty, HALF)
    first, second = rotate(first, second, cosine, sine, cos.dtype.element_ty)
    target += entry * target_batch + head * target_head + column
    if CACHED:
        store_halves(target + place * target_token, first, second, inside, HALF)
    else:
        store_halves(target + token * target_token, first, second, mask, HALF)


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


def tables(
    generator: torch.Generator, length: int, dim: int, dtype: torch.dtype, *, wide: int
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim / 2] of rotary angles, float32 if ``wide``; a shift makes position 0 turn something."""
    device = generator.device
    frequencies = 1e6 ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    shift = torch.rand((), generator=generator, device=device)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions + shift, frequencies)
    dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
    return angles.cos().to(dtype), angles.sin().to(dtype)


def cost_of(case: Case, dtype: torch.dtype, *, flops: float, reads: int = 1, vectors: int = 0) -> Cost:
    """Tables and ``vectors`` of D read, what has the size of q and k ``reads`` times and written once.

    ``flops`` are those of an element.
    """
    tokens, dim = case["tokens"], case["dim"]
    elements = case["batch"] * tokens * (case["query_heads"] + case["key_heads"]) * dim
    table_itemsize = max(4, dtype.itemsize) if case["wide"] else dtype.itemsize
    return Cost(
        flops=flops * elements,
        bytes_read=float(dtype.itemsize * (reads * elements + vectors * dim) + table_itemsize * tokens * dim),
        bytes_written=float(dtype.itemsize * elements),
    )


def talker_cases(**more: int) -> tuple[Case, ...]:
    """Layers of the TTS talker and of its code predictor, which have the same heads: one token, and many."""
    return tuple(Case(f"talker-{tokens}", large=True, **_talker(tokens, **more)) for tokens in TALKER_TOKENS)


def talker_sweep(**more: int) -> Sweep:
    """The sizes of :func:`talker_cases` by tokens."""
    return Sweep(
        size="tokens",
        values=TALKER_TOKENS,
        sizes=lambda tokens: _talker(tokens, **more),
        fixed="16 and 8 heads of 128 features, the talker's",
    )


def _talker(tokens: int, **more: int) -> dict[str, int]:
    return {"batch": 1, "tokens": tokens, "query_heads": 16, "key_heads": 8, "dim": 128, "wide": 0, **more}


SIZES = {
    "batch": Sizes(most=3),
    "tokens": Sizes(most=70, block=16),
    "query_heads": Sizes(least=1, most=6),
    "key_heads": Sizes(least=1, most=4),
    "dim": Sizes(least=2, most=136, multiple_of=2),
    "wide": Sizes(most=1),
}
VALUES = {
    **dict.fromkeys(("q", "k"), Values(least=-1e4, most=1e4)),
    **dict.fromkeys(("cos", "sin"), Values(least=-1.0, most=1.0)),
}
WEIGHT_VALUES = dict.fromkeys(("q_weight", "k_weight"), Values(least=-1e2, most=1e2))
