"""Every result type of kernbench, and the versioned JSON they are stored in.

A record is the value in which the measuring side and the reading side meet. Times are seconds, sizes are bytes, rates
are per second; only a report formats them. This module imports nothing of ours, so both sides may import it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

SCHEMA = 1

Seconds = float


class RecordError(ValueError):
    """A record file cannot be read; the message says which file, why, and what to do."""


# --- who, where, when -------------------------------------------------------------------------------------------------


class Git(Struct, frozen=True, kw_only=True):
    """State of the repository that the measured code came from."""

    commit: str
    dirty: bool


class Device(Struct, frozen=True, kw_only=True):
    """The device that ran the steps. ``memory_bytes`` and ``l2_bytes`` are 0 where the device does not tell."""

    type: Literal["cpu", "cuda"]
    name: str
    count: int = 1
    capability: str = ""
    memory_bytes: int = 0
    l2_bytes: int = 0
    driver: str = ""
    runtime: str = ""


class Ceilings(Struct, frozen=True, kw_only=True):
    """Roofs measured on this device, never read from a table. Absent figures are None.

    ``copy`` counts bytes read plus bytes written; matrix products are keyed by dtype ("float32", "tf32").
    """

    copy_bytes_per_second: float | None = None
    triad_bytes_per_second: float | None = None
    matmul_flops_per_second: dict[str, float] = {}
    launch_seconds: Seconds | None = None


class Environment(Struct, frozen=True, kw_only=True):
    device: Device
    python: str
    torch: str
    triton: str
    kernbench: str
    platform: str
    cpu: str
    cpu_threads: int
    ceilings: Ceilings | None = None


class WorkloadInfo(Struct, frozen=True, kw_only=True):
    """What was run. ``phases`` are the active phase numbers, ``implementations`` names the one used per phase."""

    name: str
    preset: str
    dtype: str
    seed: int
    unit: str
    phases: list[int] = []
    implementations: dict[str, str] = {}
    data: str = ""
    parameters: int = 0
    weights: str = ""


class Stage(Struct, frozen=True, kw_only=True):
    """One finished part of a command; ``status`` is what became of it, ``message`` why when it is not "done"."""

    name: str
    status: Literal["done", "failed", "skipped", "interrupted"]
    seconds: Seconds
    message: str = ""


class SourceLine(Struct, frozen=True, kw_only=True):
    """A line of the user's program: ``file`` relative to the workspace where it lies inside it."""

    file: str
    line: int
    text: str
    function: str = ""


# --- one measured side: what profile finds ----------------------------------------------------------------------------


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
    """One bar of the timeline; ``track`` is a host thread or a device stream, times count from the step's start."""

    track: str
    name: str
    start_seconds: Seconds
    duration_seconds: Seconds
    kind: str


class Clocks(Struct, frozen=True, kw_only=True):
    """What the device says of itself while it was timed; None where it does not tell."""

    sm_hz: float | None = None
    memory_hz: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    throttle_reasons: list[str] = []


# --- what the line pass saw (saved beside the trace as lines.json) ----------------------------------------------------


class HostRead(Struct, frozen=True, kw_only=True):
    """One read of a tensor by the host, in the order it happened.

    ``line`` indexes ``LineLog.lines``; ``form`` is how the source asks for it ("item", "if", "tolist", "index",
    "nonzero", "print", "copy", "synchronize", …). ``host_tensor`` marks a read that never waits for a device;
    ``real`` one for which the runtime itself reported a synchronisation.
    """

    step: int
    line: int
    op: str
    form: str
    host_tensor: bool
    real: bool
    wait_seconds: Seconds | None = None
    phase: int | None = None


class LineLog(Struct, frozen=True, kw_only=True):
    """Which source line did what, over ``steps`` watched steps.

    ``op_lines`` holds, for the last watched step, the line index of each call of an operator in call order
    (-1 where no Python line was executing it). ``notes`` says what could not be matched or was not seen.
    """

    steps: int
    lines: list[SourceLine] = []
    reads: list[HostRead] = []
    op_lines: dict[str, list[int]] = {}
    step_seconds: Seconds | None = None
    notes: list[str] = []


# --- what a trace tells: inside a profile, and of a trace of others ---------------------------------------------------


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
    "communication",
    "slow rank",
    "device-bound",
]


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that costs step time, with its cause, evidence and advice; the largest cost comes first.

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
    """Neighbouring short kernels that one kernel could do. ``saving`` is None where neither bytes nor shapes are known.

    ``low`` counts the launches and gaps between them alone, ``high`` also the intermediate tensors never written.
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
    """One operator with one set of shapes: the work that its shapes imply over the time its kernels took."""

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


class Estimate(Struct, frozen=True, kw_only=True):
    """What a replay says of one change. ``saving`` is the range over plausible launch latencies.

    ``deferred`` marks a value that steers control flow on the host: its read can be put off, not deleted.
    """

    change: Literal["without stall", "without all stalls", "stalls in best order", "roofline kernels", "graph"]
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
    why in one sentence.
    """

    step_seconds: Seconds
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


# --- parity, ratio, verdict -------------------------------------------------------------------------------------------


class Errors(Struct, frozen=True, kw_only=True):
    """Error against the float64 oracle over all compared tensors.

    ``max`` is the largest difference, each over the larger of the tensor's RMS and the element itself; ``rms_ratio`` is
    RMS(difference) / RMS(oracle); ``mean`` is the signed mean difference over RMS(oracle).
    """

    max: float
    rms_ratio: float
    mean: float


class MutantResult(Struct, frozen=True, kw_only=True):
    """One wrong or hostile kernel before the gate. ``reason`` says how it was caught, or why it does not count.

    ``outcome`` "equivalent": it computes what the reference does, as far as the dtype can tell. "needs a GPU": only
    there can it be seen.
    """

    name: str
    kind: Literal["result", "altered", "hostile"]
    outcome: Literal["killed", "survived", "equivalent", "needs a GPU"]
    reason: str = ""


class ParityResult(Struct, frozen=True, kw_only=True):
    """One comparison: a kernel case in one dtype and mode, or a phase on real steps (``kernel`` then names it).

    ``examples`` counts generated inputs, ``limits`` the bounds on ``errors``; ``bound`` is the one on the maximum.
    """

    kernel: str
    case: str
    dtype: str
    mode: str
    passed: bool
    errors: Errors | None = None
    eager_errors: Errors | None = None
    bound: float | None = None
    tensor: str = ""
    limits: Errors | None = None
    mutants_killed: tuple[int, int] | None = None
    mutants: list[MutantResult] = []
    examples: int | None = None
    bitwise: bool | None = None
    seconds: Seconds = 0.0
    reason: str = ""


class Ratio(Struct, frozen=True, kw_only=True):
    """Step time before over step time after (above 1 is faster): paired median over rounds, bootstrap interval.

    ``noise_floor`` is the half-width around 1 that identical arms (A/A) showed in the same run.
    """

    median: float
    low: float
    high: float
    noise_floor: float
    rounds: int
    steps_per_round: int
    a_a: tuple[float, float] | None = None
    dropped_rounds: int = 0


class Prediction(Struct, frozen=True, kw_only=True):
    """What the phase promised before it was measured; absent figures are None. ``claim`` is the source document's.

    Syncs and launches are those taken out of a step.
    """

    text: str
    claim: str = ""
    syncs_per_step: float | None = None
    launches_per_step: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    basis: str = ""


class SiteHit(Struct, frozen=True, kw_only=True):
    """One line of the receipt: the site that was replaced, by what, and how often the replacement ran in a step.

    ``every`` is the steps from call to call that the plan declares; ``steps`` is how many were counted.
    """

    site: str
    implementation: str
    calls: int
    calls_per_step: float
    kernel: str = ""
    every: int = 1
    steps: int = 0


class Verdict(Struct, frozen=True, kw_only=True):
    decision: Literal["keep", "reject", "inconclusive"]
    sentence: str
    reasons: list[str] = []


class PhaseInfo(Struct, frozen=True, kw_only=True):
    number: int
    title: str
    flag: str = ""
    implementation: str = ""


class Arm(Struct, frozen=True, kw_only=True):
    """Interleaved timings of one arm: seconds per step, one figure per round, in round order."""

    name: str
    seconds: list[Seconds]


class BenchResult(Struct, frozen=True, kw_only=True):
    """One timed implementation. ``label`` warns ("launch-bound", "impossible", "wrong", …) and ``note`` says why.

    ``direction`` is what of a kernel was timed; the time of its backward is without the forward before it.

    ``noise_floor`` is the half-width around 1 that eager against itself (A/A) showed in the same rounds. ``clocks`` are
    those of the rounds: medians, the highest temperature, and every throttle reason that was seen.
    """

    kernel: str
    case: str
    dtype: str
    implementation: str
    seconds: Seconds | None
    direction: Literal["forward", "backward"] = "forward"
    interval: tuple[Seconds, Seconds] | None = None
    bytes: float | None = None
    flops: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share_of_roof: float | None = None
    units_per_second: float | None = None
    speedup: tuple[float, float, float] | None = None
    noise_floor: float | None = None
    launches_per_step: float | None = None
    syncs_per_step: float | None = None
    figures: list[Figure] = []
    floor: Floor | None = None
    clocks: Clocks | None = None
    cache: str = ""
    label: str = ""
    note: str = ""


class Sweep(Struct, frozen=True, kw_only=True):
    """Cases of a kernel that differ in one size, in the order of its values; their rows stand among the results.

    ``fixed`` says what is the same for all of them.
    """

    kernel: str
    size: str
    values: list[int]
    cases: list[str]
    fixed: str = ""


class ClaimCheck(Struct, frozen=True, kw_only=True):
    """A figure that somebody states for a case, beside what exists and what was measured here.

    ``counted`` are the bytes that give ``bytes_per_second`` over ``stated_seconds``, ``real_bytes`` those that there
    are. ``seconds`` is our kernel's time, None where it was not measured; ``sentence`` says what follows.
    """

    kernel: str
    case: str
    source: str
    title: str
    bytes_per_second: float
    counted_bytes: float
    real_bytes: float
    stated_seconds: Seconds
    device: str = ""
    roof_bytes_per_second: float | None = None
    seconds: Seconds | None = None
    launch_seconds: Seconds | None = None
    copy_seconds: Seconds | None = None
    sentence: str = ""


class Curve(Struct, frozen=True, kw_only=True):
    """One figure of a training run over its steps, of one implementation: its ``values`` after so many ``steps``."""

    name: str
    implementation: str
    steps: list[int]
    values: list[float]
    unit: str = ""


class Build(Struct, frozen=True, kw_only=True):
    """One Triton function compiled for one architecture: what ptxas made of it, and whether that is allowed.

    ``cases`` are those whose launches this one binary serves. ``registers`` are per thread, ``spill_bytes`` too.
    """

    kernel: str
    function: str
    arch: str
    dtype: str
    cases: list[str]
    passed: bool
    warps: int = 0
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    instructions: int | None = None
    seconds: Seconds = 0.0
    reason: str = ""


class SanitizerResult(Struct, frozen=True, kw_only=True):
    """What one tool of compute-sanitizer found in one kernel; ``findings`` are its own words, shortened."""

    kernel: str
    tool: str
    passed: bool
    errors: int
    findings: list[str] = []
    seconds: Seconds = 0.0
    reason: str = ""


# --- records ----------------------------------------------------------------------------------------------------------


class Header(Struct, kw_only=True, tag_field="kind"):
    """What every record begins with. ``status`` is "running" until the last stage is done.

    ``confidence`` is the level of every interval in the record; records that do not say hold 95 % intervals.
    """

    run_id: str
    created_utc: str
    command: str
    environment: Environment
    schema: int = SCHEMA
    git: Git | None = None
    confidence: float = 0.95
    status: Literal["running", "complete", "failed", "interrupted"] = "running"
    stages: list[Stage] = []
    warnings: list[str] = []


class ProfileRecord(Header, kw_only=True, tag="profile"):
    workload: WorkloadInfo
    steps: Steps | None = None
    throughput: Throughput | None = None
    figures: list[Figure] = []
    floor: Floor | None = None
    breakdown: list[Part] = []
    hotspots: list[Hotspot] = []
    stalls: list[Stall] = []
    syncs_per_step: float | None = None
    cpu_reads_per_step: float | None = None
    launches_per_step: float | None = None
    launches: Launches | None = None
    idle: Idle | None = None
    overhead: Overhead | None = None
    timeline: list[Span] = []
    memory_peak_bytes: int | None = None
    clocks: Clocks | None = None
    analysis: TraceAnalysis | None = None


class SwapRecord(Header, kw_only=True, tag="swap"):
    """One phase, measured: both sides, the evidence between them, and what was decided."""

    workload: WorkloadInfo
    phase: PhaseInfo
    predicted: Prediction | None = None
    before: ProfileRecord | None = None
    after: ProfileRecord | None = None
    parity: list[ParityResult] = []
    ratio: Ratio | None = None
    arms: list[Arm] = []
    clocks: list[Clocks] = []
    receipt: list[SiteHit] = []
    verdict: Verdict | None = None


class ParityRecord(Header, kw_only=True, tag="parity"):
    results: list[ParityResult] = []
    sanitizer: list[SanitizerResult] = []
    workload: WorkloadInfo | None = None


class BenchRecord(Header, kw_only=True, tag="bench"):
    results: list[BenchResult] = []
    builds: list[Build] = []
    workload: WorkloadInfo | None = None
    arms: list[Arm] = []
    sweeps: list[Sweep] = []
    claims: list[ClaimCheck] = []
    curves: list[Curve] = []


class CompareRecord(Header, kw_only=True, tag="compare"):
    """Two runs side by side. ``ratio`` is step time before over after, from unpaired steps of separate runs."""

    before: ProfileRecord
    after: ProfileRecord
    ratio: Ratio | None = None
    verdict: Verdict | None = None


class AnalyzeRecord(Header, kw_only=True, tag="analyze"):
    """A trace of any program: profile's analyses without the workload. Several files are the ranks of one run.

    ``environment`` is that of the machine that analyses, not of the one that recorded. ``hotspots`` and what follows
    are those of the first file, or of the slowest rank where one stands out.
    """

    traces: list[TraceInfo]
    step_seconds: list[Seconds] = []
    breakdown: list[Part] = []
    hotspots: list[Hotspot] = []
    stalls: list[Stall] = []
    launches: Launches | None = None
    idle: Idle | None = None
    timeline: list[Span] = []
    analysis: TraceAnalysis | None = None


Record = ProfileRecord | SwapRecord | ParityRecord | BenchRecord | CompareRecord | AnalyzeRecord


def encode(record: Record) -> bytes:
    """The record as indented JSON with a trailing newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def kind(record: Record) -> str:
    """The record's kind as it stands in the file: "profile", "swap", "parity", "bench", "compare" or "analyze"."""
    return str(type(record).__struct_config__.tag)


def to_builtins(value: Struct) -> dict[str, object]:
    """A result as plain dictionaries and lists."""
    plain: dict[str, object] = msgspec.to_builtins(value)
    return plain


def write(record: Record, path: Path) -> None:
    """Write atomically: a reader sees the old record or the new one, never half of one.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomically(path, encode(record))


def read(path: Path) -> Record:
    """Read one record.

    Raises:
        RecordError: the file is absent, is no record, is damaged, or has a newer schema.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"cannot read {path}: {error.strerror or error}; name a run folder or its record.json"
        ) from None
    try:
        schema = msgspec.json.decode(data, type=_SchemaOnly).schema
        if schema > SCHEMA:
            raise RecordError(f"{path} has schema {schema}, this kernbench reads up to {SCHEMA}; upgrade kernbench")
        record: Record = msgspec.json.decode(data, type=Record)
        return record
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path} is damaged ({error}); profile again, or delete that run folder") from None


class _SchemaOnly(Struct):
    schema: int


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then rename it over ``path``.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        scratch.unlink()
        raise
