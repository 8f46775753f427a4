"""Who encloses whom on the host: parents, own time, forward operators of backward nodes, phases.

The functions take the host columns of a trace (one row per event, sorted by thread, start, outermost first).
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

OP, CALL, ANNOTATION = 0, 1, 2

_PHASE = re.compile(r"kernbench\.phase(\d+):")
_STEP = re.compile(r"kernbench\.step#|ProfilerStep#")
_ROUNDING_NS = 4
WHOLE_STEP = 0.8
"""From this share of a step on, an annotation is taken for the step itself."""


def enclosing(host: dict[str, Ints]) -> tuple[Ints, Ints]:
    """Innermost enclosing operator and annotation of each row."""
    times = host["thread"], host["start_ns"], host["end_ns"]
    return innermost(host["kind"] == OP, *times), innermost(host["kind"] == ANNOTATION, *times)


def innermost(container: Bools, thread: Ints, start_ns: Ints, end_ns: Ints) -> Ints:
    """For each row the innermost container that is open when it starts, -1 for none.

    Containers should nest; of those that overlap, one that ends later than its parent still counts as inside it.
    """
    rows = np.flatnonzero(container & (end_ns > start_ns))
    if not len(rows):
        return np.full(len(thread), -1, np.int64)
    first = int(start_ns.min())
    span = int(max(end_ns.max(), start_ns.max())) - first + 2
    if span * (int(thread.max()) + 2) >= 2**62:
        return _swept(container, thread, start_ns, end_ns)
    begun, ended = thread * span + (start_ns - first), thread * span + (end_ns - first)
    before = np.zeros(len(thread), np.int64)
    before[rows] = 1
    before = np.cumsum(before) - before
    for _ in range(3):
        enclosed = _by_level(rows, before - np.searchsorted(np.sort(ended[rows]), begun, side="right"))
        inner = rows[enclosed[rows] >= 0]
        late = inner[ended[inner] > ended[enclosed[inner]]]
        if not len(late):
            return enclosed
        if np.any(ended[late] > ended[enclosed[late]] + _ROUNDING_NS):
            break
        # Start and duration are rounded apart, so a child may seem to end a little later than its parent. To cut it
        # may leave its own children late.
        while len(late):
            ended[late] = ended[enclosed[late]]
            late = inner[ended[inner] > ended[enclosed[inner]]]
    return _swept(container, thread, start_ns, end_ns)


def _by_level(rows: Ints, level: Ints) -> Ints:
    """The last of ``rows`` before each row that is one level up; ``level`` counts the containers open at a row."""
    count = len(level)
    # Level by level, so that neighbours are looked up one after the other.
    asking, outer = _sorted_by_level(level), rows[_sorted_by_level(level[rows])]
    asking = asking[np.searchsorted(level[asking], 1) :]
    asked, offered = level[asking], level[outer] + 1
    place = np.searchsorted(offered * count + outer, asked * count + asking) - 1
    last = np.full(count, -1, np.int64)
    last[asking] = np.where((place >= 0) & (offered[place] == asked), outer[place], -1)
    return last


def _sorted_by_level(level: Ints) -> Ints:
    # NumPy sorts numbers of 16 bits by counting, others by comparing.
    few = len(level) and level.min() >= -(2**15) and level.max() < 2**15
    return np.argsort(level.astype(np.int16) if few else level, kind="stable")


def _swept(container: Bools, thread: Ints, start_ns: Ints, end_ns: Ints) -> Ints:
    """The same for containers that overlap: one sweep with a stack of open intervals."""
    found = []
    stack: list[int] = []
    ends = end_ns.tolist()
    current = -1
    columns = zip(container.tolist(), thread.tolist(), start_ns.tolist(), strict=True)
    for row, (opens, of, start) in enumerate(columns):
        if of != current:
            stack.clear()
            current = of
        while stack and ends[stack[-1]] <= start:
            stack.pop()
        found.append(stack[-1] if stack else -1)
        if opens:
            stack.append(row)
    return np.array(found, np.int64)


def self_time(host: dict[str, Ints], parent: Ints) -> Ints:
    """Nanoseconds of each operator without its child operators; 0 for other rows."""
    operators = host["kind"] == OP
    own = np.where(operators, host["end_ns"] - host["start_ns"], 0)
    child = operators & (parent >= 0)
    np.subtract.at(own, parent[child], own[child].copy())
    return np.maximum(own, 0)


def forward_ops(host: dict[str, Ints], parent: Ints, sequence: Ints, backward: Bools) -> Ints:
    """For each row under a backward node, the operator that created the node; -1 elsewhere.

    Several nested forward operators carry one sequence number (each records the next number to be given out); the one
    that started last created the node.
    """
    creators = np.flatnonzero((sequence >= 0) & ~backward & (host["kind"] == OP))
    creators = creators[np.lexsort((host["start_ns"][creators], sequence[creators]))]
    nodes = np.flatnonzero((sequence >= 0) & backward)
    forward = np.full(len(parent), -1, np.int64)
    if not len(creators) or not len(nodes):
        return forward
    # Numbers repeat between threads, so take the latest creator of that number that started before the node ran.
    span = int(host["start_ns"].max()) + 2
    keys = sequence[creators] * span + host["start_ns"][creators]
    position = np.searchsorted(keys, sequence[nodes] * span + host["start_ns"][nodes]) - 1
    found = (position >= 0) & (sequence[creators[position]] == sequence[nodes])
    forward[nodes[found]] = creators[position[found]]
    inherited = forward.tolist()
    for row, above in enumerate(parent.tolist()):
        if above >= 0 and inherited[row] < 0:
            inherited[row] = inherited[above]
    return np.array(inherited, np.int64)


def phases(host: dict[str, Ints], annotation: Ints, forward: Ints, names: list[str]) -> Ints:
    """Number of the enclosing kernbench phase, for backward that of the forward operator; -1 outside all phases.

    A phase that replaces the step as a whole says nothing of the operators in it, so its annotation does not count.
    """
    number = np.full(len(annotation) + 1, -1, np.int64)  # the last entry answers for row -1
    duration = host["end_ns"] - host["start_ns"]
    for row in np.flatnonzero(host["kind"] == ANNOTATION).tolist():
        match = _PHASE.match(names[host["name"][row]])
        above = annotation[row]
        if match and above >= 0 and _STEP.match(names[host["name"][above]]):
            match = match if duration[row] < WHOLE_STEP * duration[above] else None
        number[row] = int(match.group(1)) if match else number[above]
    phase = number[annotation]
    lacking = (phase < 0) & (forward >= 0)
    phase[lacking] = phase[forward[lacking]]
    return phase
