"""Where the time goes: device kernels by their own time, or operators where there is no device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kernbench.analysis.attribution import Places, outermost, places
from kernbench.analysis.families import kind_of_device
from kernbench.analysis.windows import step_windows
from kernbench.record import Hotspot, HotspotView, LineLog
from kernbench.traces.nesting import OP, Ints
from kernbench.traces.trace import Trace

_ENGINE_PREFIX = "autograd::engine::evaluate_function: "
# Operators nest no deeper than this below one whose shapes were recorded.
_CLIMB = 64
_Kind = Literal["kernel", "copy", "memset", "op"]


@dataclass(frozen=True, eq=False)
class _Work:
    """The rows that have own time: device events, or operators of a CPU. ``host`` is the host row behind each, or -1.

    ``name`` and ``op`` index the trace's names, ``line`` the places' lines; -1 where unknown. ``kind`` is a device
    event's, -1 for an operator. ``whole`` is what shares are of.
    """

    name: Ints
    time: Ints
    op: Ints
    line: Ints
    phase: Ints
    kind: Ints
    host: Ints
    whole: float


def hotspots(trace: Trace, lines: LineLog | None, limit: int = 50) -> list[Hotspot]:
    """The ``limit`` largest by own time per step, largest first.

    On a GPU the rows are kernels, copies and memsets by name, ``op`` is the launching operator and ``share`` is of all
    device time. On a CPU they are operators without their children, ``op`` is the outermost operator around them and
    ``share`` is of the step. ``source``, ``op`` and ``phase`` are those that account for most of the row's time.
    """
    where = places(trace, lines)
    work = _work(trace, where)
    return _grouped(trace, where, work, work.name, trace.names.__getitem__, limit)


def views(trace: Trace, lines: LineLog | None, limit: int = 20) -> dict[HotspotView, list[Hotspot]]:
    """The same time by kernel, by the operator that the program called, by module, source line and input shapes.

    A view is absent where the trace tells nothing of it, "kernel" also for a CPU, whose operators have no kernels. What
    a view cannot place (a kernel outside of modules) is left out of it; shares stay those of all time.
    """
    where = places(trace, lines)
    work = _work(trace, where)
    rows = work.host
    known = rows >= 0

    def of_host(column: Ints) -> Ints:
        return np.where(known, column[rows], -1) if len(column) else np.full(len(rows), -1, np.int64)

    def text(index: int) -> str:
        return trace.names[index].removeprefix(_ENGINE_PREFIX)

    def shape_text(key: int) -> str:
        operator, shape = divmod(key, len(trace.shape_texts))
        return f"{text(operator)} {trace.shape_texts[shape][0]}"

    def line_text(index: int) -> str:
        source = where.lines[index]
        return f"{source.file}:{source.line}" + (f" {source.function}" if source.function else "")

    shaped, operator = _shaped(trace, rows)
    keys = {
        "kernel": (work.name if trace.on_gpu else np.full(len(rows), -1, np.int64), text),
        "operator": (of_host(where.op), text),
        "module": (of_host(trace.modules), text),
        "line": (work.line, line_text),
        "shape": (np.where(shaped >= 0, operator * len(trace.shape_texts) + shaped, -1), shape_text),
    }
    found: dict[HotspotView, list[Hotspot]] = {}
    for view in get_args(HotspotView):
        key, name = keys[view]
        if rows_of_view := _grouped(trace, where, work, key, name, limit):
            found[view] = rows_of_view
    return found


def _shaped(trace: Trace, rows: Ints) -> tuple[Ints, Ints]:
    """Shapes and operator of each row: those of the innermost operator around it whose inputs were recorded."""
    host = trace.host
    row = rows.copy()
    for _ in range(_CLIMB):
        climbing = (row >= 0) & (np.append(trace.shapes, 0)[row] < 0)
        if not climbing.any():
            break
        row = np.where(climbing, host.parent[row], row) if len(host) else row
    found = row >= 0
    shapes, names = np.append(trace.shapes, -1), np.append(host.name, -1)
    return np.where(found, shapes[row], -1), np.where(found, names[row], -1)


def _work(trace: Trace, where: Places) -> _Work:
    host = trace.host
    if not trace.on_gpu:
        rows = np.flatnonzero((host.kind == OP) & trace.in_counted(host.step))
        windows = step_windows(trace)
        whole = float((windows.end - windows.start).sum())
        outermost = _outermost_name(trace)[rows]
        none = np.full(len(rows), -1, np.int64)
        return _Work(
            host.name[rows], host.self_ns[rows], outermost, where.line[rows], host.phase[rows], none, rows, whole
        )
    device = trace.device
    rows = np.flatnonzero(trace.in_counted(device.step))
    time = (device.end_ns - device.start_ns)[rows]
    op, call = device.op[rows], device.call[rows]
    # Appended entries answer for row -1.
    name = np.append(host.name, -1)[op]
    line = np.append(where.line, -1)
    on_line = np.where(op >= 0, line[op], line[call])
    return _Work(device.name[rows], time, name, on_line, device.phase[rows], device.kind[rows], call, float(time.sum()))


def _outermost_name(trace: Trace) -> Ints:
    """Name of the operator that the program called, for each row: the outermost one, itself included."""
    operators = trace.host.kind == OP
    row = outermost(operators, trace.host.parent)
    return trace.host.name[np.where(row >= 0, row, np.arange(len(row)))]


def _grouped(
    trace: Trace, where: Places, work: _Work, key: Ints, name: Callable[[int], str], limit: int
) -> list[Hotspot]:
    """One hotspot per key, largest first; rows with key -1 are left out. ``name`` says what a key is called."""
    steps = len(trace.counted)
    kept = np.flatnonzero(key >= 0)
    if not len(kept):
        return []
    _, group = np.unique(key[kept], return_inverse=True)
    total = np.bincount(group, weights=work.time[kept])
    count = np.bincount(group)
    largest = np.argsort(-total, kind="stable")[:limit]
    order = np.argsort(group, kind="stable")
    bounds = np.append(0, np.cumsum(count))
    result = []
    for number in largest.tolist():
        rows = kept[order[bounds[number] : bounds[number + 1]]]
        spent = work.time[rows]
        phase, around = _heaviest(work.phase[rows], spent), _heaviest(work.op[rows], spent)
        result.append(
            Hotspot(
                name=name(int(key[rows[0]])),
                self_seconds_per_step=float(total[number]) / steps / 1e9,
                share=float(total[number]) / work.whole if work.whole else 0.0,
                calls_per_step=len(rows) / steps,
                kind=_kind(int(_heaviest(work.kind[rows], spent))),
                op=trace.names[around].removeprefix(_ENGINE_PREFIX) if around >= 0 else "",
                source=where.source(_heaviest(work.line[rows], spent, skip_unknown=True)),
                phase=phase if phase >= 0 else None,
            )
        )
    return result


def _kind(kind: int) -> _Kind:
    return kind_of_device(kind) if kind >= 0 else "op"


def _heaviest(values: Ints, weight: Ints, *, skip_unknown: bool = False) -> int:
    """The value with the largest total weight; -1 stands for unknown and can be passed over."""
    if skip_unknown:
        values, weight = values[values >= 0], weight[values >= 0]
    if not len(values):
        return -1
    distinct, position = np.unique(values, return_inverse=True)
    return int(distinct[np.bincount(position, weights=weight).argmax()])
