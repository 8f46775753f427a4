"""What a record says in words: the verdict sentence of each kind and the names that reports give to causes and classes.

Shared by the HTML report and the terminal. Nothing is measured or decided here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from kernbench.record import (
    AnalyzeRecord,
    BenchRecord,
    CompareRecord,
    ParityRecord,
    ProfileRecord,
    Ratio,
    Record,
    SourceLine,
    Stall,
    SwapRecord,
    WorkloadInfo,
    kind,
)
from kernbench.report import benchwords, paritywords, tracewords, units
from kernbench.report.phrases import Tone, capitalized, sentence, unfinished

STALL_CLASSES: Mapping[str, str] = {
    "free": "free: nothing waited",
    "starved": "starved: the device had run dry before it",
    "busy": "waits on a busy device",
    "drain": "drains the device",
    "unclassified": "waits for the device",
    "would-sync": "would sync on a GPU",
    "cpu-tensor": "reads a host tensor: no stall",
}

DECISIONS: Mapping[str, tuple[str, Tone]] = {
    "keep": ("Kept", "good"),
    "reject": ("Rejected", "bad"),
    "inconclusive": ("Inconclusive", "warn"),
}

KINDS: Mapping[str, str] = {
    "profile": "Profile",
    "swap": "Swap",
    "parity": "Parity",
    "bench": "Bench",
    "compare": "Comparison",
    "analyze": "Trace analysis",
}


DISTORTED = 2.0
"""From here on a traced step is so much longer than it is without that it waits for other things."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: median over ``count`` unprofiled steps, and its interval where the record has one."""

    seconds: float
    interval: tuple[float, float] | None
    count: int


def step_time(record: ProfileRecord | None) -> StepTime | None:
    """The step's time as the record's throughput states it; None where no step was timed."""
    if record is None or record.steps is None or not record.steps.seconds:
        return None
    steps, throughput = record.steps, record.throughput
    if throughput is None or throughput.units_per_second <= 0 or throughput.interval[0] <= 0:
        return StepTime(median(steps.seconds), None, len(steps.seconds))
    slow, fast = throughput.interval
    return StepTime(
        steps.units_per_step / throughput.units_per_second,
        (steps.units_per_step / fast, steps.units_per_step / slow),
        len(steps.seconds),
    )


def waiting(stalls: Sequence[Stall]) -> list[Stall]:
    """The stalls at which a host waits, or would on a GPU, as they are ordered in the record."""
    return [stall for stall in stalls if stall.klass != "cpu-tensor"]


def place(where: Stall | SourceLine) -> str:
    """A source line, short enough for a sentence: "optimizer.py:88"."""
    return f"{where.file.rsplit('/', 1)[-1]}:{where.line}"


def stall_class(stall: Stall) -> str:
    """A stall's class in words."""
    return STALL_CLASSES.get(stall.klass, stall.klass)


def headline(record: Record) -> str:
    """The one sentence that answers the run, whatever its kind and however far it came."""
    match record:
        case ProfileRecord():
            return profile_headline(record)
        case SwapRecord():
            return swap_headline(record)
        case ParityRecord():
            tools = paritywords.sanitizer_clause(record.sanitizer)
            compared = paritywords.parity_headline(record.results, record) if record.results or not tools else ""
            return f"{compared} {tools}".strip()
        case BenchRecord():
            return benchwords.bench_headline(record)
        case CompareRecord():
            return compare_headline(record)
        case AnalyzeRecord():
            return tracewords.headline(record) or unfinished(record, "The trace was not analysed")


def profile_headline(record: ProfileRecord) -> str:
    """ "A step takes 92.1 ms (median of 20 steps, …); 6 host reads a step would make a GPU wait, 4 of them at …"."""
    time = step_time(record)
    if time is None:
        return unfinished(record, "No step was timed")
    interval = (
        f", {units.interval_name(record.confidence)} {units.seconds_range(*time.interval)}" if time.interval else ""
    )
    steps = "1 step" if time.count == 1 else f"median of {time.count:,} steps"
    return f"A step takes {units.seconds(time.seconds)} ({steps}{interval}); {stall_clause(record)}."


def stall_clause(record: ProfileRecord) -> str:
    """How many host reads make the host wait, and where most of them stand."""
    stage = next((stage for stage in record.stages if stage.name.endswith("lines")), None)
    if record.syncs_per_step is None and not record.stalls:
        return "host reads were not watched" if stage is None or stage.status != "done" else "no host read was seen"
    stalls = waiting(record.stalls)
    total = record.syncs_per_step
    if total is None:
        total = sum(stall.count_per_step for stall in stalls)
    if total == 0:
        return "no host reads: nothing makes the host wait"
    on_gpu = record.environment.device.type == "cuda"
    reads = "1 host read" if total == 1 else f"{units.count(total)} host reads"
    verb = ("makes" if total == 1 else "make") if on_gpu else "would make"
    clause = f"{reads} a step {verb} {'the host' if on_gpu else 'a GPU'} wait"
    if not stalls:
        return clause
    top = max(stalls, key=lambda stall: stall.count_per_step)
    if top.count_per_step >= total:
        return f"{clause}, at {place(top)}"
    return f"{clause}, {units.count(top.count_per_step)} of them at {place(top)}"


def swap_headline(record: SwapRecord) -> str:
    """Decision, phase, before → after, interval and rounds."""
    title = f"phase {record.phase.number}, {record.phase.title}"
    if record.verdict is None:
        return unfinished(record, f"No verdict on {title}")
    decision = DECISIONS.get(record.verdict.decision, (record.verdict.decision, "neutral"))[0]
    if record.ratio is None:
        why = record.verdict.sentence.removeprefix(f"{record.verdict.decision}: ")
        return f"{decision}: {title}. {capitalized(sentence(why))}"
    sides = before_after_seconds(record)
    step = f"a step goes from {units.seconds(sides[0])} to {units.seconds(sides[1])}, " if sides else ""
    evidence = ratio_evidence(record.ratio, record.confidence)
    return f"{decision}: {title}. {capitalized(step + change(record.ratio))} ({evidence})."


def before_after_seconds(record: SwapRecord) -> tuple[float, float] | None:
    """Median step of the interleaved arms; where no race was run, of the two profiles; else None."""
    before, after = raced_arms(record)
    if before and after:
        return median(before), median(after)
    sides = step_time(record.before), step_time(record.after)
    return (sides[0].seconds, sides[1].seconds) if sides[0] and sides[1] else None


def raced_arms(record: SwapRecord) -> tuple[list[float], list[float]]:
    """Seconds per round of the arm before and of the chosen arm after; empty lists where there was no race."""
    arms = {arm.name: arm.seconds for arm in record.arms}
    after = arms.get(f"after {record.phase.implementation}", arms.get("after", []))
    return arms.get("before", []), after


def other_arms(record: SwapRecord) -> list[tuple[str, float]]:
    """Implementations that were raced but not chosen, with their median step."""
    chosen = f"after {record.phase.implementation}"
    others = [arm for arm in record.arms if arm.seconds and arm.name.startswith("after ") and arm.name != chosen]
    return [(arm.name.removeprefix("after "), median(arm.seconds)) for arm in others]


def change(ratio: Ratio) -> str:
    """A ratio in words, by the rule of evidence: the interval excludes 1 and the effect exceeds the A/A floor."""
    if not changed(ratio):
        return "no change shown"
    return units.faster(ratio.median)


def changed(ratio: Ratio | None) -> bool:
    """Whether a ratio shows a change rather than noise; no ratio shows none."""
    if ratio is None:
        return False
    excludes_one = ratio.low > 1 or ratio.high < 1
    return excludes_one and abs(ratio.median - 1) > ratio.noise_floor


def ratio_tone(ratio: Ratio) -> Tone:
    """Good for a shown gain, bad for a shown loss, neutral else."""
    if not changed(ratio):
        return "neutral"
    return "good" if ratio.median > 1 else "bad"


def ratio_evidence(ratio: Ratio, confidence: float) -> str:
    """Interval, rounds and floor of a ratio, for brackets; the ratio itself where ``change`` does not name it."""
    median_ratio = "" if changed(ratio) and ratio.median > 1 else f"before/after {units.times(ratio.median)}, "
    floor = f", A/A floor {units.floor(ratio.noise_floor)}" if ratio.noise_floor else ""
    interval = f"{units.interval_name(confidence)} {units.times_range(ratio.low, ratio.high)}"
    return f"{median_ratio}{interval}, n = {ratio.rounds}{floor}"


def compare_headline(record: CompareRecord) -> str:
    """Before → after of two runs, and what separate runs can show."""
    before, after = step_time(record.before), step_time(record.after)
    if before is None or after is None:
        return "One of the two runs timed no step, so they cannot be compared."
    text = f"A step goes from {units.seconds(before.seconds)} to {units.seconds(after.seconds)}"
    if record.ratio is not None:
        text += f", {change(record.ratio)} ({ratio_evidence(record.ratio, record.confidence)})"
    reads = record.before.syncs_per_step, record.after.syncs_per_step
    if reads[0] is not None and reads[1] is not None and reads[0] != reads[1]:
        text += f"; host reads go from {units.count(reads[0])} to {units.count(reads[1])} a step"
    return f"{text}."


def difference(before: float | None, after: float | None, unit: str) -> tuple[str, Tone]:
    """A signed change in words: ("▼ 17.2 ms less (19 %)", "good").

    Args:
        unit: "seconds", "bytes" or "count", where less is better; any other one is a rate, where more is.
    """
    if before is None or after is None:
        return "", "neutral"
    if before == after:
        return "the same", "neutral"
    size, less = abs(after - before), after < before
    shown = {"seconds": units.seconds, "bytes": units.size, "count": units.count}.get(unit)
    amount = shown(size) if shown else f"{units.number(size)} {unit}"
    # Percentages beyond ten times as much are hard to read.
    factor = units.times(after / before) if before > 0 and after > 10 * before else ""
    relative = f" ({factor or units.share(size / before)})" if before > 0 else ""
    word = ("fewer" if unit == "count" else "less") if less else "more"
    return f"{'▼' if less else '▲'} {amount} {word}{relative}", "good" if less == (shown is not None) else "bad"


def phases_in_words(workload: WorkloadInfo) -> str:
    """Which phases are in place: "phases 0, 1 (triton)" or "no phase"."""
    if not workload.phases:
        return "no phase"
    named = []
    for number in workload.phases:
        implementation = workload.implementations.get(str(number), "")
        named.append(f"{number} ({implementation})" if implementation else str(number))
    return f"phase{'s' if len(named) > 1 else ''} {', '.join(named)}"


def evidence_apart(text: str) -> list[tuple[str, bool]]:
    """A sentence in pieces for a page: bracketed ones marked True, to be set lighter; figures keep their unit."""
    unbroken = re.sub(r"(?<=\d) (?=(?:s|ms|µs|ns|%)(?!\w))", "\N{NO-BREAK SPACE}", text).replace(
        "–", "–\N{WORD JOINER}"
    )
    pieces = re.split(r"(\([^()]*\))", unbroken)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def lede(record: Record) -> str:
    """What the trace says of a profile, below the sentence on its time; empty where that says it all.

    A step that tracing makes much longer waits for other things while it is traced.
    """
    if not isinstance(record, ProfileRecord) or record.analysis is None or not record.analysis.headline:
        return ""
    ratio = record.overhead.trace_ratio if record.overhead is not None else None
    if ratio is None or ratio < DISTORTED:
        return record.analysis.headline
    return (
        f"Tracing makes this step {units.times(ratio)} as long, so what follows is true of the traced step and may "
        f"not be of the step itself. {record.analysis.headline}"
    )


def on_gpu(record: Record) -> bool:
    """Whether the steps that a record tells of ran on a GPU."""
    if isinstance(record, AnalyzeRecord):
        return record.idle is not None or any(info.vendor in ("nvidia", "amd") for info in record.traces)
    return record.environment.device.type == "cuda"


def devices(record: Record) -> list[str]:
    """The devices that the steps ran on, each named once; an analyzed trace may not tell."""
    if isinstance(record, AnalyzeRecord):
        told = [info.device or tracewords.VENDORS.get(info.vendor, "") for info in record.traces]
        return list(dict.fromkeys(filter(None, told)))
    return [record.environment.device.name]


def kind_in_words(record: Record) -> str:
    """The kind of a record as a title: "Profile"."""
    name = kind(record)
    return KINDS.get(name, name)


def workload_of(record: Record) -> WorkloadInfo | None:
    """The workload that a record is about, if it is about one."""
    match record:
        case CompareRecord():
            return record.after.workload
        case AnalyzeRecord():
            return None
        case _:
            return record.workload
