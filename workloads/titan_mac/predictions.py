"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

import statistics

from kernbench.record import Prediction, ProfileRecord

SYNC_CLAIM = "40-50 % wall-clock speedup, 3120 syncs per step"
SYNC_PROMISE = "No host read is left in a steady step; the gain is the time the device idled behind them, at most."
ADAMW_CLAIM = "30-50 % speedup for the optimizer step"
ADAMW_PROMISE = "AdamW becomes two launches; at best it takes 28 bytes per parameter at the speed of a copy."
# Per parameter in float32: read p, g, m, v and write p, m, v.
ADAMW_BYTES_PER_PARAMETER = 28
ADAMW_LAUNCHES = 2


def predict_no_syncs(before: ProfileRecord) -> Prediction:
    """All syncs go; the step loses at most the device idle time that has a sync as its cause."""
    ratio_high, basis = None, "no idle times by cause in the profile before, so no time is promised"
    step = _step_seconds(before)
    waited = before.idle.causes.get("sync") if before.idle else None
    if step and waited is not None and waited < step:
        ratio_high = step / (step - waited)
        basis = f"step {step * 1e3:.3g} ms, of which the device idles {waited * 1e3:.3g} ms because of syncs"
    return Prediction(
        text=SYNC_PROMISE,
        claim=SYNC_CLAIM,
        syncs_per_step=before.syncs_per_step,
        ratio_low=None if ratio_high is None else 1.0,
        ratio_high=ratio_high,
        basis=basis,
    )


def predict_fused_adamw(before: ProfileRecord) -> Prediction:
    """All but two launches of the update go; its device time falls to that of its bytes at the measured copy speed."""
    spots = [spot for spot in before.hotspots if spot.phase == 2]
    # On the CPU hotspots are operators, which call each other: their calls are not launches.
    on_gpu = before.environment.device.type == "cuda"
    launches = sum(spot.calls_per_step for spot in spots) - ADAMW_LAUNCHES if spots and on_gpu else None
    ratio_high, basis = None, "no hotspot of this phase, no step time or no measured copy speed in the profile before"
    step = _step_seconds(before)
    ceilings = before.environment.ceilings
    speed = ceilings.copy_bytes_per_second if ceilings else None
    parameters = before.workload.parameters
    if spots and step and speed and parameters:
        now = sum(spot.self_seconds_per_step for spot in spots)
        least = ADAMW_BYTES_PER_PARAMETER * parameters / speed
        ratio_high = step / (step - max(now - least, 0.0)) if now - least < step else None
        basis = (
            f"update {now * 1e3:.3g} ms now; {ADAMW_BYTES_PER_PARAMETER} bytes x {parameters} parameters at "
            f"{speed / 1e9:.3g} GB/s take {least * 1e3:.3g} ms"
        )
    return Prediction(
        text=ADAMW_PROMISE,
        claim=ADAMW_CLAIM,
        launches_per_step=launches,
        ratio_low=None if ratio_high is None else 1.0,
        ratio_high=ratio_high,
        basis=basis,
    )


def _step_seconds(before: ProfileRecord) -> float | None:
    return statistics.median(before.steps.seconds) if before.steps and before.steps.seconds else None
