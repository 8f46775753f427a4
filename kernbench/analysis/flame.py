"""Host time of a step as a tree of frames: the program's functions, operators and runtime calls, libraries folded.

Rows nest by time. What the autograd engine runs in a thread of its own is taken as called by the step's thread, which
waits for it meanwhile. Everything that began before a step, such as the training loop around it, is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kernbench.analysis.intervals import union
from kernbench.record import FlameFrame, SourceLine
from kernbench.traces.frames import is_program
from kernbench.traces.nesting import ANNOTATION, CALL, OP, Bools, Ints
from kernbench.traces.trace import Trace

PYTHON, LIBRARY, OPERATOR, RUNTIME_CALL, SCOPE, BUILT_IN = range(6)
_WORDS: tuple[Literal["python", "library", "op", "call", "annotation"], ...] = (
    "python",
    "library",
    "op",
    "call",
    "annotation",
)
_KINDS = {OP: OPERATOR, CALL: RUNTIME_CALL, ANNOTATION: SCOPE}
_ENGINE_PREFIX = "autograd::engine::evaluate_function: "
_PYTHON_NAME = re.compile(r"(.+)\(\d+\): (.+)", re.DOTALL)
_INSTALLED = re.compile(r".*/(?:site-packages|dist-packages|lib/python3\.\d+)/", re.DOTALL)


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is nested, by start, outermost first. ``name`` indexes the trace's names; ``label`` tells frames apart."""

    kind: Ints
    name: Ints
    label: Ints
    start_ns: Ints
    end_ns: Ints
    file: Ints
    line: Ints


@dataclass(frozen=True, eq=False)
class _Tree:
    """Nodes with their parents before them; ``row`` is the first row of each, ``total`` in ns."""

    parent: Ints
    row: Ints
    total: Ints
    folded: Ints


def flame(trace: Trace, limit: int = 600) -> list[FlameFrame]:
    """The ``limit`` longest frames, parents first and siblings in order of time; empty where the host is not recorded.

    The root is the step itself. With Python stacks a run of library frames is one frame that counts them, and what is
    built into Python counts for its caller. Without stacks annotations, operators and calls are all there is.
    """
    rows = _rows(trace)
    whole = int((trace.steps.end_ns - trace.steps.start_ns)[trace.counted].sum())
    if not len(rows.kind) or not whole:
        return []
    tree = _tree(rows)
    below = np.bincount(tree.parent[tree.parent >= 0], weights=tree.total[tree.parent >= 0], minlength=len(tree.parent))
    own = tree.total - below
    # A parent's total is never below its child's, and parents come first, so a stable order keeps whole branches.
    kept = np.argsort(-tree.total, kind="stable")[: limit - 1]
    # Rows are sorted by start, outer ones first, so this puts parents before their children.
    kept = kept[np.argsort(tree.row[kept], kind="stable")]
    scale = len(trace.counted) * 1e9
    covered = int(tree.total[tree.parent < 0].sum())
    name = trace.steps.marker.rstrip("#") or "whole trace"
    frames = [
        FlameFrame(
            name=name,
            parent=-1,
            seconds_per_step=whole / scale,
            self_seconds_per_step=max(whole - covered, 0) / scale,
            kind="annotation",
        )
    ]
    position = {-1: 0}
    texts = {(one.file, one.line, one.function): one for one in trace.sources}
    for node in kept.tolist():
        position[node] = len(frames)
        row = int(tree.row[node])
        label, source = _named(trace, rows, row, texts)
        frames.append(
            FlameFrame(
                name=label,
                parent=position[int(tree.parent[node])],
                seconds_per_step=float(tree.total[node]) / scale,
                self_seconds_per_step=max(float(own[node]), 0.0) / scale,
                kind=_WORDS[int(rows.kind[row])],
                source=source,
                folded=int(tree.folded[node]),
            )
        )
    return frames


def _rows(trace: Trace) -> _Rows:
    host, frames, steps = trace.host, trace.frames, trace.steps
    chosen = trace.in_counted(host.step) & _threads(trace) & ~_whole_step(trace)
    mine = np.flatnonzero(chosen)
    step = np.searchsorted(steps.start_ns, frames.start_ns, side="right") - 1
    inside = (step >= 0) & (frames.start_ns < steps.end_ns[step]) & trace.in_counted(step)
    called = np.flatnonzero(inside & (frames.thread == steps.thread))
    kind = np.concatenate([np.array([OPERATOR, RUNTIME_CALL, SCOPE])[host.kind[mine]], _frame_kinds(trace, called)])
    name = np.concatenate([host.name[mine], frames.name[called]])
    start = np.concatenate([host.start_ns[mine], frames.start_ns[called]])
    end = np.concatenate([host.end_ns[mine], frames.end_ns[called]])
    nowhere = np.full(len(mine), -1, np.int64)
    # A frame that outlasts its step belongs to it with the part inside.
    end = np.minimum(end, steps.end_ns[np.concatenate([host.step[mine], step[called]])])
    inner_last = np.array([1, 1, 3, 4, 2, 2])[kind]
    order = np.lexsort((inner_last, -end, start))
    label = kind * len(trace.names) + np.where(kind == LIBRARY, _packages(trace)[name], _plain(trace)[name])
    return _Rows(
        kind[order],
        name[order],
        label[order],
        start[order],
        end[order],
        np.concatenate([nowhere, frames.file[called]])[order],
        np.concatenate([nowhere, frames.line[called]])[order],
    )


def _threads(trace: Trace) -> Bools:
    """Host rows of the step's thread, and of the autograd engine's threads while the step's thread runs no operator."""
    host, main = trace.host, trace.steps.thread
    mine = host.thread == main
    engine = np.setdiff1d(np.unique(host.thread[host.forward >= 0]), [main])
    working = mine & (host.kind == OP)
    busy = union(host.start_ns[working], host.end_ns[working])
    waited_for = np.isin(host.thread, engine)
    waited_for[waited_for] = ~busy.contains(host.start_ns[waited_for])
    return np.asarray(mine | waited_for, np.bool_)


def _whole_step(trace: Trace) -> Bools:
    host, steps = trace.host, trace.steps
    spans = (host.start_ns <= steps.start_ns[host.step]) & (host.end_ns >= steps.end_ns[host.step])
    return np.asarray((host.kind == ANNOTATION) & (host.step >= 0) & spans, np.bool_)


def _frame_kinds(trace: Trace, called: Ints) -> Ints:
    """Python for the program's functions and for modules, else library or built-in."""
    file, name = trace.frames.file[called], trace.frames.name[called]
    program = np.zeros(len(trace.names), bool)
    for index in np.unique(file[file >= 0]).tolist():
        program[index] = is_program(trace.names[index])
    module = trace.named(re.compile(r"nn\.Module: "))[name]
    with_file = np.where(program[file], PYTHON, LIBRARY)
    return np.where(file >= 0, with_file, np.where(module, PYTHON, BUILT_IN))


def _packages(trace: Trace) -> Ints:
    """For each name of a library's function the first name of that package, so that one label stands for all of it."""
    first: dict[str, int] = {}
    index = np.arange(len(trace.names))
    names, at = np.unique(trace.frames.name, return_index=True)
    for name, file in zip(names.tolist(), trace.frames.file[at].tolist(), strict=True):
        if file >= 0:
            index[name] = first.setdefault(_package(trace.names[file]), name)
    return index


def _plain(trace: Trace) -> Ints:
    """For each name itself; for the engine's call of a backward node the name of that node."""
    index = {name: position for position, name in enumerate(trace.names)}
    return np.array([index.get(name.removeprefix(_ENGINE_PREFIX), own) for name, own in index.items()], np.int64)


def _package(file: str) -> str:
    """ "torch" of ".../site-packages/torch/nn/functional.py"."""
    return _INSTALLED.sub("", file).lstrip("/").split("/")[0].removesuffix(".py")


def _tree(rows: _Rows) -> _Tree:
    """Level by level: the outermost rows of what is left, and of each of them what lies below."""
    count = len(rows.kind)
    of_row = np.full(count, -1, np.int64)
    total = np.zeros(count, np.int64)
    labels = int(rows.label.max()) + 1
    nodes: dict[int, int] = {}
    parents: list[int] = []
    first = np.zeros(count, np.int64)
    start, end, index, above = rows.start_ns, rows.end_ns, np.arange(count), np.full(count, -1, np.int64)
    while len(index):
        reach = np.maximum.accumulate(end)
        outermost = np.concatenate([[True], start[1:] >= reach[:-1]])
        top, caller = index[outermost], above[outermost]
        joins = _joins(rows, top, caller, first)
        of_row[top] = caller
        new = np.flatnonzero(~joins)
        keys, at, position = np.unique(
            (caller[new] + 1) * labels + rows.label[top[new]], return_index=True, return_inverse=True
        )
        found = np.fromiter((nodes.setdefault(key, len(nodes)) for key in keys.tolist()), np.int64, len(keys))
        of_row[top[new]] = found[position]
        for node, row, parent in zip(found.tolist(), top[new][at].tolist(), caller[new][at].tolist(), strict=True):
            if node == len(parents):
                parents.append(parent)
                first[node] = row
            # A folded frame's callees lie on several levels.
            first[node] = min(first[node], row)
        np.add.at(total, found[position], np.maximum(end - start, 0)[outermost][new])
        inner = ~outermost
        group = (np.cumsum(outermost) - 1)[inner]
        # Rows that outlast what they lie in, by a clock tick or in a damaged trace, must not count twice.
        end = np.minimum(end[inner], end[outermost][group])
        start, index, above = start[inner], index[inner], of_row[top][group]
    folded = _folded(rows, of_row, len(nodes))
    return _Tree(np.array(parents, np.int64), first[: len(nodes)], total[: len(nodes)], folded)


def _joins(rows: _Rows, top: Ints, caller: Ints, first: Ints) -> Bools:
    """Which rows are part of their caller's node: a library's in a library's, and what is built into Python.

    So is a backward node inside the engine's call of the same name.
    """
    calling = first[caller]
    joins = (rows.kind[top] == LIBRARY) & (rows.kind[calling] == LIBRARY)
    joins |= (rows.kind[top] == OPERATOR) & (rows.label[top] == rows.label[calling])
    return np.asarray((joins & (caller >= 0)) | (rows.kind[top] == BUILT_IN), np.bool_)


def _folded(rows: _Rows, of_row: Ints, nodes: int) -> Ints:
    """How many different functions of libraries each node stands for."""
    hidden = np.flatnonzero(((rows.kind == LIBRARY) | (rows.kind == BUILT_IN)) & (of_row >= 0))
    names = int(rows.name.max()) + 1
    pairs = np.unique(of_row[hidden] * names + rows.name[hidden])
    return np.bincount(pairs // names, minlength=nodes)


def _named(
    trace: Trace, rows: _Rows, row: int, texts: dict[tuple[str, int, str], SourceLine]
) -> tuple[str, SourceLine | None]:
    """What a node is called, and for functions where they are defined."""
    name, kind = trace.names[rows.name[row]], int(rows.kind[row])
    file = trace.names[rows.file[row]] if rows.file[row] >= 0 else ""
    if kind == LIBRARY:
        return _package(file), None
    if kind == PYTHON and file:
        match = _PYTHON_NAME.fullmatch(name)
        function, line = match.group(2) if match else name, int(rows.line[row])
        source = SourceLine(file=file, line=line, text="", function=function)
        return function, texts.get((file, line, function), source)
    return name.removeprefix(_ENGINE_PREFIX), None
