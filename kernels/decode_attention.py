"""Attention of one new token over a cache: head norms, rotation, cache write and grouped queries in one launch.

    q' = rotate(q / rms(q) * q_weight),  k' = rotate(k / rms(k) * k_weight)
    y = softmax(q' K^T / sqrt(D)) V over the cache, with k' and v written to its row ``position``

A program handles one query head and a share of the positions so far; the shares follow the position, which is read on
the device, so that one CUDA graph serves all positions. Slots of a tile keep a maximum each, and meet once at the end.
More shares than one of a head are combined, in order, by the program of them that arrives last at the head's counter,
or without counters by a second launch. The cache is not read before the wait, but asked into the L2 cache, where
nothing can be out of date.

Cast order, that of an unfused model: the norm's two roundings, those of the rotation if the tables have the dtype of
the row, and one of the result; scores and weights stay float32.

Source: Qwen3's attention (query and key norm before the rotation); Su et al., RoFormer, 2021; Dao et al.,
Flash-Decoding, 2023 (shares of the cache).
Shapes: Hq query heads, Hk key and value heads, D head dimension, L length of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _attend, _decode, _rope, _rows
from ._blocks import blocks_in

LARGEST_DIM = 256
COMBINE_WARPS = 4
LINE_BYTES = 128
"""Of the L2 cache."""


class Shares(NamedTuple):
    """How the attention of one token is cut into programs; numbers only, so that an operator can take it.

    Attributes:
        shares: of the positions so far, at most; a power of two.
        tokens: that a program handles at once, and the least that a share has; a power of two.
        warps: of a program.
        overlap: of :mod:`_decode`, ``PLAIN``, ``LATE`` or ``EARLY``.
    """

    shares: int
    tokens: int
    warps: int
    overlap: int = _decode.EARLY


ONE_SHARE = 128
"""Rows of a cache up to which combining shares costs more than they save."""
CONFIGURATIONS = tuple(
    Shares(shares, tokens, warps) for shares in (1, 2, 4, 8, 16) for tokens in (16, 32, 64) for warps in (2, 4, 8)
)
"""What is worth measuring on a GPU; caches of 1024 rows at positions 64 and 512, and of 17."""


def shares_for(length: int) -> Shares:
    """A tile of 32 rows is 64 bytes a thread; eight shares of a cache of 1024 rows are 128 programs for 16 heads."""
    if length <= ONE_SHARE:
        # The new token is in no tile: of 17 rows 16 are read.
        return Shares(1, 16 if length <= 17 else 32, 4)
    return Shares(min(8, triton.next_power_of_2(blocks_in(length, ONE_SHARE))), 32, 4)


def decode_attention_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    position: Tensor, eps: float, arrived: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`decode_attention`, of which it counts nothing in ``arrived``."""
    kv_heads, length, dim = key_cache.shape
    rows = qkv.view(-1, 1, dim)
    q, k, v = torch.split(rows, [rows.shape[0] - 2 * kv_heads, kv_heads, kv_heads])
    cosine, sine = cos[position], sin[position]
    query = _rope.rotated(_rope.normed(q, q_weight, eps), cosine, sine)
    key_cache.index_copy_(1, position, _rope.rotated(_rope.normed(k, k_weight, eps), cosine, sine))
    value_cache.index_copy_(1, position, v)
    seen = torch.arange(length, device=qkv.device) <= position
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query[None], key_cache[None], value_cache[None], attn_mask=seen[None], enable_gqa=True
    )
    return mixed.reshape(-1)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, position, arrived, y, partial, scale, eps, length,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    SHARES: tl.constexpr, TOKENS: tl.constexpr, COUNTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles one share of one of HEADS query heads; grid is HEADS * SHARES.

    qkv has HEADS + 2 * HEADS / GROUP rows of DIM, the caches are [HEADS / GROUP, length, DIM]. The result goes to y
    [HEADS, DIM], or of more shares than one to partial: mixed values, weights and largest scores [HEADS, SHARES, ...].
    Where shares are COUNTED in arrived [HEADS], the last of a head combines them.
    """
    _decode.started(OVERLAP)
    head = tl.program_id(0).to(tl.int64) // SHARES
    kv_head = head // GROUP
    column = tl.arange(0, COLUMNS)
    mask = column < DIM
    HALF: tl.constexpr = DIM // 2
    turned = tl.where(column < HALF, column + HALF, column - HALF)
    q_factor = tl.load(q_weight + column, mask=mask, other=0.0).to(tl.float32)
    q_turned = tl.load(q_weight + turned, mask=mask, other=0.0).to(tl.float32)
    k_factor = tl.load(k_weight + column, mask=mask, other=0.0).to(tl.float32)
    k_turned = tl.load(k_weight + turned, mask=mask, other=0.0).to(tl.float32)
    key_cache += kv_head * length * DIM
    value_cache += kv_head * length * DIM
    if OVERLAP > 0:
        # This may be the position of a token before, which asks for nearly the same rows.
        first, _ = _attend.share(tl.load(position, volatile=True).to(tl.int32), SHARES, TOKENS)
        _attend.ask_for(key_cache, first, length, DIM, LINES, TOKENS)
        _attend.ask_for(value_cache, first, length, DIM, LINES, TOKENS)
    _decode.wait(OVERLAP)

    place = tl.load(position).to(tl.int32)
    first, end = _attend.share(place, SHARES, TOKENS)
    old = tl.minimum(tl.minimum(end, place), length)
    slot = tl.arange(0, TOKENS)
    # What lies behind the position was never written, and may be anything. With one share its keys are read all the
    # same: where they lie does not depend on the position, which is on its way.
    keys = _attend.rows(key_cache, first + slot, length if SHARES == 1 else old, column, mask, DIM)
    values = _attend.rows(value_cache, first + slot, old, column, mask, DIM)

    row = place + tl.zeros_like(column)
    in_table = mask & (row >= 0) & (row < length)
    place_wide = place.to(tl.int64)
    frequency = place_wide * HALF + column % HALF
    cosine = tl.load(cos + frequency, mask=in_table, other=0.0).to(tl.float32)
    sine = tl.load(sin + frequency, mask=in_table, other=0.0).to(tl.float32)
    sine = tl.where(column < HALF, -sine, sine)
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    PRODUCT: tl.constexpr = DTYPE if cos.dtype.element_ty == DTYPE else tl.float32
    query = _attend.rotated_head(
        qkv + head * DIM, q_factor, q_turned, cosine, sine, column, turned, mask, eps, DIM, DTYPE, PRODUCT
    )
    new = qkv + (HEADS + kv_head) * DIM
    new_key = _attend.rotated_head(
        new, k_factor, k_turned, cosine, sine, column, turned, mask, eps, DIM, DTYPE, PRODUCT
    )
    new_value = tl.load(new + (HEADS // GROUP) * DIM + column, mask=mask, other=0.0).to(tl.float32)
    # Of the group's heads the first one writes, and of its shares the one with the position.
    owns = in_table & (row >= first) & (row < end) & (column < tl.where(head % GROUP == 0, DIM, 0))
    tl.store(key_cache + place_wide * DIM + column, new_key.to(DTYPE), mask=owns)
    tl.store(value_cache + place_wide * DIM + column, new_value.to(DTYPE), mask=owns)

    largest = tl.where(first + slot < old, tl.sum(keys * query[None, :], 1) * scale, float("-inf"))
    weights = tl.full([TOKENS], 1.0, tl.float32)
    mixed = values
    for start in range(first + TOKENS, old, TOKENS):
        keys = _attend.rows(key_cache, start + slot, old, column, mask, DIM)
        values = _attend.rows(value_cache, start + slot, old, column, mask, DIM)
        scores = tl.where(start + slot < old, tl.sum(keys * query[None, :], 1) * scale, float("-inf"))
        larger = tl.maximum(largest, scores)
        kept = tl.exp(largest - _attend.pivot(larger))
        added = tl.exp(scores - _attend.pivot(larger))
        weights = weights * kept + added
        mixed = mixed * kept[:, None] + values * added[:, None]
        largest = larger
    largest, weights, mixed = _attend.met(largest, weights, mixed)
    score = tl.where((place >= first) & (place < end), tl.sum(query * new_key) * scale, float("-inf"))
    larger = tl.maximum(largest, score)
    kept = tl.exp(largest - _attend.pivot(larger))
    added = tl.exp(score - _attend.pivot(larger))
    weights = weights * kept + added
    mixed = mixed * kept + new_value * added
    if SHARES == 1:
        tl.store(y + head * DIM + column, _decode.round_to(mixed / weights, DTYPE).to(DTYPE), mask=mask)
    else:
        share = tl.program_id(0).to(tl.int64)
        tl.store(partial + share * DIM + column, mixed, mask=mask)
        tl.store(partial + HEADS * SHARES * DIM + share, weights)
        tl.store(partial + HEADS * SHARES * (DIM + 1) + share, larger)
        if COUNTED:
            _attend.combine_when_last(arrived, partial, y, head, HEADS, DIM, COLUMNS, SHARES)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial, y, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program combines the shares of one head; grid is HEADS. Arguments as of the kernel in front."""
    _decode.started(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    _decode.wait(OVERLAP)
    _attend.combine(partial, y, head, HEADS, DIM, COLUMNS, SHARES)


def decode_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    position: Tensor, eps: float, arrived: Tensor | None = None, *, shares: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the token at ``position``, [Hq * D]; writes its key and value to the caches. All contiguous.

    Norm weights may not be written by a kernel that launches early as this one does; they are read before the wait.

    Args:
        qkv: [(Hq + 2 * Hk) * D], the heads of q, then those of k, then those of v.
        q_weight: [D], k_weight likewise.
        cos: [L, D / 2], or longer, sin likewise; both of one floating dtype.
        key_cache: [Hk, L, D], value_cache likewise; rows before the position are read, that at the position is written.
        position: [1] int64, from 0 to L - 1.
        eps: added to the mean square of a head.
        arrived: [Hq] int32 or longer, zeros, and zeros again after; with it more shares than one take no second launch.
            Launches that may run at once need one each.
        shares: a :class:`Shares`, to measure others than :func:`shares_for` gives.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    call = _OPERATOR if _rows.watched() else _launch
    y: Tensor = call(qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, position, eps, arrived, shares)
    return y


def _launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    position: Tensor, eps: float, arrived: Tensor | None = None, shares: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    kv_heads, length, dim = key_cache.shape
    heads = qkv.numel() // max(1, dim) - 2 * kv_heads
    _check(qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, position, arrived, heads)
    counted = arrived is not None
    shared, combined = _plans(heads, kv_heads, length, dim, qkv.itemsize, counted, tuple(shares) if shares else None)
    y = torch.empty(heads * dim, dtype=qkv.dtype, device=qkv.device)
    partial = y
    if shared.programs > heads:
        partial = torch.empty(shared.programs * (dim + 2), dtype=torch.float32, device=qkv.device)
    _decode.launch(
        _kernel, shared, qkv.device,
        qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, position,
        position if arrived is None else arrived, y, partial, dim**-0.5, eps, length,
    )  # fmt: skip
    if combined:
        _decode.launch(_combine_kernel, combined, qkv.device, partial, y)
    return y


@lru_cache(maxsize=1024)
def _plans(
    heads: int, kv_heads: int, length: int, dim: int, itemsize: int, counted: bool, shares: tuple[int, ...] | None
) -> tuple[_decode.Plan, _decode.Plan | None]:
    """The launch over all shares, and that which combines more than one if nobody counts them."""
    chosen = Shares(*shares) if shares else shares_for(length)
    columns, lines = triton.next_power_of_2(dim), triton.next_power_of_2(blocks_in(dim * itemsize, LINE_BYTES))
    shared = (heads, heads // kv_heads, dim, columns, lines, chosen.shares, chosen.tokens, counted)
    combined = _decode.Plan(heads, (heads, dim, columns, chosen.shares), COMBINE_WARPS, chosen.overlap)
    return (
        _decode.Plan(heads * chosen.shares, shared, chosen.warps, chosen.overlap),
        combined if chosen.shares > 1 and not counted else None,
    )


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    position: Tensor, arrived: Tensor | None, heads: int,
) -> None:  # fmt: skip
    kv_heads, length, dim = key_cache.shape
    _decode.check(
        "decode_attention", qkv,
        {
            "qkv": (qkv, ((heads + 2 * kv_heads) * dim,)), "q_weight": (q_weight, (dim,)),
            "k_weight": (k_weight, (dim,)), "key_cache": (key_cache, (kv_heads, length, dim)),
            "value_cache": (value_cache, (kv_heads, length, dim)),
        },
    )  # fmt: skip
    if dim % 2 or dim > LARGEST_DIM or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"decode_attention takes heads of an even dimension up to {LARGEST_DIM}, query heads in groups for each "
            f"key head; there are {heads} and {kv_heads} of {dim}"
        )
    if position.shape != (1,) or position.dtype != torch.int64 or position.device != qkv.device:
        raise ValueError(
            f"decode_attention takes a position [1], int64, on {qkv.device}; it is {list(position.shape)}, "
            f"{position.dtype}, on {position.device}"
        )
    if arrived is not None:
        _decode.check_counters("decode_attention", qkv.device, arrived, heads)
    fits = cos.shape == sin.shape and cos.dim() == 2 and cos.shape[0] >= length and cos.shape[1] == dim // 2
    for name, table in {"cos": cos, "sin": sin}.items():
        alike = table.dtype == cos.dtype and table.dtype in _rows.DTYPES and table.device == qkv.device
        if not fits or not alike or not table.is_contiguous():
            raise ValueError(
                f"decode_attention takes tables [{length} or more, {dim // 2}], contiguous, of one floating dtype, on "
                f"{qkv.device}; {name} is {list(table.shape)} with strides {list(table.stride())}, {table.dtype}, on "
                f"{table.device}"
            )


_OPERATOR = _decode.register(
    "decode_attention(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor position, float eps, Tensor(c!)? arrived=None, int[]? shares=None) -> Tensor",
    _launch,
    lambda qkv, q_weight, k_weight, cos, sin, key_cache, value_cache, position, eps, arrived=None, shares=None: (
        qkv.new_empty(qkv.shape[0] - 2 * key_cache.shape[0] * key_cache.shape[2])
    ),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A normal row, weights around one, tables of any angles, and caches with numbers in all their rows."""
    generator = torch.Generator(device).manual_seed(seed)
    kv_heads, group, length, dim = case["kv_heads"], case["group"], case["length"], case["dim"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    angles = 3 * normal(length, dim // 2)
    return {
        "qkv": normal((group + 2) * kv_heads * dim).to(dtype),
        "q_weight": (1 + 0.1 * normal(dim)).to(dtype),
        "k_weight": (1 + 0.1 * normal(dim)).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "key_cache": normal(kv_heads, length, dim).to(dtype),
        "value_cache": normal(kv_heads, length, dim).to(dtype),
        "position": torch.tensor([min(case["position"], length - 1)], device=device),
        "eps": 1e-6,
        "arrived": torch.zeros(group * kv_heads, dtype=torch.int32, device=device) if case["counted"] else None,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Four operations a cached number and query head; the cache up to the position is read, one row of it written."""
    kv_heads, group, dim = case["kv_heads"], case["group"], case["dim"]
    rows = min(case["position"], case["length"] - 1)
    return Cost(
        flops=4.0 * group * kv_heads * (rows + 1) * dim,
        bytes_read=float(dtype.itemsize * dim * (2 * kv_heads * rows + (group + 2) * kv_heads + 3) + 8),
        bytes_written=float(dtype.itemsize * dim * (group + 2) * kv_heads),
    )


SPEC = KernelSpec(
    name="decode_attention",
    reference=decode_attention_reference,
    optimized=decode_attention,
    make_inputs=make_inputs,
    cases=(
        Case("first token", kv_heads=1, group=2, length=5, dim=16, position=0, counted=0),
        Case("ragged", kv_heads=2, group=3, length=45, dim=34, position=37, counted=0),
        Case("shares", kv_heads=1, group=1, length=141, dim=18, position=133, counted=0),
        Case("shares, counted", kv_heads=1, group=2, length=141, dim=18, position=133, counted=1),
        Case("predictor", kv_heads=1, group=2, length=17, dim=128, position=9, counted=1),
        Case("predictor, all heads", large=True, kv_heads=8, group=2, length=17, dim=128, position=15, counted=1),
        Case("talker", large=True, kv_heads=8, group=2, length=1024, dim=128, position=512, counted=1),
        Case("talker, near the start", large=True, kv_heads=8, group=2, length=1024, dim=128, position=48, counted=1),
        Case("talker, not counted", large=True, kv_heads=8, group=2, length=1024, dim=128, position=512, counted=0),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    mutates=("key_cache", "value_cache", "arrived"),
    sizes={
        "kv_heads": Sizes(least=1, most=2),
        "group": Sizes(least=1, most=2),
        "length": Sizes(least=1, most=150, block=ONE_SHARE),
        "dim": Sizes(least=2, most=66, multiple_of=2),
        "position": Sizes(most=150, block=32),
        "counted": Sizes(most=1),
    },
    values={
        "position": Values(fixed=True),
        **{
            name: Values(least=-1e2, most=1e2)
            for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "key_cache", "value_cache")
        },
    },
    source="Qwen3's attention (query and key norm before the rotation); Su et al., RoFormer, 2021; Dao et al., "
    "Flash-Decoding, 2023",
)
