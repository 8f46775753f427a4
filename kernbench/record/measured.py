"""One measured side: what a profile finds."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from kernbench.record.origin import Seconds, SourceLine


class Steps(Struct, frozen=True, kw_only=True):
    """Unprofiled steps, in the order they ran. ``units_per_step`` counts in ``WorkloadInfo.unit``."""

    seconds: list[Seconds]
    units_per_step: float
    warmup: int = 0
    losses: list[float] = []


class Throughput(Struct, frozen=True, kw_only=True):
    """Median rate with its bootstrap interval over steps."""

    units_per_second: float
    interval: tuple[float, float]


class Figure(Struct, frozen=True, kw_only=True):
    """What a workload makes of the time of its step, in its own words: "audio seconds per wall second"."""

    name: str
    value: float
    unit: str = ""


class Floor(Struct, frozen=True, kw_only=True):
    """The bytes that a step has to move, and how long the measured copy bandwidth takes for them.

    ``share`` is that time over the step's; None where memory does not bind or was not measured, which ``note`` says.
    """

    bytes_per_step: float
    seconds: Seconds | None = None
    share: float | None = None
    note: str = ""


class RankSide(Struct, frozen=True, kw_only=True):
    """One rank's unprofiled step, the median; ``trace`` is the file of its traced steps beside the record."""

    rank: int
    device: str
    step_seconds: Seconds
    units_per_step: float
    trace: str = ""


class Ranks(Struct, frozen=True, kw_only=True):
    """The ranks of a run. ``Steps.units_per_step`` and the throughput are then of all ranks together."""

    backend: str
    sides: list[RankSide]


class Part(Struct, frozen=True, kw_only=True):
    """One slice of a step by cause; the parts of a breakdown add up to the step."""

    cause: str
    seconds_per_step: Seconds
    description: str = ""
    busy: bool = True


class Hotspot(Struct, frozen=True, kw_only=True):
    """A device kernel (or, on the CPU, an operator) with its own time, children excluded."""

    name: str
    self_seconds_per_step: Seconds
    share: float
    calls_per_step: float
    kind: Literal["kernel", "copy", "memset", "op"] = "kernel"
    op: str = ""
    source: SourceLine | None = None
    bound: str | None = None
    phase: int | None = None


StallClass = Literal["free", "starved", "busy", "drain", "unclassified", "would-sync", "cpu-tensor"]


class Stall(Struct, frozen=True, kw_only=True):
    """A source line at which the host reads a tensor.

    ``real`` is true only where the runtime's own synchronising call was seen (on a GPU). Class "would-sync" is the
    CPU's view: the tensor would live on the device. Class "cpu-tensor" is a read of a host tensor: no stall anywhere.
    """

    file: str
    line: int
    source: str
    op: str
    count_per_step: float
    klass: StallClass = field(name="class")
    real: bool
    wait_seconds_per_step: Seconds | None = None
    saving_seconds_per_step: Seconds | None = None
    function: str = ""
    phase: int | None = None


class Launches(Struct, frozen=True, kw_only=True):
    """Device work items per step. On the CPU ``per_step`` counts the operators that would launch (leaf calls)."""

    per_step: float
    kernels_per_step: float = 0.0
    copies_per_step: float = 0.0
    memsets_per_step: float = 0.0
    median_seconds: Seconds | None = None
    short_share: float | None = None


class Idle(Struct, frozen=True, kw_only=True):
    """Device idle time in a step, split by cause. On the CPU, None is recorded instead: the host is the device."""

    busy_seconds_per_step: Seconds
    idle_seconds_per_step: Seconds
    causes: dict[str, Seconds] = {}


class Overhead(Struct, frozen=True, kw_only=True):
    """What observing costs: step time under each observing pass over the unprofiled step time (1.0 is free)."""

    trace_ratio: float | None = None
    lines_ratio: float | None = None


class Span(Struct, frozen=True, kw_only=True, array_like=True):
    """One bar of the timeline; ``track`` is a host thread or a device stream, times count from the step's start.

    ``source`` is the line of a wait of the host, where it is known.
    """

    track: str
    name: str
    start_seconds: Seconds
    duration_seconds: Seconds
    kind: str
    source: SourceLine | None = None


class Clocks(Struct, frozen=True, kw_only=True):
    """What the device says of itself while it was timed; None where it does not tell."""

    sm_hz: float | None = None
    memory_hz: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    throttle_reasons: list[str] = []
