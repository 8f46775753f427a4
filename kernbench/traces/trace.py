"""A Kineto trace (torch.profiler's Chrome JSON, plain or gzipped) as typed columns.

Two tables hold what happened: ``Host`` (operators, runtime calls, annotations) and ``Device`` (kernels, copies,
memsets). Rows refer to each other by row number, -1 where there is nothing to refer to. Times are whole nanoseconds
since the first event, so that sums of intervals are exact; the analyses turn them into seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kernbench.errors import KernbenchError
from kernbench.record import SourceLine, TraceInfo
from kernbench.traces import frames, kineto, nesting, tracedevice, traceinfo, tracesteps
from kernbench.traces.nesting import ANNOTATION, CALL, OP, Bools, Ints
from kernbench.traces.tracetables import Collectives, Device, DeviceSyncs, Frames, Host, Memory, Steps, Waits

__all__ = [
    "COPY",
    "KERNEL",
    "MEMSET",
    "Collectives",
    "Device",
    "DeviceSyncs",
    "Frames",
    "Host",
    "Memory",
    "Steps",
    "Trace",
    "Waits",
    "load",
]

KERNEL, COPY, MEMSET = 0, 1, 2

_SYNCHRONIZE = re.compile(r"(cuda|cu|hip)(Stream|Device|Event|Ctx)Synchronize")
# These copy and wait in one call. PyTorch on ROCm copies with hipMemcpyWithStream.
_BLOCKING_COPY = re.compile(r"cudaMemcpy(2D)?(_v\d+)?$|cuMemcpy(DtoH|HtoD)(_v2)?$|hipMemcpy(WithStream|DtoH|HtoD)?$")


@dataclass(frozen=True, eq=False)
class Trace:
    """One loaded trace; ``names`` resolves the ``name`` columns, ``threads`` the ``thread`` column.

    Beside each host row stand ``frame`` (row in ``frames``: the innermost Python call around it), ``source`` (index in
    ``sources``: the innermost Python call outside of installed libraries), ``modules`` (index in ``names`` of the
    innermost ``nn.Module`` call) and ``shapes`` (index in ``shape_texts``: dimensions and types of the inputs as JSON
    text); -1 where the trace does not tell. A source line is a function's definition line.
    """

    names: list[str]
    threads: list[str]
    host: Host
    device: Device
    device_syncs: DeviceSyncs
    steps: Steps
    info: TraceInfo
    frames: Frames
    frame: Ints
    sources: list[SourceLine]
    source: Ints
    modules: Ints
    shapes: Ints
    shape_texts: list[tuple[str, str]]
    collectives: Collectives
    memory: Memory
    waits_on: Waits

    @property
    def on_gpu(self) -> bool:
        return len(self.device) > 0

    def check(self) -> None:
        """Refuse a trace whose device record is so incomplete that figures would be wrong.

        Raises:
            KernbenchError: kernels are missing in every step.
        """
        lost = self.info.lost_launches
        if lost and not self.on_gpu:
            raise KernbenchError(
                f"{self.info.file} launches work on a device but holds no device event; record it again with the"
                " profiler's device activity (ProfilerActivity.CUDA) and permission to trace the device"
            )
        if lost and not self.steps.complete.any():
            raise KernbenchError(
                f"{self.info.file} lost the kernels of {lost} launches and has no step without a loss, so its figures"
                " would be wrong; record fewer steps, with a warm-up of the profiler before them"
            )

    @cached_property
    def counted(self) -> Ints:
        """Positions in ``steps`` of the steps that analyses average over: the complete ones, or all if none is."""
        complete = np.flatnonzero(self.steps.complete)
        return complete if len(complete) else np.arange(len(self.steps))

    def in_counted(self, step: Ints) -> Bools:
        """Which rows of a ``step`` column fall in a counted step."""
        return np.isin(step, self.counted)

    def named(self, pattern: re.Pattern[str]) -> Bools:
        """For each entry of ``names``, whether ``pattern`` matches at its start; index it with a ``name`` column."""
        return np.fromiter((pattern.match(name) is not None for name in self.names), bool, len(self.names))

    @cached_property
    def sync_calls(self) -> Ints:
        """Host rows of runtime calls in which the host waits for the device, in order of start.

        These are the synchronising calls, blocking copies, and copies to pageable memory, which block in effect. Calls
        of threads that never launch anything are left out: they are watchdogs, and nobody waits for them.
        """
        host, device = self.host, self.device
        call = host.kind == CALL
        waits = call & (self.named(_SYNCHRONIZE) | self.named(_BLOCKING_COPY))[host.name]
        pageable = (
            self.named(re.compile(r".*Device -> Pageable"))[device.name] & (device.kind == COPY) & (device.call >= 0)
        )
        waits[device.call[pageable]] = True
        launching = np.unique(host.thread[device.call[device.call >= 0]])
        if len(launching):
            waits &= np.isin(host.thread, launching)
        rows = np.flatnonzero(waits)
        return rows[np.argsort(host.start_ns[rows], kind="stable")]


def load(path: Path) -> Trace:
    """Read one trace.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, no trace, or holds no operator and no device event.
    """
    table = kineto.read(path)
    columns, order = _host_columns(table)
    if not len(columns["kind"]) and not len(table.device):
        raise KernbenchError(f"{path} holds no operator and no device event; profile at least one whole step")
    steps = tracesteps.marked(columns, table.names, table.device)
    if steps.marker != tracesteps.MARKERS[0]:
        # Our own traces start and stop outside the steps; others may begin and end with the profiler's synchronisation.
        own = tracesteps.profiler_calls(columns, table.names)
        steps = tracesteps.without_profiler(steps, columns, own)
        columns, order = {column: np.delete(values, own) for column, values in columns.items()}, np.delete(order, own)
    columns["correlation"] = _beside(table, order, "correlation")
    beside = {column: _beside(table, order, column) for column in ("sequence", "forward_thread", "external", "size")}
    beside["shapes"] = np.append(table.op_shapes, np.full(len(table.calls) + len(table.annotations), -1))[order]
    host = _host(columns, beside, steps, table.names)
    device, collectives = tracedevice.work(table, host, steps, beside["external"], beside["size"])
    device_syncs, waits = tracedevice.syncs(table, host)
    launched = tracesteps.launches(host, table.names)
    lost = launched.copy()
    lost[device.call[device.call >= 0]] = False
    steps = replace(steps, complete=tracesteps.complete(steps, host, device, launched, lost))
    python = frames.table(table.frames, table.names)
    frame = frames.innermost(python, host.thread, host.start_ns)
    lines, source = frames.sources(python, frame, host, steps.thread, table.names)
    return Trace(
        names=table.names,
        threads=table.threads,
        host=host,
        device=device,
        device_syncs=device_syncs,
        steps=steps,
        info=traceinfo.describe(path, table, host, device, steps, lost),
        frames=python,
        frame=frame,
        sources=lines,
        source=source,
        modules=frames.modules(python, frame, host, table.names, steps.marker == tracesteps.MARKERS[0]),
        shapes=beside["shapes"],
        shape_texts=table.shape_texts,
        collectives=collectives,
        memory=tracedevice.memory(table),
        waits_on=waits,
    )


def _host_columns(table: kineto.Tables) -> tuple[dict[str, Ints], Ints]:
    """The three kinds of host events in one table, sorted, without their arguments; the row of ``_parts`` of each."""
    parts = _parts(table)
    columns = {
        column: np.concatenate([getattr(part, column) for part in parts.values()])
        for column in ("name", "thread", "start_ns", "end_ns")
    }
    columns["kind"] = np.repeat(list(parts), list(map(len, parts.values())))
    # Annotations first where start and end agree: an annotation encloses what it was written around.
    outer_first = np.array([1, 2, 0])[columns["kind"]]
    order = np.lexsort((outer_first, -columns["end_ns"], columns["start_ns"], columns["thread"]))
    for column in columns:
        # One after the other: fresh memory takes longer to get than to fill.
        columns[column] = columns[column][order]
    return columns, order


def _beside(table: kineto.Tables, order: Ints, column: str) -> Ints:
    """An argument of the host events in their order; -1 where a kind lacks it."""
    parts = _parts(table).values()
    return np.concatenate([part.numbers.get(column, np.full(len(part), -1)) for part in parts])[order]


def _parts(table: kineto.Tables) -> dict[int, kineto.Columns]:
    return {OP: table.ops, CALL: table.calls, ANNOTATION: table.annotations}


def _host(columns: dict[str, Ints], beside: dict[str, Ints], steps: Steps, names: list[str]) -> Host:
    parent, annotation = nesting.enclosing(columns)
    forward = nesting.forward_ops(columns, parent, beside["sequence"], beside["forward_thread"] > 0)
    return Host(
        **columns,
        parent=parent,
        annotation=annotation,
        self_ns=nesting.self_time(columns, parent),
        forward=forward,
        phase=nesting.phases(columns, annotation, forward, names),
        step=tracesteps.step_at(steps, columns["start_ns"]),
    )
