"""When the device does nothing, and why: idle time of a step by cause, and by what the host was doing."""

from __future__ import annotations

import numpy as np

from kernbench.analysis.attribution import places
from kernbench.analysis.idlepieces import CAUSES, Pieces, pieces
from kernbench.analysis.intervals import grouped
from kernbench.analysis.windows import Windows, busy_intervals, on_main_device, step_windows
from kernbench.record import Idle, IdleSite, LineLog
from kernbench.traces.trace import Trace

__all__ = [
    "CAUSES",
    "Pieces",
    "Windows",
    "busy_intervals",
    "idle",
    "on_main_device",
    "pieces",
    "sites",
    "step_windows",
]
_SITES = 30


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


def sites(trace: Trace, lines: LineLog | None, limit: int = _SITES) -> list[IdleSite]:
    """Idle time by cause and place, the ``limit`` largest, largest first; empty for a trace of a CPU.

    The place is that of the call that held the host up (a read, an allocation, a data loader); where nothing did, that
    of the launch which the device was waiting for.
    """
    if not trace.on_gpu:
        return []
    windows, found = step_windows(trace), pieces(trace)
    inside = windows.share_of(found.start, found.end)
    kept = inside > 0
    where = places(trace, lines)
    site = found.site[kept]
    op = np.where(site >= 0, where.op[site], -1)
    line = np.where(site >= 0, where.line[site], -1)
    distinct, position = grouped(found.cause[kept], op, line)
    spent = np.bincount(position, weights=inside[kept], minlength=len(distinct))
    count = np.bincount(position, minlength=len(distinct))
    steps = len(windows.start)
    return [
        IdleSite(
            cause=CAUSES[distinct[row][0]],
            seconds_per_step=float(spent[row]) / steps / 1e9,
            count_per_step=float(count[row]) / steps,
            op=where.op_name(distinct[row][1]),
            source=where.source(distinct[row][2]),
        )
        for row in np.argsort(-spent, kind="stable")[:limit].tolist()
    ]
