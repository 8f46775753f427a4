"""Synthetic records of analyzed traces for the report tests: every field filled, one name hostile."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import report_records as samples
from report_records import HOSTILE, LONG_ADD, LONG_GEMM, MEMORY, OPTIMIZER

from kernbench.record import (
    AnalyzeRecord,
    Communication,
    CompareRecord,
    Device,
    Difference,
    Environment,
    Estimate,
    Finding,
    FlameFrame,
    FusionCandidate,
    Hotspot,
    IdleSite,
    Launches,
    LaunchGaps,
    LineMatch,
    MemoryPoint,
    OperatorChange,
    PathPart,
    ProfileRecord,
    RankTime,
    RooflinePoint,
    SourceLine,
    Span,
    Stage,
    StepPair,
    TraceAnalysis,
    TraceInfo,
    WhatIf,
)

STEP = 92.1e-3
NORM = SourceLine(
    file=OPTIMIZER, line=88, text="if torch.isnan(norm) or torch.isinf(norm):", function="DeepNestedOptimizer.step"
)
CLIP = SourceLine(file=MEMORY, line=141, text="if grad_norm > self.max_norm:", function="NeuralMemory.update")
LOSS = SourceLine(file="workloads/titan_mac/train.py", line=52, text=f'print(loss.item(), "{HOSTILE}")')


def findings() -> list[Finding]:
    return [
        Finding(
            cause="host read",
            sentence="Three reads a step at optimizer.py:88 drain the device for 4.10 ms.",
            seconds_per_step=4.1e-3,
            share=0.0445,
            advice="Keep the norm on the device and test it with torch.where, or test it a step later.",
            source=NORM,
            op="aten::is_nonzero",
        ),
        Finding(
            cause="data loading",
            sentence=f"The loader {HOSTILE} keeps the device waiting for 2.00 ms.",
            seconds_per_step=2.0e-3,
            share=0.0217,
            advice="Load in worker processes.",
        ),
        Finding(
            cause="device-bound",
            sentence="For 63.1 ms of a step the device works; only faster kernels shorten that.",
            seconds_per_step=0.0,
            share=0.0,
        ),
    ]


def whatif(**changes: Any) -> WhatIf:
    def estimate(change: Any, title: str, low: float, high: float, **more: Any) -> Estimate:
        return Estimate(change=change, title=title, saving_seconds_per_step=(low, high), share=high / STEP, **more)

    fields: dict[str, Any] = {
        "step_seconds": STEP,
        "replayed_seconds": 91.2e-3,
        "error": -0.0098,
        "latency_seconds": (4.5e-6, 6.7e-6),
        "estimates": [
            estimate("without all stalls", "all waits", 5.0e-3, 5.6e-3),
            estimate("without stall", "is_nonzero", 3.1e-3, 3.3e-3, source=NORM, op="aten::is_nonzero", deferred=True),
            estimate("without stall", "is_nonzero", 1.1e-3, 1.1e-3, source=CLIP, deferred=True, phase=0),
            estimate("without stall", "item", 0.1e-3, 0.2e-3, source=LOSS, note="only every tenth step"),
            estimate(
                "stalls in best order", "is_nonzero", 3.1e-3, 3.3e-3, source=NORM, cumulative_seconds_per_step=3.3e-3
            ),
            estimate(
                "stalls in best order", "is_nonzero", 1.9e-3, 2.1e-3, source=CLIP, cumulative_seconds_per_step=5.4e-3
            ),
            estimate("phase", "phase 3", 4.0e-3, 6.0e-3, phase=3),
            estimate("graph", "the step as one graph", 9.0e-3, 11.0e-3),
        ],
    }
    return WhatIf(**(fields | changes))


def refused() -> WhatIf:
    return whatif(
        error=0.32,
        replayed_seconds=121.6e-3,
        estimates=[],
        refused="The replay misses the traced step by more than 5 %, so it cannot say what would be won",
    )


def flame(frames: int = 60) -> list[FlameFrame]:
    def frame(name: str, parent: int, total: float, own: float, kind: Any, **more: Any) -> FlameFrame:
        return FlameFrame(
            name=name, parent=parent, seconds_per_step=total, self_seconds_per_step=own, kind=kind, **more
        )

    return [
        frame("train.py: train_step", -1, 80e-3, 4e-3, "python", source=LOSS),
        frame("model.py: forward", 0, 30e-3, 2e-3, "python", source=CLIP),
        frame("torch", 1, 20e-3, 5e-3, "library", folded=14),
        frame("aten::mm", 2, 10e-3, 8e-3, "op"),
        frame("cudaLaunchKernel", 3, 2e-3, 2e-3, "call"),
        frame("optimizer.py: step", 0, 40e-3, 1e-3, "python", source=NORM),
        frame(HOSTILE, -1, 12e-3, 12e-3, "annotation"),
        *(frame(f"aten::op_{index}", 5, 0.6e-3, 0.6e-3, "op") for index in range(frames)),
    ]


def memory(points: int = 300) -> list[MemoryPoint]:
    source = random.Random(4)
    return [
        MemoryPoint(
            seconds=index * 1e-3,
            allocated_bytes=int(2e9 + 1.5e9 * abs((index % 100) - 50) / 50 + source.random() * 1e8),
            reserved_bytes=4 * 2**30,
        )
        for index in range(points)
    ]


def roofline() -> list[RooflinePoint]:
    return [
        RooflinePoint(
            op="aten::mm",
            shapes="[2048, 1024] x [1024, 4096]",
            dtype="float32",
            calls_per_step=24,
            seconds_per_step=9.8e-3,
            flops=2 * 2048 * 1024 * 4096,
            bytes=4 * (2048 * 1024 + 1024 * 4096 + 2048 * 4096),
            bound="compute",
            share_of_roof=0.81,
        ),
        RooflinePoint(
            op="aten::add",
            shapes="[2048, 4096]",
            dtype="float32",
            calls_per_step=411,
            seconds_per_step=3.3e-3,
            flops=2048 * 4096,
            bytes=12 * 2048 * 4096,
            bound="memory",
            share_of_roof=1.2,
            note="above the roof: read from cache",
        ),
        RooflinePoint(
            op=HOSTILE,
            shapes="[1]",
            dtype="float32",
            calls_per_step=312,
            seconds_per_step=0.9e-3,
            flops=1,
            bytes=8,
            bound="launch",
        ),
    ]


def analysis(**changes: Any) -> TraceAnalysis:
    fields: dict[str, Any] = {
        "trace": info(),
        "headline": "A step of 92.1 ms loses 6.10 ms to the host, most of it at optimizer.py:88.",
        "findings": findings(),
        "views": {
            "kernel": samples.hotspots(),
            "operator": [Hotspot(name="aten::mm", self_seconds_per_step=9.8e-3, share=0.31, calls_per_step=96.0)],
            "module": [Hotspot(name="nn.Module: Block_3", self_seconds_per_step=8e-3, share=0.25, calls_per_step=40.0)],
        },
        "gaps": LaunchGaps(
            latency_seconds=5.1e-6,
            gap_seconds=1.4e-6,
            gaps_per_step=1300.0,
            idle_in_gaps_seconds_per_step=2.1e-3,
            depth=(31.0, 1020),
        ),
        "idle_sites": [
            IdleSite(cause="host reads", seconds_per_step=4.1e-3, count_per_step=3, op="aten::is_nonzero", source=NORM),
            IdleSite(cause="data loading", seconds_per_step=2.0e-3, count_per_step=1, op=HOSTILE),
        ],
        "fusion": [
            FusionCandidate(
                kernels=[LONG_ADD, HOSTILE, LONG_ADD],
                repeats_per_step=96,
                seconds_per_step=2.4e-3,
                op="RMSNorm",
                saving_seconds_per_step=(0.3e-3, 1.2e-3),
                bytes_saved_per_step=1.6e9,
                source=CLIP,
                basis="gaps and recorded shapes",
            ),
            FusionCandidate(kernels=[LONG_GEMM, LONG_ADD], repeats_per_step=4, seconds_per_step=0.4e-3),
        ],
        "roofline": roofline(),
        "memory": memory(),
        "critical_path": [
            PathPart(kind="kernel", name=LONG_GEMM, seconds_per_step=9.8e-3, count_per_step=96),
            PathPart(kind="host", name=HOSTILE, seconds_per_step=4.1e-3, count_per_step=3, source=NORM),
            PathPart(kind="idle", name="nothing runs", seconds_per_step=1e-3, count_per_step=9),
        ],
        "flame": flame(),
        "whatif": whatif(),
        "line_match": LineMatch(waits_per_step=6.0, matched_per_step=5.0),
    }
    return TraceAnalysis(**(fields | changes))


def info(**changes: Any) -> TraceInfo:
    fields: dict[str, Any] = {
        "file": "/data/runs/h100-train.json.gz",
        "bytes": 5_432_100,
        "events": 130_211,
        "vendor": "nvidia",
        "device": "NVIDIA H100 80GB HBM3",
        "steps": 5,
        "counted_steps": 3,
        "marker": "ProfilerStep",
        "step_seconds": STEP,
        "stacks": True,
        "shapes": True,
        "memory_events": True,
        "notes": ["Two of the steps were not counted, because launches in them have no kernel."],
    }
    return TraceInfo(**(fields | changes))


def timeline() -> list[Span]:
    lines = [NORM, NORM, CLIP, LOSS, None, NORM]
    spans = samples.timeline()
    waits = [span for span in spans if span.kind == "sync"]
    named = dict(zip((span.start_seconds for span in waits), lines, strict=False))
    return [
        msgspec.structs.replace(span, source=named.get(span.start_seconds)) if span.kind == "sync" else span
        for span in spans
    ]


def analyze(**changes: Any) -> AnalyzeRecord:
    here = msgspec.structs.replace(
        samples.environment("cpu"), device=Device(type="cpu", name="cpu"), torch="", triton="", ceilings=None
    )
    assert isinstance(here, Environment)
    fields: dict[str, Any] = {
        "run_id": "20261121-200000-analyze-5a5a",
        "created_utc": "2026-11-21T20:00:00+00:00",
        "command": "kernbench analyze h100-train.json.gz",
        "environment": here,
        "status": "complete",
        "stages": [Stage(name="read", status="done", seconds=0.3)],
        "traces": [info()],
        "step_seconds": [STEP, 1.01 * STEP, 0.99 * STEP],
        "breakdown": samples.breakdown(),
        "hotspots": samples.hotspots(),
        "stalls": samples.stalls()[:4],
        "launches": Launches(per_step=1421.0, kernels_per_step=1380.0, copies_per_step=29.0, memsets_per_step=12.0),
        "idle": samples.profile().idle,
        "timeline": timeline(),
        "analysis": analysis(),
    }
    return AnalyzeRecord(**(fields | changes))


def healthy() -> AnalyzeRecord:
    """A trace in which nothing is wrong, and which recorded neither stacks, shapes nor memory."""
    return analyze(
        run_id="20261121-201000-analyze-600d",
        stalls=[],
        analysis=TraceAnalysis(
            trace=info(),
            headline="Healthy: the device works for 99 % of a step of 92.1 ms.",
            findings=[findings()[-1]],
            whatif=whatif(estimates=[]),
        ),
    )


def ranks() -> AnalyzeRecord:
    """Two ranks, the second one slow; the replay refuses."""
    found = Communication(
        ranks=[
            RankTime(
                rank=0,
                step_seconds=STEP,
                compute_seconds_per_step=60e-3,
                communication_seconds_per_step=20e-3,
                exposed_seconds_per_step=14e-3,
                wait_seconds_per_step=12e-3,
            ),
            RankTime(
                rank=1,
                step_seconds=STEP,
                compute_seconds_per_step=75e-3,
                communication_seconds_per_step=8e-3,
                exposed_seconds_per_step=2e-3,
                wait_seconds_per_step=0.1e-3,
            ),
        ],
        overlap_share=0.3,
        slowest_rank=1,
        lag_seconds_per_step=12e-3,
        collectives={"ncclDevKernel_AllReduce_Sum_f32_RING_LL": 18e-3, HOSTILE: 2e-3},
    )
    return analyze(
        run_id="20261121-202000-analyze-2a2a",
        traces=[info(file="rank0.json.gz", rank=0, world_size=2), info(file="rank1.json.gz", rank=1, world_size=2)],
        analysis=analysis(communication=found, whatif=refused(), flame=[], memory=[]),
    )


def profile() -> ProfileRecord:
    return samples.profile(run_id="20261121-203000-profile-7ace", analysis=analysis(), timeline=timeline())


def difference() -> Difference:
    def change(name: str, kind: Any, calls: Any, device: Any, host: Any, **more: Any) -> OperatorChange:
        return OperatorChange(
            name=name,
            kind=kind,
            calls_per_step=calls,
            device_seconds_per_step=device,
            host_seconds_per_step=host,
            **more,
        )

    return Difference(
        steps=[StepPair(before=3, after=3, before_seconds=92e-3, after_seconds=75e-3)],
        operators=[
            change("aten::mm", "op", (96.0, 96.0), (12e-3, 9e-3), (2e-3, 2e-3), gone=["gemm_old"], new=[LONG_GEMM]),
            change(HOSTILE, "kernel", (0.0, 4.0), (0.0, 1e-3), (0.0, 0.0)),
            change("aten::item", "op", (6.0, 1.0), (0.0, 0.0), (4e-3, 1e-3)),
            *(change(f"aten::op_{n}", "op", (1.0, 1.0), (2e-6, 1e-6), (0.0, 0.0)) for n in range(20)),
        ],
        same=41,
        parting="operator 17 of the step is aten::item before and aten::add after",
        idle_seconds_per_step={"host reads": (17e-3, 2e-3), "launch": (1e-3, 1.2e-3)},
    )


def comparison() -> CompareRecord:
    found = samples.comparison()
    found.run_id = "20261121-204000-compare-d1ff"
    found.difference = difference()
    return found


def all_kinds() -> dict[str, Any]:
    return {
        "comparison-traced": comparison(),
        "analyze": analyze(),
        "analyze-healthy": healthy(),
        "analyze-ranks": ranks(),
        "profile-traced": profile(),
    }
