"""Which nodes of a replayed program belong to which stall, and whether the value read there steers the host."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.attribution import places
from kernbench.analysis.replaymodel import Program
from kernbench.analysis.replaywaits import NOTHING
from kernbench.analysis.stalls import waiting
from kernbench.record import LineLog, SourceLine, Stall
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import Trace

# Operators that exist only to read: without the read they go, with the copy that they issue.
_READS = re.compile(r"aten::(item|_local_scalar_dense|is_nonzero)$")
_DECIDES = re.compile(r"aten::(is_nonzero|equal)$")
_STEERS = re.compile(
    r"^\s*(if|elif|while|assert|for)\b|\bif\b.+\belse\b|\brange\(|\[[^\]]*(\.item\(\)|\bint\()|\bbool\(|\b(and|or|not)\b"
)


@dataclass(frozen=True, eq=False)
class Site:
    """The waits of one source line and operator."""

    nodes: Ints
    source: SourceLine | None
    op: str
    deferred: bool
    phase: int | None

    @property
    def title(self) -> str:
        """How a person would name it."""
        return f"{self.source.file}:{self.source.line} ({self.op})" if self.source else self.op

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from other sites, as in a row of stalls."""
        return (self.source.file, self.source.line, self.op) if self.source else ("", 0, self.op)


def sites(trace: Trace, program: Program, lines: LineLog | None) -> list[Site]:
    """Every waiting node of the program in one site: the one of its stall, else of its operator and line."""
    waits = program.nodes.waits != NOTHING
    node_of_row = {int(program.nodes.row[node]): node for node in np.flatnonzero(waits).tolist()}
    groups: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    stall_of: dict[tuple[str, int, str], Stall] = {}
    for known in waiting(trace, lines):
        key = (known.stall.file, known.stall.line, known.stall.op)
        nodes = [node_of_row.pop(row) for row in known.rows.tolist() if row in node_of_row]
        if nodes:
            groups[key] += nodes
            stall_of[key] = known.stall
    where = places(trace, lines)
    for row, node in node_of_row.items():
        source = where.source(int(where.line[row]))
        groups[source.file if source else "", source.line if source else 0, where.op_name(int(where.op[row]))].append(
            node
        )
    return [_site(trace, program, np.sort(nodes), key, stall_of.get(key)) for key, nodes in groups.items()]


def _site(trace: Trace, program: Program, nodes: Ints, key: tuple[str, int, str], stall: Stall | None) -> Site:
    file, line, op = key
    row = int(program.nodes.row[nodes[0]])
    source = SourceLine(file=file, line=line, text="") if file else None
    phases = np.unique(trace.host.phase[program.nodes.row[nodes]]).tolist()
    phase = int(phases[0]) if len(phases) == 1 and phases[0] >= 0 else None
    if stall is not None:
        phase = stall.phase if stall.phase is not None else phase
        source = SourceLine(file=file, line=line, text=stall.source, function=stall.function) if file else None
    decides = any(_DECIDES.match(name) for name in operators_around(trace, row))
    return Site(nodes, source, op, decides or bool(source and _STEERS.search(source.text)), phase)


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
