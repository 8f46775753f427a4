"""Which source line each host row of a trace belongs to, from the log of the line pass.

The line pass sees operators where PyTorch dispatches them: a call made inside an already seen operator is hidden from
it, while the trace shows all. So a trace row is comparable if its name is in the log and no row above it is; the
n-th comparable row of a name in a step is the n-th call in the log, if both count the same number of calls.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from kernbench.nesting import OP, Bools, Ints
from kernbench.record import LineLog
from kernbench.trace import Trace


def line_of_rows(trace: Trace, lines: LineLog) -> Ints:
    """Index into ``lines.lines`` for each host row; -1 where it is not known.

    What runs under a backward node gets the line of the operator that created the node. Rows inside an operator get
    its line, wrappers around operators that of the first one inside. Where the counts disagree, the operator's most
    frequent line stands in.
    """
    host = trace.host
    calls = {_normalised(name): found for name, found in lines.op_lines.items()}
    logged = np.fromiter((name in calls for name in trace.names), bool, len(trace.names))
    seen = _outermost((host.kind == OP) & logged[host.name], host.parent)
    own = np.full(len(host), -1, np.int64)
    exposed = np.flatnonzero(seen == np.arange(len(host)))
    exposed = exposed[np.argsort(host.start_ns[exposed], kind="stable")]
    for name, found in calls.items():
        if name not in trace.names:
            continue
        rows = exposed[host.name[exposed] == trace.names.index(name)]
        for step in range(len(trace.steps)):
            in_step = rows[host.step[rows] == step]
            own[in_step] = _by_ordinal(in_step, host.forward[in_step] < 0, found)
    line = np.where(seen >= 0, own[seen], -1)
    line = _from_first_child(line, seen, host.parent)
    forward = np.where(host.forward >= 0, line[host.forward], -1)
    return np.where(forward >= 0, forward, line)


def _normalised(name: str) -> str:
    """ "aten.mm.default" (Python's form of an operator's name) as the trace writes it: "aten::mm"."""
    if "::" in name or "." not in name:
        return name
    namespace, bare = name.split(".")[:2]
    return f"{namespace}::{bare}"


def _outermost(chosen: Bools, parent: Ints) -> Ints:
    """For each row its outermost chosen ancestor or itself; -1 where there is none. Parents precede children."""
    found = np.where(chosen, np.arange(len(chosen)), -1).tolist()
    for row, above in enumerate(parent.tolist()):
        if above >= 0 and found[above] >= 0:
            found[row] = found[above]
    return np.array(found, np.int64)


def _by_ordinal(rows: Ints, is_forward: Bools, found: list[int]) -> Ints:
    """The logged line of each row by its ordinal, or the most frequent one if the counts disagree."""
    if len(rows) == len(found):
        return np.array(found, np.int64)
    known = Counter(line for line in found if line >= 0)
    lines = np.full(len(rows), known.most_common(1)[0][0] if known else -1, np.int64)
    # A log that stops at the autograd thread still lines up in the forward part.
    if int(is_forward.sum()) == len(found):
        lines[is_forward] = found
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
