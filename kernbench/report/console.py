"""What a person reads in the terminal on standard output; progress is told by ``bars``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from kernbench.record import (
    AnalyzeRecord,
    BenchRecord,
    BenchResult,
    Build,
    CompareRecord,
    Environment,
    ParityRecord,
    ParityResult,
    ProfileRecord,
    Ratio,
    Record,
    SanitizerResult,
    SwapRecord,
)
from kernbench.report import (
    benchwords,
    curveplot,
    machine,
    page,
    paritywords,
    phrases,
    sentences,
    stepconsole,
    sweepplot,
    terminal,
    tracewords,
    units,
)
from kernbench.report.terminal import STYLES

TOP_FAILURES = 8


def show(record: Record, report: Path | None) -> None:
    """Print a record's summary, its warnings, and last where the report lies."""
    console = terminal.output()
    console.print(terminal.text(sentences.headline(record), "bold"))
    if lede := sentences.lede(record):
        console.print(terminal.text(lede))
    for block in _body(record):
        console.print()
        console.print(block)
    console.print()
    for warning in filter(None, [phrases.ending(record), *record.warnings]):
        console.print(terminal.text("warning: ", "yellow").append_text(terminal.text(warning)))
    if report is not None:
        console.print(terminal.text(f"report: {report}"), soft_wrap=True)


def show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the runs on disk, as ``catalogue.runs`` lists them."""
    if not runs:
        terminal.output().print("no runs yet; start with: kernbench profile WORKLOAD")
        return
    table = terminal.table("run", "of", "kind", "date", "status")
    for run in runs:
        damaged = run["kind"] == "damaged"
        style = "red" if damaged else "" if run["status"] == "complete" else "yellow"
        date = units.moment(str(run.get("created_utc", "")))
        table.add_row(
            *map(terminal.text, (run["run"], run["group"], run["kind"], date)), terminal.text(run["status"], style)
        )
    terminal.output().print(table)


def show_declarations(listing: Mapping[str, Any]) -> None:
    """Print workloads, kernels and what is kept, as ``catalogue.declarations`` lists them."""
    console = terminal.output()
    for workload in listing["workloads"]:
        console.print(
            terminal.text(workload["name"], "bold").append_text(terminal.text(f"  {workload['summary']}", "not bold"))
        )
        console.print(terminal.text(f"  presets: {', '.join(workload['presets'])}; counts {workload['unit']}"))
        for phase in workload["phases"]:
            flag = f"  {phase['flag']}=1" if phase["flag"] else ""
            line = terminal.text(f"  phase {phase['number']}: {phase['title']}{flag}")
            console.print(
                line.append_text(terminal.text(f"  kept ({phase['kept']})", "green")) if phase["kept"] else line
            )
    if listing["kernels"]:
        table = terminal.table("kernel", "cases", "dtypes")
        for kernel in listing["kernels"]:
            table.add_row(
                *map(terminal.text, (kernel["name"], ", ".join(kernel["cases"]), ", ".join(kernel["dtypes"])))
            )
        console.print(table)
    console.print(terminal.text(f"workspace: {listing['workspace']}"), soft_wrap=True)


def show_journal(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the journal's headings with their verdicts."""
    if not entries:
        terminal.output().print("the journal is empty; kernbench swap --phase N writes an entry")
        return
    table = terminal.table("date", "entry", "verdict", "run")
    for entry in entries:
        tone = sentences.DECISIONS.get(entry["verdict"], ("", "neutral"))[1]
        verdict = terminal.text(entry["verdict"], STYLES[tone])
        table.add_row(
            terminal.text(entry["date"]), terminal.text(entry["title"]), verdict, terminal.text(entry["run_id"])
        )
    terminal.output().print(table)


def show_doctor(findings: Mapping[str, Any]) -> None:
    """Print device, versions, what works here, and the ceilings, as ``pipeline.doctor`` found them."""
    console = terminal.output()
    environment = msgspec.convert(findings["environment"], Environment)
    console.print(terminal.facts(machine.environment_rows(environment)))
    table = terminal.table("what", "works here", "how")
    for item in findings["capabilities"]:
        works = terminal.text("yes", "green") if item["works"] else terminal.text("no", "yellow")
        table.add_row(terminal.text(item["name"]), works, terminal.text(item["detail"]))
    console.print(table)
    ceilings = machine.ceiling_rows(environment)
    console.print(terminal.facts(ceilings) if ceilings else "no ceilings were measured")
    for root in findings["workspaces"]:
        console.print(terminal.text(f"workspace: {root}"), soft_wrap=True)


def _body(record: Record) -> list[RenderableType]:
    match record:
        case ProfileRecord():
            return _profile(record)
        case SwapRecord():
            return _swap(record)
        case CompareRecord():
            blocks = _comparison(record.before, record.after, record.ratio)
            return blocks + stepconsole.changed_operators(record.difference, sentences.changed(record.ratio))
        case ParityRecord():
            return _parity(record.results) + _sanitizer(record.sanitizer)
        case BenchRecord():
            return _bench(record) + _builds(record.builds)
        case AnalyzeRecord():
            return stepconsole.analyze(record)


def _watching(record: ProfileRecord) -> str:
    """What watching costs a step, and how many waits found their line."""
    told = []
    if record.overhead is not None and record.overhead.trace_ratio is not None:
        costs = f"tracing takes {units.times(record.overhead.trace_ratio)} the time"
        if record.overhead.lines_ratio is not None:
            costs += f", watching lines {units.times(record.overhead.lines_ratio)}"
        told.append(f"{costs}, neither is in the above")
    match = record.analysis.line_match if record.analysis is not None else None
    if match is not None and (matched := tracewords.line_match(match)):
        told.append(matched.removesuffix("."))
    return "; ".join(told)


def _profile(record: ProfileRecord) -> list[RenderableType]:
    facts = [f"{sentences.phases_in_words(record.workload)} in place"]
    if record.workload.weights:
        facts.append(f"weights {record.workload.weights}")
    if record.launches_per_step is not None:
        facts.insert(0, f"{units.count(record.launches_per_step)} launches a step")
    if record.throughput is not None:
        facts.insert(0, units.units_rate(record.throughput.units_per_second, record.workload.unit))
    if (record.figures or record.floor) and record.syncs_per_step is not None:
        facts.insert(2, f"{units.count(record.syncs_per_step)} host reads a step")
    blocks: list[RenderableType] = [terminal.text(", ".join(facts))]
    if record.ranks is not None:
        blocks.append(terminal.text(tracewords.sides(record.ranks)))
    own = [(figure.name, units.figure(figure.value, figure.unit)) for figure in record.figures]
    if record.floor is not None:
        own.append(("bandwidth floor", benchwords.floor_in_words(record.floor)))
    if own:
        blocks.append(terminal.facts(own))
    if watched := _watching(record):
        blocks.append(terminal.text(watched))
    if record.analysis is not None:
        return [Group(*blocks), *stepconsole.step(record, record.analysis)]
    blocks += stepconsole.breakdown([("", record.breakdown)])
    blocks += [stepconsole.hotspots(record.hotspots)] if record.hotspots else []
    waits = sentences.waiting(record.stalls)
    return [*blocks, stepconsole.stalls([(stall, "", "") for stall in waits])] if waits else blocks


def _swap(record: SwapRecord) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    if record.verdict is not None and record.verdict.reasons:
        blocks.append(Group(*(terminal.text(f"- {reason}") for reason in record.verdict.reasons)))
    if record.before is not None and record.after is not None:
        race = sentences.before_after_seconds(record) if all(sentences.raced_arms(record)) else None
        blocks += _comparison(record.before, record.after, record.ratio, race)
    if record.predicted is not None:
        promises = page.promises(record.predicted, record.before, record.after, record.ratio)
        table = terminal.table("prediction", "predicted", "measured", "outcome")
        for row in promises:
            table.add_row(*map(terminal.text, (row.name, row.predicted, row.measured, row.words)))
        blocks.append(table if promises else terminal.text(f"predicted: {record.predicted.text}"))
    evidence = [terminal.text(f"parity: {paritywords.parity_headline(record.parity)}")] if record.parity else []
    for hit in record.receipt:
        by = f"{hit.kernel} ({hit.implementation})" if hit.kernel else hit.implementation
        often = f"{units.count(hit.calls_per_step)} call{'' if hit.calls_per_step == 1 else 's'} a step"
        due = f", due every {hit.every} steps" if hit.every > 1 else ""
        evidence.append(terminal.text(f"receipt: {hit.site} by {by}, {often}{due}"))
    return [*blocks, Group(*evidence)] if evidence else blocks


def _comparison(
    before: ProfileRecord, after: ProfileRecord, ratio: Ratio | None, race: tuple[float, float] | None = None
) -> list[RenderableType]:
    shown = sentences.changed(ratio)
    table = terminal.table("figure", ">before", ">after", "change")
    for row in page.changes(before, after, race=race, shown=shown):
        sides = (terminal.text(row.show(row.before)), terminal.text(row.show(row.after)))
        table.add_row(terminal.text(row.name), *sides, terminal.text(row.words, STYLES[row.tone]))
    blocks = [*stepconsole.breakdown([("before", before.breakdown), ("after", after.breakdown)], shown=shown), table]
    pairs = page.stall_pairs(sentences.waiting(before.stalls), sentences.waiting(after.stalls))
    if pairs:
        blocks.append(stepconsole.stalls([(pair.shown, pair.words, STYLES[pair.tone]) for pair in pairs]))
    return blocks


def _parity(results: Sequence[ParityResult]) -> list[RenderableType]:
    if not results:
        return []
    table = terminal.table("compared", ">passed", ">failed", ">planted errors caught")
    groups = page.parity_groups(results)
    for group in groups:
        failed = terminal.text(str(group.failed), "red" if group.failed else "")
        caught = f"{group.killed} of {group.planted}" if group.planted else ""
        table.add_row(
            terminal.text(group.kernel),
            terminal.text(str(len(group.rows) - group.failed)),
            failed,
            terminal.text(caught),
        )
    failures = [row for group in groups for row in group.rows if not row.passed]
    lines = [
        terminal.text(f"failed: {row.kernel}, {row.case}, {row.dtype}, {row.mode}: {row.reason}", "red")
        for row in failures[:TOP_FAILURES]
    ]
    if len(failures) > TOP_FAILURES:
        lines.append(terminal.text(f"and {len(failures) - TOP_FAILURES} more failures in the report"))
    return [table, Group(*lines)] if lines else [table]


def _sanitizer(results: Sequence[SanitizerResult]) -> list[RenderableType]:
    if not results:
        return []
    table = terminal.table("kernel", "tool", ">errors", "finding")
    for row in results:
        found = row.reason or "; ".join(row.findings[:TOP_FAILURES])
        table.add_row(
            terminal.text(row.kernel),
            terminal.text(row.tool),
            terminal.text(str(row.errors)),
            terminal.text(found, "" if row.passed else "red"),
        )
    return [table]


def _builds(builds: Sequence[Build]) -> list[RenderableType]:
    if not builds:
        return []
    table = terminal.table(
        "kernel", "function", "arch", "dtype", ">registers", ">spills", ">shared", ">instructions", "cases"
    )
    for row in sorted(builds, key=lambda build: build.passed):
        figures = [
            "" if figure is None else show(figure)
            for figure, show in (
                (row.registers, units.count),
                (row.spill_bytes, units.size),
                (row.shared_bytes, units.size),
                (row.instructions, units.count),
            )
        ]
        cases = ", ".join(row.cases)
        told = terminal.text(cases) if row.passed else terminal.text(f"failed: {row.reason} ({cases})", "red")
        names = (row.kernel, row.function, row.arch, row.dtype)
        table.add_row(*map(terminal.text, names), *map(terminal.text, figures), told)
    return [table]


def _bench(record: BenchRecord) -> list[RenderableType]:
    sweeps, rest = sweepplot.apart(record)
    groups = benchwords.bench_groups(rest)
    untimed = benchwords.not_measured(groups)
    lines = [terminal.text(f"{benchwords.NOT_MEASURED}: {'; '.join(names)} ({why})") for why, names in untimed.items()]
    blocks: list[RenderableType] = [Group(*lines)] if lines else []
    blocks += [
        _extra(item) for item in (*sweeps, sweepplot.claims(record), curveplot.curves(record)) if item is not None
    ]
    for name, rows in groups.items():
        if any(name in names for names in untimed.values()):
            continue
        held = not record.workload and any(row.peak_bytes is not None for row in rows)
        own = (">launches", ">host reads") if record.workload else (">of roof", *([">memory"] if held else []))
        table = terminal.table(
            "implementation",
            ">time",
            f">{units.interval_name(record.confidence)}",
            f"against {rows[0].implementation}",
            ">rate",
            *own,
            "label",
        )
        title = terminal.text(name, "bold")
        best = benchwords.fastest(rows)
        for row in rows:
            table.add_row(*_bench_row(record, row, held), style="bold" if row is best and len(rows) > 1 else "")
        blocks.append(Group(title, table))
        blocks += _bench_figures(rows)
    return blocks


def _extra(item: sweepplot.Table) -> RenderableType:
    """A table of a bench that is not one of its cases, with what follows from it."""
    first, *others = item.headings
    table = terminal.table(first, *(f">{heading}" for heading in others))
    for row in item.rows:
        table.add_row(*(terminal.text(cell.text) for cell in row))
    return Group(
        terminal.text(item.title, "bold"), terminal.text(item.note, "dim"), table, *map(terminal.text, item.said)
    )


def _bench_figures(rows: Sequence[BenchResult]) -> list[RenderableType]:
    """What the workload itself says of each time, and how close it comes to the bandwidth floor."""
    names = list(dict.fromkeys(figure.name for row in rows for figure in row.figures))
    floors = [row.floor for row in rows if row.floor is not None]
    if not names and not floors:
        return []
    share = (">of bandwidth floor",) if any(floor.share is not None for floor in floors) else ()
    table = terminal.table("implementation", *(f">{name}" for name in names), *share)
    for row in rows:
        own = {figure.name: units.figure(figure.value, figure.unit) for figure in row.figures}
        cells = [own.get(name, "") for name in names]
        reached = row.floor.share if row.floor is not None else None
        cells += [units.share(reached) if reached is not None else ""] * len(share)
        table.add_row(terminal.text(row.implementation), *map(terminal.text, cells))
    told = benchwords.floors_in_words(rows)
    return [Group(table, *(terminal.text(f"bandwidth floor: {words}") for words in told))]


def _bench_row(record: BenchRecord, row: BenchResult, held: bool) -> list[Text]:
    """The cells of a row, the memory it holds among them if ``held``."""
    if record.workload:
        own = [
            terminal.text(units.count(value) if value is not None else "")
            for value in (row.launches_per_step, row.syncs_per_step)
        ]
    else:
        own = [terminal.text(units.share(row.share_of_roof) if row.share_of_roof is not None else "")]
        own += [terminal.text(units.size(row.peak_bytes) if row.peak_bytes is not None else "")] * held
    return [
        terminal.text(row.implementation),
        terminal.text(units.seconds(row.seconds) if row.seconds is not None else "-"),
        terminal.text(units.seconds_range(*row.interval) if row.interval else ""),
        terminal.text(units.faster(row.speedup[0]) if row.speedup else ""),
        terminal.text(benchwords.bench_rate(row, record.workload)),
        *own,
        terminal.text(benchwords.remark(row), "yellow" if row.label else ""),
    ]
