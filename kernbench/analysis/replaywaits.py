"""What waits for what in a trace: host calls for device work, and streams for each other.

Where the trace holds ``cuda_sync`` events they tell the stream. Elsewhere the stream of the copy that the same operator
issued, or the thread's last one, is taken, and every guess is held against the times: a call that returned before the
work ended did not wait for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.intervals import union
from kernbench.analysis.replayqueue import Earlier
from kernbench.traces.nesting import CALL, Ints
from kernbench.traces.trace import Trace

NOTHING, ANYTHING, ITEM = -1, -2, -3
UNKNOWN = -(2**60)

# Device and host clocks agree to about a microsecond in a trace.
CLOCK_NS = 1_000
# Waking up after a wait takes 5 to 20 us; what is beyond this had another reason.
LONGEST_WAKE_NS = 50_000
USUAL_WAKE_NS = 5_000
# A copy from pageable memory goes through a staging buffer; shorter calls only hand it over.
STAGED_NS = 20_000
USUAL_COST_NS = 3_000
_WHOLE_CONTEXT = 4_294_967_295
_DEVICE = re.compile(r"(cuda|cu|hip)(Device|Ctx)Synchronize")
_EVENT = re.compile(r"(cuda|cu|hip)EventSynchronize")
_RECORD = re.compile(r"(cuda|cu|hip)EventRecord")
_STREAM_WAIT = re.compile(r"(cuda|cu|hip)StreamWaitEvent")
_FROM_PAGEABLE = re.compile(r".*Pageable -> Device")


@dataclass(frozen=True, eq=False)
class Blocks:
    """Per node: the stream (or ``ANYTHING``, ``ITEM``, ``NOTHING``) that it waits for.

    ``target`` counts items back from the last one issued; ``cost_ns`` is the call without any waiting.
    """

    waits: Ints
    target: Ints
    wake_ns: Ints
    cost_ns: Ints


def find(trace: Trace, rows: Ints, issued: Ints, issuer: Ints, stream: Ints, before: Earlier) -> Blocks:
    """What each node waits for, and how long it takes to return after that has ended.

    Args:
        rows: host row per node, -1 for marks.
        issued: device row per item, in the order of issue; ``issuer`` its node, ``stream`` its stream.
        before: what was queued when the first node began.
    """
    return _Search(trace, rows, issued, issuer, stream, before).blocks()


class _Search:
    """One pass over the nodes, with the end of all work issued so far per stream."""

    def __init__(self, trace: Trace, rows: Ints, issued: Ints, issuer: Ints, stream: Ints, before: Earlier) -> None:
        self.trace, self.rows, self.stream = trace, rows, stream
        host = trace.host
        known = np.maximum(rows, 0)
        self.start, self.stop = host.start_ns[known].tolist(), host.end_ns[known].tolist()
        self.thread, self.op = host.thread[known].tolist(), host.parent[known].tolist()
        name = host.name[known]
        self.syncs = np.isin(rows, trace.sync_calls).tolist()
        self.of_device = (trace.named(_DEVICE)[name]).tolist()
        self.of_event = (trace.named(_EVENT)[name]).tolist()
        self.ends = trace.device.end_ns[issued]
        self.from_pageable = trace.named(_FROM_PAGEABLE)[trace.device.name[issued]].tolist()
        self.first = np.searchsorted(issuer, np.arange(len(rows) + 1)).tolist()
        self.told = self._told(before.numbers)
        self.latest = before.last_end_ns.tolist()

    def _told(self, number: dict[tuple[int, int], int]) -> dict[int, int]:
        """Stream by host row, as far as ``cuda_sync`` events tell."""
        syncs = self.trace.device_syncs
        told = {}
        for call, on_device, on_stream in zip(
            syncs.call.tolist(), syncs.device.tolist(), syncs.stream.tolist(), strict=True
        ):
            if call >= 0:
                whole = on_stream in (_WHOLE_CONTEXT, -1)
                told[call] = ANYTHING if whole else number.get((on_device, on_stream), NOTHING)
        return told

    def blocks(self) -> Blocks:
        count = len(self.rows)
        waits, target = np.full(count, NOTHING), np.zeros(count, np.int64)
        wake, cost = np.full(count, UNKNOWN), np.full(count, -1)
        last_of_thread: dict[int, int] = {}
        last_of_op: dict[int, int] = {}
        ends, streams = self.ends.tolist(), self.stream.tolist()
        for node in range(count):
            own = range(self.first[node], self.first[node + 1])
            for item in own:
                number = streams[item]
                self.latest[number] = max(self.latest[number], ends[item])
                last_of_thread[self.thread[node]] = last_of_op[self.op[node]] = number
            begin, end = self.start[node], self.stop[node]
            if len(own) and self.from_pageable[own[-1]] and end - begin > STAGED_NS:
                # The call copies through a staging buffer, and returns when the last part lies in it.
                if abs(end - ends[own[-1]]) < STAGED_NS:
                    waits[node], wake[node] = ITEM, end - ends[own[-1]]
                continue
            if not self.syncs[node]:
                continue
            if len(own):
                until = ends[own[-1]]
                if until <= end + CLOCK_NS:
                    waits[node], wake[node] = ITEM, max(end - until, 0)
                continue
            guess = last_of_op.get(self.op[node]) if self.op[node] >= 0 else None
            guess = last_of_thread.get(self.thread[node], NOTHING) if guess is None else guess
            waits[node], target[node], until = self._waited(node, self.told.get(int(self.rows[node]), guess))
            if waits[node] != NOTHING and until > begin:
                wake[node] = min(max(end - until, 0), LONGEST_WAKE_NS)
            else:
                cost[node] = end - begin
        return self._filled(Blocks(waits, target, wake, cost))

    def _waited(self, node: int, guess: int) -> tuple[int, int, int]:
        """What a synchronising call waited for, how many items back that is, and when it ended."""
        begin, end = self.start[node], self.stop[node] + CLOCK_NS
        if self.of_event[node]:
            # The work before the event's record: that whose end the call returned with.
            issued = self.first[node]
            recent = self.ends[max(0, issued - 4096) : issued]
            candidates = np.flatnonzero((recent > begin) & (recent <= end) & (recent > end - LONGEST_WAKE_NS))
            if not len(candidates):
                return NOTHING, 0, begin
            chosen = int(candidates[np.argmax(recent[candidates])])
            return ITEM, len(recent) - 1 - chosen, int(recent[chosen])
        if self.of_device[node] or guess == ANYTHING:
            until = max(self.latest)
            return (ANYTHING, 0, until) if until <= end else (NOTHING, 0, begin)
        if guess >= 0 and self.latest[guess] <= end and end - self.latest[guess] <= LONGEST_WAKE_NS + CLOCK_NS:
            return guess, 0, self.latest[guess]
        ending = [(until, number) for number, until in enumerate(self.latest) if begin < until <= end]
        if ending:
            until, number = max(ending)
            return number, 0, until
        return (guess, 0, self.latest[guess]) if guess >= 0 and self.latest[guess] <= end else (NOTHING, 0, begin)

    def _filled(self, found: Blocks) -> Blocks:
        """Waking up and cost where the trace shows only the other: the median of those that it shows."""
        waking, idle = found.wake_ns[found.wake_ns >= 0], found.cost_ns[found.cost_ns >= 0]
        wake = int(np.median(waking)) if len(waking) else USUAL_WAKE_NS
        cost = int(np.median(idle)) if len(idle) else USUAL_COST_NS
        return Blocks(
            found.waits,
            found.target,
            np.where(found.wake_ns != UNKNOWN, found.wake_ns, wake),
            np.where(found.cost_ns >= 0, found.cost_ns, cost),
        )


def dependencies(
    trace: Trace, issued: Ints, stream: Ints, unexplained_ns: Ints, late_ns: int
) -> dict[int, list[tuple[int, int]]]:
    """Per item the work of other streams that it waited for: (items back, pause after its end).

    They come from recorded stream waits, else from the order of the host's record and wait calls, else from an item
    that started more than ``late_ns`` later than all that is known of it explains, just when another stream's ended.
    """
    if int(stream.max()) == 0:
        return {}
    begun, ended = trace.device.start_ns[issued], trace.device.end_ns[issued]
    launched = trace.host.start_ns[trace.device.call[issued]]
    edges = _recorded(trace, issued, launched) or _by_call_order(trace, stream, launched)
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for later, earlier in edges:
        if later > earlier and begun[later] >= ended[earlier] - CLOCK_NS:
            found[later].append((later - earlier, _pause(int(begun[later] - ended[earlier]))))
    order = np.argsort(ended, kind="stable")
    for item in np.flatnonzero(unexplained_ns > late_ns).tolist():
        if item in found and any(begun[item] - ended[item - back] <= late_ns for back, _ in found[item]):
            continue
        position = int(np.searchsorted(ended[order], begun[item] + CLOCK_NS, side="right"))
        near = [
            other
            for other in order[max(0, position - 8) : position].tolist()
            if stream[other] != stream[item] and other < item and ended[other] >= begun[item] - late_ns
        ]
        if near:
            found[item].append((item - near[-1], _pause(int(begun[item] - ended[near[-1]]))))
    return dict(found)


def _pause(observed_ns: int) -> int:
    """A wait that bound ended with the pause that is seen; one that did not bind would take about a microsecond."""
    return observed_ns if 0 <= observed_ns <= 5 * CLOCK_NS else CLOCK_NS


def _recorded(trace: Trace, issued: Ints, launched: Ints) -> list[tuple[int, int]]:
    """Edges (later item, earlier item) from the trace's own stream waits."""
    waits, device, host = trace.waits_on, trace.device, trace.host
    asked = np.where(waits.call >= 0, host.start_ns[waits.call], waits.time_ns) if len(host) else waits.time_ns
    until = np.where(waits.record >= 0, host.start_ns[waits.record], asked) if len(host) else asked
    queues: dict[tuple[int, int], Ints] = {}
    pairs = np.stack([device.device[issued], device.stream[issued]], axis=1)
    for number, stream in np.unique(pairs, axis=0).tolist():
        queues[number, stream] = np.flatnonzero((pairs == (number, stream)).all(axis=1))
    nothing = np.zeros(0, np.int64)
    edges = []
    columns = (waits.device, waits.stream, waits.on_stream, asked, until)
    for number, stream, on_stream, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        mine, theirs = queues.get((number, stream), nothing), queues.get((number, on_stream), nothing)
        after = int(np.searchsorted(launched[mine], begin))
        before = int(np.searchsorted(launched[theirs], end)) - 1
        if after < len(mine) and before >= 0:
            edges.append((int(mine[after]), int(theirs[before])))
    return edges


def _by_call_order(trace: Trace, stream: Ints, launched: Ints) -> list[tuple[int, int]]:
    """Edges from ``cudaEventRecord`` followed by ``cudaStreamWaitEvent`` with launches on two streams around them."""
    host = trace.host
    calls = host.kind == CALL
    records = np.sort(host.start_ns[calls & trace.named(_RECORD)[host.name]])
    edges = []
    for asked in np.sort(host.start_ns[calls & trace.named(_STREAM_WAIT)[host.name]]).tolist():
        recorded = int(np.searchsorted(records, asked)) - 1
        after = int(np.searchsorted(launched, asked))
        before = int(np.searchsorted(launched, records[recorded])) - 1 if recorded >= 0 else -1
        if before >= 0 and after < len(launched) and stream[before] != stream[after]:
            edges.append((after, before))
    return edges


def stream_overlap(begun: Ints, ended: Ints, stream: Ints) -> float:
    """Share of the less busy streams' time in which the busiest one runs too; 0 for a single stream."""
    busy = np.bincount(stream, weights=ended - begun)
    main = stream == int(np.argmax(busy))
    if main.all():
        return 0.0
    side = union(begun[~main], ended[~main])
    return side.within(union(begun[main], ended[main])).total / max(side.total, 1)


__all__ = ["ANYTHING", "ITEM", "NOTHING", "Blocks", "dependencies", "find", "stream_overlap"]
