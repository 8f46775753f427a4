"""The tables of a loaded trace: typed columns, times in whole nanoseconds since the first event, -1 for "none"."""

from __future__ import annotations

from dataclasses import dataclass

from kernbench.traces.nesting import Bools, Ints


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
