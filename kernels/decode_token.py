"""The next semantic token from its logits in one launch: penalty, suppression, temperature, top k, top p, and the draw.

    x = logits, divided by the penalty where positive and multiplied where not, for tokens seen; plus what suppresses
    candidates = the top_k largest of x, in order; p = softmax(candidates / temperature), c = the sums of p so far
    nucleus = candidates with c - p < top_p; of it the first whose c exceeds u times the mass of the nucleus

A program counts for its ids how many others come before them, which is their place in the order: nothing is sorted. The
program that arrives last at the counter draws. Of equal logits the smaller id is in front, and NaN in front of all, as
for a stable torch.sort; if nothing can be compared, the first is drawn.

Rounding: x is one float32 product and one sum, so that the order is exactly that of PyTorch on any device. What follows
is float64, where libraries differ by some 1e-16: a draw within that of a border may fall on its other side.

Source: Keskar et al., CTRL, 2019 (penalty); Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top
p).
Shapes: V vocabulary, R rows of what suppresses, M positions, G codes of a frame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _attend, _choice, _decode, _rows
from ._blocks import blocks_in

LARGEST_TOP_K = 1024
LARGEST_BLOCK = 4096
MOST_CODES = 2**24
"""Each id is compared with each."""


class Ranks(NamedTuple):
    """How ids are shared out to programs; numbers only, so that an operator can take it.

    Attributes:
        rows: ids that a program places; a power of two.
        warps: of a program.
        overlap: of :mod:`_decode`, ``PLAIN``, ``LATE`` or ``EARLY``.
    """

    rows: int
    warps: int
    overlap: int = _decode.EARLY


DEFAULT = Ranks(16, 8)
"""192 programs for 3072 ids; with twice as many ids each, one of an A100 runs out of registers."""
CONFIGURATIONS = tuple(Ranks(rows, warps) for rows in (8, 16, 32, 64) for warps in (4, 8, 16))
"""What is worth measuring on a GPU, for 3072 ids."""


def decode_token_reference(
    logits: Tensor, added: Tensor, early: Tensor, uniforms: Tensor, codes: Tensor, seen: Tensor, position: Tensor,
    arrived: Tensor, penalty: float, temperature: float, top_k: int, top_p: float, forced: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`decode_token`, of which it counts nothing in ``arrived``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen.index_fill_(0, codes[:, 0].index_select(0, position), True)
    penalized = torch.where(wide > 0, wide * (1 / penalty), wide * penalty)
    penalized = torch.where(seen, penalized, wide) + added.index_select(0, early.index_select(0, position))[0]
    token = _drawn(penalized, uniforms[:, 0].index_select(0, position + 1), temperature, top_k, top_p)
    if forced is not None:
        given = forced[:, 0].index_select(0, position + 1)
        token = torch.where(given < 0, token, given)
    codes[:, 0].index_copy_(0, position + 1, token)
    return wide


def _drawn(x: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The token [1] whose share of the cumulated probability the uniform number [1] falls in."""
    if temperature == 0.0:
        return x.argmax(-1, keepdim=True)
    ordered, ids = torch.sort(x, descending=True, stable=True)
    shares = torch.softmax(ordered[:top_k].to(torch.float64) / temperature, dim=-1)
    cumulated = shares.cumsum(-1)
    inside = cumulated - shares < top_p
    total = torch.where(inside, cumulated, 0.0).amax(-1, keepdim=True)
    passed = inside & (cumulated <= uniform * total) & (cumulated < total)
    return ids.gather(-1, passed.sum(-1, keepdim=True))


@triton.jit
def _placed(logits, added, seen, token, id, count, penalty, inverse):  # type: ignore[no-untyped-def]
    """Logits of these ids, what is chosen from instead, and that in its order."""
    inside = id < count
    wide = tl.load(logits + id, mask=inside, other=0.0).to(tl.float32)
    before = (tl.load(seen + id, mask=inside, other=0) != 0) | (id == token)
    penalized = tl.where(wide > 0, wide * inverse, wide * penalty)
    x = tl.where(before, penalized, wide) + tl.load(added + id, mask=inside, other=0.0)
    return wide, x, _choice.order(x, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(slots, uniform, temperature, top_p, candidates, CANDIDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The id drawn from the candidates, in order: their numbers [CANDIDATES], as bits, then their ids."""
    slot = tl.arange(0, CANDIDATES)
    inside = slot < candidates
    # From the L2 cache: other programs may have written them a moment ago.
    bits = tl.load(slots + slot, mask=inside, other=0, cache_modifier=".cg")
    largest = tl.load(slots, cache_modifier=".cg").to(tl.float32, bitcast=True).to(tl.float64) / temperature
    x = bits.to(tl.float32, bitcast=True).to(tl.float64) / temperature
    weight = tl.where(inside, tl.exp(x - largest), 0.0)
    share = weight / tl.sum(weight, 0)
    cumulated = tl.cumsum(share, 0)
    nucleus = inside & (cumulated - share < top_p)
    total = tl.max(tl.where(nucleus, cumulated, 0.0), 0)
    # The last candidate is never passed, even where the product rounds up to the whole mass.
    passed = nucleus & (cumulated <= uniform.to(tl.float64) * total) & (cumulated < total)
    return tl.load(slots + CANDIDATES + tl.sum(passed.to(tl.int32), 0), cache_modifier=".cg").to(tl.int64)


@triton.jit(do_not_specialize=["count", "places", "groups", "candidates", "temperature", "top_p"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, added, early, uniforms, codes, forced, seen, position, arrived, wide, slots, penalty, inverse,
    temperature, top_p, count, places, groups, candidates,
    FORCED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program places ROWS of the ids; grid is count over that, rounded up. float64 arguments come as their bits."""
    _decode.started(OVERLAP)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _decode.wait(OVERLAP)
    place = tl.load(position).to(tl.int64)
    in_table = (place >= 0) & (place + 1 < places)
    token = tl.load(codes + place * groups, mask=in_table, other=-1)
    added += tl.load(early + place, mask=in_table, other=0) * count
    logit, x, ordered = _placed(logits, added, seen, token, own, count, penalty, inverse)
    tl.store(wide + own, logit, mask=own < count)
    # Others may read this one before or after; to all of them the token was seen.
    tl.store(seen + own, 1, mask=(own == token) & (own < count))
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, count, BLOCK):
        other = start + tl.arange(0, BLOCK)
        _, _, compared = _placed(logits, added, seen, token, other, count, penalty, inverse)
        # Of equal ones the smaller id comes before.
        least = ordered[:, None] - (other[None, :] < own[:, None]).to(tl.int32)
        rank += tl.sum((compared[None, :] > least).to(tl.int32), 1)
    chosen = (own < count) & (rank < candidates)
    tl.store(slots + rank, x.to(tl.int32, bitcast=True), mask=chosen)
    tl.store(slots + CANDIDATES + rank, own, mask=chosen)
    if _attend.is_last(arrived, tl.num_programs(0)):
        after = (place + 1) * groups
        uniform = tl.load(uniforms + after, mask=in_table, other=0.0)
        divisor = temperature.to(tl.int64).to(tl.float64, bitcast=True)
        drawn = _draw(slots, uniform, divisor, top_p.to(tl.int64).to(tl.float64, bitcast=True), candidates, CANDIDATES)
        if FORCED:
            given = tl.load(forced + after, mask=in_table, other=-1)
            drawn = tl.where(given < 0, drawn, given)
        tl.store(codes + after, drawn, mask=in_table)


def decode_token(
    logits: Tensor, added: Tensor, early: Tensor, uniforms: Tensor, codes: Tensor, seen: Tensor, position: Tensor,
    arrived: Tensor, penalty: float, temperature: float, top_k: int, top_p: float, forced: Tensor | None = None,
    *, ranks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Choose the token after ``position`` into ``codes``, and mark the one at it as ``seen``. All contiguous.

    Args:
        logits: [V].
        added: [R, V] float32, what is added to the logits.
        early: [M] int64, the row of ``added`` that a position takes.
        uniforms: [M, G] float32, of which the first of the next position is u.
        codes: [M, G] int64, the tokens first of their rows.
        seen: [V] bool.
        position: [1] int64, from 0 to M - 2.
        arrived: [1] int32, zero, and zero again after. Launches that may run at once need one each.
        penalty: positive.
        temperature: 0 takes the largest.
        top_k: 1 to 1024, or to V if that is less.
        top_p: the mass that candidates before one may have at most.
        forced: [M, G] int64, what is written instead where it is not negative.
        ranks: a :class:`Ranks`, to measure others than the default.

    Returns:
        The logits as float32, [V].

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device, or a number is out of its range.
    """
    call = _OPERATOR if _rows.watched() else _launch
    wide: Tensor = call(
        logits, added, early, uniforms, codes, seen, position, arrived, penalty, temperature, top_k, top_p, forced,
        ranks,
    )  # fmt: skip
    return wide


def _launch(
    logits: Tensor, added: Tensor, early: Tensor, uniforms: Tensor, codes: Tensor, seen: Tensor, position: Tensor,
    arrived: Tensor, penalty: float, temperature: float, top_k: int, top_p: float, forced: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    count, device = logits.numel(), logits.device
    _check(logits, added, early, uniforms, codes, seen, position, arrived, forced)
    if not (penalty > 0 and temperature >= 0 and top_k >= 1 and min(top_k, count) <= LARGEST_TOP_K):
        raise ValueError(
            f"decode_token takes a positive penalty, a temperature from 0 on and a top_k from 1 to {LARGEST_TOP_K}; "
            f"they are {penalty}, {temperature} and {top_k}"
        )
    candidates = 1 if temperature == 0.0 else min(top_k, count)
    plan = _plan(count, candidates, forced is not None, tuple(ranks) if ranks else None)
    wide = torch.empty(count, dtype=torch.float32, device=device)
    slots = torch.empty(2 * triton.next_power_of_2(candidates), dtype=torch.int32, device=device)
    _decode.launch(
        _kernel, plan, device,
        logits, added, early, uniforms, codes, codes if forced is None else forced, seen.view(torch.uint8), position,
        arrived, wide, slots, penalty, 1 / penalty, _bits(temperature or 1.0), _bits(top_p), count, codes.shape[0],
        codes.shape[1], candidates,
    )  # fmt: skip
    return wide


@lru_cache(maxsize=1024)
def _plan(count: int, candidates: int, forced: bool, ranks: tuple[int, ...] | None) -> _decode.Plan:
    chosen = Ranks(*ranks) if ranks else DEFAULT
    block = min(LARGEST_BLOCK, triton.next_power_of_2(count))
    if not ranks and _rows.INTERPRETED.value:
        few = triton.next_power_of_2(blocks_in(count, _rows.INTERPRETED_PROGRAMS))
        chosen = chosen._replace(rows=min(few, tl.TRITON_MAX_TENSOR_NUMEL // block))
    rows = min(chosen.rows, triton.next_power_of_2(count))
    compiled_in = (forced, rows, block, triton.next_power_of_2(candidates))
    return _decode.Plan(blocks_in(count, rows), compiled_in, chosen.warps, chosen.overlap)


def _bits(number: float) -> int:
    """Those of a float64, as an integer: as a number a kernel takes it in float32 only."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _check(
    logits: Tensor, added: Tensor, early: Tensor, uniforms: Tensor, codes: Tensor, seen: Tensor, position: Tensor,
    arrived: Tensor, forced: Tensor | None,
) -> None:  # fmt: skip
    count, device = logits.numel(), logits.device
    _decode.check("decode_token", logits, {"logits": (logits, (count,))})
    _decode.check(
        "decode_token", added, {"added": (added, (added.shape[0], count)), "uniforms": (uniforms, codes.shape)}
    )
    tables = {"codes": codes} if forced is None else {"codes": codes, "forced": forced}
    _decode.check_tables("decode_token", device, tables, position, 0)
    _decode.check_counters("decode_token", device, arrived, 1)
    fits = early.shape == codes.shape[:1] and early.dtype == torch.int64 and early.is_contiguous()
    marks = seen.shape == (count,) and seen.dtype == torch.bool and seen.is_contiguous()
    if not fits or not marks or count >= MOST_CODES or added.dtype != torch.float32:
        raise ValueError(
            f"decode_token takes fewer than {MOST_CODES} logits, {count} here, with seen [{count}] bool, early "
            f"[{codes.shape[0]}] int64, and added float32; they are {list(seen.shape)} {seen.dtype}, "
            f"{list(early.shape)} {early.dtype} and {added.dtype}"
        )
    if not early.device == seen.device == added.device == device:
        raise ValueError(f"decode_token takes tensors of one device; logits are on {device}, others elsewhere")


_OPERATOR = _decode.register(
    "decode_token(Tensor logits, Tensor added, Tensor early, Tensor uniforms, Tensor(a!) codes, Tensor(b!) seen, "
    "Tensor position, Tensor(c!) arrived, float penalty, float temperature, int top_k, float top_p, "
    "Tensor? forced=None, int[]? ranks=None) -> Tensor",
    _launch,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.float32),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Logits some of which are seen, a last quarter that is suppressed, and uniform numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    codes, places, groups = case["codes"], case["places"], case["groups"]

    def integers(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most, shape, device=device, generator=generator)

    added = torch.zeros(2, codes, device=device)
    added[:, codes - codes // 4 :] = float("-inf")
    added[1, codes // 4 : codes // 2] = float("-inf")
    return {
        "logits": (3 * torch.randn(codes, device=device, generator=generator)).to(dtype),
        "added": added,
        "early": integers(0, 2, places),
        "uniforms": torch.rand(places, groups, device=device, generator=generator),
        "codes": integers(0, codes, places, groups),
        "seen": integers(0, 3, codes) == 0,
        "position": torch.tensor([places - 2], device=device),
        "arrived": torch.zeros(1, dtype=torch.int32, device=device),
        "penalty": 1.05,
        "temperature": case["tenths"] / 10,
        "top_k": case["top_k"],
        "top_p": case["percent"] / 100,
        # Half of them force nothing.
        "forced": integers(-codes, codes, places, groups) if case["forced"] else None,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """A comparison a pair of ids; logits, what is added and what was seen are read."""
    codes = case["codes"]
    return Cost(
        flops=float(codes * codes),
        bytes_read=float((dtype.itemsize + 5) * codes),
        bytes_written=float(4 * codes),
    )


SPEC = KernelSpec(
    name="decode_token",
    reference=decode_token_reference,
    optimized=decode_token,
    make_inputs=make_inputs,
    cases=(
        Case("one", codes=1, places=2, groups=1, top_k=1, percent=90, tenths=9, forced=0),
        Case("ragged", codes=203, places=3, groups=4, top_k=50, percent=90, tenths=9, forced=0),
        Case("whole nucleus", codes=64, places=4, groups=2, top_k=70, percent=100, tenths=15, forced=0),
        Case("greedy", codes=129, places=3, groups=3, top_k=50, percent=90, tenths=0, forced=0),
        Case("forced", codes=80, places=5, groups=2, top_k=20, percent=50, tenths=9, forced=1),
        Case("talker", large=True, codes=3072, places=1024, groups=16, top_k=50, percent=90, tenths=9, forced=1),
        Case("many codes", large=True, codes=9001, places=64, groups=16, top_k=500, percent=95, tenths=9, forced=0),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    mutates=("codes", "seen", "arrived"),
    sizes={
        "codes": Sizes(least=1, most=200, block=64),
        "places": Sizes(least=2, most=4),
        "groups": Sizes(least=1, most=4),
        "top_k": Sizes(least=1, most=80),
        "percent": Sizes(least=1, most=100),
        "tenths": Sizes(most=20),
        "forced": Sizes(most=1),
    },
    values={
        "logits": Values(least=-1e4, most=1e4, nonfinite=True),
        "added": Values(fixed=True),
        "uniforms": Values(least=0.0, most=1.0),
    },
    source="Keskar et al., CTRL, 2019; Holtzman et al., The Curious Case of Neural Text Degeneration, 2020",
)
