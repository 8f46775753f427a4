"""Which nodes of a replayed program belong to which stall, and whether the value read there steers the host."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.attribution import line_of_rows
from kernbench.analysis.replaymodel import Program
from kernbench.analysis.replaywaits import NOTHING
from kernbench.nesting import Ints
from kernbench.record import LineLog, SourceLine, Stall
from kernbench.trace import Trace

# Operators that exist only to read: without the read they go, with the copy that they issue.
_READS = re.compile(r"aten::(item|_local_scalar_dense|is_nonzero)$")
_DECIDES = re.compile(r"aten::(is_nonzero|equal)$")
_STEERS = re.compile(
    r"^\s*(if|elif|while|assert|for)\b|\bif\b.+\belse\b|\brange\(|\[[^\]]*(\.item\(\)|\bint\()|\bbool\(|\b(and|or|not)\b"
)


@dataclass(frozen=True, eq=False)
class Site:
    """The waits of one source line and operator. ``stall`` is a position in the list of stalls, -1 for none."""

    nodes: Ints
    stall: int
    source: SourceLine | None
    op: str
    deferred: bool
    phase: int | None

    @property
    def title(self) -> str:
        """How a person would name it."""
        if self.source is None or not self.source.file:
            return self.op
        return f"{self.source.file}:{self.source.line} ({self.op})"


def sites(trace: Trace, program: Program, stalls: Sequence[Stall], lines: LineLog | None) -> list[Site]:
    """Every waiting node of the program in one site."""
    waiting = np.flatnonzero(program.nodes.waits != NOTHING)
    groups: dict[tuple[int, str, int, str], list[int]] = defaultdict(list)
    line, places = _lines(trace, lines)
    rows = program.nodes.row[waiting].tolist()
    explicit = _explicit(trace, rows, stalls, lines)
    for position, (node, row) in enumerate(zip(waiting.tolist(), rows, strict=True)):
        operators = operators_around(trace, row)
        place = places[line[row]] if line[row] >= 0 else None
        stall = explicit.get(position, _stall(stalls, place, operators, trace.names[trace.host.name[row]]))
        file, number = (place.file, place.line) if place is not None and stall < 0 else ("", 0)
        op = operators[-1] if operators else trace.names[trace.host.name[row]]
        groups[stall, file, number, op if stall < 0 else ""].append(node)
    found = []
    for (stall, _, _, _), nodes in groups.items():
        row = int(program.nodes.row[nodes[0]])
        operators = operators_around(trace, row)
        source = places[line[row]] if line[row] >= 0 else None
        op = operators[-1] if operators else trace.names[trace.host.name[row]]
        phase = int(trace.host.phase[row]) if trace.host.phase[row] >= 0 else None
        if stall >= 0:
            known = stalls[stall]
            op, phase = known.op, known.phase
            source = _source(known) or source
        steers = any(_DECIDES.match(name) for name in operators) or bool(source and _STEERS.search(source.text))
        found.append(Site(np.array(nodes, np.int64), stall, source, op, steers, phase))
    return found


def read_nodes(trace: Trace, program: Program, site: Site) -> tuple[Ints, Ints]:
    """The outermost operator around each of the site's waits that only reads, and all nodes under these operators.

    Returns:
        host rows of the operators, and positions of the nodes; both empty for a site that does more than read.
    """
    host = trace.host
    tops = []
    for row in program.nodes.row[site.nodes].tolist():
        above, top = int(host.parent[row]), -1
        while above >= 0 and _READS.match(trace.names[host.name[above]]):
            top, above = above, int(host.parent[above])
        if top < 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        tops.append(top)
    operators = np.unique(tops)
    inside = (program.nodes.row >= 0) & np.isin(host.thread[program.nodes.row], host.thread[operators])
    position = np.searchsorted(host.start_ns[operators], program.nodes.start_ns, side="right") - 1
    order = np.argsort(host.start_ns[operators], kind="stable")
    ends = host.end_ns[operators][order]
    position = np.searchsorted(host.start_ns[operators][order], program.nodes.start_ns, side="right") - 1
    inside &= (position >= 0) & (program.nodes.start_ns < ends[np.maximum(position, 0)])
    return operators, np.flatnonzero(inside)


def operators_around(trace: Trace, row: int) -> list[str]:
    """Names of the operators around a host row, innermost first."""
    names = []
    above = int(trace.host.parent[row])
    while above >= 0:
        names.append(trace.names[trace.host.name[above]])
        above = int(trace.host.parent[above])
    return names


def _lines(trace: Trace, lines: LineLog | None) -> tuple[list[int], list[SourceLine]]:
    """A source line per host row, from the line pass or from the stacks of the trace."""
    if lines is None:
        return trace.source.tolist(), trace.sources
    return line_of_rows(trace, lines).tolist(), lines.lines


def _source(stall: Stall) -> SourceLine | None:
    if not stall.file:
        return None
    return SourceLine(file=stall.file, line=stall.line, text=stall.source, function=stall.function)


def _stall(stalls: Sequence[Stall], place: SourceLine | None, operators: list[str], call: str) -> int:
    """Position of the stall that a wait belongs to; -1 if none or several could be it."""
    names = {*operators, call}
    real = [number for number, stall in enumerate(stalls) if stall.real]
    if place is not None:
        here = [number for number in real if (stalls[number].file, stalls[number].line) == (place.file, place.line)]
        named = [number for number in here if stalls[number].op in names]
        if len(named or here) >= 1:
            return (named or here)[0]
    alike = [number for number in real if stalls[number].op in names and (place is None or not stalls[number].file)]
    return alike[0] if len(alike) == 1 else -1


def _explicit(trace: Trace, rows: Sequence[int], stalls: Sequence[Stall], lines: LineLog | None) -> dict[int, int]:
    """Stalls of waits outside all operators (``torch.cuda.synchronize``), matched by their order within a step."""
    outside = [position for position, row in enumerate(rows) if trace.host.parent[row] < 0]
    if lines is None or not outside:
        return {}
    last = max((read.step for read in lines.reads), default=-1)
    reads = [read for read in lines.reads if read.real and "::" not in read.op and read.step == last]
    by_step: dict[int, list[int]] = defaultdict(list)
    for position in outside:
        by_step[int(trace.host.step[rows[position]])].append(position)
    found = {}
    for positions in by_step.values():
        if len(positions) != len(reads):
            continue
        for position, read in zip(positions, reads, strict=True):
            place = lines.lines[read.line]
            for number, stall in enumerate(stalls):
                if stall.real and (stall.file, stall.line, stall.op) == (place.file, place.line, read.op):
                    found[position] = number
    return found
