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

from kernbench import kineto, nesting
from kernbench.errors import KernbenchError
from kernbench.nesting import ANNOTATION, CALL, OP, Bools, Ints
from kernbench.record import SourceLine, TraceInfo

KERNEL, COPY, MEMSET = 0, 1, 2

_STEP_MARKERS = ("kernbench.step#", "ProfilerStep#")
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch(?!HostFunc)")
_SYNCHRONIZE = re.compile(r"(cuda|cu|hip)(Stream|Device|Event|Ctx)Synchronize")
# These copy and wait in one call. PyTorch on ROCm copies with hipMemcpyWithStream.
_BLOCKING_COPY = re.compile(r"cudaMemcpy(2D)?(_v\d+)?$|cuMemcpy(DtoH|HtoD)(_v2)?$|hipMemcpy(WithStream|DtoH|HtoD)?$")
_PROFILER_CALLS = ("cudaDeviceSynchronize", "hipDeviceSynchronize")
# The device may fall behind by a lost record or two; a step that lost more than this share was cut by the profiler.
_LOST_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Host:
    """Host events, sorted by thread, then start, then outermost first: a parent's row precedes its children's.

    ``parent`` is the innermost enclosing operator, ``annotation`` the innermost enclosing annotation. ``self_ns`` is an
    operator's time without its child operators. ``forward`` is, for all that runs under a backward node, the operator
    that created the node. ``phase`` is the number of the enclosing kernbench phase, taken from ``forward`` in backward.
    """

    kind: Ints
    name: Ints
    thread: Ints
    start_ns: Ints
    end_ns: Ints
    correlation: Ints
    parent: Ints
    annotation: Ints
    self_ns: Ints
    forward: Ints
    phase: Ints
    step: Ints

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True, eq=False)
class Device:
    """Device events by start. ``call`` is the launch's host row; ``op``, ``phase`` and ``step`` are the launch's.

    ``graph`` is 1 where a graph launch issued the event; ``collective`` indexes the collective's name, -1 for others.
    """

    kind: Ints
    name: Ints
    device: Ints
    stream: Ints
    start_ns: Ints
    end_ns: Ints
    bytes: Ints
    call: Ints
    op: Ints
    phase: Ints
    step: Ints
    graph: Ints
    collective: Ints

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True, eq=False)
class DeviceSyncs:
    """``cuda_sync`` events (recorded only on request) by start; ``call`` is the host row of the runtime call."""

    name: Ints
    device: Ints
    stream: Ints
    start_ns: Ints
    end_ns: Ints
    call: Ints


@dataclass(frozen=True, eq=False)
class Waits:
    """Stream waits on the device (``cudaStreamWaitEvent``) by time: ``stream`` goes on after the work of ``on_stream``.

    ``record`` is the host row of the call that recorded the awaited event, -1 where the trace does not tell; ``call``
    is the host row of the wait's own call. The awaited work is what ``on_stream`` was given before ``record``.
    """

    time_ns: Ints
    device: Ints
    stream: Ints
    on_stream: Ints
    call: Ints
    record: Ints

    def __len__(self) -> int:
        return len(self.time_ns)


@dataclass(frozen=True, eq=False)
class Collectives:
    """Collectives in the order of device rows (``row``). ``bytes`` and ``group`` (ranks) are -1 if not recorded."""

    row: Ints
    name: Ints
    bytes: Ints
    group: Ints

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, eq=False)
class Memory:
    """Allocations and releases by time. ``device`` is -1 for host memory; -1 bytes where a total is not recorded."""

    time_ns: Ints
    device: Ints
    allocated: Ints
    reserved: Ints
    delta: Ints

    def __len__(self) -> int:
        return len(self.time_ns)


@dataclass(frozen=True, eq=False)
class Frames:
    """Python calls, sorted by thread, then start, then outermost first. ``parent`` is a row of this table.

    ``name`` and ``file`` index ``Trace.names``; ``line`` is the function's definition line. Built-in functions and
    modules have no file (-1).
    """

    name: Ints
    thread: Ints
    start_ns: Ints
    end_ns: Ints
    parent: Ints
    file: Ints
    line: Ints

    def __len__(self) -> int:
        return len(self.name)


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps by host time. ``marker`` tells which annotation marked them, "" if the whole trace counts as one step.

    ``complete`` is false for a step that the profiler cut: launches without their kernels, or nothing inside.
    """

    number: Ints
    start_ns: Ints
    end_ns: Ints
    complete: Bools
    marker: str
    thread: int

    def __len__(self) -> int:
        return len(self.number)


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
    host, sequence, backward = _host_columns(table)
    if not len(host["kind"]) and not len(table.device.start_ns):
        raise KernbenchError(f"{path} holds no operator and no device event; profile at least one whole step")
    steps = _steps(host, table)
    if steps.marker != _STEP_MARKERS[0]:
        # Our own traces start and stop outside the steps; others may begin and end with the profiler's synchronisation.
        own = _profiler_calls(host, table.names)
        steps = _without_profiler(steps, host, own)
        kept = np.setdiff1d(np.arange(len(host["kind"])), own)
        host = {column: values[kept] for column, values in host.items()}
        sequence, backward = sequence[kept], backward[kept]
    parent, annotation = nesting.enclosing(host)
    forward = nesting.forward_ops(host, parent, sequence, backward)
    full = Host(
        **host,
        parent=parent,
        annotation=annotation,
        self_ns=nesting.self_time(host, parent),
        forward=forward,
        phase=nesting.phases(host, annotation, forward, table.names),
        step=_step_at(steps, host["start_ns"]),
    )
    device, syncs = _device(table, full, steps)
    steps = replace(steps, complete=_complete(steps, full, device, table.names))
    nothing = np.zeros(0, np.int64)
    unknown = np.full(len(full), -1, np.int64)
    return Trace(
        names=table.names,
        threads=table.threads,
        host=full,
        device=device,
        device_syncs=syncs,
        steps=steps,
        info=TraceInfo(file=path.name, bytes=path.stat().st_size, events=len(full) + len(device)),
        frames=Frames(*[nothing] * 7),
        frame=unknown,
        sources=[],
        source=unknown,
        modules=unknown,
        shapes=unknown,
        shape_texts=[],
        collectives=Collectives(*[nothing] * 4),
        memory=Memory(*[nothing] * 5),
        waits_on=Waits(*[nothing] * 6),
    )


def _host_columns(table: kineto.Tables) -> tuple[dict[str, Ints], Ints, Bools]:
    """The three kinds of host events in one sorted table, with sequence number and "runs in backward" beside it."""
    parts = ((OP, table.ops), (CALL, table.calls), (ANNOTATION, table.annotations))
    columns = {
        column: np.concatenate([getattr(part, column) for _, part in parts])
        for column in ("name", "thread", "start_ns", "end_ns", "correlation")
    }
    columns["kind"] = np.concatenate([np.full(len(part.start_ns), kind, np.int64) for kind, part in parts])
    # Annotations first where start and end agree: an annotation encloses what it was written around.
    outer_first = np.array([1, 2, 0])[columns["kind"]]
    order = np.lexsort((outer_first, -columns["end_ns"], columns["start_ns"], columns["thread"]))
    sequence = np.concatenate([part.sequence for _, part in parts])[order]
    forward_thread = np.concatenate([part.forward_thread for _, part in parts])[order]
    return {column: values[order] for column, values in columns.items()}, sequence, forward_thread > 0


def _steps(host: dict[str, Ints], table: kineto.Tables) -> Steps:
    rows, marker = _step_annotations(host, table.names)
    if marker:
        numbers = [_leading_number(table.names[host["name"][row]][len(marker) :]) for row in rows]
        start, end = host["start_ns"][rows], host["end_ns"][rows]
        thread = int(host["thread"][rows[0]])
    else:
        numbers = [0]
        start = np.concatenate([host["start_ns"], table.device.start_ns]).min(keepdims=True)
        end = np.concatenate([host["end_ns"], table.device.end_ns]).max(keepdims=True)
        operators = host["thread"][host["kind"] == OP]
        thread = int(np.bincount(operators).argmax()) if len(operators) else -1
    return Steps(np.array(numbers, np.int64), start, end, np.ones(len(start), bool), marker, thread)


def _leading_number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0


def _step_at(steps: Steps, time_ns: Ints) -> Ints:
    """Position in ``steps`` of the step that a host time falls in, whatever the thread; -1 between steps."""
    position = np.searchsorted(steps.start_ns, time_ns, side="right") - 1
    return np.where((position >= 0) & (time_ns < steps.end_ns[position]), position, -1)


def _step_annotations(host: dict[str, Ints], names: list[str]) -> tuple[Ints, str]:
    annotations = np.flatnonzero(host["kind"] == ANNOTATION)
    annotations = annotations[np.argsort(host["start_ns"][annotations], kind="stable")]
    for marker in _STEP_MARKERS:
        rows: list[int] = []
        for row in annotations.tolist():
            after_last = not rows or host["start_ns"][row] >= host["end_ns"][rows[-1]]
            if names[host["name"][row]].startswith(marker) and after_last:
                rows.append(row)
        if rows:
            return np.array(rows, np.int64), marker
    return np.zeros(0, np.int64), ""


def _profiler_calls(host: dict[str, Ints], names: list[str]) -> Ints:
    """Rows of the profiler's own synchronisation at its start and stop: the first and the last runtime call."""
    calls = np.flatnonzero(host["kind"] == CALL)
    calls = calls[np.argsort(host["start_ns"][calls], kind="stable")]
    own = [row for row in calls[[0, -1]].tolist() if names[host["name"][row]] in _PROFILER_CALLS] if len(calls) else []
    return np.array(own, np.int64)


def _without_profiler(steps: Steps, host: dict[str, Ints], own: Ints) -> Steps:
    """Steps cut short where the profiler's synchronisation precedes their first or follows their last operator."""
    start, end = steps.start_ns.copy(), steps.end_ns.copy()
    operator_starts = host["start_ns"][host["kind"] == OP]
    for first, last in zip(host["start_ns"][own].tolist(), host["end_ns"][own].tolist(), strict=True):
        if (
            start[0] <= first
            and last < end[0]
            and not np.any((operator_starts >= start[0]) & (operator_starts < first))
        ):
            start[0] = last
        elif start[-1] < first and last <= end[-1] and not np.any(operator_starts >= last):
            end[-1] = first
    return replace(steps, start_ns=start, end_ns=end)


def _device(table: kineto.Tables, host: Host, steps: Steps) -> tuple[Device, DeviceSyncs]:
    raw = table.device
    order = np.argsort(raw.start_ns, kind="stable")
    call = _by_correlation(host, raw.correlation)[order]
    linked = call >= 0
    step = np.where(linked, host.step[call], -1) if len(host) else np.full(len(order), -1, np.int64)
    if len(order) and not linked.any():
        # Recorded without runtime calls: device time is all there is to go by.
        step = _step_at(steps, raw.start_ns[order])
    device = Device(
        kind=table.device_kind[order],
        name=raw.name[order],
        device=raw.device[order],
        stream=raw.stream[order],
        start_ns=raw.start_ns[order],
        end_ns=raw.end_ns[order],
        bytes=raw.bytes[order],
        call=call,
        op=np.where(linked, host.parent[call], -1) if len(host) else call,
        phase=np.where(linked, host.phase[call], -1) if len(host) else call,
        step=step,
        graph=np.zeros(len(order), np.int64),
        collective=np.full(len(order), -1, np.int64),
    )
    order = np.argsort(table.syncs.start_ns, kind="stable")
    syncs = DeviceSyncs(
        **{
            column: getattr(table.syncs, column)[order] for column in ("name", "device", "stream", "start_ns", "end_ns")
        },
        call=_by_correlation(host, table.syncs.correlation)[order],
    )
    return device, syncs


def _by_correlation(host: Host, wanted: Ints) -> Ints:
    """Host row of the runtime call with each correlation number; -1 where the trace has none."""
    rows = np.flatnonzero((host.kind == CALL) & (host.correlation > 0))
    if not len(rows) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    rows = rows[np.argsort(host.correlation[rows], kind="stable")]
    position = np.minimum(np.searchsorted(host.correlation[rows], wanted), len(rows) - 1)
    return np.where(host.correlation[rows[position]] == wanted, rows[position], -1)


def _complete(steps: Steps, host: Host, device: Device, names: list[str]) -> Bools:
    filled = np.bincount(host.step[(host.kind != ANNOTATION) & (host.step >= 0)], minlength=len(steps)) > 0
    filled |= np.bincount(device.step[device.step >= 0], minlength=len(steps)) > 0
    if len(device) and np.any(device.call >= 0):
        launch = np.fromiter((_LAUNCH.match(name) is not None for name in names), bool, len(names))
        launches = (host.kind == CALL) & launch[host.name] & (host.step >= 0)
        ran = np.zeros(len(host), bool)
        ran[device.call[device.call >= 0]] = True
        issued = np.bincount(host.step[launches], minlength=len(steps))
        lost = np.bincount(host.step[launches & ~ran], minlength=len(steps))
        filled &= lost <= _LOST_SHARE * issued
    return filled
