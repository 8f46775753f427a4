"""A traced stretch of steps as a program that can be replayed: host segments, calls, device work, waits.

A node is a runtime call that gives work to the device or waits for it; the host time before it is its ``work``. An item
is one piece of device work, in the order in which the host issued it. What the trace shows as waiting is taken out of
the durations and becomes a rule: an item starts when it was launched, its stream is free and the work that its stream
waits for has ended; a wait returns when what it waits for has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.analysis import replaywaits
from kernbench.analysis.hostclocks import clocks_of_threads
from kernbench.analysis.replayqueue import Earlier, queued_before, streams_of
from kernbench.analysis.replaywaits import NOTHING, Blocks
from kernbench.errors import KernbenchError
from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import Trace

# Nodes of the replayed stretch: enough steps for a steady picture, few enough for some tens of replays a second.
MOST_NODES = 12_000
# CUDA holds about this many launches before the next one has to wait for room.
QUEUE_DEPTH = 1024
# Beyond this share of device work without a launch in the trace, nobody knows when the host issued what.
UNLINKED_SHARE = 0.02
# From this distance to the work before it on, an item's launch had long arrived when its turn came.
DEEP_NS = 50_000
# What launches take on current machines; said of a trace in which every launch queued.
USUAL_LATENCY_NS = (4_500, 7_000)
# A gap or latency beyond this has another cause than the way of a launch; it is not taken over into the replay.
LONGEST_LATENCY_NS = 50_000
LONGEST_GAP_NS = 10_000


class CannotReplayError(KernbenchError):
    """The trace does not hold what a replay needs; the message says what, as one sentence."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Host nodes in the order of the trace. ``row`` is the host row, -1 for the mark at a step's end.

    ``work_ns`` is host time before the node, ``call_ns`` the call itself without waiting. ``waits`` is the stream whose
    issued work the node waits for (or ``ANYTHING``, ``NOTHING``, ``ITEM`` of ``replaywaits``), ``target`` for ``ITEM``
    how many items back; it returns ``wake_ns`` after that has ended. Its items are ``first`` to ``first + count``.
    """

    row: Ints
    clock: Ints
    start_ns: Ints
    work_ns: Ints
    call_ns: Ints
    waits: Ints
    target: Ints
    wake_ns: Ints
    first: Ints
    count: Ints
    step: Ints

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, eq=False)
class Items:
    """Device work in the order of issue. ``row`` is the device row, ``gap_ns`` the pause after the work before it.

    ``latency_ns`` counts from the start of the call; -1 where the trace cannot tell, because the item queued.
    """

    row: Ints
    stream: Ints
    latency_ns: Ints
    gap_ns: Ints
    duration_ns: Ints
    depends: dict[int, list[tuple[int, int]]]
    """Per item the items (how many back) that its stream waits for, and the pause after their end."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, eq=False)
class Program:
    """What the host did and what the device was given, over whole steps.

    ``body`` is the first node of what can be repeated for a steady state: the second step, or all if there is but one.
    ``latency_ns`` is the plausible range of launch latencies. Times of what was queued before the stretch count from
    its begin: ``pending_ns`` until each stream is free of it, ``queued_ns`` until each piece of it has ended, in order.
    """

    nodes: Nodes
    items: Items
    clocks: int
    steps: int
    body: int
    traced_ns: int
    pending_ns: Ints
    queued_ns: Ints
    latency_ns: tuple[int, int]
    depth: int


def model(trace: Trace) -> Program:
    """The longest run of complete steps, cut to ``MOST_NODES``, as a program.

    Raises:
        CannotReplayError: the trace holds no device work or not the launches of it.
    """
    first, last = _stretch(trace)
    begin, end = int(trace.steps.start_ns[first]), int(trace.steps.end_ns[last])
    issued = _items(trace, first, last)
    row, item_count = np.unique(trace.device.call[issued], return_counts=True)
    waiting = trace.sync_calls[_within(trace.host.step[trace.sync_calls], first, last)]
    rows = np.concatenate([np.union1d(row, waiting), np.full(last - first + 1, -1)])
    start = np.where(rows >= 0, trace.host.start_ns[rows], 0)
    start[rows < 0] = trace.steps.end_ns[first : last + 1]
    # A call that begins just when a step ends belongs to the next one.
    order = np.lexsort((rows >= 0, start))
    rows, start = rows[order], start[order]
    clock, clocks = clocks_of_threads(trace, rows, first, last)
    stop = np.where(rows >= 0, trace.host.end_ns[rows], start)
    work, call = _segments(clock, start, stop, begin)

    count = np.zeros(len(rows), np.int64)
    position = np.searchsorted(row, rows)
    mine = (rows >= 0) & (row[np.minimum(position, len(row) - 1)] == rows)
    count[mine] = item_count[position[mine]]
    node_of_row = dict(zip(rows.tolist(), range(len(rows)), strict=True))
    issuer = np.array([node_of_row[call_row] for call_row in trace.device.call[issued].tolist()], np.int64)
    order = np.lexsort((trace.device.start_ns[issued], issuer))
    issued, issuer = issued[order], issuer[order]
    stream, before = streams_of(trace, issued, begin)
    blocks = replaywaits.find(trace, rows, issued, issuer, stream, before)
    call, depth = _queue(call, blocks, issued, issuer, start, trace, before)
    items, latency = _timed(trace, issued, issuer, stream, start, np.where(blocks.waits == NOTHING, call, 0))
    depends = replaywaits.dependencies(trace, issued, stream, items.unexplained_ns, LONGEST_GAP_NS)
    # What waited for another stream says nothing of its own latency.
    items.latency_ns[list(depends)] = -1
    nodes = Nodes(
        row=rows,
        clock=clock,
        start_ns=start,
        work_ns=work,
        call_ns=np.where(blocks.waits == NOTHING, call, np.minimum(call, blocks.cost_ns)),
        waits=blocks.waits,
        target=blocks.target,
        wake_ns=blocks.wake_ns,
        first=np.concatenate([[0], np.cumsum(count)[:-1]]),
        count=count,
        step=np.where(rows >= 0, trace.host.step[rows], -1),
    )
    return Program(
        nodes=nodes,
        items=Items(issued, stream, items.latency_ns, items.gap_ns, items.duration_ns, depends),
        clocks=clocks,
        steps=last - first + 1,
        body=int(np.argmax(rows < 0)) + 1 if last > first else 0,
        traced_ns=max(end, int(trace.device.end_ns[issued].max())) - begin,
        pending_ns=_pending(trace, issued, stream, before, begin),
        queued_ns=before.end_ns - begin,
        latency_ns=latency,
        depth=depth,
    )


def _within(step: Ints, first: int, last: int) -> Bools:
    return np.asarray((step >= first) & (step <= last), np.bool_)


def _stretch(trace: Trace) -> tuple[int, int]:
    """First and last step of the longest run of counted steps, from its end as many as ``MOST_NODES`` allow, or two."""
    runs = np.split(trace.counted, np.flatnonzero(np.diff(trace.counted) != 1) + 1)
    longest = max(runs, key=len)
    first, last = int(longest[0]), int(longest[-1])
    step = trace.device.step[trace.device.step >= 0]
    nodes = np.cumsum(np.bincount(step, minlength=len(trace.steps))[first : last + 1][::-1])
    fitting = max(int(np.searchsorted(nodes, MOST_NODES, side="right")), 2)
    return last - min(last - first, fitting - 1), last


def _items(trace: Trace, first: int, last: int) -> Ints:
    """Device rows whose launch lies in the stretch.

    Raises:
        CannotReplayError: there is none, or too much of the device work beside them has no launch in the trace.
    """
    device = trace.device
    issued = np.flatnonzero((device.call >= 0) & _within(device.step, first, last))
    begin, until = int(trace.steps.start_ns[first]), int(trace.steps.end_ns[last])
    until = max(until, int(device.end_ns[issued].max(initial=0)))
    beside = (device.start_ns >= begin) & (device.start_ns < until)
    lost = np.count_nonzero(beside & (device.call < 0) & ~queued_before(trace))
    if lost > UNLINKED_SHARE * np.count_nonzero(beside):
        raise CannotReplayError(
            f"the launches of {lost} of {np.count_nonzero(beside)} device events are missing in the trace, "
            "so it cannot be replayed; record the runtime calls too"
        )
    if not len(issued):
        raise CannotReplayError("no step of the trace holds device work, so there is nothing to replay")
    return issued


def _segments(clock: Ints, start: Ints, stop: Ints, begin: int) -> tuple[Ints, Ints]:
    """Host time before each node and in it, per clock. A call around another one ends where that one starts."""
    work, call = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64)
    for number in np.unique(clock).tolist():
        mine = np.flatnonzero(clock == number)
        following = np.append(start[mine][1:], np.iinfo(np.int64).max)
        end = np.minimum(stop[mine], following)
        call[mine] = end - start[mine]
        work[mine] = np.maximum(start[mine] - np.concatenate([[begin], end[:-1]]), 0)
    return work, call


@dataclass(frozen=True, eq=False)
class Timed:
    """What the trace tells of each item's latency (-1 where it queued), gap and duration."""

    latency_ns: Ints
    gap_ns: Ints
    duration_ns: Ints
    unexplained_ns: Ints
    """How much later than launch and stream explain the item started: it waited for something else."""


def _timed(
    trace: Trace, issued: Ints, issuer: Ints, stream: Ints, start: Ints, call: Ints
) -> tuple[Timed, tuple[int, int]]:
    begun, ended = trace.device.start_ns[issued], trace.device.end_ns[issued]
    free = _stream_free(stream, ended)
    launched = start[issuer]
    observed = begun - launched
    # Work of one graph launch follows the launch by the work before it, not by a latency of its own.
    leading = np.concatenate([[True], issuer[1:] != issuer[:-1]])
    shortest = max(int(np.percentile(observed[leading], 1)), 0)
    shortest = shortest if shortest <= LONGEST_LATENCY_NS else USUAL_LATENCY_NS[0]
    slow = np.where(call[issuer] > 3 * shortest, call[issuer], 0)
    deep = free > launched + np.maximum(slow, DEEP_NS)
    pause = begun - free
    usual_gap = int(np.median(np.clip(pause[deep], 0, LONGEST_GAP_NS))) if deep.any() else 1000
    followed = (pause >= 0) & (pause <= 2 * usual_gap + 500) & (observed >= shortest)
    queued = deep | followed | ~leading
    direct = observed[~queued & (observed - slow <= LONGEST_LATENCY_NS)]
    usual = int(np.median(direct)) if len(direct) >= 5 else max(USUAL_LATENCY_NS[1], shortest)
    longest = slow + LONGEST_LATENCY_NS
    latency = np.where(queued, np.where(slow > 0, slow, -1), np.clip(observed, 0, longest))
    gap = np.where(queued, np.clip(pause, 0, LONGEST_GAP_NS), usual_gap)
    ready = launched + np.where(latency >= 0, latency, shortest)
    unexplained = begun - np.maximum(ready, free + gap)
    return Timed(latency, gap, ended - begun, unexplained), (shortest, max(usual, shortest))


def _stream_free(stream: Ints, ended: Ints) -> Ints:
    """When the stream of each item had finished all that was issued to it before; far in the past for the first."""
    free = np.full(len(stream), -(2**60), np.int64)
    for number in np.unique(stream).tolist():
        mine = np.flatnonzero(stream == number)
        free[mine[1:]] = np.maximum.accumulate(ended[mine])[:-1]
    return free


def _queue(
    call: Ints, blocks: Blocks, issued: Ints, issuer: Ints, start: Ints, trace: Trace, before: Earlier
) -> tuple[Ints, int]:
    """Call times without waiting for room in the launch queue, and how many launches it holds."""
    launches = np.unique(issuer)
    ends = np.sort(np.concatenate([before.end_ns, trace.device.end_ns[issued]]))
    asked = np.searchsorted(issuer, launches) + len(before.end_ns)
    waiting_items = asked - np.searchsorted(ends, start[launches], side="right")
    usual = int(np.median(call[launches]))
    full = (call[launches] > max(10 * usual, DEEP_NS)) & (waiting_items > QUEUE_DEPTH // 4)
    full &= (waiting_items > 0.9 * waiting_items.max()) & (blocks.waits[launches] == NOTHING)
    depth = int(np.median(waiting_items[full])) if full.any() else max(QUEUE_DEPTH, int(waiting_items.max()))
    shortened = call.copy()
    shortened[launches[full]] = usual
    return shortened, depth


def _pending(trace: Trace, issued: Ints, stream: Ints, before: Earlier, begin: int) -> Ints:
    """Per stream, how long after the stretch's begin it was busy with work from before.

    That work may have been cut out of the trace; then the first item starts late, long after its launch.
    """
    device = trace.device
    pending = before.last_end_ns - begin
    for number in np.unique(stream).tolist():
        first = issued[int(np.argmax(stream == number))]
        begun = int(device.start_ns[first])
        ready = max(int(trace.host.end_ns[device.call[first]]), begin + int(pending[number]))
        if begun - ready > LONGEST_LATENCY_NS:
            pending[number] = begun - begin
    return np.maximum(pending, 0)
