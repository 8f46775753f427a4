"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

import statistics

from kernbench.record import Prediction, ProfileRecord

from .config import PRESETS

SYNC_CLAIM = "_get_phenotype and metabolic updates touch every expert every step, preventing graph capture"
SYNC_PROMISE = (
    "Experts run in one grouped product instead of a loop with 4 reads per expert and layer; besides the scores' reads "
    "none is left in a step, and the gain is the time the device idled behind them, at most."
)


def predict_no_reads(before: ProfileRecord) -> Prediction:
    """All reads go but the scores'; the step loses at most the device idle time that has a read as its cause."""
    return _without_waits(before, SYNC_PROMISE, SYNC_CLAIM)


def _without_waits(before: ProfileRecord, text: str, claim: str) -> Prediction:
    ratio_high, basis = None, "no idle times by cause in the profile before, so no time is promised"
    step = step_seconds(before)
    waited = before.idle.causes.get("sync") if before.idle else None
    if step and waited is not None and waited < step:
        ratio_high = step / (step - waited)
        basis = f"step {step * 1e3:.3g} ms, of which the device idles {waited * 1e3:.3g} ms because of reads"
    return Prediction(
        text=text,
        claim=claim,
        ratio_low=None if ratio_high is None else 1.0,
        ratio_high=ratio_high,
        basis=basis,
    )


PRESYN_CLAIM = "overhead below 5 % of the forward pass, from 30 %; 1.5x to 2x tokens/s; one kernel in place of about 50"
PRESYN_PROMISE = (
    "At most four kernels forward do a layer's attention with its synapses and leave nothing of size (T, T); "
    "at best the device time of attention goes, and nothing else of the step changes."
)


PRESYN_KERNELS = 4
"""Kernels that one layer's attention launches forward, at most: two of them for stochastic release."""


def predict_presyn(before: ProfileRecord) -> Prediction:
    """The launches of attention go but for a few; its time falls towards nothing, at most."""
    spots = [spot for spot in before.hotspots if spot.phase == 1]
    on_gpu = before.environment.device.type == "cuda"
    step = step_seconds(before)
    ratio_high, launches, basis = None, None, "no hotspot of this phase or no step time in the profile before"
    if spots and step:
        now = sum(spot.self_seconds_per_step for spot in spots)
        kept = PRESYN_KERNELS * PRESETS[before.workload.preset].layers
        launches = max(sum(spot.calls_per_step for spot in spots) - kept, 0.0) if on_gpu else None
        ratio_high = step / (step - now) if now < step else None
        basis = f"step {step * 1e3:.3g} ms, of which forward attention takes {now * 1e3:.3g} ms on the device"
    return Prediction(
        text=PRESYN_PROMISE,
        claim=PRESYN_CLAIM,
        launches_per_step=launches,
        ratio_low=None if ratio_high is None else 1.0,
        ratio_high=ratio_high,
        basis=basis,
    )


METRICS_CLAIM = "gathering lineage and routing stats to the CPU stalls the pipeline; decouple logging from the loop"
METRICS_PROMISE = (
    "The three copies to the host per mixture of experts go, and with them the time the device idled behind these; a "
    "thread writes the log. Three launches a mixture stay."
)


def predict_metrics(before: ProfileRecord) -> Prediction:
    """The scores' reads go; the step loses at most the device idle time that is left with a read as its cause."""
    return _without_waits(before, METRICS_PROMISE, METRICS_CLAIM)


def step_seconds(before: ProfileRecord) -> float | None:
    """Median time of a step."""
    return statistics.median(before.steps.seconds) if before.steps and before.steps.seconds else None
