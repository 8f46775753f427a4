"""Which source lines make the host wait for the device, how long, and what the wait does to the device.

Lines come from the line pass, waits and classes from the runtime's own synchronising calls in the trace. The two are
passes over the same steps, matched by the order of their events within a step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from kernbench.analysis import idle
from kernbench.nesting import CALL
from kernbench.record import HostRead, LineLog, Stall, StallClass
from kernbench.trace import Trace

# A wait below this cost about what the call itself costs.
FREE_NS = 5_000
# Host work between a wait and the next launch that the device can still absorb: about one launch.
RESUME_NS = 10_000

# Stands for reads and waits outside all operators, such as torch.cuda.synchronize.
_EXPLICIT = ""

_Key = tuple[int, str, bool, bool]


@dataclass(frozen=True)
class Wait:
    """One wait of the host in the trace: the synchronising calls of one operator, or one call outside operators.

    ``operators`` are the names around it, innermost first; ``call`` is the runtime's own name.
    """

    step: int
    call: str
    operators: tuple[str, ...]
    wait_ns: int
    klass: StallClass


def stalls(trace: Trace | None, lines: LineLog | None) -> list[Stall]:
    """One row per source line, operator and kind of read; longest wait first, then most frequent.

    Without a log, or when the log saw none of the trace's waits, the rows come from the trace alone and have no line
    (``file`` is empty, ``line`` 0). ``saving_seconds_per_step`` is left open: it takes a replay.
    """
    found = waits(trace) if trace is not None and trace.on_gpu else []
    rows = [] if lines is None else _from_log(lines, found, trace)
    if trace is not None and found and not any(row.real for row in rows):
        rows += _from_trace(found, len(trace.counted))
    return sorted(rows, key=lambda row: (-(row.wait_seconds_per_step or 0.0), -row.count_per_step, row.file, row.line))


def syncs_per_step(lines: LineLog) -> float:
    """Reads per step that make the host wait; on a CPU, that would on a GPU."""
    on_gpu = any(read.real for read in lines.reads)
    waiting = sum(not read.host_tensor and (read.real or not on_gpu) for read in lines.reads)
    return waiting / max(lines.steps, 1)


def cpu_reads_per_step(lines: LineLog) -> float:
    """Reads of host tensors per step: no stall anywhere."""
    return sum(read.host_tensor for read in lines.reads) / max(lines.steps, 1)


def waits(trace: Trace) -> list[Wait]:
    """Every wait within the counted steps, in order of time."""
    host = trace.host
    rows = trace.sync_calls[trace.in_counted(host.step[trace.sync_calls])]
    groups: list[list[int]] = []
    for row in rows.tolist():
        same_operator = groups and host.parent[row] >= 0 and host.parent[row] == host.parent[groups[-1][-1]]
        if same_operator:
            groups[-1].append(row)
        else:
            groups.append([row])
    if not groups:
        return []
    judge = _Judge(trace)
    return [
        Wait(
            step=int(host.step[group[0]]),
            call=trace.names[host.name[group[-1]]],
            operators=_operators_around(trace, group[0]),
            wait_ns=int((host.end_ns[group] - host.start_ns[group]).sum()),
            klass=judge.classify(group),
        )
        for group in groups
    ]


class _Judge:
    """Classifies waits against one trace; holds what every classification looks up."""

    def __init__(self, trace: Trace) -> None:
        host, device = trace.host, trace.device
        self.host = host
        self.busy = idle.busy_intervals(trace)
        mine = np.flatnonzero(idle.on_main_device(trace))
        linked = device.call[mine] >= 0
        launched = np.where(linked, host.start_ns[device.call[mine]], np.iinfo(np.int64).min)
        order = np.argsort(launched, kind="stable")
        self.launched = launched[order]
        self.reach = np.maximum.accumulate(device.end_ns[mine][order])
        calls = np.unique(device.call[device.call >= 0])
        self.launches_of = {
            thread: np.sort(host.start_ns[calls[host.thread[calls] == thread]])
            for thread in np.unique(host.thread[calls]).tolist()
        }

    def classify(self, group: list[int]) -> StallClass:
        """Free, starved (the device had run dry before), drain (it runs dry after), or busy (it has more to do)."""
        host = self.host
        begin, end = self._begin(group[0]), int(host.end_ns[group[-1]])
        position = int(np.searchsorted(self.launched, begin)) - 1
        pending = position >= 0 and int(self.reach[position]) > begin
        busy_after = bool(self.busy.contains(np.array([end]))[0])
        if not pending:
            return "free" if end - int(host.start_ns[group[0]]) < FREE_NS and not busy_after else "starved"
        launches = self.launches_of.get(int(host.thread[group[0]]), np.zeros(0, np.int64))
        following = int(np.searchsorted(launches, end))
        resumed = following < len(launches) and int(launches[following]) - end <= RESUME_NS
        return "busy" if busy_after or resumed else "drain"

    def _begin(self, row: int) -> int:
        """Start of the read that ends in this call: the first runtime call of its operator, such as the copy."""
        above = int(self.host.parent[row])
        if above < 0:
            return int(self.host.start_ns[row])
        inside = slice(above, row + 1)
        calls = (self.host.kind[inside] == CALL) & (self.host.parent[inside] == above)
        return int(self.host.start_ns[inside][calls].min())


def _operators_around(trace: Trace, row: int) -> tuple[str, ...]:
    names = []
    above = int(trace.host.parent[row])
    while above >= 0:
        names.append(trace.names[trace.host.name[above]])
        above = int(trace.host.parent[above])
    return tuple(names)


def _from_log(lines: LineLog, found: list[Wait], trace: Trace | None) -> list[Stall]:
    groups: dict[_Key, list[HostRead]] = defaultdict(list)
    for read in lines.reads:
        groups[_key(read)].append(read)
    matched, steps = _match(lines, found, len(trace.counted) if trace is not None else 0)
    return [_stall(lines, key, reads, matched.get(key, []), steps) for key, reads in groups.items()]


def _key(read: HostRead) -> _Key:
    return read.line, read.op, read.host_tensor, read.real


def _stall(lines: LineLog, key: _Key, reads: list[HostRead], matched: list[Wait], steps: int) -> Stall:
    line, op, host_tensor, real = key
    source = lines.lines[line] if 0 <= line < len(lines.lines) else None
    klass: StallClass = "cpu-tensor" if host_tensor else "would-sync"
    measured = [read.wait_seconds for read in reads if read.wait_seconds is not None]
    wait = sum(measured) / max(lines.steps, 1) if measured else None
    if real:
        klass = _most_frequent([found.klass for found in matched])
        wait = sum(found.wait_ns for found in matched) / steps / 1e9 if matched else wait
    phase = Counter(read.phase for read in reads).most_common(1)[0][0]
    return Stall(
        file=source.file if source else "",
        line=source.line if source else 0,
        source=source.text if source else "",
        function=source.function if source else "",
        op=op,
        count_per_step=len(reads) / max(lines.steps, 1),
        klass=klass,
        real=real,
        wait_seconds_per_step=wait,
        phase=phase,
    )


def _most_frequent(classes: Sequence[StallClass]) -> StallClass:
    """The class of most waits; of equally frequent ones the first in the order of the record's vocabulary."""
    count = Counter(classes)
    return max(get_args(StallClass), key=lambda klass: count[klass]) if count else "unclassified"


def _match(lines: LineLog, found: list[Wait], counted_steps: int) -> tuple[dict[_Key, list[Wait]], int]:
    """The trace's waits by the read that caused them, and over how many steps they were counted.

    Within a step, the n-th wait is the n-th read if both count the same number; else the same is tried for each
    operator alone. What cannot be told apart stays unmatched.
    """
    matched: dict[_Key, list[Wait]] = defaultdict(list)
    by_step: dict[int, list[HostRead]] = defaultdict(list)
    for read in lines.reads:
        if read.real:
            by_step[read.step].append(read)
    watched = [by_step[step] for step in sorted(by_step, reverse=True)]
    for step in sorted({wait.step for wait in found}):
        mine = [wait for wait in found if wait.step == step]
        reads = next((reads for reads in watched if len(reads) == len(mine)), None)
        pairs = zip(reads, mine, strict=True) if reads is not None else _pairs_by_operator(watched[:1], mine)
        for read, wait in pairs:
            matched[_key(read)].append(wait)
    return matched, max(counted_steps, 1)


def _pairs_by_operator(watched: list[list[HostRead]], found: list[Wait]) -> list[tuple[HostRead, Wait]]:
    asked: dict[str, list[HostRead]] = defaultdict(list)
    for read in watched[0] if watched else []:
        asked[read.op if "::" in read.op else _EXPLICIT].append(read)
    given: dict[str, list[Wait]] = defaultdict(list)
    for wait in found:
        # The outermost operator that the log names is the one that the program called.
        given[next((op for op in reversed(wait.operators) if op in asked), _EXPLICIT)].append(wait)
    return [
        pair
        for op, reads in asked.items()
        if len(reads) == len(given[op])
        for pair in zip(reads, given[op], strict=True)
    ]


def _from_trace(found: list[Wait], steps: int) -> list[Stall]:
    groups: dict[str, list[Wait]] = defaultdict(list)
    for wait in found:
        groups[wait.operators[-1] if wait.operators else wait.call].append(wait)
    return [
        Stall(
            file="",
            line=0,
            source="",
            op=op,
            count_per_step=len(group) / steps,
            klass=_most_frequent([wait.klass for wait in group]),
            real=True,
            wait_seconds_per_step=sum(wait.wait_ns for wait in group) / steps / 1e9,
        )
        for op, group in groups.items()
    ]
