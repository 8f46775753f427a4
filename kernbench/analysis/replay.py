"""Runs the program of a traced stretch again, unchanged or changed: host clocks, stream queues, waits, queue depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kernbench.analysis.replaymodel import Program
from kernbench.analysis.replaywaits import ANYTHING, ITEM, NOTHING
from kernbench.traces.nesting import Bools, Ints

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Replayed:
    """When the stretch, and each repeat of it, was done on the host and on the device, in ns from its start."""

    done_ns: list[float]

    @property
    def period_ns(self) -> float:
        """Time of one repeat."""
        return (self.done_ns[-1] - self.done_ns[0]) / (len(self.done_ns) - 1)


def replay(program: Program, *, latency_ns: int | None = None, repeats: int = 0, host_scale: float = 1.0) -> Replayed:
    """Run the program, then its steps again and again.

    What the first of several steps waited for lies outside of the trace, so that one is not repeated.

    Args:
        latency_ns: for items whose own latency the trace does not tell; the shortest plausible one if not given.
        host_scale: factor on all host time, as when the run was not profiled.
    """
    nodes, items = program.nodes, program.items
    default = program.latency_ns[0] if latency_ns is None else latency_ns
    latency = np.where(items.latency_ns >= 0, items.latency_ns, default).tolist()
    stream, gap, duration = items.stream.tolist(), items.gap_ns.tolist(), items.duration_ns.tolist()
    depends, linked, depth = items.depends, bool(items.depends), program.depth
    columns = (
        nodes.clock.tolist(),
        (nodes.work_ns * host_scale).tolist(),
        (nodes.call_ns * host_scale).tolist(),
        nodes.waits.tolist(),
        nodes.target.tolist(),
        nodes.wake_ns.tolist(),
        nodes.first.tolist(),
        (nodes.first + nodes.count).tolist(),
    )
    clocks = [0.0] * program.clocks
    free = [float(pending) for pending in program.pending_ns.tolist()]
    ends = [float(end) for end in program.queued_ns.tolist()]
    done = []
    for copy in range(repeats + 1):
        skipped = program.body if copy else 0
        for clock, work, call, waits, target, wake, first, last in islice(zip(*columns, strict=True), skipped, None):
            now = clocks[clock] + work
            if first < last:
                # The host waits for room where the queue is full.
                if len(ends) >= depth and ends[-depth] > now:
                    now = ends[-depth]
                for item in range(first, last):
                    number = stream[item]
                    start = now + latency[item]
                    ready = free[number] + gap[item]
                    if ready > start:
                        start = ready
                    if linked and item in depends:
                        for back, pause in depends[item]:
                            if back <= len(ends) and ends[-back] + pause > start:
                                start = ends[-back] + pause
                    free[number] = start + duration[item]
                    ends.append(free[number])
            now += call
            if waits != NOTHING:
                if waits == ITEM:
                    until = ends[-1 - target] if target < len(ends) else 0.0
                else:
                    until = max(free) if waits == ANYTHING else free[waits]
                if until + wake > now and until > now - call:
                    now = until + wake
            clocks[clock] = now
        # A thread beside the steps' own starts the next repeat with it, or later if it is behind.
        clocks = [max(clock, clocks[0]) for clock in clocks]
        done.append(max(clocks[0], *free))
    return Replayed(done)


def passes(program: Program) -> int:
    """How many nodes ``steady`` visits."""
    return len(program.nodes) + _repeats(program) * (len(program.nodes) - program.body)


def _repeats(program: Program) -> int:
    return 3 if program.steps == 1 else 2 if program.steps <= 3 else 1


def steady(program: Program, *, latency_ns: int | None = None, host_scale: float = 1.0) -> float:
    """Nanoseconds per step in the steady state, in which the host may run ahead from step to step."""
    run = replay(program, latency_ns=latency_ns, repeats=_repeats(program), host_scale=host_scale)
    return run.period_ns / max(program.steps - 1, 1)


def without_waits(program: Program, chosen: Bools) -> Program:
    """The program whose ``chosen`` nodes do not wait any more; the calls themselves stay."""
    nodes = program.nodes
    return replace(program, nodes=replace(nodes, waits=np.where(chosen, NOTHING, nodes.waits)))


def without_nodes(program: Program, chosen: Bools) -> Program:
    """The program without these calls and the device work that they issue; the host time before them stays."""
    nodes, items = program.nodes, program.items
    gone = np.repeat(chosen, nodes.count)
    return replace(
        program,
        nodes=replace(
            nodes,
            waits=np.where(chosen, NOTHING, nodes.waits),
            call_ns=np.where(chosen, 0, nodes.call_ns),
        ),
        items=replace(items, duration_ns=np.where(gone, 0, items.duration_ns), gap_ns=np.where(gone, 0, items.gap_ns)),
    )


def with_host_time(program: Program, work_ns: Ints, call_ns: Ints | None = None) -> Program:
    """The program with other host segments."""
    nodes = program.nodes
    return replace(
        program, nodes=replace(nodes, work_ns=work_ns, call_ns=nodes.call_ns if call_ns is None else call_ns)
    )


def without_items_time(program: Program, share: Floats) -> Program:
    """The program whose items are shorter by a share of their duration each."""
    items = program.items
    shorter = np.rint(items.duration_ns * (1 - share)).astype(np.int64)
    return replace(program, items=replace(items, duration_ns=shorter))
