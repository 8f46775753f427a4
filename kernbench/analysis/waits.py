"""Every wait of the host for the device in a trace, with its place and what it does to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.analysis.attribution import Places
from kernbench.analysis.idlepieces import blocking_rows
from kernbench.analysis.windows import busy_intervals, on_main_device
from kernbench.record import StallClass
from kernbench.traces.nesting import CALL, Ints
from kernbench.traces.trace import Trace

# A wait below this cost about what the call itself costs.
FREE_NS = 5_000
# Host work between a wait and the next launch that the device can still absorb: about one launch.
RESUME_NS = 10_000
_ENGINE = "autograd::engine"


@dataclass(frozen=True)
class Wait:
    """One wait of the host: the synchronising calls of one operator, or one call outside operators.

    ``rows`` are the calls' host rows, ``call`` is the runtime's own name of the last one and ``operators`` the names
    around it, innermost first. ``op`` is the operator that the program called, or the call; ``line`` indexes the lines
    of the ``Places`` that it was found with, -1 if unknown. ``thread`` indexes the trace's threads, -1 for the thread
    that runs the steps and those of the autograd engine, which work for it.
    """

    step: int
    thread: int
    call: str
    op: str
    line: int
    operators: tuple[str, ...]
    rows: tuple[int, ...]
    wait_ns: int
    klass: StallClass


def waits(trace: Trace, where: Places) -> list[Wait]:
    """Every wait within the counted steps, in order of time; what the allocator waits for is left out."""
    host = trace.host
    rows = np.sort(blocking_rows(trace)[0])
    rows = rows[trace.in_counted(host.step[rows])]
    if not len(rows):
        return []
    parent, thread = host.parent[rows], host.thread[rows]
    apart = (parent[1:] != parent[:-1]) | (parent[1:] < 0) | (thread[1:] != thread[:-1])
    groups = np.split(rows, np.flatnonzero(apart) + 1)
    first, last = (np.array([group[position] for group in groups], np.int64) for position in (0, -1))
    classes = _classes(trace, first, last)
    main = np.append(_autograd_threads(trace), trace.steps.thread)
    found = [
        Wait(
            step=int(host.step[group[0]]),
            thread=-1 if host.thread[group[0]] in main else int(host.thread[group[0]]),
            call=trace.names[host.name[group[-1]]],
            op=where.op_name(int(where.op[group[0]])),
            line=int(where.line[group[0]]),
            operators=operators_around(trace, int(group[0])),
            rows=tuple(group.tolist()),
            wait_ns=int((host.end_ns[group] - host.start_ns[group]).sum()),
            klass=klass,
        )
        for group, klass in zip(groups, classes, strict=True)
    ]
    order = np.argsort(host.start_ns[first], kind="stable")
    return [found[position] for position in order.tolist()]


def operators_around(trace: Trace, row: int) -> tuple[str, ...]:
    """Names of the operators around a host row, innermost first."""
    names = []
    above = int(trace.host.parent[row])
    while above >= 0:
        names.append(trace.names[trace.host.name[above]])
        above = int(trace.host.parent[above])
    return tuple(names)


def _autograd_threads(trace: Trace) -> Ints:
    engine = np.fromiter((name.startswith(_ENGINE) for name in trace.names), bool, len(trace.names))
    return np.unique(trace.host.thread[engine[trace.host.name]])


def _classes(trace: Trace, first: Ints, last: Ints) -> list[StallClass]:
    """Free, starved (the device had run dry before), drain (it runs dry after), or busy (it has more to do).

    Args:
        first: host row of the first call of each wait; ``last`` of its last one.
    """
    host, device = trace.host, trace.device
    begin, end = _begins(trace, first), host.end_ns[last]
    mine = np.flatnonzero(on_main_device(trace))
    linked = device.call[mine] >= 0
    launched = np.where(linked, host.start_ns[device.call[mine]], np.iinfo(np.int64).min)
    order = np.argsort(launched, kind="stable")
    reach = np.append(np.maximum.accumulate(device.end_ns[mine][order]), np.iinfo(np.int64).min)
    # Position -1, before the first launch, finds the appended end: nothing was pending.
    pending = reach[np.searchsorted(launched[order], begin) - 1] > begin
    busy_after = busy_intervals(trace).contains(end)
    # One sorted key per launch finds the next launch of the same thread.
    calls = device.call[device.call >= 0]
    span = int(host.end_ns.max()) + RESUME_NS + 1
    keys = np.append(np.sort(host.thread[calls] * span + host.start_ns[calls]), np.iinfo(np.int64).max)
    here = host.thread[first] * span + end
    resumed = keys[np.searchsorted(keys, here)] - here <= RESUME_NS
    short = end - host.start_ns[first] < FREE_NS
    classes: list[StallClass] = []
    for waiting, more, soon, brief in zip(pending, busy_after, resumed, short, strict=True):
        if waiting:
            classes.append("busy" if more or soon else "drain")
        else:
            classes.append("free" if brief and not more else "starved")
    return classes


def _begins(trace: Trace, rows: Ints) -> Ints:
    """Start of the read that ends in each call: the first runtime call of its operator, such as the copy."""
    host = trace.host
    calls = np.flatnonzero(host.kind == CALL)
    parents, position = np.unique(host.parent[calls], return_index=True)
    earliest = host.start_ns[calls[position]][np.searchsorted(parents, host.parent[rows])]
    return np.where(host.parent[rows] >= 0, earliest, host.start_ns[rows])
