"""What keeps the device from its work, in nanoseconds of device time per step: the figures behind the findings."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kernbench.analysis import idlepieces
from kernbench.analysis.families import COMMUNICATION, FAMILIES, of_device
from kernbench.analysis.idlepieces import CAUSES, Pieces, pieces
from kernbench.analysis.intervals import Intervals, union
from kernbench.analysis.windows import Windows, busy_intervals, on_main_device, step_windows
from kernbench.record import WhatIf
from kernbench.traces.nesting import CALL, Bools, Ints
from kernbench.traces.trace import COPY, KERNEL, Trace

# A stream that is busy for less of a step than this does not count as one that could run beside another.
_BUSY_SHARE = 0.02
_STREAM_WAIT = re.compile(r"(cuda|cu|hip)StreamWaitEvent")
_HANDED_ON = (idlepieces.HOST, idlepieces.DATA, idlepieces.EXCHANGE, idlepieces.ALLOCATION, idlepieces.SLOW_LAUNCH)
QUEUED_GAP = len(CAUSES)
"""Stands for idle time between two pieces of work of which the second was queued in time: nobody's fault."""


@dataclass(frozen=True, eq=False)
class IdleCosts:
    """Idle time within the steps: ``ns`` of each of ``pieces``, and the cause that answers for it.

    The way of a launch belongs to what had made the launch late; ``cause`` is that, or ``QUEUED_GAP``.
    """

    pieces: Pieces
    ns: Ints
    cause: Ints

    def of_cause(self, *causes: int) -> float:
        """Nanoseconds over all counted steps."""
        return float(self.ns[np.isin(self.cause, causes)].sum())

    def by_host_row(self, rows: int) -> Ints:
        """Nanoseconds of each of ``rows`` host rows as a wait, with the way of the launch that it alone delayed."""
        found = self.pieces
        waited = (self.cause == idlepieces.SYNC) & (found.site >= 0)
        row = np.where(found.after >= 0, found.after, found.site)[waited]
        return np.bincount(row, weights=self.ns[waited], minlength=rows).astype(np.int64)


@dataclass(frozen=True)
class Step:
    """Seconds of a step as it runs without the profiler, as far as that is known, and how much of it is idle.

    ``idle_scale`` is that idle time over the profiled step's: profiling costs time on the host, so it makes idle time.
    """

    seconds: float
    idle: float
    idle_scale: float = 1.0

    @property
    def idle_share(self) -> float:
        return self.idle / self.seconds


def true_step(trace: Trace, whatif: WhatIf | None) -> Step:
    """The step of a trace, without the profiler's own time where the replay was told of it."""
    windows = step_windows(trace)
    seconds = windows.mean_ns / 1e9
    busy = float(busy_intervals(trace).covered(windows.start, windows.end).mean()) / 1e9
    idle = seconds - busy
    if whatif is None or whatif.host_scale >= 1 or not whatif.baseline_seconds or not idle:
        return Step(seconds, idle)
    left = min(max(whatif.baseline_seconds - busy, 0.0), idle)
    return Step(busy + left, left, left / idle)


def idle_costs(trace: Trace, idle_scale: float) -> IdleCosts:
    """Idle time of a GPU's steps by the cause that answers for it, times ``idle_scale``."""
    found = pieces(trace)
    inside = np.rint(step_windows(trace).share_of(found.start, found.end) * idle_scale).astype(np.int64)
    cause = found.cause.copy()
    travel = np.isin(cause, (idlepieces.LAUNCH, idlepieces.SLOW_LAUNCH))
    begun = np.where(found.site >= 0, trace.host.start_ns[found.site], 0) if len(trace.host) else found.start
    queued = travel & (begun < found.start)
    cause[(found.cause == idlepieces.LAUNCH) & ~queued] = idlepieces.LAUNCH_BOUND
    follows = np.append(False, (found.start[1:] == found.end[:-1]) & np.isin(found.cause[:-1], _HANDED_ON))
    inherits = np.flatnonzero(follows & (found.cause == idlepieces.LAUNCH))
    cause[inherits] = found.cause[inherits - 1]
    cause[travel & (found.after >= 0)] = np.where(
        _of_allocator(trace, found.after[travel & (found.after >= 0)]), idlepieces.ALLOCATION, idlepieces.SYNC
    )
    cause[queued & (found.cause == idlepieces.LAUNCH)] = QUEUED_GAP
    return IdleCosts(found, inside, cause)


def _of_allocator(trace: Trace, rows: Ints) -> Bools:
    return np.isin(rows, idlepieces.blocking_rows(trace)[1])


def exposed_communication(trace: Trace) -> Intervals:
    """When the main device did nothing but communicate."""
    device, mine = trace.device, on_main_device(trace)
    talks = of_device(trace) == FAMILIES.index(COMMUNICATION)
    other = mine & ~talks
    talking = union(device.start_ns[mine & talks], device.end_ns[mine & talks])
    return talking.without(union(device.start_ns[other], device.end_ns[other]))


def exposed_copies(trace: Trace, rows: Ints) -> float:
    """Nanoseconds over all counted steps of copies (device ``rows``) beside which no kernel ran."""
    device, windows = trace.device, step_windows(trace)
    kernels = on_main_device(trace) & (device.kind == KERNEL)
    copying = union(device.start_ns[rows], device.end_ns[rows])
    alone = copying.without(union(device.start_ns[kernels], device.end_ns[kernels]))
    return _inside(alone, windows)


def copies_of(trace: Trace, rows: Ints) -> Ints:
    """Device rows of the copies that the operators around these host rows issued, or the rows themselves."""
    device, host = trace.device, trace.host
    copies = np.flatnonzero((device.kind == COPY) & (device.call >= 0))
    parents = host.parent[rows]
    beside = np.isin(host.parent[device.call[copies]], parents[parents >= 0])
    return copies[beside | np.isin(device.call[copies], rows)]


@dataclass(frozen=True, eq=False)
class TakingTurns:
    """Streams of the main device that wait for each other: how long, over all counted steps."""

    ns: float
    streams: tuple[int, ...]


def taking_turns(trace: Trace) -> TakingTurns | None:
    """Streams with work in hand that stood still for an event of another stream; None where there are none.

    An event could have begun once it was launched and its stream was free. Where it began later, an event was awaited
    on its behalf, and another stream was busy meanwhile, it was held back. Communication is left out: it has causes of
    its own. What could overlap at most is all but the busiest stream's work.
    """
    device, host, windows = trace.device, trace.host, step_windows(trace)
    talks = of_device(trace) == FAMILIES.index(COMMUNICATION)
    rows = np.flatnonzero(on_main_device(trace) & ~talks & (device.call >= 0))
    awaited = np.sort(host.start_ns[(host.kind == CALL) & trace.named(_STREAM_WAIT)[host.name]])
    if not len(rows) or not len(awaited):
        return None
    streams = np.unique(device.stream[rows]).tolist()
    own = {number: rows[device.stream[rows] == number] for number in streams}
    busy = {number: union(device.start_ns[mine], device.end_ns[mine]) for number, mine in own.items()}
    spent = {number: _inside(intervals, windows) for number, intervals in busy.items()}
    counted = sum(spent.values())
    chosen = [number for number in streams if spent[number] >= _BUSY_SHARE * windows.mean_ns * len(windows.start)]
    if len(chosen) < 2:
        return None
    whole = _inside(union(device.start_ns[rows], device.end_ns[rows]), windows)
    possible = whole - max(spent.values())
    held = [_held_back(trace, own[number], awaited, busy, number) for number in chosen]
    starts, ends = (np.concatenate(columns) for columns in zip(*held, strict=True))
    waited = _inside(union(starts, ends), windows)
    return TakingTurns(min(waited, possible), tuple(chosen)) if counted and min(waited, possible) > 0 else None


def _held_back(trace: Trace, rows: Ints, awaited: Ints, busy: dict[int, Intervals], number: int) -> tuple[Ints, Ints]:
    """When work of one stream was held back while another stream was busy."""
    device = trace.device
    launched = trace.host.start_ns[device.call[rows]]
    before = np.append(np.iinfo(np.int64).min, np.maximum.accumulate(device.end_ns[rows])[:-1])
    ready = np.maximum(launched + idlepieces.LAUNCH_NS, before)
    asked = np.append(np.iinfo(np.int64).min, launched[:-1])
    # An event was awaited between the stream's last launch and this one.
    ordered = np.searchsorted(awaited, launched) > np.searchsorted(awaited, np.minimum(asked, launched))
    late = ordered & (device.start_ns[rows] > ready)
    others = [intervals for other, intervals in busy.items() if other != number]
    elsewhere = union(
        np.concatenate([intervals.start for intervals in others]),
        np.concatenate([intervals.end for intervals in others]),
    )
    held = union(ready[late], device.start_ns[rows][late]).within(elsewhere)
    return held.start, held.end


def _inside(intervals: Intervals, windows: Windows) -> float:
    return float(intervals.covered(windows.start, windows.end).sum())
