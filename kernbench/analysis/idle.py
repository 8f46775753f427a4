"""When the device does nothing, and why: gaps between device events, cut into pieces by cause.

A gap ends with the next device event. What lies before the host began to launch that event is the host's doing; what
lies after is the way from the launch to the device. Causes:

- "sync": the host waited in a synchronising call when the device ran dry, or had just come back from one.
- "allocation": the host was in cudaMalloc, cudaFree and the like.
- "host": the host had nothing queued: Python, dispatch, data loading.
- "launch": the work was on its way, less than ``LAUNCH_NS`` after the launch began.
- "slow launch": the launch call itself took longer than that, as when it loads the kernel's module.
- "queued": the work had been handed over for longer than that; it waited for another stream or an event.
- "unknown": the trace does not hold the launch of the next event, or nothing of the host at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.intervals import Intervals, union
from kernbench.nesting import CALL, Bools, Ints
from kernbench.record import Idle
from kernbench.trace import Trace

CAUSES = ("sync", "host", "allocation", "launch", "slow launch", "queued", "unknown")
# Launch calls take 4.5 to 7 us on current machines; twice that is no longer the way of a launch.
LAUNCH_NS = 15_000
_ALLOCATION = re.compile(r"(cuda|cu|hip)(Malloc|Free|MemAlloc|MemFree|HostAlloc|HostMalloc|HostFree|MemCreate|MemMap)")
_NEVER = np.iinfo(np.int64).max
_NOT_TRACED = np.iinfo(np.int64).min


@dataclass(frozen=True, eq=False)
class Windows:
    """A stretch of time per counted step; neighbouring steps share no time."""

    start: Ints
    end: Ints

    @property
    def mean_ns(self) -> float:
        return float((self.end - self.start).mean())


@dataclass(frozen=True, eq=False)
class Pieces:
    """Idle time in order; ``cause`` indexes ``CAUSES``."""

    start: Ints
    end: Ints
    cause: Ints

    def per_step(self, windows: Windows) -> dict[str, float]:
        """Nanoseconds per step of each cause that occurs within the windows."""
        found = {}
        for number, name in enumerate(CAUSES):
            mine = self.cause == number
            inside = Intervals(self.start[mine], self.end[mine]).covered(windows.start, windows.end)
            if inside.sum():
                found[name] = float(inside.sum()) / len(windows.start)
        return found


def idle(trace: Trace) -> Idle | None:
    """Busy and idle time of the device per step; None for a trace of a CPU, where the host is the device."""
    if not trace.on_gpu:
        return None
    windows = step_windows(trace)
    busy = float(busy_intervals(trace).covered(windows.start, windows.end).mean())
    causes = pieces(trace).per_step(windows)
    return Idle(
        busy_seconds_per_step=busy / 1e9,
        idle_seconds_per_step=(windows.mean_ns - busy) / 1e9,
        causes={name: ns / 1e9 for name, ns in causes.items()},
    )


def step_windows(trace: Trace) -> Windows:
    """The time that belongs to each counted step.

    On a CPU that is the step's host time. On a GPU the device may run behind: a step's window ends when both its host
    part and its last device event have ended, and begins no earlier than the work of the step before has ended.
    """
    steps = trace.steps
    if not trace.on_gpu:
        return Windows(steps.start_ns[trace.counted], steps.end_ns[trace.counted])
    mine = on_main_device(trace) & (trace.device.step >= 0)
    reach = steps.end_ns.copy()
    np.maximum.at(reach, trace.device.step[mine], trace.device.end_ns[mine])
    reach = np.maximum.accumulate(reach)
    start = steps.start_ns.copy()
    start[1:] = np.maximum(start[1:], reach[:-1])
    return Windows(start[trace.counted], np.maximum(reach, start)[trace.counted])


def on_main_device(trace: Trace) -> Bools:
    """Which device events ran on the device that did the most; a trace of one process may hold several."""
    devices, position = np.unique(trace.device.device, return_inverse=True)
    busiest = np.bincount(position, weights=(trace.device.end_ns - trace.device.start_ns)).argmax()
    return np.asarray(trace.device.device == devices[busiest], np.bool_)


def busy_intervals(trace: Trace) -> Intervals:
    """When the main device did anything: kernels, copies, memsets, on whichever stream."""
    mine = on_main_device(trace)
    return union(trace.device.start_ns[mine], trace.device.end_ns[mine])


def pieces(trace: Trace) -> Pieces:
    """Idle time of the main device from the first step's begin to the last one's end, by cause."""
    mine = np.flatnonzero(on_main_device(trace))
    windows = step_windows(trace)
    gaps = busy_intervals(trace).gaps(int(windows.start.min()), int(windows.end.max()))
    launch_start, launch_end = _next_launch(trace, mine, gaps)
    begun, returned = np.clip(launch_start, gaps.start, gaps.end), np.clip(launch_end, gaps.start, gaps.end)
    late = np.where(gaps.end - returned < LAUNCH_NS, CAUSES.index("slow launch"), CAUSES.index("queued"))
    travel = np.where(gaps.end - begun < LAUNCH_NS, CAUSES.index("launch"), late)
    travel[launch_start == _NOT_TRACED] = CAUSES.index("unknown")
    before = _by_host_activity(trace, gaps.start, begun)
    starts = np.concatenate([before.start, begun])
    ends = np.concatenate([before.end, gaps.end])
    causes = np.concatenate([before.cause, travel])
    kept = np.flatnonzero(ends > starts)
    kept = kept[np.argsort(starts[kept], kind="stable")]
    return Pieces(starts[kept], ends[kept], causes[kept])


def _next_launch(trace: Trace, mine: Ints, gaps: Intervals) -> tuple[Ints, Ints]:
    """When the host began and finished launching the event that ends each gap."""
    host, call = trace.host, trace.device.call[mine]
    following = np.searchsorted(trace.device.start_ns[mine], gaps.end, side="left")
    start, end = (
        np.append(
            np.where(call >= 0, time[call], _NOT_TRACED) if len(host) else np.full(len(mine), _NOT_TRACED), _NEVER
        )
        for time in (host.start_ns, host.end_ns)
    )
    return start[following], end[following]


def _by_host_activity(trace: Trace, start: Ints, end: Ints) -> Pieces:
    """Stretches in which nothing was queued, cut by what the host was doing."""
    host = trace.host
    allocation = np.flatnonzero((host.kind == CALL) & trace.named(_ALLOCATION)[host.name])
    syncs = union(host.start_ns[trace.sync_calls], host.end_ns[trace.sync_calls])
    # Where the device ran dry while the host stood in a synchronising call, all that follows is the price of that call.
    drained = syncs.contains(start)
    # Elsewhere the host was late already, and a call is to blame only for the time spent inside it.
    late = union(start[~drained], end[~drained])
    sync = late.within(syncs)
    allocating = late.without(sync).within(union(host.start_ns[allocation], host.end_ns[allocation]))
    parts = {
        "sync": union(np.concatenate([start[drained], sync.start]), np.concatenate([end[drained], sync.end])),
        "allocation": allocating,
        "host": late.without(sync).without(allocating),
    }
    return Pieces(
        np.concatenate([part.start for part in parts.values()]),
        np.concatenate([part.end for part in parts.values()]),
        np.concatenate([np.full(len(part.start), CAUSES.index(cause)) for cause, part in parts.items()]),
    )
