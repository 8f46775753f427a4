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
from kernbench.nesting import Ints
from kernbench.record import LineLog, PathPart
from kernbench.trace import KERNEL, Trace

QUEUED = "between queued kernels"
_STREAM_SYNC = re.compile(r"Stream Sync")
_NEVER = np.iinfo(np.int64).min
# Kernels of other streams may have ended between the awaited one and the host's return; so many are looked at.
_CANDIDATES = 16

Kind = Literal["host", "kernel", "copy", "launch", "sync", "communication", "idle"]


@dataclass
class _Path:
    """Pieces of the path as start and end in ns; what they are of is a device row, a host row or nothing."""

    host: list[tuple[int, int]] = field(default_factory=list)
    device: list[tuple[int, int, int]] = field(default_factory=list)
    launch: list[tuple[int, int, int]] = field(default_factory=list)
    sync: list[tuple[int, int, int]] = field(default_factory=list)
    idle: list[tuple[int, int]] = field(default_factory=list)


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
        self.late = linked & (launched + latency >= free)
        other = _ended_before(start, end)
        ready = np.maximum(returned, free)
        waited = (other >= 0) & (start - ready > LAUNCH_NS) & (end[other] > ready)
        self.before = np.where(waited, other, before).tolist()
        self.late = (self.late & ~waited).tolist()
        self.row, self.start, self.end = mine.tolist(), start.tolist(), end.tolist()
        self.launched, self.call, self.stream = launched.tolist(), call.tolist(), device.stream[mine].tolist()
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
                time, event = self._device(event, time, begin)
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

    def _device(self, event: int, time: int, begin: int) -> tuple[int, int]:
        """Pass one device event; where the path goes on: the time, and the event that ended then, -1 for the host."""
        start = max(min(self.start[event], time), begin)
        self.path.device.append((start, time, self.row[event]))
        if start == begin:
            return begin, -1
        if self.late[event]:
            launched = max(self.launched[event], begin)
            self.path.launch.append((launched, start, self.call[event]))
            return launched, -1
        before = self.before[event]
        ended = max(min(self.end[before], start), begin) if before >= 0 else begin
        if ended < start:
            self.path.idle.append((ended, start))
        return ended, before

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
    spent: dict[tuple[Kind, str, int], list[int]] = {}

    def add(kind: Kind, name: str, line: int, ns: int, count: int = 1) -> None:
        entry = spent.setdefault((kind, name, line), [0, 0])
        entry[0] += ns
        entry[1] += count

    talking = communicates(trace).tolist()
    for start, end, row in path.device:
        kind: Kind = "communication" if talking[row] else "kernel" if trace.device.kind[row] == KERNEL else "copy"
        call = int(trace.device.call[row])
        line = int(where.line[call]) if call >= 0 else -1
        add(kind, trace.names[trace.device.name[row]], line, end - start)
    for start, end, row in path.launch:
        add("launch", trace.names[trace.host.name[row]], -1, end - start)
    for start, end, row in path.sync:
        add("sync", where.op_name(int(where.op[row])), int(where.line[row]), end - start)
    for start, end in path.idle:
        add("idle", QUEUED, -1, end - start)
    for share in hostpath.shares(trace, where, path.host):
        add("host", share.name, share.line, share.nanoseconds, share.count)
    return [
        PathPart(
            kind=kind,
            name=name,
            seconds_per_step=ns / steps / 1e9,
            count_per_step=count / steps,
            source=where.source(line),
        )
        for (kind, name, line), (ns, count) in spent.items()
        if ns
    ]
