"""Parity of decoding: logits under fixed codes, codes spoken freely, and the frame at which speech ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernbench import philox
from kernbench.workload import Compared, Side

from .config import TtsConfig
from .decoder import Decoder

LONG, SHORT = 64, 4
"""Frames of a comparison, and where kernels are interpreted."""
ENOUGH_STEPS = 10
LARGE = 10**8
"""Parameters above which a model is held against float32 instead of float64."""
TIMES_OWN = 3.0
"""Of the error of the side before, as for the state after steps."""
FLOOR_ULP = 4.0
COSINE = 0.999
"""Specification, section 6: the least for bfloat16."""
FORCED_SEED = 20


def feed_fixed_codes(decoder: Decoder) -> None:
    """Force random codes, the same in every dtype and phase, so that steps of all sides have the same inputs."""
    config = decoder.config
    rows = config.positions + 1
    drawn = philox.randint(FORCED_SEED, torch.arange(rows * config.groups)).view(rows, config.groups)
    decoder.force(drawn.to(torch.int64) % min(config.sampling.suppress_from, config.acoustic_vocabulary))


def compare(unswapped: Side, before: Side, after: Side, steps: int) -> Iterator[Compared]:
    """All comparisons of decoding, over few frames where ``steps`` are few."""
    frames = LONG if steps >= ENOUGH_STEPS else SHORT
    yield compare_logits(unswapped, before, after, frames)
    yield from compare_speech(before, after, frames, greedy=True)
    yield from compare_speech(before, after, frames, greedy=False)


class Distance(NamedTuple):
    """How far logits are from the truth, over rows: the least cosine, errors in units of the RMS of the truth, and the
    share of rows whose most likely code is the same."""

    cosine: float
    rms: float
    largest: float
    top1: float


def compare_logits(unswapped: Side, before: Side, after: Side, frames: int) -> Compared:
    """Logits of talker and predictor when fixed codes are fed back, against the unswapped model in a longer dtype."""
    with before() as built:
        frames = min(frames, built.config.frames)
        dtype, large = built.place.dtype, _parameters(built) > LARGE
        own_rows = _forced_rows(built, frames)
    with after() as built:
        rows = _forced_rows(built, frames)
    with unswapped(torch.float32 if large else torch.float64) as built:
        truth = _forced_rows(built, frames)
    found, own = (_distance(one, truth) for one in (rows, own_rows))
    limit = TIMES_OWN * own.rms + FLOOR_ULP * torch.finfo(dtype).eps
    note = (
        f"{len(rows)} rows against {'float32' if large else 'float64'}: cosine at least {found.cosine:.6f} (before "
        f"{own.cosine:.6f}), largest error {found.largest:.2g} of the RMS (before {own.largest:.2g}), the same code "
        f"is the most likely in {found.top1:.1%} (before {own.top1:.1%})"
    )
    passed = found.rms <= limit and found.cosine >= COSINE
    if not passed:
        note = f"RMS error {found.rms:.2g} exceeds {limit:.2g}, or the cosine is below {COSINE}; {note}"
    return Compared("teacher-forced logits", passed, note)


@dataclass
class Speech:
    """What was spoken, and per frame the logits of its acoustic codes and those of the semantic token after it."""

    codes: list[list[int]]
    acoustic: list[list[Tensor]]
    semantic: list[Tensor]

    def logits(self, frame: int, group: int) -> Tensor | None:
        """What a code was chosen from; None for the first token, which belongs to the prompt."""
        if group:
            return self.acoustic[frame][group - 1]
        return self.semantic[frame - 1] if frame else None


def compare_speech(before: Side, after: Side, frames: int, *, greedy: bool) -> Iterator[Compared]:
    """Codes of both sides, each following its own: equal while the arithmetic is.

    Where logits differ by a rounding, sequences may part, and how long they agree is told. Where they are equal bit for
    bit, the same code has to be chosen. Then both sides are told that a token of what they agree on is the end.
    """
    with before() as built:
        frames = min(frames, built.config.frames)
        own = _spoken(built, frames, greedy=greedy)
    with after() as built:
        other = _spoken(built, frames, greedy=greedy)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own.codes, other.codes, strict=True)))
    name = "greedy codes" if greedy else "sampled codes"
    yield Compared(name, *_judged(own, other, agreed))
    if not greedy:
        yield _ends(before, after, own.codes[:agreed], frames)


def _judged(own: Speech, other: Speech, agreed: int) -> tuple[bool, str]:
    total = len(own.codes)
    if agreed == total:
        return True, f"all {total} frames have the same codes"
    one, two = own.codes[agreed], other.codes[agreed]
    group = next(group for group in range(len(one)) if one[group] != two[group])
    place = f"frame {agreed}, code {group}: {one[group]} before, {two[group]} after"
    first, second = own.logits(agreed, group), other.logits(agreed, group)
    if first is None or second is None or torch.equal(first, second):
        return False, f"{place}, and both choose from the same logits"
    cosine = float(functional.cosine_similarity(first.double(), second.double(), dim=-1))
    passed = cosine >= COSINE
    told = "as far as rounding takes them" if passed else f"below {COSINE}"
    return passed, f"agree for {agreed} of {total} frames; {place}, from logits of cosine {cosine:.6f}, {told}"


def _ends(before: Side, after: Side, codes: list[list[int]], frames: int) -> Compared:
    """Both sides with a token as the end that both are known to speak, as late as there is one."""
    name = "end of speech"
    tokens = [frame[0] for frame in codes]
    last = next((index for index in range(len(tokens) - 1, 0, -1) if tokens[index] not in tokens[:index]), None)
    if last is None:
        return Compared(name, True, f"not compared: in {len(codes)} frames that agree no token could be the end")
    lengths = []
    for side in (before, after):
        with side() as built:
            # Allowed from the start, as while it was no end, so that all is chosen from what it was chosen from.
            built.config = _sampling(built, end_after=0)
            built.end_token = tokens[last]
            lengths.append(len(built.generate(frames)))
    note = f"token {tokens[last]} as the end stops the side before after {lengths[0]} frames, after {lengths[1]}"
    return Compared(name, lengths == [last, last], note)


def _sampling(decoder: Decoder, **changes: Any) -> TtsConfig:
    """The configuration with other settings of its sampling."""
    return replace(decoder.config, sampling=replace(decoder.config.sampling, **changes))


def _spoken(decoder: Decoder, frames: int, *, greedy: bool) -> Speech:
    if greedy:
        decoder.config = _sampling(decoder, temperature=0.0)
    acoustic, semantic = [], []
    for index in range(frames):
        decoder.step(index)
        acoustic.append([row.clone() for row in decoder.acoustic_logits])
        semantic.append(decoder.logits_1V.clone())
    return Speech(decoder.read_codes(), acoustic, semantic)


def _forced_rows(decoder: Decoder, frames: int) -> list[Tensor]:
    """Logits of all frames under fixed codes, [1, V] each, on the host in float64."""
    feed_fixed_codes(decoder)
    rows = []
    for index in range(frames):
        decoder.step(index)
        rows += [row.to("cpu", torch.float64) for row in (*decoder.acoustic_logits, decoder.logits_1V)]
    return rows


def _distance(rows: list[Tensor], truth: list[Tensor]) -> Distance:
    cosine, squares, largest, same, elements = 1.0, 0.0, 0.0, 0, 0
    for row, exact in zip(rows, truth, strict=True):
        unit = float(exact.square().mean().sqrt())
        difference = (row - exact) / unit
        cosine = min(cosine, float(functional.cosine_similarity(row, exact, dim=-1)))
        squares += float(difference.square().sum())
        largest = max(largest, float(difference.abs().max()))
        same += int(row.argmax() == exact.argmax())
        elements += row.numel()
    return Distance(cosine, math.sqrt(squares / elements), largest, same / len(rows))


def _parameters(decoder: Decoder) -> int:
    return sum(weight.numel() for weight in decoder.model.parameters())
