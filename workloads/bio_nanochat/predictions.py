"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

from kernbench.promises import NOTHING, down_to, launches_saved, multiplying, promise, without_idle, without_waits
from kernbench.record import Prediction, ProfileRecord

from .config import PRESETS

SYNC_CLAIM = "_get_phenotype and metabolic updates touch every expert every step, preventing graph capture"
SYNC_PROMISE = (
    "Experts run in one grouped product instead of a loop with 4 reads per expert and layer; besides the scores' reads "
    "none is left in a step, and the gain is the time the device idled behind them, at most."
)


def predict_no_reads(before: ProfileRecord) -> Prediction:
    """All reads go but the scores'; the step loses at most the device idle time that has a read as its cause."""
    return promise(SYNC_PROMISE, without_waits(before), claim=SYNC_CLAIM)


PRESYN_CLAIM = "overhead below 5 % of the forward pass, from 30 %; 1.5x to 2x tokens/s; one kernel in place of about 50"
PRESYN_PROMISE = (
    "At most four kernels forward do a layer's attention with its synapses and leave nothing of size (T, T); "
    "at best the device time of attention goes, and nothing else of the step changes."
)
PRESYN_KERNELS = 4
"""Kernels that one layer's attention launches forward, at most: two of them for stochastic release."""


def predict_presyn(before: ProfileRecord) -> Prediction:
    """The launches of attention go but for a few; its time falls towards nothing, at most."""
    preset = PRESETS.get(before.workload.preset)
    fewer = launches_saved(before, 1, PRESYN_KERNELS * preset.layers) if preset else None
    return promise(PRESYN_PROMISE, down_to(before, 1, NOTHING), claim=PRESYN_CLAIM, launches=fewer)


METRICS_CLAIM = "gathering lineage and routing stats to the CPU stalls the pipeline; decouple logging from the loop"
METRICS_PROMISE = (
    "The three copies to the host per mixture of experts go, and with them the time the device idled behind these; a "
    "thread writes the log. Three launches a mixture stay."
)


def predict_metrics(before: ProfileRecord) -> Prediction:
    """The scores' reads go; the step loses at most the device idle time that is left with a read as its cause."""
    return promise(METRICS_PROMISE, without_waits(before), claim=METRICS_CLAIM)


GRAPH_PROMISE = (
    "A step is one launch beside the copy of its tokens, so that the host waits for the device and not the reverse; "
    "the device's idle time goes, at most. Numbers stay as they are, but that AdamW counts its steps on the device."
)


def predict_graph(before: ProfileRecord) -> Prediction:
    """All idle time of the device goes, at best."""
    return promise(GRAPH_PROMISE, without_idle(before), claim=SYNC_CLAIM)


PRODUCTS_PROMISE = (
    "The head's product gets rows of whole cache lines, and Muon multiplies stacks of matrices; of the time of both at "
    "best the head's products are left, at the ceiling of products."
)


def predict_products(before: ProfileRecord) -> Prediction:
    """Of the time at the phase's sites that of the head's flops is left, at best."""
    config = PRESETS.get(before.workload.preset)
    work = None
    if config is not None:
        passes = 1 if config.step == "forward" else 3
        flops = float(passes * 2 * config.batch * config.length * config.width * config.vocabulary)
        work = multiplying(before, flops, f"{flops / 1e9:.3g} GFLOP of the head", before.workload.dtype)
    return promise(PRODUCTS_PROMISE, down_to(before, 6, work))
