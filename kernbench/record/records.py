"""The records themselves: one per command."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kernbench.record.difference import Difference
from kernbench.record.measured import (
    Clocks,
    Figure,
    Floor,
    Hotspot,
    Idle,
    Launches,
    Overhead,
    Part,
    Ranks,
    Span,
    Stall,
    Steps,
    Throughput,
)
from kernbench.record.origin import Environment, Git, Seconds, Stage, WorkloadInfo
from kernbench.record.proof import Arm, ParityResult, PhaseInfo, Prediction, Ratio, SiteHit, Verdict
from kernbench.record.timed import BenchResult, Build, ClaimCheck, Curve, SanitizerResult, Sweep
from kernbench.record.traced import TraceAnalysis, TraceInfo

SCHEMA = 1


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
    ranks: Ranks | None = None


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
    """Two runs side by side. ``ratio`` is step time before over after, from unpaired steps of separate runs.

    Of two trace files the sides are profiles whose steps are the traced ones. ``difference`` is that of the traces.
    """

    before: ProfileRecord
    after: ProfileRecord
    ratio: Ratio | None = None
    verdict: Verdict | None = None
    difference: Difference | None = None


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
