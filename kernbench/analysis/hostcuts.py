"""Changes to a replayed program other than a missing read: loading ahead, no allocation, free streams, a graph."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from kernbench.analysis.intervals import union
from kernbench.analysis.replay import with_host_time
from kernbench.analysis.replaymodel import Program
from kernbench.analysis.replaywaits import NOTHING, stream_overlap
from kernbench.traces.nesting import CALL, Bools, Ints
from kernbench.traces.trace import Trace

_LOADING = re.compile(r"enumerate\(DataLoader\)#|(?i:.*\b(data[ _]?load(ing|er)?|(next|get|load|fetch)_?batch)\b)")
_ALLOCATION = re.compile(r"(cuda|cu|hip)(Malloc|Free|MemAlloc|MemFree|HostAlloc|HostMalloc|HostFree|MemCreate|MemMap)")
# Launching a graph takes about this long on the host, and its items follow each other this closely.
GRAPH_LAUNCH_NS = 10_000
GRAPH_GAP_NS = 1_000
# Streams that overlap for more than this share of the less busy one's time do not take turns.
TURNS_OVERLAP = 0.1


def overlap(program: Program, start: Ints, end: Ints, thread: Ints, trace: Trace) -> Ints:
    """How much of the host time before each node lies in the given stretches of its own clock's threads."""
    nodes = program.nodes
    found = np.zeros(len(nodes), np.int64)
    clock_of_thread = {
        int(trace.host.thread[row]): int(clock)
        for row, clock in zip(nodes.row.tolist(), nodes.clock.tolist(), strict=True)
        if row >= 0
    }
    clock_of_thread.setdefault(trace.steps.thread, 0)
    clocks = np.array([clock_of_thread.get(number, -1) for number in thread.tolist()], np.int64)
    for clock in np.unique(nodes.clock).tolist():
        mine = np.flatnonzero(nodes.clock == clock)
        cut = union(start[clocks == clock], end[clocks == clock])
        before = nodes.start_ns[mine] - nodes.work_ns[mine]
        found[mine] = cut.covered(before, nodes.start_ns[mine])
    return found


def without_loading(trace: Trace, program: Program) -> Program | None:
    """No host time in a data loader; None if the trace shows none."""
    host = trace.host
    rows = np.flatnonzero((host.kind != CALL) & trace.named(_LOADING)[host.name] & (host.step >= 0))
    return _cut(trace, program, rows)


def without_allocation(trace: Trace, program: Program) -> Program | None:
    """No host time in cudaMalloc, cudaFree and the like; None if the trace shows none."""
    host = trace.host
    rows = np.flatnonzero((host.kind == CALL) & trace.named(_ALLOCATION)[host.name] & (host.step >= 0))
    return _cut(trace, program, rows)


def _cut(trace: Trace, program: Program, rows: Ints) -> Program | None:
    host = trace.host
    gone = overlap(program, host.start_ns[rows], host.end_ns[rows], host.thread[rows], trace)
    return with_host_time(program, np.maximum(program.nodes.work_ns - gone, 0)) if gone.any() else None


def without_stream_waits(trace: Trace, program: Program) -> Program | None:
    """Only the busiest stream still waits for others; None unless such waits make streams take turns.

    A collective's stream waits for what it sends, so it is left alone.
    """
    items = program.items
    device = trace.device
    main = int(np.argmax(np.bincount(items.stream, weights=items.duration_ns)))
    exchanging = device.collective[items.row] >= 0
    kept = {item: edges for item, edges in items.depends.items() if items.stream[item] == main or exchanging[item]}
    if len(kept) == len(items.depends):
        return None
    overlapping = stream_overlap(device.start_ns[items.row], device.end_ns[items.row], items.stream)
    return None if overlapping > TURNS_OVERLAP else replace(program, items=replace(items, depends=kept))


def in_a_graph(trace: Trace, program: Program) -> Program | None:
    """Each step's device work launched at once; host time outside of operators stays. None if graphs are used already.

    A step whose waits are left in cannot be captured: take them out first.
    """
    nodes, items = program.nodes, program.items
    if trace.device.graph[items.row].mean() > 0.5:
        return None
    launching = nodes.count > 0
    step = np.where(launching, nodes.step, -1)
    leading = np.zeros(len(nodes), np.bool_)
    leading[[int(np.flatnonzero(step == number)[0]) for number in np.unique(step[launching]).tolist()]] = True
    loading = without_loading(trace, program)
    kept = nodes.work_ns - loading.nodes.work_ns if loading is not None else None
    changed = launched_together(program, launching & ~leading, kept)
    call = np.where(leading, GRAPH_LAUNCH_NS, changed.nodes.call_ns)
    gap = np.minimum(items.gap_ns, GRAPH_GAP_NS)
    return replace(
        changed,
        items=replace(changed.items, gap_ns=gap),
        nodes=replace(changed.nodes, call_ns=call, waits=np.where(launching, NOTHING, nodes.waits)),
    )


def launched_together(program: Program, followers: Bools, kept_ns: Ints | None = None) -> Program:
    """The program whose ``followers`` are launched by the launch before them, without host time of their own.

    Args:
        kept_ns: host time before each node that stays all the same.
    """
    nodes, items = program.nodes, program.items
    own = np.repeat(followers, nodes.count)
    return replace(
        program,
        nodes=replace(
            nodes,
            work_ns=np.where(followers, 0 if kept_ns is None else kept_ns, nodes.work_ns),
            call_ns=np.where(followers, 0, nodes.call_ns),
        ),
        items=replace(items, latency_ns=np.where(own, 0, items.latency_ns)),
    )
