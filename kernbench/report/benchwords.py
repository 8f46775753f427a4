"""What a bench says in words: which implementation is fastest and how far ahead, floors, rates, and builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernbench.record import BenchRecord, BenchResult, Build, Floor, WorkloadInfo
from kernbench.report import units
from kernbench.report.phrases import sentence, unfinished

NOT_MEASURED = "not measured here"
"""The label of a row that has no time for want of a device, and not because something failed."""
MEMORY_NOTE = (
    "The most that a call holds at one time beside what it is given; of a backward, with the forward before it."
)


def builds_headline(builds: Sequence[Build]) -> str:
    """Whether every kernel compiles for every architecture, and if not, which one fails first and why."""
    failed = [build for build in builds if not build.passed]
    kernels = len({build.kernel for build in builds})
    archs = ", ".join(dict.fromkeys(build.arch for build in builds))
    total = f"{len(builds):,} build{'s' if len(builds) != 1 else ''} of {kernels} kernel{'s' if kernels != 1 else ''}"
    if not failed:
        return f"{total} for {archs}: all fit."
    first = failed[0]
    return sentence(
        f"{len(failed):,} of {total} for {archs} failed, the first one {first.kernel}, {first.function} for "
        f"{first.arch}: {first.reason}"
    )


def noise_floor(rows: Sequence[BenchResult]) -> float | None:
    """The A/A floor of rows that were timed together, None where none was measured."""
    return max((row.noise_floor for row in rows if row.noise_floor is not None), default=None)


def remark(row: BenchResult) -> str:
    """What is wrong with a row, or to be known of it: its label and its note."""
    return ": ".join(filter(None, (row.label, row.note)))


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
