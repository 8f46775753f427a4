"""What the analysis of a trace says in words, for the page and the terminal alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from kernbench.record import (
    AnalyzeRecord,
    Communication,
    Estimate,
    Finding,
    FusionCandidate,
    LaunchGaps,
    LineMatch,
    MemoryPoint,
    Ranks,
    RooflinePoint,
    SourceLine,
    TraceAnalysis,
    TraceInfo,
    WhatIf,
)
from kernbench.report import units

VENDORS: Mapping[str, str] = {"nvidia": "NVIDIA", "amd": "AMD", "cpu": "CPU only"}

BOUNDS: Mapping[str, str] = {
    "compute": "arithmetic",
    "memory": "memory",
    "launch": "launch",
    "unknown": "not told",
}

PATH_KINDS: Mapping[str, str] = {
    "host": "host work",
    "kernel": "kernel",
    "copy": "copy",
    "launch": "launch",
    "sync": "host wait",
    "communication": "communication",
    "idle": "nothing runs",
}

VIEWS: Mapping[str, str] = {
    "kernel": "kernel",
    "operator": "operator",
    "module": "module",
    "line": "source line",
    "shape": "shape",
}

DEFERRED = "the value steers the host, so the read can be put off, not deleted"


def headline(record: AnalyzeRecord) -> str:
    """The verdict on a trace; where the analysis gives none, how long a step takes."""
    if record.analysis is not None and record.analysis.headline:
        return record.analysis.headline
    if record.step_seconds:
        count = len(record.step_seconds)
        steps = "1 step" if count == 1 else f"mean of {count:,} steps"
        return f"A step takes {units.seconds(fmean(record.step_seconds))} ({steps})."
    return ""


def first_sentence(text: str) -> tuple[str, str]:
    """A text's first sentence, for a headline, and the rest."""
    found = re.match(r"(.+?[.!?])\s+(?=[A-Z0-9])(.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "")


def faults(analysis: TraceAnalysis | None) -> list[Finding]:
    """The findings that something can be done about; a device that is busy is none."""
    return [] if analysis is None else [found for found in analysis.findings if found.cause != "device-bound"]


def place(source: SourceLine | None) -> str:
    """A source line as its file and line: "train.py:52"; empty where none is known."""
    if source is None or not source.file:
        return ""
    return f"{source.file.rsplit('/', 1)[-1]}:{source.line}" if source.line else source.file.rsplit("/", 1)[-1]


def at_most(finding: Finding) -> str:
    """What a finding costs: "up to 4.10 ms a step, 12 %"."""
    return f"up to {units.seconds(finding.seconds_per_step)} a step, {units.share(finding.share)}"


def replay_error(whatif: WhatIf) -> str:
    """How well the replay tells what happened, which comes before what it tells of what might have."""
    if whatif.replayed_seconds is None or whatif.error is None:
        return capitalized_sentence(whatif.refused)
    size = units.share(abs(whatif.error))
    sign = "" if abs(whatif.error) < 0.001 else "+" if whatif.error > 0 else "−"
    text = (
        f"Replayed unchanged, a step takes {units.seconds(whatif.replayed_seconds)}; the trace says "
        f"{units.seconds(whatif.step_seconds)}: {sign}{size} off, the limit is {units.share(whatif.limit)}."
    )
    return " ".join(filter(None, (text, capitalized_sentence(whatif.refused), host_scale(whatif))))


def host_scale(whatif: WhatIf) -> str:
    """What the estimates are of, where the step without the profiler is known: profiling slows the host down."""
    if whatif.refused or whatif.baseline_seconds is None or abs(whatif.host_scale - 1) < 0.005:
        return ""
    return (
        f"Savings are of the unprofiled step of {units.seconds(whatif.baseline_seconds)}, for which host time is taken "
        f"times {whatif.host_scale:.2f}."
    )


def saving(low_high: tuple[float, float] | None) -> str:
    """A range of saved time, as one figure where both ends read the same: "3.10–3.40 ms"."""
    if low_high is None:
        return ""
    low, high = low_high
    one = units.seconds(high)
    return one if units.seconds(low) == one else units.seconds_range(low, high)


def estimate_note(estimate: Estimate) -> str:
    """What is to be known about an estimate before it is believed."""
    return estimate.note or (DEFERRED if estimate.deferred else "")


def gaps(found: LaunchGaps) -> str:
    """How far the host runs ahead of the device, in one sentence; what was not found is left out."""
    parts = []
    if found.latency_seconds is not None:
        parts.append(f"a launch takes {units.seconds(found.latency_seconds)} to reach an idle device")
    if found.gaps_per_step:
        median = f", {units.seconds(found.gap_seconds)} each at the median" if found.gap_seconds is not None else ""
        parts.append(
            f"{_many(found.gaps_per_step, 'gap')} between kernels a step{median}, "
            f"{units.seconds(found.idle_in_gaps_seconds_per_step)} in all"
        )
    if found.depth is not None:
        parts.append(f"{units.count(found.depth[0])} launched and unfinished at the median, {found.depth[1]:,} at most")
    if found.graph_launches_per_step:
        parts.append(f"{_many(found.graph_launches_per_step, 'graph launch', 'es')} a step")
    return capitalized_sentence("; ".join(parts))


def line_match(match: LineMatch) -> str:
    """How many waits of the timed pass have a line from the other one."""
    if not match.waits_per_step:
        return ""
    rate = match.matched_per_step / match.waits_per_step
    return (
        f"{units.count(match.matched_per_step)} of {units.count(match.waits_per_step)} waits a step have their line "
        f"({units.share(rate)})."
    )


def fusion_name(candidate: FusionCandidate) -> str:
    """What would be fused: the user's operator where one is known, else how many kernels."""
    return candidate.op or f"{len(candidate.kernels)} kernels"


def roofline_rates(point: RooflinePoint) -> tuple[str, str]:
    """What a point achieved in arithmetic and in bytes; empty where its shapes do not tell."""
    if point.seconds_per_step <= 0:
        return "", ""
    calls = point.calls_per_step / point.seconds_per_step
    return (
        units.flops_rate(point.flops * calls) if point.flops else "",
        units.bytes_rate(point.bytes * calls) if point.bytes else "",
    )


def ranks(found: Communication) -> str:
    """Who waits for whom, and how much of the communication is hidden behind other work."""
    parts = []
    if found.slowest_rank is not None:
        lag = f" for {units.seconds(found.lag_seconds_per_step)} a step" if found.lag_seconds_per_step else ""
        parts.append(f"The others wait for rank {found.slowest_rank}{lag}")
    if found.overlap_share is not None:
        parts.append(f"{units.share(found.overlap_share)} of the communication runs beside other work")
    return capitalized_sentence("; ".join(parts))


def sides(found: Ranks) -> str:
    """How many ranks there were, and the step of each without a profiler."""
    count = len(found.sides)
    steps = ", ".join(f"rank {one.rank} {units.seconds(one.step_seconds)}" for one in found.sides)
    return f"{count} rank{'' if count == 1 else 's'} with {found.backend}, throughput of all together; a step: {steps}"


def collective_rows(found: Communication) -> list[tuple[str, str]]:
    """Time in each kind of collective, as rows of name and text."""
    return [(name, f"{units.seconds(seconds)} a step") for name, seconds in found.collectives.items()]


def memory_peak(points: Sequence[MemoryPoint]) -> str:
    """The most that was allocated, and the most that was reserved for it."""
    allocated, reserved = max(p.allocated_bytes for p in points), max(p.reserved_bytes for p in points)
    held = f", {units.size(reserved)} reserved" if reserved > 0 else ""
    return f"At most {units.size(allocated)} allocated{held}."


def trace_name(info: TraceInfo) -> str:
    """A trace file without its folders."""
    return info.file.rsplit("/", 1)[-1]


def trace_facts(info: TraceInfo) -> list[tuple[str, str]]:
    """What a trace file holds, as rows of name and text; what it does not tell is left out."""
    rank = "" if info.rank is None else f"{info.rank}" + (f" of {info.world_size}" if info.world_size else "")
    marked = f"{info.steps:,}, marked by {info.marker}" if info.marker else "not marked: the whole trace is one step"
    if info.marker and info.counted_steps != info.steps:
        marked += f", {info.counted_steps:,} counted"
    recorded = [
        name
        for name, held in (
            ("stacks", info.stacks),
            ("shapes", info.shapes),
            ("synchronisation events", info.sync_events),
            ("memory events", info.memory_events),
        )
        if held
    ]
    rows = [
        ("file", trace_name(info)),
        ("size", units.size(info.bytes)),
        ("events", f"{info.events:,}"),
        ("device", info.device),
        ("vendor", VENDORS.get(info.vendor, "")),
        ("rank", rank),
        ("steps", marked),
        ("step", units.seconds(info.step_seconds) if info.step_seconds else ""),
        ("recorded", ", ".join(recorded) or "neither stacks nor shapes"),
        ("launches without a kernel", f"{info.lost_launches:,}" if info.lost_launches else ""),
    ]
    return [(name, text) for name, text in rows if text]


def capitalized_sentence(text: str) -> str:
    """The text as a sentence: a capital first, a stop last; nothing stays nothing."""
    if not text:
        return ""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _many(count: float, noun: str, plural: str = "s") -> str:
    return f"{units.count(count)} {noun}{'' if count == 1 else plural}"
