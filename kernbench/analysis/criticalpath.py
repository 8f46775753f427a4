"""The chain of work that a step's length consists of, walked from its end to its begin.

At each moment of a step one thing holds up all that follows: a piece of device work, the way of a launch to the device,
the host's own work, or the host's return from a wait. Device work begins late because the host launched it late, or
because the work before it in its stream, or what it waits for in another one, ended late; whichever came last is on the
path. The parts of a step therefore add up to it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kernbench.analysis import attribution, hostpath
from kernbench.analysis.communication import communicates
from kernbench.analysis.idlepieces import LAUNCH_NS
from kernbench.analysis.windows import on_main_device, step_windows
from kernbench.record import LineLog, PathPart
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import KERNEL, Trace

QUEUED = "between queued kernels"
_STREAM_SYNC = re.compile(r"Stream Sync")
_NEVER = np.iinfo(np.int64).min
# Kernels of other streams may have ended between the awaited one and the host's return; so many are looked at.
_CANDIDATES = 16

Kind = Literal["host", "kernel", "copy", "launch", "sync", "communication", "idle"]
_DEVICE_KINDS: tuple[Kind, ...] = ("communication", "kernel", "copy")


@dataclass(frozen=True)
class _Sum:
    """Time and number of pieces of one name (an index) and line (in ``Places.lines``)."""

    name: int
    line: int
    nanoseconds: int
    count: int


@dataclass
class _Path:
    """Pieces of the path as start and end in ns; what they are of is a device row or a host row."""

    host: list[tuple[int, int]] = field(default_factory=list)
    device: list[tuple[int, int, int]] = field(default_factory=list)
    launch: list[tuple[int, int, int]] = field(default_factory=list)
    sync: list[tuple[int, int, int]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)


def critical_path(trace: Trace, lines: LineLog | None, limit: int = 30) -> list[PathPart]:
    """The ``limit`` largest parts of the critical path, averaged over the counted steps; empty without a device.

    Host work is by source line and operator, device work by kernel; "launch" is the way from the launch call's begin to
    the kernel's, "sync" the return of the host from a wait, "idle" what lies between queued kernels.
    """
    if not trace.on_gpu or not len(trace.host):
        return []
    windows = step_windows(trace)
    walk = _Walk(trace)
    for start, end in zip(windows.start.tolist(), windows.end.tolist(), strict=True):
        walk.back(start, end)
    found = _parts(trace, lines, walk.path, len(windows.start))
    return sorted(found, key=lambda part: -part.seconds_per_step)[:limit]


class _Walk:
    """Walks back through one trace; holds its main device's events and its waits as lists."""

    def __init__(self, trace: Trace) -> None:
        host, device = trace.host, trace.device
        self.path = _Path()
        mine = np.flatnonzero(on_main_device(trace))
        start, end, call = device.start_ns[mine], device.end_ns[mine], device.call[mine]
        linked = call >= 0
        launched = np.where(linked, np.minimum(host.start_ns[call], start), _NEVER)
        returned = np.where(linked, np.minimum(host.end_ns[call], start), _NEVER)
        before = _before_in_stream(device.stream[mine])
        free = np.where(before >= 0, np.minimum(end[before], start), _NEVER)
        travel = (start - launched)[linked & (launched < start)]
        latency = min(int(travel.min()), LAUNCH_NS) if len(travel) else 0
        late = linked & (launched + latency >= free)
        other = _ended_before(start, end)
        ready = np.maximum(returned, free)
        waited = (other >= 0) & (start - ready > LAUNCH_NS) & (end[other] > ready)
        before = np.where(waited, other, before)
        self.before = before.tolist()
        self.freed = np.where(before >= 0, np.minimum(end[before], start), _NEVER).tolist()
        self.late = (late & ~waited).tolist()
        self.row, self.start, self.end = mine.tolist(), start.tolist(), end.tolist()
        self.launched: list[int] = launched.tolist()
        self.call, self.stream = call.tolist(), device.stream[mine].tolist()
        order = np.argsort(end, kind="stable")
        self.by_end: list[int] = order.tolist()
        self.ends = end[order].tolist()
        waits = hostpath.on_path(trace, trace.sync_calls)
        waits = waits[np.argsort(host.end_ns[waits], kind="stable")]
        self.waits = waits.tolist()
        self.wait_start, self.wait_end = host.start_ns[waits].tolist(), host.end_ns[waits].tolist()
        synced = trace.device_syncs
        one_stream = trace.named(_STREAM_SYNC)[synced.name]
        self.stream_of = dict(zip(synced.call[one_stream].tolist(), synced.stream[one_stream].tolist(), strict=True))

    def back(self, begin: int, end: int) -> None:
        """Add one step's path."""
        time, below = end, len(self.waits)
        last = bisect_right(self.ends, end) - 1
        event = self.by_end[last] if last >= 0 and self.ends[last] == end else -1
        while time > begin:
            if event >= 0:
                time, event = self._device(event, time, begin), -1
                continue
            below = min(bisect_right(self.wait_end, time), below) - 1
            if below < 0 or self.wait_end[below] <= begin:
                self.path.host.append((begin, time))
                return
            if self.wait_end[below] < time:
                self.path.host.append((self.wait_end[below], time))
            event = self._awaited(below)
            time = max(self.end[event] if event >= 0 else self.wait_start[below], begin)
            self.path.sync.append((time, self.wait_end[below], self.waits[below]))

    def _device(self, event: int, time: int, begin: int) -> int:
        """Pass device events back to one that the host launched late, and return when it did, or the step's begin."""
        path = self.path
        while True:
            start = max(min(self.start[event], time), begin)
            path.device.append((start, time, self.row[event]))
            if start == begin:
                return begin
            if self.late[event]:
                launched = max(self.launched[event], begin)
                path.launch.append((launched, start, self.call[event]))
                return launched
            time = max(self.freed[event], begin)
            if time < start:
                path.idle.append(start - time)
            event = self.before[event]
            if event < 0 or time == begin:
                return begin

    def _awaited(self, wait: int) -> int:
        """The event whose end let the host go on; -1 if the wait found nothing to wait for."""
        start, end = self.wait_start[wait], self.wait_end[wait]
        stream = self.stream_of.get(self.waits[wait])
        position = bisect_right(self.ends, end) - 1
        for candidate in range(position, max(position - _CANDIDATES, -1), -1):
            event = self.by_end[candidate]
            if self.ends[candidate] <= start:
                break
            own = self.call[event] == self.waits[wait]
            if (own or self.launched[event] < start) and stream in (None, self.stream[event]):
                return event
        return -1


def _before_in_stream(stream: Ints) -> Ints:
    """For each event the one before it in its stream, -1 for a stream's first; events are sorted by start."""
    order = np.argsort(stream, kind="stable")
    before = np.full(len(stream), -1, np.int64)
    same = stream[order][1:] == stream[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    return before


def _ended_before(start: Ints, end: Ints) -> Ints:
    """For each event the one that had ended last when it began; -1 where none had."""
    order = np.argsort(end, kind="stable")
    position = np.searchsorted(end[order], start, side="right") - 1
    found = np.where(position >= 0, order[position], -1)
    # Events without length may end as they begin; going back only to earlier ones keeps the walk finite.
    return np.where(found < np.arange(len(start)), found, -1)


def _parts(trace: Trace, lines: LineLog | None, path: _Path, steps: int) -> list[PathPart]:
    where = attribution.places(trace, lines)
    device, host = trace.device, trace.host
    ns, row = _lengths(path.device)
    kind = np.where(communicates(trace), 0, np.where(device.kind == KERNEL, 1, 2))[row]
    line = np.where(device.call[row] >= 0, where.line[device.call[row]], -1)
    found: list[tuple[Kind, str, _Sum]] = []
    for number, word in enumerate(_DEVICE_KINDS):
        mine = kind == number
        sums = _sums(device.name[row][mine], line[mine], ns[mine])
        found += [(word, trace.names[one.name], one) for one in sums]
    ns, row = _lengths(path.launch)
    sums = _sums(host.name[row], np.full(len(row), -1), ns)
    found += [("launch", trace.names[one.name], one) for one in sums]
    ns, row = _lengths(path.sync)
    found += [("sync", where.op_name(one.name), one) for one in _sums(where.op[row], where.line[row], ns)]
    shares = hostpath.shares(trace, where, path.host)
    found += [("host", one.name, _Sum(-1, one.line, one.nanoseconds, one.count)) for one in shares]
    found.append(("idle", QUEUED, _Sum(-1, -1, sum(path.idle), len(path.idle))))
    return [
        PathPart(
            kind=word,
            name=name,
            seconds_per_step=one.nanoseconds / steps / 1e9,
            count_per_step=one.count / steps,
            source=where.source(one.line),
        )
        for word, name, one in found
        if one.nanoseconds
    ]


def _lengths(pieces: list[tuple[int, int, int]]) -> tuple[Ints, Ints]:
    """Length in ns and row of each piece."""
    columns = np.array(pieces, np.int64).reshape(-1, 3)
    return columns[:, 1] - columns[:, 0], columns[:, 2]


def _sums(name: Ints, line: Ints, ns: Ints) -> list[_Sum]:
    """Total of ``ns`` and count for each pair of name and line."""
    if not len(name):
        return []
    lines = int(line.max()) + 2
    keys, position = np.unique(name * lines + line + 1, return_inverse=True)
    total = np.zeros(len(keys), np.int64)
    np.add.at(total, position, ns)
    count = np.bincount(position)
    return [
        _Sum(key // lines, key % lines - 1, spent, many)
        for key, spent, many in zip(keys.tolist(), total.tolist(), count.tolist(), strict=True)
    ]
