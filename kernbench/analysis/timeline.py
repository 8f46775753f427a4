"""One representative step as bars on tracks, few enough to draw."""

from __future__ import annotations

import numpy as np

from kernbench.analysis.families import kind_of_device
from kernbench.analysis.idle import step_windows
from kernbench.nesting import CALL, OP, Ints
from kernbench.record import Span
from kernbench.trace import Trace

HOST_TRACK = "host"

# A report is about this many pixels wide: shorter bars, and shorter gaps between bars, cannot be seen.
_PIXELS = 1500


def timeline(trace: Trace, max_spans: int = 1200) -> list[Span]:
    """Bars of the step with the median length, by track and start; times count from the step's begin.

    The first track is the host thread that runs the step (outermost operators; synchronising calls of kind "sync" come
    after them, as they lie within), then other host threads, then one track for each device stream. Neighbours of one
    kind closer than a pixel merge into one bar ("first name … 12 in all"); what is still too much for
    ``max_spans`` is merged more coarsely.
    """
    windows = step_windows(trace)
    middle = int(np.argsort(windows.end - windows.start, kind="stable")[(len(windows.start) - 1) // 2])
    start, end = int(windows.start[middle]), int(windows.end[middle])
    rows = _host_rows(trace, start, end) + _device_rows(trace, start, end)
    resolution = (end - start) / _PIXELS
    spans = _merged(trace, rows, start, end, resolution)
    while len(spans) > max_spans and resolution < end - start:
        resolution *= 2
        spans = _merged(trace, rows, start, end, resolution)
    return spans[:max_spans]


# One lane of bars: track, kind, and the columns name, start, end of its events by start.
_Lane = tuple[str, str, Ints, Ints, Ints]


def _host_rows(trace: Trace, start: int, end: int) -> list[_Lane]:
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
                lanes.append((track, kind, host.name[mine], host.start_ns[mine], host.end_ns[mine]))
    return lanes


def _device_rows(trace: Trace, start: int, end: int) -> list[_Lane]:
    device = trace.device
    inside = np.flatnonzero((device.start_ns < end) & (device.end_ns > start))
    lanes: list[_Lane] = []
    several = len(np.unique(device.device[inside])) > 1
    for number, stream in sorted(set(zip(device.device[inside].tolist(), device.stream[inside].tolist(), strict=True))):
        track = f"device {number} stream {stream}" if several else f"stream {stream}"
        on_stream = inside[(device.device[inside] == number) & (device.stream[inside] == stream)]
        for kind in np.unique(device.kind[on_stream]).tolist():
            mine = on_stream[device.kind[on_stream] == kind]
            lanes.append((track, kind_of_device(kind), device.name[mine], device.start_ns[mine], device.end_ns[mine]))
    return lanes


def _merged(trace: Trace, lanes: list[_Lane], start: int, end: int, resolution: float) -> list[Span]:
    spans = []
    for track, kind, name, begins, ends in lanes:
        begins, ends = np.maximum(begins, start), np.minimum(ends, end)
        groups: list[tuple[int, int, int, int]] = []  # begin, end, first name, how many
        for label, begin, finish in zip(name.tolist(), begins.tolist(), ends.tolist(), strict=True):
            if groups:
                first_begin, last_end, first, count = groups[-1]
                tiny = finish - begin < resolution or last_end - first_begin < resolution
                if begin - last_end < resolution and (tiny or begin < last_end):
                    groups[-1] = (first_begin, max(finish, last_end), first, count + 1)
                    continue
            groups.append((begin, finish, label, 1))
        spans += [
            Span(
                track=track,
                name=trace.names[first] if count == 1 else f"{trace.names[first]} … {count} in all",
                start_seconds=(begin - start) / 1e9,
                duration_seconds=(finish - begin) / 1e9,
                kind=kind,
            )
            for begin, finish, first, count in groups
        ]
    return spans
