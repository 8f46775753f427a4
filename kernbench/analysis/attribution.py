"""Which source line each host row of a trace belongs to, from the log of the line pass.

The line pass sees operators where PyTorch dispatches them: a call made inside an already seen operator is hidden from
it, while the trace shows all. So a trace row is comparable if its name is in the log and no row above it is; the
n-th comparable row of a name in a step is the n-th call in the log, if both count the same number of calls.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from kernbench.record import LineLog, SourceLine
from kernbench.traces.nesting import OP, Bools, Ints
from kernbench.traces.trace import Trace

_ENGINE_PREFIX = "autograd::engine::evaluate_function: "
# What a program calls; not the autograd engine's nodes, nor the wrappers that compiled functions put around operators.
_CALLED = re.compile(r"(?!autograd::|torch::)\w+::")


@dataclass(frozen=True, eq=False)
class Places:
    """Where each host row comes from: ``line`` indexes ``lines``, ``op`` indexes ``names``; -1 where unknown.

    ``op`` is the operator that the program called, so the outermost one; outside operators the row's own name.
    """

    names: list[str]
    lines: list[SourceLine]
    line: Ints
    op: Ints

    def op_name(self, index: int) -> str:
        """The operator's name, a backward node's without the engine's prefix; "" if unknown."""
        return self.names[index].removeprefix(_ENGINE_PREFIX) if index >= 0 else ""

    def source(self, index: int) -> SourceLine | None:
        """The line, None if unknown."""
        return self.lines[index] if index >= 0 else None


_known: WeakKeyDictionary[Trace, tuple[LineLog | None, Places]] = WeakKeyDictionary()


def places(trace: Trace, lines: LineLog | None) -> Places:
    """Lines from the log of the line pass, else from the Python stacks of the trace (a function's first line)."""
    if trace in _known and _known[trace][0] is lines:
        return _known[trace][1]
    host, line = trace.host, trace.source
    if lines is not None:
        logged = line_of_rows(trace, lines)
        line = np.where(logged >= 0, logged, np.where(line >= 0, line + len(lines.lines), -1))
    inherited = np.where(host.forward >= 0, line[host.forward], -1)
    line = np.where(line >= 0, line, inherited)
    operators = host.kind == OP
    called = operators & trace.named(_CALLED)[host.name]
    top, outer = outermost(called, host.parent), outermost(operators, host.parent)
    top = np.where(top >= 0, top, np.where(outer >= 0, outer, np.arange(len(host))))
    found = Places(trace.names, [*(lines.lines if lines else []), *trace.sources], line, host.name[top])
    _known[trace] = (lines, found)
    return found


def line_of_rows(trace: Trace, lines: LineLog) -> Ints:
    """Index into ``lines.lines`` for each host row; -1 where it is not known.

    What runs under a backward node gets the line of the operator that created the node. Rows inside an operator get
    its line, wrappers around operators that of the first one inside. Where the counts disagree, the operator's most
    frequent line stands in.
    """
    host = trace.host
    calls = {_normalised(name): found for name, found in lines.op_lines.items()}
    logged = np.fromiter((name in calls for name in trace.names), bool, len(trace.names))
    chosen = (host.kind == OP) & logged[host.name] & (host.step >= 0)
    seen = outermost(chosen, host.parent)
    own = np.full(len(host), -1, np.int64)
    rows = np.flatnonzero(chosen)
    rows = rows[np.lexsort((host.start_ns[rows], host.step[rows], host.name[rows]))]
    edges = np.flatnonzero(np.diff(host.name[rows]) | np.diff(host.step[rows])) + 1
    for group in np.split(rows, edges) if len(rows) else []:
        found = calls[trace.names[host.name[group[0]]]]
        own[group] = _by_ordinal(seen[group] == group, host.forward[group] < 0, found)
    line = np.where((own < 0) & (seen >= 0), own[seen], own)
    line = _from_first_child(line, seen, host.parent)
    forward = np.where(host.forward >= 0, line[host.forward], -1)
    return np.where(forward >= 0, forward, line)


def _normalised(name: str) -> str:
    """ "aten.mm.default" (Python's form of an operator's name) as the trace writes it: "aten::mm"."""
    if "::" in name or "." not in name:
        return name
    namespace, bare = name.split(".")[:2]
    return f"{namespace}::{bare}"


def outermost(chosen: Bools, parent: Ints) -> Ints:
    """For each row its outermost chosen ancestor or itself; -1 where there is none."""
    found, above = np.where(chosen, np.arange(len(chosen)), -1), parent.copy()
    rows = np.flatnonzero(above >= 0)
    # Each round looks twice as far up as the one before, for the rows that have something there.
    while len(rows):
        near = above[rows]
        further, far = found[near], above[near]
        found[rows] = np.where(further >= 0, further, found[rows])
        above[rows] = far
        rows = rows[far >= 0]
    return found


def _by_ordinal(exposed: Bools, is_forward: Bools, found: list[int]) -> Ints:
    """Lines for one operator's calls in one step, in order; -1 for calls inside other seen ones.

    The log holds the exposed calls, or only those of the forward pass if it stops at the autograd thread, or all calls
    if it names the operator wherever it occurs. The first of these that counts as many calls as the log is taken.
    """
    known = Counter(line for line in found if line >= 0)
    lines = np.where(exposed, known.most_common(1)[0][0] if known else -1, -1)
    for candidates in (exposed, exposed & is_forward, np.ones(len(exposed), bool)):
        if int(candidates.sum()) == len(found):
            lines[candidates] = found
            break
    return lines


def _from_first_child(line: Ints, seen: Ints, parent: Ints) -> Ints:
    """Rows that wrap seen operators take the line of the first one inside that has one."""
    lines, inside = line.tolist(), (seen >= 0).tolist()
    parents = parent.tolist()
    for row in range(len(parents) - 1, -1, -1):
        above = parents[row]
        if above >= 0 and not inside[above] and lines[row] >= 0:
            lines[above] = lines[row]
    return np.array(lines, np.int64)
