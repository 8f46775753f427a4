"""Where operators stand under the roofs, by the work that their shapes imply and the time that their kernels took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kernbench.analysis import opnames, opwork
from kernbench.analysis.launches import SHORT_NS
from kernbench.analysis.opwork import Tensor, Work
from kernbench.measurement.roofline import place
from kernbench.record import Ceilings, RooflinePoint
from kernbench.spec import Cost
from kernbench.traces.nesting import OP, Bools, Ints
from kernbench.traces.trace import KERNEL, Trace

# A convolution's result is looked for in the inputs of this many rows after it.
_LOOK_AHEAD = 60


@dataclass(frozen=True, eq=False)
class Shaped:
    """Operators with known work, one for each name and shape: ``kind`` of a host row is a position in ``works``."""

    works: list[Work | None]
    kind: Ints
    inputs: list[opwork.Inputs]

    def passed(self, one: int, other: int) -> int:
        """Bytes written and read again between two operators of these kinds: what the first gives, if the other takes
        a tensor of that shape and type."""
        work = self.works[one]
        if work is None or work.output is None or work.output not in self.inputs[other]:
            return 0
        return 2 * work.output.bytes


def roofline(trace: Trace, ceilings: Ceilings | None, limit: int = 40) -> list[RooflinePoint]:
    """One point per operator and shapes, longest first; empty where no shapes are recorded.

    A kernel counts for the innermost operator around its launch whose work is known from its shapes; on a CPU it is the
    outermost such operator, with all its time. Without ``ceilings`` there is no share, and the bound is unknown but for
    short kernels.
    """
    owner, time, kernels = _timed(trace)
    if not len(owner):
        return []
    shaped = works(trace, np.unique(owner))
    kind = shaped.kind[owner]
    count = len(shaped.works)
    calls = np.bincount(shaped.kind[np.unique(owner)], minlength=count)
    spent = np.bincount(kind, weights=time, minlength=count)
    launched = np.bincount(kind, weights=kernels, minlength=count)
    first = np.zeros(count, np.int64)
    first[kind[::-1]] = owner[::-1]
    points = []
    for number in np.argsort(-spent, kind="stable").tolist():
        work = shaped.works[number]
        if work is None or spent[number] <= 0:
            continue
        row = int(first[number])
        points.append(
            _point(
                trace,
                row,
                work,
                calls=int(calls[number]),
                nanoseconds=float(spent[number]),
                kernels=int(launched[number]),
                ceilings=ceilings,
            )
        )
        if len(points) == limit:
            break
    return points


def _timed(trace: Trace) -> tuple[Ints, Ints, Ints]:
    """Operators of the counted steps, each with a time in ns that it owns, and how many kernels that is."""
    host, device = trace.host, trace.device
    if trace.on_gpu:
        rows = np.flatnonzero(trace.in_counted(device.step) & (device.kind == KERNEL) & (device.op >= 0))
        owner = owners(trace, device.op[rows])
        rows, owner = rows[owner >= 0], owner[owner >= 0]
        return owner, (device.end_ns - device.start_ns)[rows], np.ones(len(rows), np.int64)
    rows = np.flatnonzero(_known(trace)[:-1] & trace.in_counted(host.step))
    # What such an operator calls is part of its own work.
    rows = rows[owners(trace, host.parent[rows]) < 0]
    return rows, (host.end_ns - host.start_ns)[rows], np.zeros(len(rows), np.int64)


def owners(trace: Trace, rows: Ints) -> Ints:
    """For each row the innermost operator, itself included, of a known kind and with shapes; -1 where there is none."""
    known = _known(trace)
    current = rows.copy()
    while True:
        climbing = np.flatnonzero((current >= 0) & ~known[current])
        if not len(climbing):
            return current
        current[climbing] = trace.host.parent[current[climbing]]


def _known(trace: Trace) -> Bools:
    """Host rows whose operator and shapes are such that their work may be told; one more entry answers for row -1."""
    by_name = np.fromiter((opwork.known(name) for name in trace.names), bool, len(trace.names))
    known = (trace.host.kind == OP) & (trace.shapes >= 0) & by_name[trace.host.name]
    return np.append(known, False)


def works(trace: Trace, rows: Ints) -> Shaped:
    """The work of operators, told once for each name and shape; None where these shapes are not understood."""
    kind = np.full(len(trace.host) + 1, -1, np.int64)
    rows = rows[_known(trace)[rows]]
    if not len(rows):
        return Shaped([], kind, [])
    keys = trace.host.name[rows] * len(trace.shape_texts) + trace.shapes[rows]
    _, first, position = np.unique(keys, return_index=True, return_inverse=True)
    kind[rows] = position
    distinct = rows[first].tolist()
    given: list[opwork.Inputs] = [opwork.inputs(trace.shape_texts[trace.shapes[row]]) for row in distinct]
    return Shaped([_work(trace, row, of) for row, of in zip(distinct, given, strict=True)], kind, given)


def _work(trace: Trace, row: int, given: opwork.Inputs) -> Work | None:
    name = trace.names[trace.host.name[row]]
    output = _result(trace, row, given) if name in opnames.CONVOLUTION else None
    return opwork.work(name, given, output)


def _result(trace: Trace, row: int, given: opwork.Inputs) -> Tensor | None:
    """What a convolution gives, as the next operator outside it reads it: padding and strides are not recorded."""
    host = trace.host
    outside = int(host.end_ns[row])
    for after in range(row + 1, min(row + _LOOK_AHEAD, len(host))):
        if host.thread[after] != host.thread[row]:
            break
        if host.start_ns[after] < outside or trace.shapes[after] < 0:
            continue
        read = opwork.inputs(trace.shape_texts[trace.shapes[after]])
        if read and read[0] is not None and opwork.fits_convolution(given, read[0]):
            return read[0]
    return None


def _point(
    trace: Trace,
    row: int,
    work: Work,
    *,
    calls: int,
    nanoseconds: float,
    kernels: int,
    ceilings: Ceilings | None,
) -> RooflinePoint:
    steps = len(trace.counted)
    bound: Literal["compute", "memory", "launch", "unknown"] = "unknown"
    share, notes = None, [work.note]
    if ceilings is not None:
        cost = Cost(flops=work.flops, bytes_read=work.bytes_read, bytes_written=work.bytes_written)
        placed = place(nanoseconds / calls / 1e9, cost, work.dtype, ceilings)
        share = placed.share
        if share is not None:
            bound = "memory" if placed.bound == "memory" else "compute"
        notes.append(placed.note)
    if kernels and nanoseconds / kernels < SHORT_NS:
        bound = "launch"
    return RooflinePoint(
        op=trace.names[trace.host.name[row]],
        shapes=_shown(opwork.inputs(trace.shape_texts[trace.shapes[row]])),
        dtype=work.dtype,
        calls_per_step=calls / steps,
        seconds_per_step=nanoseconds / steps / 1e9,
        flops=work.flops,
        bytes=work.bytes,
        bound=bound,
        share_of_roof=share,
        note="; ".join(filter(None, notes)),
    )


def _shown(given: opwork.Inputs) -> str:
    return ", ".join(str(list(one.dims)) for one in given if one is not None and one.dims)
