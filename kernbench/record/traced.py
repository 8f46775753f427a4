"""What a trace tells: inside a profile, and of a trace of others."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kernbench.record.measured import Hotspot
from kernbench.record.origin import Seconds, SourceLine


class TraceInfo(Struct, frozen=True, kw_only=True):
    """What a trace file holds. ``vendor`` is "" where nothing tells; ``lost_launches`` are launches without a kernel.

    ``marker`` is the annotation that marks the steps, "" if the whole trace counts as one step. ``notes`` are whole
    sentences on what cannot be told from this file.
    """

    file: str
    bytes: int
    events: int
    vendor: Literal["nvidia", "amd", "cpu", ""] = ""
    device: str = ""
    rank: int | None = None
    world_size: int | None = None
    steps: int = 0
    counted_steps: int = 0
    marker: str = ""
    step_seconds: Seconds = 0.0
    stacks: bool = False
    shapes: bool = False
    sync_events: bool = False
    memory_events: bool = False
    lost_launches: int = 0
    notes: list[str] = []


Cause = Literal[
    "host read",
    "implicit sync",
    "pageable copy",
    "data loading",
    "launch-bound",
    "host-bound",
    "allocator",
    "serialised streams",
    "unaligned product",
    "communication",
    "slow rank",
    "device-bound",
]


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that costs step time, with its cause, evidence and advice.

    Findings stand in the order of importance: by cost, faults with a remedy of their own before what is true of the
    whole step.

    ``seconds_per_step`` is what would be won at most, ``share`` that over the step. "device-bound" is no fault: the
    device is busy and only faster kernels help.
    """

    cause: Cause
    sentence: str
    seconds_per_step: Seconds
    share: float
    advice: str = ""
    source: SourceLine | None = None
    op: str = ""


class LaunchGaps(Struct, frozen=True, kw_only=True):
    """How far the host runs ahead. ``latency`` is from a launch's begin to its kernel's where nothing was queued.

    ``gap_seconds`` are medians of device idle time between neighbouring kernels of one stream; ``depth`` the median and
    largest number of launched and unfinished work items.
    """

    latency_seconds: Seconds | None = None
    gap_seconds: Seconds | None = None
    gaps_per_step: float = 0.0
    idle_in_gaps_seconds_per_step: Seconds = 0.0
    depth: tuple[float, int] | None = None
    graph_launches_per_step: float = 0.0


class IdleSite(Struct, frozen=True, kw_only=True):
    """Device idle time by what the host was doing: one row per cause and source site (or operator)."""

    cause: str
    seconds_per_step: Seconds
    count_per_step: float
    op: str = ""
    source: SourceLine | None = None


class FusionCandidate(Struct, frozen=True, kw_only=True):
    """Neighbouring kernels that one could do; ``seconds_per_step`` runs from the first one's begin to the last end.

    The low saving counts the gaps between them alone, the high one also the intermediate tensors that are never
    written, where shapes are recorded; None where neither says anything. ``basis`` says which of the two it is.
    """

    kernels: list[str]
    repeats_per_step: float
    seconds_per_step: Seconds
    saving_seconds_per_step: tuple[Seconds, Seconds] | None = None
    bytes_saved_per_step: float | None = None
    source: SourceLine | None = None
    op: str = ""
    basis: str = ""


class RooflinePoint(Struct, frozen=True, kw_only=True):
    """One operator with one set of shapes: the work that its shapes imply over the time its kernels took.

    ``flops`` and ``bytes`` are those of one call, each input read once and each output written once.
    """

    op: str
    shapes: str
    dtype: str
    calls_per_step: float
    seconds_per_step: Seconds
    flops: float
    bytes: float
    bound: Literal["compute", "memory", "launch", "unknown"] = "unknown"
    share_of_roof: float | None = None
    note: str = ""


class RankTime(Struct, frozen=True, kw_only=True):
    """One rank's step: ``exposed`` is communication that nothing else overlaps, ``wait`` standing in collectives."""

    rank: int
    step_seconds: Seconds
    compute_seconds_per_step: Seconds
    communication_seconds_per_step: Seconds
    exposed_seconds_per_step: Seconds
    wait_seconds_per_step: Seconds | None = None


class Communication(Struct, frozen=True, kw_only=True):
    """Collectives, overlap and ranks. ``slowest_rank`` is the one the others wait for, None where none stands out."""

    ranks: list[RankTime]
    overlap_share: float | None = None
    slowest_rank: int | None = None
    lag_seconds_per_step: Seconds | None = None
    collectives: dict[str, Seconds] = {}


class MemoryPoint(Struct, frozen=True, kw_only=True, array_like=True):
    """Device memory at one moment of the trace, in seconds from the first step's start."""

    seconds: Seconds
    allocated_bytes: int
    reserved_bytes: int


class PathPart(Struct, frozen=True, kw_only=True):
    """One kind of work on the critical path: what a shorter step would have to shorten."""

    kind: Literal["host", "kernel", "copy", "launch", "sync", "communication", "idle"]
    name: str
    seconds_per_step: Seconds
    count_per_step: float
    source: SourceLine | None = None


class FlameFrame(Struct, frozen=True, kw_only=True, array_like=True):
    """One frame of the flame view of host time. ``parent`` is a position in the same list, -1 for a root.

    ``folded`` counts library frames that were merged into this one.
    """

    name: str
    parent: int
    seconds_per_step: Seconds
    self_seconds_per_step: Seconds
    kind: Literal["python", "library", "op", "call", "annotation"]
    source: SourceLine | None = None
    folded: int = 0


Change = Literal[
    "without stall",
    "without all stalls",
    "stalls in best order",
    "graph",
    "without data loading",
    "without allocation",
    "without stream waits",
    "phase",
]


class Estimate(Struct, frozen=True, kw_only=True):
    """What a replay says of one change. ``saving`` is the range over plausible launch latencies.

    ``deferred`` marks a value that steers control flow on the host: its read can be put off, not deleted.
    """

    change: Change
    title: str
    saving_seconds_per_step: tuple[Seconds, Seconds]
    share: float
    cumulative_seconds_per_step: Seconds | None = None
    source: SourceLine | None = None
    op: str = ""
    phase: int | None = None
    deferred: bool = False
    note: str = ""


class WhatIf(Struct, frozen=True, kw_only=True):
    """The replay of the trace: its error on the unchanged trace, and estimates only where that is small enough.

    ``error`` is (replayed - traced) / traced of the step; beyond ``limit`` there are no estimates and ``refused`` says
    why in one sentence. ``baseline_seconds`` is the step that savings and shares are of: the steady state, with host
    time scaled by ``host_scale`` where the step without the profiler is known.
    """

    step_seconds: Seconds
    baseline_seconds: Seconds | None = None
    host_scale: float = 1.0
    replayed_seconds: Seconds | None = None
    error: float | None = None
    limit: float = 0.05
    latency_seconds: tuple[Seconds, Seconds] | None = None
    estimates: list[Estimate] = []
    refused: str = ""


class LineMatch(Struct, frozen=True, kw_only=True):
    """How many of the timed pass's waits found their line in the line pass."""

    waits_per_step: float
    matched_per_step: float


HotspotView = Literal["kernel", "operator", "module", "line", "shape"]


class TraceAnalysis(Struct, kw_only=True):
    """All that a trace tells beyond the profile's own fields. Lists are largest first; empty means not found."""

    trace: TraceInfo | None = None
    headline: str = ""
    findings: list[Finding] = []
    views: dict[str, list[Hotspot]] = {}
    gaps: LaunchGaps | None = None
    idle_sites: list[IdleSite] = []
    fusion: list[FusionCandidate] = []
    roofline: list[RooflinePoint] = []
    communication: Communication | None = None
    memory: list[MemoryPoint] = []
    critical_path: list[PathPart] = []
    flame: list[FlameFrame] = []
    whatif: WhatIf | None = None
    line_match: LineMatch | None = None
