"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

from kernbench.promises import copying, down_to, launches_saved, promise, without_idle, without_waits
from kernbench.record import Prediction, ProfileRecord

from .config import PRESETS

SYNC_CLAIM = "Zero-copy operations: all processing stays on GPU"
SYNC_PROMISE = "No host read is left in a forward pass; the gain is the time the device idled behind them, at most."


def predict_no_reads(before: ProfileRecord) -> Prediction:
    """All reads go; the step loses at most the device idle time that has a read as its cause."""
    return promise(SYNC_PROMISE, without_waits(before), claim=SYNC_CLAIM, syncs=before.syncs_per_step)


BLEND_CLAIM = "15 us latency, 480 GB/s memory bandwidth, above 100 % of the GPU's through caching"
BLEND_PROMISE = (
    "The blend reads and writes the layer's output once, with its statistics, at the speed of a copy at best."
)
MOVE_CLAIM = "Batch state updates, atomic operations for thread safety"
MOVE_PROMISE = "A change of state is one kernel and the two launches that prepare it, whatever the number of seeds."
MEASURE_CLAIM = "Telemetry reduction: mean/variance calculation, memory-efficient accumulation"
MEASURE_PROMISE = "Telemetry reads what the blend left of each tile, and no longer the layer's output."

GRAPH_CLAIM = "Kernel launch: about 5 us of a latency of 15 us"
GRAPH_PROMISE = "A step is one launch of a graph; the gain is the time the device idled, at most."

BOOKKEEPING_CLAIM = "Batch state updates; kernel launch: about 5 us of a latency of 15 us"
BOOKKEEPING_PROMISE = (
    "What a forward pass asks and writes of every seed besides the blend is two launches, whatever the number of seeds."
)


def predict_blend(before: ProfileRecord) -> Prediction:
    """The forward blend falls to one launch that moves its unique bytes."""
    config = PRESETS.get(before.workload.preset)
    moved = None if config is None else 2.0 * 4 * config.batch * config.width
    return predict_kernel(before, phase=1, launches=1, moved=moved, text=BLEND_PROMISE, claim=BLEND_CLAIM)


def predict_move(before: ProfileRecord) -> Prediction:
    """A change of state becomes three launches, of next to no bytes."""
    return predict_kernel(before, phase=2, launches=3, moved=0.0, text=MOVE_PROMISE, claim=MOVE_CLAIM)


def predict_measure(before: ProfileRecord) -> Prediction:
    """Measuring becomes one launch, of next to no bytes."""
    return predict_kernel(before, phase=3, launches=1, moved=0.0, text=MEASURE_PROMISE, claim=MEASURE_CLAIM)


def predict_bookkeeping(before: ProfileRecord) -> Prediction:
    """Alphas and what a forward pass leaves become a launch each, of next to no bytes."""
    return predict_kernel(before, phase=5, launches=2, moved=0.0, text=BOOKKEEPING_PROMISE, claim=BOOKKEEPING_CLAIM)


def predict_kernel(
    before: ProfileRecord, *, phase: int, launches: int, moved: float | None, text: str, claim: str
) -> Prediction:
    """All but ``launches`` launches a step of the phase's hotspots go; their time falls to that of ``moved`` bytes."""
    work = None if moved is None else copying(before, moved, f"{moved:.3g} bytes")
    fewer = launches_saved(before, phase, launches)
    return promise(text, down_to(before, phase, work), claim=claim, launches=fewer)


def predict_graph(before: ProfileRecord) -> Prediction:
    """All idle time of the device goes, at best."""
    return promise(GRAPH_PROMISE, without_idle(before), claim=GRAPH_CLAIM)
