"""One representative step as bars on tracks, few enough to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kernbench.analysis import stalls
from kernbench.analysis.families import kind_of_device
from kernbench.analysis.idle import step_windows
from kernbench.record import LineLog, SourceLine, Span
from kernbench.traces.nesting import CALL, OP, Ints
from kernbench.traces.trace import Trace

HOST_TRACK = "host"

# A report is about a thousand pixels wide, and a reader zooms in: what is shorter than this cannot be told apart.
_PIXELS = 16_000
# Names of template functions run to thousands of letters, and each bar carries one.
_LETTERS = 120


@dataclass(frozen=True, eq=False)
class _Lane:
    """Events of one kind on one track, by start; ``row`` is each one's host row, or -1 for work of the device."""

    track: str
    kind: str
    name: Ints
    start: Ints
    end: Ints
    row: Ints


def timeline(trace: Trace, lines: LineLog | None = None, *, max_spans: int = 1600) -> list[Span]:
    """Bars of the step with the median length, by track and start; times count from the step's begin.

    The first track is the host thread that runs the step (outermost operators; synchronising calls of kind "sync" come
    after them, as they lie within), then other host threads, then one track for each device stream. Waits carry the
    line that ``stalls`` finds for them. Short neighbours of one kind merge into one bar ("first name … 12 in all"),
    only as coarsely as ``max_spans`` makes necessary.
    """
    windows = step_windows(trace)
    middle = int(np.argsort(windows.end - windows.start, kind="stable")[(len(windows.start) - 1) // 2])
    start, end = int(windows.start[middle]), int(windows.end[middle])
    lanes = _host_lanes(trace, start, end) + _device_lanes(trace, start, end)
    resolution = (end - start) / _PIXELS
    firsts = [_first_of_group(lane, resolution) for lane in lanes]
    while sum(map(len, firsts)) > max_spans and resolution < end - start:
        resolution *= 2
        firsts = [_first_of_group(lane, resolution) for lane in lanes]
    places = _places(trace, lines)
    spans = [
        span for lane, first in zip(lanes, firsts, strict=True) for span in _bars(trace, lane, first, start, places)
    ]
    return spans[:max_spans]


def _places(trace: Trace, lines: LineLog | None) -> dict[int, SourceLine]:
    """The line of each host row that waits, as far as it is known."""
    places = {}
    for found in stalls.waiting(trace, lines):
        stall = found.stall
        if stall.file:
            line = SourceLine(file=stall.file, line=stall.line, text=stall.source, function=stall.function)
            places.update(dict.fromkeys(found.rows.tolist(), line))
    return places


def _host_lanes(trace: Trace, start: int, end: int) -> list[_Lane]:
    host = trace.host
    inside = (host.start_ns < end) & (host.end_ns > start)
    outermost = np.flatnonzero(inside & (host.kind == OP) & (host.parent < 0))
    launching = np.flatnonzero(inside & (host.kind == CALL) & (host.parent < 0))
    waits = trace.sync_calls[inside[trace.sync_calls]]
    plain = np.setdiff1d(launching, waits)
    lanes: list[_Lane] = []
    threads = np.unique(host.thread[np.concatenate([outermost, plain, waits])])
    for thread in sorted(threads.tolist(), key=lambda thread: (thread != trace.steps.thread, thread)):
        track = HOST_TRACK if thread == trace.steps.thread else f"{HOST_TRACK} thread {trace.threads[thread]}"
        for kind, rows in (("op", outermost), ("launch", plain), ("sync", waits)):
            mine = rows[host.thread[rows] == thread]
            if len(mine):
                times = _clipped(host.start_ns[mine], host.end_ns[mine], start, end)
                lanes.append(_Lane(track, kind, host.name[mine], *times, mine))
    return lanes


def _device_lanes(trace: Trace, start: int, end: int) -> list[_Lane]:
    device = trace.device
    inside = np.flatnonzero((device.start_ns < end) & (device.end_ns > start))
    lanes: list[_Lane] = []
    several = len(np.unique(device.device[inside])) > 1
    for number, stream in sorted(set(zip(device.device[inside].tolist(), device.stream[inside].tolist(), strict=True))):
        track = f"device {number} stream {stream}" if several else f"stream {stream}"
        on_stream = inside[(device.device[inside] == number) & (device.stream[inside] == stream)]
        for kind in np.unique(device.kind[on_stream]).tolist():
            mine = on_stream[device.kind[on_stream] == kind]
            times = _clipped(device.start_ns[mine], device.end_ns[mine], start, end)
            lanes.append(_Lane(track, kind_of_device(kind), device.name[mine], *times, np.full(len(mine), -1)))
    return lanes


def _clipped(begins: Ints, ends: Ints, start: int, end: int) -> tuple[Ints, Ints]:
    return np.maximum(begins, start), np.minimum(ends, end)


def _first_of_group(lane: _Lane, resolution: float) -> Ints:
    """Positions at which a new bar begins: neighbours that overlap, or are both short and close, share one."""
    covered_until = np.maximum.accumulate(lane.end)[:-1]
    gap = lane.start[1:] - covered_until
    short = lane.end - lane.start < resolution
    joins = (gap < 0) | ((gap < resolution) & short[1:] & short[:-1])
    return np.concatenate([[0], np.flatnonzero(~joins) + 1])


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def _bars(trace: Trace, lane: _Lane, first: Ints, start: int, places: Mapping[int, SourceLine]) -> list[Span]:
    ends = np.maximum.reduceat(lane.end, first).tolist()
    counts = np.diff(np.append(first, len(lane.start))).tolist()
    begins, names, rows = lane.start[first].tolist(), lane.name[first].tolist(), lane.row[first].tolist()
    return [
        Span(
            track=lane.track,
            name=_short(trace.names[name]) + ("" if count == 1 else f" … {count} in all"),
            start_seconds=(begin - start) / 1e9,
            duration_seconds=(finish - begin) / 1e9,
            kind=lane.kind,
            source=places.get(row),
        )
        for name, begin, finish, count, row in zip(names, begins, ends, counts, rows, strict=True)
    ]
