"""Which source lines make the host wait for the device, how long, and what the wait does to the device.

Lines come from the line pass, waits and classes from the runtime's own synchronising calls in the trace. The two are
passes over the same steps, matched by thread and by the order of their events within a step. In a trace of others the
lines come from its Python stacks, where it has them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np

from kernbench.analysis.attribution import Places, places
from kernbench.analysis.waits import Wait, waits
from kernbench.record import HostRead, LineLog, LineMatch, SourceLine, Stall, StallClass
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import Trace

# Stands for reads and waits outside all operators, such as torch.cuda.synchronize.
_EXPLICIT = ""

_Key = tuple[int, str, bool, bool, str]
_Thread = TypeVar("_Thread", int, str)
_Event = TypeVar("_Event", HostRead, Wait)


@dataclass(frozen=True, eq=False)
class Waiting:
    """A stall, and the host rows of all its waits in the counted steps."""

    stall: Stall
    rows: Ints


def stalls(trace: Trace | None, lines: LineLog | None) -> list[Stall]:
    """One row per source line, operator and kind of read; longest wait first, then most frequent.

    Without a log, or when the log saw none of the trace's waits, the rows come from the trace alone: their line is the
    first one of the function around them, and without stacks ``file`` is empty and ``line`` 0.
    ``saving_seconds_per_step`` is left open: it takes a replay.
    """
    return [found.stall for found in waiting(trace, lines)]


def waiting(trace: Trace | None, lines: LineLog | None) -> list[Waiting]:
    """``stalls`` with the host rows of each, in the same order."""
    on_gpu = trace is not None and trace.on_gpu
    where = places(trace, lines) if trace is not None and on_gpu else None
    found = waits(trace, where) if trace is not None and where is not None else []
    rows = [] if lines is None else _from_log(lines, found, trace)
    if trace is not None and where is not None and found and not any(row.stall.real for row in rows):
        rows += _from_trace(found, len(trace.counted), where)
    return sorted(rows, key=lambda row: _rank(row.stall))


def _rank(stall: Stall) -> tuple[float, float, str, int]:
    return -(stall.wait_seconds_per_step or 0.0), -stall.count_per_step, stall.file, stall.line


def line_match(trace: Trace, lines: LineLog) -> LineMatch | None:
    """How many of the trace's waits found their line in the line pass; None where nothing waited."""
    found = waits(trace, places(trace, lines)) if trace.on_gpu else []
    if not found:
        return None
    matched, steps = _match(lines, found, len(trace.counted))
    return LineMatch(
        waits_per_step=len(found) / steps, matched_per_step=sum(len(group) for group in matched.values()) / steps
    )


def syncs_per_step(lines: LineLog) -> float:
    """Reads per step that make the host wait; on a CPU, that would on a GPU."""
    on_gpu = any(read.real for read in lines.reads)
    waiting = sum(not read.host_tensor and (read.real or not on_gpu) for read in lines.reads)
    return waiting / max(lines.steps, 1)


def cpu_reads_per_step(lines: LineLog) -> float:
    """Reads of host tensors per step: no stall anywhere."""
    return sum(read.host_tensor for read in lines.reads) / max(lines.steps, 1)


def _from_log(lines: LineLog, found: list[Wait], trace: Trace | None) -> list[Waiting]:
    groups: dict[_Key, list[HostRead]] = defaultdict(list)
    for read in lines.reads:
        groups[_key(read)].append(read)
    matched, steps = _match(lines, found, len(trace.counted) if trace is not None else 0)
    return [
        Waiting(_stall(lines, key, reads, matched.get(key, []), steps), _rows_of(matched.get(key, [])))
        for key, reads in groups.items()
    ]


def _key(read: HostRead) -> _Key:
    return read.line, read.op, read.host_tensor, read.real, read.thread


def _rows_of(group: Iterable[Wait]) -> Ints:
    return np.array([row for wait in group for row in wait.rows], np.int64)


def _stall(lines: LineLog, key: _Key, reads: list[HostRead], matched: list[Wait], steps: int) -> Stall:
    line, op, host_tensor, real, _ = key
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

    Within a step, the n-th wait of a thread is its n-th read if both count the same number; else the same is tried for
    each operator alone. What cannot be told apart stays unmatched. The thread that runs the steps is known in both
    passes; another one is recognised where it alone waits as often as it read.
    """
    matched: dict[_Key, list[Wait]] = defaultdict(list)
    watched = _by_step_and_thread((read.step, read.thread, read) for read in lines.reads if read.real)
    traced = _by_step_and_thread((wait.step, wait.thread, wait) for wait in found)
    latest = [watched[step] for step in sorted(watched, reverse=True)]
    for threads in traced.values():
        for read, wait in _pairs_of_step(latest, threads):
            matched[_key(read)].append(wait)
    return matched, max(counted_steps, 1)


def _by_step_and_thread(
    events: Iterable[tuple[int, _Thread, _Event]],
) -> dict[int, dict[_Thread, list[_Event]]]:
    groups: dict[int, dict[_Thread, list[_Event]]] = defaultdict(lambda: defaultdict(list))
    for step, thread, event in events:
        groups[step][thread].append(event)
    return groups


def _pairs_of_step(
    watched: list[dict[str, list[HostRead]]], threads: dict[int, list[Wait]]
) -> list[tuple[HostRead, Wait]]:
    """Pairs of one traced step; ``watched`` holds the reads of the watched steps by thread, the latest step first."""
    pairs: list[tuple[HostRead, Wait]] = []
    mine = threads.get(-1, [])
    reads = next((step[""] for step in watched if len(step.get("", [])) == len(mine)), None) if mine else None
    if reads is not None:
        pairs += zip(reads, mine, strict=True)
    elif watched:
        pairs += _pairs_by_operator(watched[0].get("", []), mine)
    others = {thread: read for thread, read in watched[0].items() if thread} if watched else {}
    for waiting in (group for thread, group in threads.items() if thread >= 0):
        same_threads = sum(len(group) == len(waiting) for thread, group in threads.items() if thread >= 0)
        candidates = [read for read in others.values() if len(read) == len(waiting)]
        if same_threads == len(candidates) == 1:
            pairs += zip(candidates[0], waiting, strict=True)
    return pairs


def _pairs_by_operator(reads: list[HostRead], found: list[Wait]) -> list[tuple[HostRead, Wait]]:
    asked: dict[str, list[HostRead]] = defaultdict(list)
    for read in reads:
        asked[read.op if "::" in read.op else _EXPLICIT].append(read)
    given: dict[str, list[Wait]] = defaultdict(list)
    for wait in found:
        # The outermost operator that the log names is the one that the program called.
        given[next((op for op in reversed(wait.operators) if op in asked), _EXPLICIT)].append(wait)
    return [
        pair
        for op, group in asked.items()
        if len(group) == len(given[op])
        for pair in zip(group, given[op], strict=True)
    ]


def _from_trace(found: list[Wait], steps: int, where: Places) -> list[Waiting]:
    groups: dict[tuple[str, int, int], list[Wait]] = defaultdict(list)
    for wait in found:
        groups[wait.op, wait.line, wait.thread].append(wait)
    nowhere = SourceLine(file="", line=0, text="")
    return [
        Waiting(
            Stall(
                file=(source := where.source(line) or nowhere).file,
                line=source.line,
                source=source.text,
                function=source.function,
                op=op,
                count_per_step=len(group) / steps,
                klass=_most_frequent([wait.klass for wait in group]),
                real=True,
                wait_seconds_per_step=sum(wait.wait_ns for wait in group) / steps / 1e9,
            ),
            _rows_of(group),
        )
        for (op, line, _), group in groups.items()
    ]
