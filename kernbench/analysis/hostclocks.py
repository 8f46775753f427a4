"""Which host threads run one after the other, and which at the same time.

A backward pass runs on a thread of its own while the thread that asked for it waits: one clock serves both. Threads
that really overlap, as one that copies data ahead, keep clocks of their own.
"""

from __future__ import annotations

import numpy as np

from kernbench.analysis.intervals import Intervals, union
from kernbench.traces.nesting import ANNOTATION, OP, Ints
from kernbench.traces.trace import Trace

# Threads that hand over to each other overlap by a clock tick here and there.
_OVERLAP_SHARE = 0.05


def clocks_of_threads(trace: Trace, rows: Ints, first: int, last: int) -> tuple[Ints, int]:
    """The clock of each host row in ``rows`` (-1: the steps' own thread), and how many there are; 0 is the steps'."""
    step_thread = trace.steps.thread
    thread = np.where(rows >= 0, trace.host.thread[rows], step_thread)
    threads = [step_thread, *(number for number in np.unique(thread).tolist() if number != step_thread)]
    groups: list[tuple[int, Intervals]] = []
    clock_of: dict[int, int] = {}
    busy = _busy(trace, first, last, threads)
    for number in threads:
        mine = busy[number]
        for clock, taken in groups:
            shorter = min(mine.total, taken.total)
            if mine.within(taken).total <= _OVERLAP_SHARE * shorter:
                joined = union(np.concatenate([taken.start, mine.start]), np.concatenate([taken.end, mine.end]))
                groups[clock] = (clock, joined)
                clock_of[number] = clock
                break
        else:
            clock_of[number] = len(groups)
            groups.append((len(groups), mine))
    return np.array([clock_of[number] for number in thread.tolist()], np.int64), len(groups)


def _busy(trace: Trace, first: int, last: int, threads: list[int]) -> dict[int, Intervals]:
    """When each thread was in an operator without children, or in a runtime call."""
    host = trace.host
    inner = host.kind != ANNOTATION
    above = host.parent[(host.kind == OP) & (host.parent >= 0)]
    inner[above] = False
    inner &= (host.step >= first) & (host.step <= last)
    found = {}
    for number in threads:
        mine = inner & (host.thread == number)
        found[number] = union(host.start_ns[mine], host.end_ns[mine])
    return found
