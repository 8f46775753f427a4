"""What the host did during stretches of the critical path: operators by source line, and what lies between them.

Of several threads one counts at a time: the step's own while it runs an operator or a call, else one of the autograd
engine, for which the step's thread waits in its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.attribution import Places
from kernbench.analysis.intervals import Intervals, union
from kernbench.traces.nesting import ANNOTATION, Ints
from kernbench.traces.trace import Trace

BETWEEN = "Python between operators"


@dataclass(frozen=True)
class Share:
    """Host time on the path by operator (or annotation) and position in ``Places.lines``, -1 where unknown."""

    name: str
    line: int
    nanoseconds: int
    count: int


def on_path(trace: Trace, rows: Ints) -> Ints:
    """Those host rows that begin while their thread is the one that counts."""
    kept = np.zeros(len(rows), bool)
    taken = Intervals(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for thread, busy in _threads(trace):
        mine = trace.host.thread[rows] == thread
        kept[mine] = ~taken.contains(trace.host.start_ns[rows[mine]])
        taken = union(np.concatenate([taken.start, busy.start]), np.concatenate([taken.end, busy.end]))
    return rows[kept]


def shares(trace: Trace, where: Places, path: Sequence[tuple[int, int]]) -> list[Share]:
    """The time in ``path``, which it all adds up to, by what the host was doing."""
    if not path:
        return []
    host = trace.host
    starts, ends = np.array(path, np.int64).T
    left = union(starts, ends)
    found = []
    for thread, busy in _threads(trace):
        rows = _top_rows(trace, thread)
        # Rows that overlap in one thread, as in a damaged trace, must not count twice.
        reach = np.maximum.accumulate(host.end_ns[rows])
        begun = np.maximum(host.start_ns[rows], np.append(host.start_ns[rows][:1], reach[:-1]))
        inside = left.covered(begun, host.end_ns[rows])
        rows, inside = rows[inside > 0], inside[inside > 0]
        found += _grouped(where, where.op[rows], where.line[rows], inside)
        left = left.without(busy)
    return found + _between(trace, where, left)


def _threads(trace: Trace) -> Iterator[tuple[int, Intervals]]:
    """Threads in order of precedence, with the time in which they run something."""
    host, main = trace.host, trace.steps.thread
    engine = np.unique(host.thread[host.forward >= 0]).tolist()
    for thread in (main, *(other for other in engine if other != main)):
        rows = _top_rows(trace, thread)
        yield thread, union(host.start_ns[rows], host.end_ns[rows])


def _top_rows(trace: Trace, thread: int) -> Ints:
    """Operators and calls of a thread that lie in no other."""
    host = trace.host
    return np.flatnonzero((host.thread == thread) & (host.parent < 0) & (host.kind != ANNOTATION))


def _grouped(where: Places, name: Ints, line: Ints, spent: Ints) -> list[Share]:
    if not len(name):
        return []
    distinct, position = np.unique(np.stack([name, line]), axis=1, return_inverse=True)
    total = np.zeros(distinct.shape[1], np.int64)
    np.add.at(total, position.ravel(), spent)
    count = np.bincount(position.ravel(), minlength=len(total))
    return [
        Share(where.op_name(int(distinct[0, at])) or BETWEEN, int(distinct[1, at]), int(ns), int(count[at]))
        for at, ns in enumerate(total.tolist())
    ]


def _between(trace: Trace, where: Places, left: Intervals) -> list[Share]:
    """Time outside all operators and calls: by the innermost annotation around it, else by the line that it led to."""
    host, marker = trace.host, trace.steps.marker
    rows = np.flatnonzero((host.thread == trace.steps.thread) & (host.kind == ANNOTATION))
    edges = np.concatenate([host.start_ns[rows], host.end_ns[rows]])
    edges = np.unique(edges[left.contains(edges)])
    start = np.sort(np.concatenate([left.start, edges]), kind="stable")
    end = np.sort(np.concatenate([left.end, edges]), kind="stable")
    kept = end > start
    start, end = start[kept], end[kept]
    if not len(start):
        return []
    begun = np.searchsorted(host.start_ns[rows], start, side="right") - 1
    scope = np.where(begun >= 0, rows[begun], -1) if len(rows) else np.full(len(start), -1, np.int64)
    while np.any(over := (scope >= 0) & (host.end_ns[scope] <= start)):
        scope[over] = host.annotation[scope[over]]
    of_step = np.fromiter((bool(marker) and name.startswith(marker) for name in trace.names), bool, len(trace.names))
    name = np.where((scope >= 0) & ~of_step[host.name[scope]], host.name[scope], -1)
    return _grouped(where, name, np.where(name < 0, _line_after(trace, where, start), -1), end - start)


def _line_after(trace: Trace, where: Places, time: Ints) -> Ints:
    """Line of the next operator or call of the step's thread."""
    rows = _top_rows(trace, trace.steps.thread)
    following = np.searchsorted(trace.host.start_ns[rows], time)
    return np.append(where.line[rows], -1)[following]
