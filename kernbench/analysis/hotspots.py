"""Where the time goes: device kernels by their own time, or operators where there is no device."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kernbench.analysis.attribution import line_of_rows
from kernbench.analysis.families import kind_of_device
from kernbench.analysis.idle import step_windows
from kernbench.nesting import OP, Ints
from kernbench.record import Hotspot, LineLog
from kernbench.trace import Trace

_ENGINE_PREFIX = "autograd::engine::evaluate_function: "


def hotspots(trace: Trace, lines: LineLog | None, limit: int = 50) -> list[Hotspot]:
    """The ``limit`` largest by own time per step, largest first.

    On a GPU the rows are kernels, copies and memsets by name, ``op`` is the launching operator and ``share`` is of all
    device time. On a CPU they are operators without their children, ``op`` is the outermost operator around them and
    ``share`` is of the step. ``source``, ``op`` and ``phase`` are those that account for most of the row's time.
    """
    line = line_of_rows(trace, lines) if lines is not None else np.full(len(trace.host), -1, np.int64)
    found = (_of_device if trace.on_gpu else _of_host)(trace, lines, line)
    return sorted(found, key=lambda hotspot: -hotspot.self_seconds_per_step)[:limit]


def _of_device(trace: Trace, lines: LineLog | None, line: Ints) -> list[Hotspot]:
    device = trace.device
    rows = np.flatnonzero(trace.in_counted(device.step))
    time = (device.end_ns - device.start_ns)[rows]
    op = device.op[rows]
    launched = op >= 0
    op_name = np.where(launched, trace.host.name[op], -1) if len(trace.host) else op
    op_line = np.where(launched, line[op], -1) if len(trace.host) else op
    # Kernels and copies never share a name, so a name is one kind.
    kinds = dict(zip(device.name[rows].tolist(), device.kind[rows].tolist(), strict=True))
    return _grouped(
        trace,
        lines,
        device.name[rows],
        time,
        op_name,
        op_line,
        device.phase[rows],
        whole=float(time.sum()),
        kinds=kinds,
    )


def _of_host(trace: Trace, lines: LineLog | None, line: Ints) -> list[Hotspot]:
    host = trace.host
    rows = np.flatnonzero((host.kind == OP) & trace.in_counted(host.step))
    windows = step_windows(trace)
    whole = float((windows.end - windows.start).sum())
    above = _outermost_name(trace)[rows]
    return _grouped(
        trace, lines, host.name[rows], host.self_ns[rows], above, line[rows], host.phase[rows], whole=whole, kinds={}
    )


def _outermost_name(trace: Trace) -> Ints:
    """Name of the operator that the program called, for each row: the outermost one, itself included."""
    names = trace.host.name.tolist()
    for row, above in enumerate(trace.host.parent.tolist()):
        if above >= 0:
            names[row] = names[above]
    return np.array(names, np.int64)


def _grouped(
    trace: Trace,
    lines: LineLog | None,
    name: Ints,
    time: Ints,
    op: Ints,
    line: Ints,
    phase: Ints,
    *,
    whole: float,
    kinds: dict[int, int],
) -> list[Hotspot]:
    """One hotspot per name. ``kinds`` gives the device kind of a name; what it lacks is an operator."""
    steps = len(trace.counted)
    order = np.argsort(name, kind="stable")
    bounds = np.flatnonzero(np.diff(name[order], prepend=-1))
    result = []
    for group in np.split(order, bounds[1:]) if len(order) else []:
        mine = int(name[group[0]])
        spent = time[group]
        total = float(spent.sum())
        where = _heaviest(line[group], spent, skip_unknown=True)
        number = _heaviest(phase[group], spent)
        around = _heaviest(op[group], spent)
        kind: Literal["kernel", "copy", "memset", "op"] = kind_of_device(kinds[mine]) if mine in kinds else "op"
        result.append(
            Hotspot(
                name=trace.names[mine],
                self_seconds_per_step=total / steps / 1e9,
                share=total / whole if whole else 0.0,
                calls_per_step=len(group) / steps,
                kind=kind,
                op=trace.names[around].removeprefix(_ENGINE_PREFIX) if around >= 0 else "",
                source=lines.lines[where] if lines is not None and where >= 0 else None,
                phase=number if number >= 0 else None,
            )
        )
    return result


def _heaviest(values: Ints, weight: Ints, *, skip_unknown: bool = False) -> int:
    """The value with the largest total weight; -1 stands for unknown and can be passed over."""
    if skip_unknown:
        values, weight = values[values >= 0], weight[values >= 0]
    if not len(values):
        return -1
    distinct, position = np.unique(values, return_inverse=True)
    return int(distinct[np.bincount(position, weights=weight).argmax()])
