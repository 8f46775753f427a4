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
CMS_PROMISE = (
    "All momenta, with the network that proposes their updates, become three launches; at best at the matmul roof."
)
# The network per parameter: 1,300 multiply-adds and 81 biases.
CMS_FLOPS_PER_PARAMETER = 2762
CMS_LAUNCHES = 3
GRAPH_PROMISE = "A step is one launch of a graph; the gain is the time the device idled, at most."


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


def predict_fused_cms(before: ProfileRecord) -> Prediction:
    """All but three launches of the update go; its device time falls to that of the network's work, at best."""
    spots = [spot for spot in before.hotspots if spot.phase == 5]
    on_gpu = before.environment.device.type == "cuda"
    launches = sum(spot.calls_per_step for spot in spots) - CMS_LAUNCHES if spots and on_gpu else None
    ratio_high, basis = None, "no hotspot of this phase, no step time or no measured matmul in the profile before"
    step = _step_seconds(before)
    ceilings = before.environment.ceilings
    speed = ceilings.matmul_flops_per_second.get("float32") if ceilings else None
    parameters = before.workload.parameters
    if spots and step and speed and parameters:
        now = sum(spot.self_seconds_per_step for spot in spots)
        least = CMS_FLOPS_PER_PARAMETER * parameters / speed
        ratio_high = step / (step - max(now - least, 0.0)) if now - least < step else None
        basis = (
            f"update {now * 1e3:.3g} ms now; {CMS_FLOPS_PER_PARAMETER} operations x {parameters} parameters at "
            f"{speed / 1e12:.3g} TFLOP/s take {least * 1e3:.3g} ms"
        )
    return Prediction(
        text=CMS_PROMISE,
        launches_per_step=launches,
        ratio_low=None if ratio_high is None else 1.0,
        ratio_high=ratio_high,
        basis=basis,
    )


def predict_graph(before: ProfileRecord) -> Prediction:
    """All idle time of the device goes, at best."""
    step, ratio_high, basis = _step_seconds(before), None, "no busy time of a device in the profile before"
    busy = before.idle.busy_seconds_per_step if before.idle else 0.0
    if step and 0.0 < busy < step:
        ratio_high = step / busy
        basis = f"step {step * 1e3:.3g} ms, of which the device is busy {busy * 1e3:.3g} ms"
    return Prediction(
        text=GRAPH_PROMISE, ratio_low=None if ratio_high is None else 1.0, ratio_high=ratio_high, basis=basis
    )


def _step_seconds(before: ProfileRecord) -> float | None:
    return statistics.median(before.steps.seconds) if before.steps and before.steps.seconds else None
