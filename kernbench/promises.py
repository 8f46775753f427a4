"""What the ``predict`` of a phase is made of: bounds that follow from the profile of the side before."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from kernbench.record import Prediction, ProfileRecord


class Bound(NamedTuple):
    """How many times as fast a step is at best, None where nothing says it; and what that rests on, in words."""

    ratio_high: float | None
    basis: str


def step_seconds(before: ProfileRecord) -> float | None:
    """Median time of an unprofiled step."""
    return statistics.median(before.steps.seconds) if before.steps and before.steps.seconds else None


def without_waits(before: ProfileRecord) -> Bound:
    """No host read is left: the step loses at most the idle time of the device that has one as its cause."""
    step = step_seconds(before)
    waited = before.idle.causes.get("sync") if before.idle else None
    if not step or waited is None or waited >= step:
        return Bound(None, "no idle times by cause in the profile before, so no time is promised")
    basis = f"step {step * 1e3:.3g} ms, of which the device idles {waited * 1e3:.3g} ms because of host reads"
    return Bound(step / (step - waited), basis)


def without_idle(before: ProfileRecord) -> Bound:
    """The device never idles, as in a graph at best."""
    step = step_seconds(before)
    busy = before.idle.busy_seconds_per_step if before.idle else 0.0
    if not step or not 0.0 < busy < step:
        return Bound(None, "no busy time of a device in the profile before")
    return Bound(step / busy, f"step {step * 1e3:.3g} ms, of which the device is busy {busy * 1e3:.3g} ms")


class Work(NamedTuple):
    """The least that a phase's kernels must do: seconds of it at a measured ceiling, and the same in words."""

    seconds: float
    words: str


NOTHING = Work(0.0, "")
"""Where nothing says how little is left: the bound is what there is."""


def down_to(before: ProfileRecord, phase: int, work: Work | None) -> Bound:
    """The time of the phase's hotspots falls to that of ``work``; None where no ceiling was measured."""
    spots = [spot for spot in before.hotspots if spot.phase == phase]
    step = step_seconds(before)
    if not spots or not step or work is None:
        return Bound(None, "no hotspot of this phase, no step time or no measured ceiling in the profile before")
    now = sum(spot.self_seconds_per_step for spot in spots)
    basis = f"{now * 1e3:.3g} ms of a step of {step * 1e3:.3g} ms now"
    if work.seconds:
        basis += f"; {work.words} take {work.seconds * 1e3:.3g} ms"
    return Bound(step / (step - max(now - work.seconds, 0.0)) if now - work.seconds < step else None, basis)


def launches_saved(before: ProfileRecord, phase: int, kept: int) -> float | None:
    """Launches per step inside the phase's sites but for ``kept``; None without a GPU, as operators are no launches."""
    spots = [spot for spot in before.hotspots if spot.phase == phase]
    if not spots or before.environment.device.type != "cuda":
        return None
    return sum(spot.calls_per_step for spot in spots) - kept


def copying(before: ProfileRecord, size: float, words: str) -> Work | None:
    """``size`` bytes, named by ``words``, at the speed of a copy that was measured on the device."""
    ceilings = before.environment.ceilings
    speed = ceilings.copy_bytes_per_second if ceilings else None
    return Work(size / speed, f"{words} at {speed / 1e9:.3g} GB/s") if speed else None


def multiplying(before: ProfileRecord, flops: float, words: str, dtype: str) -> Work | None:
    """``flops``, named by ``words``, at the rate of matrix products in ``dtype`` that was measured on the device."""
    ceilings = before.environment.ceilings
    rate = ceilings.matmul_flops_per_second.get(dtype) if ceilings else None
    return Work(flops / rate, f"{words} at {rate / 1e12:.3g} TFLOP/s") if rate else None


def promise(
    text: str, bound: Bound, *, claim: str = "", syncs: float | None = None, launches: float | None = None
) -> Prediction:
    """A prediction with that bound; a phase never promises to be slower.

    Args:
        text: the promise in words.
        claim: what the source document says of it.
        syncs: host reads that go, per step.
        launches: launches that go, per step.
    """
    return Prediction(
        text=text,
        claim=claim,
        syncs_per_step=syncs,
        launches_per_step=launches,
        ratio_low=None if bound.ratio_high is None else 1.0,
        ratio_high=bound.ratio_high,
        basis=bound.basis,
    )
