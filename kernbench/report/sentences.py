"""What a record says in words: the verdict sentence of each kind and the names that reports give to causes and classes.

Shared by the HTML report and the terminal. Nothing is measured or decided here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from kernbench.record import (
    AnalyzeRecord,
    BenchRecord,
    BenchResult,
    Build,
    CompareRecord,
    Floor,
    Header,
    ParityRecord,
    ParityResult,
    ProfileRecord,
    Ratio,
    Record,
    SanitizerResult,
    SourceLine,
    Stall,
    SwapRecord,
    WorkloadInfo,
    kind,
)
from kernbench.report import tracewords, units

Tone = Literal["good", "bad", "neutral", "warn"]

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

STATUSES: Mapping[str, tuple[str, Tone]] = {
    "complete": ("complete", "neutral"),
    "running": ("not finished", "warn"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
}

NOT_MEASURED = "not measured here"
"""The label of a row that has no time for want of a device, and not because something failed."""

KINDS: Mapping[str, str] = {
    "profile": "Profile",
    "swap": "Swap",
    "parity": "Parity",
    "bench": "Bench",
    "compare": "Comparison",
    "analyze": "Trace analysis",
}


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
            tools = sanitizer_clause(record.sanitizer)
            compared = parity_headline(record.results, record) if record.results or not tools else ""
            return f"{compared} {tools}".strip()
        case BenchRecord():
            return bench_headline(record)
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
        return f"{decision}: {title}. {capitalized(_sentence(why))}"
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


def parity_headline(results: Sequence[ParityResult], record: Header | None = None) -> str:
    """How many comparisons agree, and how many planted errors were caught."""
    if not results:
        return unfinished(record, "Nothing was compared") if record else "nothing was compared"
    failed = [result for result in results if not result.passed]
    killed, planted = mutants(results)
    caught = f"; {killed:,} of {planted:,} planted errors were caught" if planted else ""
    total = f"{len(results):,} comparison{'s' if len(results) != 1 else ''}"
    if not failed:
        agree = "agrees" if len(results) == 1 else "agree"
        return f"{'The' if len(results) == 1 else 'All'} {total} {agree} with the float64 oracle{caught}."
    first = failed[0]
    where = ", ".join(part for part in (first.kernel, first.case, first.dtype, first.mode) if part)
    reason = f": {first.reason}" if first.reason else ""
    return _sentence(f"{len(failed):,} of {total} failed, the first one {where}{reason}{caught}")


def mutants(results: Sequence[ParityResult]) -> tuple[int, int]:
    """Planted errors caught and planted, over all rows."""
    rows = [result.mutants_killed for result in results if result.mutants_killed]
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


def sanitizer_clause(results: Sequence[SanitizerResult]) -> str:
    """What compute-sanitizer adds to the headline of parity; empty where it did not run."""
    if not results:
        return ""
    tools = " and ".join(dict.fromkeys(result.tool for result in results))
    failed = [result for result in results if not result.passed]
    if not failed:
        return f"{tools}: no findings in {len(results)} run{'s' if len(results) != 1 else ''}."
    first = failed[0]
    what = first.reason or next(iter(first.findings), f"{first.errors} errors")
    return _sentence(f"{tools}: {len(failed)} of {len(results)} runs failed, the first one {first.kernel}: {what}")


def builds_headline(builds: Sequence[Build]) -> str:
    """Whether every kernel compiles for every architecture, and if not, which one fails first and why."""
    failed = [build for build in builds if not build.passed]
    kernels = len({build.kernel for build in builds})
    archs = ", ".join(dict.fromkeys(build.arch for build in builds))
    total = f"{len(builds):,} build{'s' if len(builds) != 1 else ''} of {kernels} kernel{'s' if kernels != 1 else ''}"
    if not failed:
        return f"{total} for {archs}: all fit."
    first = failed[0]
    return _sentence(
        f"{len(failed):,} of {total} for {archs} failed, the first one {first.kernel}, {first.function} for "
        f"{first.arch}: {first.reason}"
    )


def noise_floor(rows: Sequence[BenchResult]) -> float | None:
    """The A/A floor of rows that were timed together, None where none was measured."""
    return max((row.noise_floor for row in rows if row.noise_floor is not None), default=None)


def bench_headline(record: BenchRecord) -> str:
    """Which implementation is fastest where, and how far ahead: of the next best, or of a workload's baseline."""
    groups = bench_groups(record.results)
    if not groups:
        return builds_headline(record.builds) if record.builds else unfinished(record, "Nothing was timed")
    leads: dict[str, list[float]] = {}
    for rows in groups.values():
        best = fastest(rows)
        if best is not None and best.seconds:
            if record.workload:
                # Paired by round, as the row shows it.
                ahead = best.speedup[0] if best.speedup else 1.0
            else:
                rival = fastest([row for row in rows if row is not best])
                ahead = (rival.seconds or 0.0) / best.seconds if rival else 1.0
            # What eager against itself shows too is no lead.
            leads.setdefault(best.implementation, []).append(ahead if ahead > 1 + (noise_floor(rows) or 0.0) else 1.0)
    if not leads:
        return unfinished(record, "No case was timed")
    cases = len(groups) - sum(map(len, not_measured(groups).values()))
    text = ". ".join(_lead(name, ahead, cases, record) for name, ahead in leads.items())
    timed = {row.implementation for row in record.results if row.seconds is not None}
    unmeasured = sorted({row.implementation for row in record.results if row.label == NOT_MEASURED} - timed)
    return f"{text}{'; ' + ' and '.join(unmeasured) + ' not measured here' if unmeasured else ''}."


def _lead(name: str, ahead: Sequence[float], cases: int, record: BenchRecord) -> str:
    where = "" if cases == 1 else f" in {len(ahead)} of {cases} cases"
    text = f"Fastest{where}: {name}"
    rival = record.results[0].implementation if record.workload else "the next best"
    if max(ahead) <= 1:
        return text
    low, high = units.times(min(ahead)), units.times(max(ahead))
    return f"{text}, {low if low == high else f'{low} to {high}'} as fast as {rival}"


def bench_groups(results: Sequence[BenchResult]) -> dict[str, list[BenchResult]]:
    """Rows that may be compared with each other, by title: one kernel, case, dtype, direction, and way of timing.

    A row without a time, of which no way of timing is known, stands with the first that was timed.
    """
    groups: dict[str, list[BenchResult]] = {}
    for result in results:
        backward = "backward" if result.direction == "backward" else ""
        title = ", ".join(part for part in (result.kernel, result.case, result.dtype, backward) if part)
        whole = f"{title}: {result.cache}" if result.cache else title
        if result.seconds is None and not result.cache:
            whole = next((known for known in groups if known.startswith(f"{title}: ")), title)
        groups.setdefault(whole, []).append(result)
    return groups


def not_measured(groups: Mapping[str, Sequence[BenchResult]]) -> dict[str, list[str]]:
    """Titles of the groups of which nothing could be measured here, by the reason: they need no table."""
    found: dict[str, list[str]] = {}
    for title, rows in groups.items():
        if all(row.label == NOT_MEASURED and row.seconds is None for row in rows):
            found.setdefault(rows[0].note, []).append(title)
    return found


def fastest(rows: Sequence[BenchResult]) -> BenchResult | None:
    """The row with the least time; figures marked impossible or wrong do not win."""
    timed = [row for row in rows if row.seconds is not None and row.label not in ("impossible", "wrong")]
    return min(timed, key=lambda row: row.seconds or 0.0, default=None)


def floor_in_words(floor: Floor) -> str:
    """What a step has to move, what that takes at least, and how close the step comes or why that is not stated."""
    share = f": the step runs at {units.share(floor.share)} of that speed" if floor.share is not None else ""
    return f"{_least(floor)}{share}{f'; {floor.note}' if floor.note else ''}"


def floors_in_words(rows: Sequence[BenchResult]) -> list[str]:
    """What the steps of several rows have to move, and whose share is to be doubted or not stated, and why."""
    least: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.floor is not None:
            least.setdefault(_least(row.floor), []).append(row.implementation)
            if row.floor.note:
                notes.setdefault(row.floor.note, []).append(row.implementation)
    told = [text if len(least) == 1 else f"{text} ({', '.join(names)})" for text, names in least.items()]
    return told + [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _least(floor: Floor) -> str:
    text = f"{units.moved(floor.bytes_per_step)} a step"
    if floor.seconds is None:
        return text
    return f"{text}, at least {units.seconds(floor.seconds)} at the measured copy bandwidth"


def bench_rate(row: BenchResult, workload: WorkloadInfo | None) -> str:
    """The one rate that tells most of a timed row: throughput, else bandwidth, else arithmetic."""
    if row.units_per_second is not None:
        return units.units_rate(row.units_per_second, workload.unit if workload else "units")
    if row.bytes_per_second is not None:
        return units.bytes_rate(row.bytes_per_second)
    return units.flops_rate(row.flops_per_second) if row.flops_per_second is not None else ""


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


def ending(record: Header) -> str:
    """How a run that is not complete ended: "the run was interrupted in stage trace"; empty for a complete one."""
    if record.status == "complete":
        return ""
    ended = next((stage for stage in record.stages if stage.status in ("failed", "interrupted")), None)
    if ended is None:
        return f"the run is {STATUSES.get(record.status, (record.status, 'neutral'))[0]}"
    outcome = "failed" if ended.status == "failed" else "was interrupted"
    return f"the run {outcome} in stage {ended.name}{f': {ended.message}' if ended.message else ''}"


def unfinished(record: Header, what: str) -> str:
    """A sentence for a run without its result: what is missing, and how the run ended."""
    how = ending(record)
    return _sentence(f"{what}; {how}" if how else what)


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
    relative = f" ({units.share(size / before)})" if before > 0 else ""
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


def evidence_apart(sentence: str) -> list[tuple[str, bool]]:
    """A sentence in pieces for a page: bracketed ones marked True, to be set lighter; figures keep their unit."""
    unbroken = re.sub(r"(?<=\d) (?=(?:s|ms|µs|ns|%)(?!\w))", "\N{NO-BREAK SPACE}", sentence).replace(
        "–", "–\N{WORD JOINER}"
    )
    pieces = re.split(r"(\([^()]*\))", unbroken)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def lede(record: Record) -> str:
    """What the trace says of a profile, below the sentence on its time; empty where that says it all."""
    return record.analysis.headline if isinstance(record, ProfileRecord) and record.analysis else ""


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


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def capitalized(text: str) -> str:
    """The text with its first letter capital, the rest as it stands."""
    return text[:1].upper() + text[1:]
