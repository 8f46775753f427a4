"""Which time belongs to which step, and when the device was busy in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.analysis.intervals import Intervals, union
from kernbench.analysis.memo import once_per_trace
from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import Trace

# Work reaches an idle device within about 10 us of its launch.
HAND_OVER_NS = 50_000


@dataclass(frozen=True, eq=False)
class Windows:
    """A stretch of time per counted step; neighbouring steps share no time."""

    start: Ints
    end: Ints

    @property
    def mean_ns(self) -> float:
        return float((self.end - self.start).mean())

    def share_of(self, start: Ints, end: Ints) -> Ints:
        """How many nanoseconds of each [start, end) lie within the windows."""
        return Intervals(self.start, self.end).covered(start, end)


@once_per_trace
def step_windows(trace: Trace) -> Windows:
    """The time that belongs to each counted step.

    On a CPU that is the step's host time. On a GPU the device may run behind: a step's window ends when both its host
    part and its last device event have ended, and begins no earlier than the work of the step before has ended.
    What the device still had to do when the trace began belongs to no step.
    """
    steps = trace.steps
    if not trace.on_gpu:
        return Windows(steps.start_ns[trace.counted], steps.end_ns[trace.counted])
    mine = on_main_device(trace) & (trace.device.step >= 0)
    reach = steps.end_ns.copy()
    np.maximum.at(reach, trace.device.step[mine], trace.device.end_ns[mine])
    reach = np.maximum.accumulate(reach)
    start = steps.start_ns.copy()
    start[0] = max(int(start[0]), _end_of_earlier_work(trace))
    start[1:] = np.maximum(start[1:], reach[:-1])
    return Windows(start[trace.counted], np.maximum(reach, start)[trace.counted])


def _end_of_earlier_work(trace: Trace) -> int:
    """When the device came to the first step's work, if it was busy with what was launched before; else 0.

    Work whose launch the trace does not hold was launched before it began. Where that work is not in the trace either,
    the first launch of the step shows it: it had been handed over for longer than a launch takes.
    """
    device, host = trace.device, trace.host
    mine = on_main_device(trace)
    own = np.flatnonzero(mine & (device.step == 0) & (device.call >= 0))
    if not len(own):
        return 0
    first = int(device.start_ns[own[0]])
    earlier = mine[: own[0]] & (device.call[: own[0]] < 0)
    if earlier.any():
        return min(int(device.end_ns[: own[0]][earlier].max()), first)
    handed_over = int(host.end_ns[device.call[own[0]]])
    return first if first - handed_over > HAND_OVER_NS and not mine[: own[0]].any() else 0


@once_per_trace
def on_main_device(trace: Trace) -> Bools:
    """Which device events ran on the device that did the most; a trace of one process may hold several."""
    devices, position = np.unique(trace.device.device, return_inverse=True)
    busiest = np.bincount(position, weights=(trace.device.end_ns - trace.device.start_ns)).argmax()
    return np.asarray(trace.device.device == devices[busiest], np.bool_)


@once_per_trace
def busy_intervals(trace: Trace) -> Intervals:
    """When the main device did anything: kernels, copies, memsets, on whichever stream."""
    mine = on_main_device(trace)
    return union(trace.device.start_ns[mine], trace.device.end_ns[mine])
