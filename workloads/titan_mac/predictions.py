"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

from kernbench.promises import copying, down_to, launches_saved, multiplying, promise, without_idle, without_waits
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
    return promise(SYNC_PROMISE, without_waits(before), claim=SYNC_CLAIM, syncs=before.syncs_per_step)


def predict_fused_adamw(before: ProfileRecord) -> Prediction:
    """All but two launches of the update go; its device time falls to that of its bytes at the measured copy speed."""
    parameters = before.workload.parameters
    words = f"{ADAMW_BYTES_PER_PARAMETER} bytes x {parameters} parameters"
    work = copying(before, float(ADAMW_BYTES_PER_PARAMETER * parameters), words) if parameters else None
    fewer = launches_saved(before, 2, ADAMW_LAUNCHES)
    return promise(ADAMW_PROMISE, down_to(before, 2, work), claim=ADAMW_CLAIM, launches=fewer)


def predict_fused_cms(before: ProfileRecord) -> Prediction:
    """All but three launches of the update go; its device time falls to that of the network's work, at best."""
    parameters = before.workload.parameters
    words = f"{CMS_FLOPS_PER_PARAMETER} operations x {parameters} parameters"
    flops = float(CMS_FLOPS_PER_PARAMETER * parameters)
    work = multiplying(before, flops, words, "float32") if parameters else None
    return promise(CMS_PROMISE, down_to(before, 5, work), launches=launches_saved(before, 5, CMS_LAUNCHES))


def predict_graph(before: ProfileRecord) -> Prediction:
    """All idle time of the device goes, at best."""
    return promise(GRAPH_PROMISE, without_idle(before))
