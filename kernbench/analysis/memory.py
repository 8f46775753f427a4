"""Device memory over time, from the allocator's own events."""

from __future__ import annotations

import numpy as np

from kernbench.record import MemoryPoint
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import Trace


def memory(trace: Trace, limit: int = 400) -> list[MemoryPoint]:
    """Allocated and reserved bytes of the device that holds the most, in order of time; empty if not recorded.

    The first point is what the first step began with. Of more than ``limit`` points those stay that are the highest and
    the last of their stretch of time, so that no peak is lost.
    """
    recorded = trace.memory
    known = (recorded.device >= 0) & (recorded.allocated >= 0)
    if not known.any():
        return []
    devices = np.unique(recorded.device[known])
    peaks = [recorded.allocated[known & (recorded.device == device)].max() for device in devices]
    rows = np.flatnonzero(known & (recorded.device == devices[int(np.argmax(peaks))]))
    start, end = int(trace.steps.start_ns[0]), int(trace.steps.end_ns[-1])
    before = rows[recorded.time_ns[rows] < start]
    rows = rows[(recorded.time_ns[rows] >= start) & (recorded.time_ns[rows] <= end)]
    rows = _thinned(recorded.allocated, np.concatenate([before[-1:], rows]), limit)
    return [
        MemoryPoint(
            seconds=max(int(recorded.time_ns[row]) - start, 0) / 1e9,
            allocated_bytes=int(recorded.allocated[row]),
            reserved_bytes=max(int(recorded.reserved[row]), 0),
        )
        for row in rows.tolist()
    ]


def _thinned(allocated: Ints, rows: Ints, limit: int) -> Ints:
    """The first and the last row, and of equal stretches of the rest the highest and the last of each."""
    if len(rows) <= limit:
        return rows
    kept = {0, len(rows) - 1}
    for part in np.array_split(np.arange(1, len(rows) - 1), max((limit - 2) // 2, 1)):
        if len(part):
            kept |= {int(part[int(np.argmax(allocated[rows[part]]))]), int(part[-1])}
    return rows[sorted(kept)]
