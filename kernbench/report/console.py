"""What a person reads in the terminal: results on standard output, progress on standard error."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from kernbench.progress import Advance, Progress, Silent
from kernbench.record import (
    BenchRecord,
    BenchResult,
    Build,
    CompareRecord,
    Environment,
    Hotspot,
    ParityRecord,
    ParityResult,
    Part,
    ProfileRecord,
    Ratio,
    Record,
    SanitizerResult,
    Stall,
    SwapRecord,
)
from kernbench.report import machine, page, sentences, sweepplot, units

TOP_HOTSPOTS, TOP_STALLS, TOP_FAILURES = 8, 6, 8
BAR_WIDTH = 72
# Output that goes to a file or a pipe has no width of its own.
FILE_WIDTH = 120
REFRESH_SECONDS = 0.1

STYLES: Mapping[str, str] = {"good": "green", "bad": "red", "warn": "yellow", "neutral": ""}


def show(record: Record, report: Path | None) -> None:
    """Print a record's summary, its warnings, and last where the report lies."""
    console = _output()
    console.print(_text(sentences.headline(record), "bold"))
    for block in _body(record):
        console.print()
        console.print(block)
    console.print()
    for warning in filter(None, [sentences.ending(record), *record.warnings]):
        console.print(_text("warning: ", "yellow").append_text(_text(warning)))
    if report is not None:
        console.print(_text(f"report: {report}"), soft_wrap=True)


def show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the runs on disk, as ``catalogue.runs`` lists them."""
    if not runs:
        _output().print("no runs yet; start with: kernbench profile WORKLOAD")
        return
    table = _table("run", "of", "kind", "date", "status")
    for run in runs:
        damaged = run["kind"] == "damaged"
        style = "red" if damaged else "" if run["status"] == "complete" else "yellow"
        date = units.moment(str(run.get("created_utc", "")))
        table.add_row(*map(_text, (run["run"], run["group"], run["kind"], date)), _text(run["status"], style))
    _output().print(table)


def show_declarations(listing: Mapping[str, Any]) -> None:
    """Print workloads, kernels and what is kept, as ``catalogue.declarations`` lists them."""
    console = _output()
    for workload in listing["workloads"]:
        console.print(_text(workload["name"], "bold").append_text(_text(f"  {workload['summary']}", "not bold")))
        console.print(_text(f"  presets: {', '.join(workload['presets'])}; counts {workload['unit']}"))
        for phase in workload["phases"]:
            flag = f"  {phase['flag']}=1" if phase["flag"] else ""
            line = _text(f"  phase {phase['number']}: {phase['title']}{flag}")
            console.print(line.append_text(_text(f"  kept ({phase['kept']})", "green")) if phase["kept"] else line)
    if listing["kernels"]:
        table = _table("kernel", "cases", "dtypes")
        for kernel in listing["kernels"]:
            table.add_row(*map(_text, (kernel["name"], ", ".join(kernel["cases"]), ", ".join(kernel["dtypes"]))))
        console.print(table)
    console.print(_text(f"workspace: {listing['workspace']}"), soft_wrap=True)


def show_journal(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the journal's headings with their verdicts."""
    if not entries:
        _output().print("the journal is empty; kernbench swap --phase N writes an entry")
        return
    table = _table("date", "entry", "verdict", "run")
    for entry in entries:
        tone = sentences.DECISIONS.get(entry["verdict"], ("", "neutral"))[1]
        verdict = _text(entry["verdict"], STYLES[tone])
        table.add_row(_text(entry["date"]), _text(entry["title"]), verdict, _text(entry["run_id"]))
    _output().print(table)


def show_doctor(findings: Mapping[str, Any]) -> None:
    """Print device, versions, what works here, and the ceilings, as ``pipeline.doctor`` found them."""
    console = _output()
    environment = msgspec.convert(findings["environment"], Environment)
    console.print(_facts(machine.environment_rows(environment)))
    table = _table("what", "works here", "how")
    for item in findings["capabilities"]:
        works = _text("yes", "green") if item["works"] else _text("no", "yellow")
        table.add_row(_text(item["name"]), works, _text(item["detail"]))
    console.print(table)
    ceilings = machine.ceiling_rows(environment)
    console.print(_facts(ceilings) if ceilings else "no ceilings were measured")
    for root in findings["workspaces"]:
        console.print(_text(f"workspace: {root}"), soft_wrap=True)


def progress(*, quiet: bool = False) -> Progress:
    """Progress on standard error: bars on a terminal, one line per stage elsewhere, nothing with ``quiet``."""
    if quiet:
        return Silent()
    console = Console(stderr=True, highlight=False)
    return _Bars(console) if console.is_terminal else _Lines()


class _Lines:
    """One plain line per stage, for logs."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        print(f"{_printable(title)} ...", file=sys.stderr, flush=True)
        yield lambda finished: None

    def note(self, text: str) -> None:
        print(f"note: {_printable(text)}", file=sys.stderr, flush=True)


class _Bars:
    """Bars that vanish when their stage ends. They are drawn by the caller's own thread only: a drawing thread would
    run beside the steps that are being timed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.open_stages = 0
        self.drawn_at = 0.0

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        if not self.open_stages:
            self.bars.start()
        self.open_stages += 1
        task = self.bars.add_task(_printable(title), total=total)
        self._draw(at_once=True)

        def advance(finished: int) -> None:
            self.bars.advance(task, finished)
            self._draw()

        try:
            yield advance
        finally:
            self.bars.remove_task(task)
            self.open_stages -= 1
            if self.open_stages:
                self._draw(at_once=True)
            else:
                self.bars.stop()

    def note(self, text: str) -> None:
        self.console.print(_text(f"note: {text}", "yellow"))

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self.drawn_at >= REFRESH_SECONDS:
            self.drawn_at = now
            self.bars.refresh()


def _body(record: Record) -> list[RenderableType]:
    match record:
        case ProfileRecord():
            return _profile(record)
        case SwapRecord():
            return _swap(record)
        case CompareRecord():
            return _comparison(record.before, record.after, record.ratio)
        case ParityRecord():
            return _parity(record.results) + _sanitizer(record.sanitizer)
        case BenchRecord():
            return _bench(record) + _builds(record.builds)


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
    blocks: list[RenderableType] = [_text(", ".join(facts))]
    own = [(figure.name, units.figure(figure.value, figure.unit)) for figure in record.figures]
    if record.floor is not None:
        own.append(("bandwidth floor", sentences.floor_in_words(record.floor)))
    if own:
        blocks.append(_facts(own))
    if record.overhead is not None and record.overhead.trace_ratio is not None:
        costs = f"tracing made a step {units.times(record.overhead.trace_ratio)} as long"
        if record.overhead.lines_ratio is not None:
            costs += f", watching lines {units.times(record.overhead.lines_ratio)}"
        blocks.append(_text(f"{costs}; the step time above is of steps under neither"))
    blocks += _breakdown([("", record.breakdown)])
    if record.hotspots:
        blocks.append(_hotspots(record.hotspots[:TOP_HOTSPOTS]))
    waits = sentences.waiting(record.stalls)
    if waits:
        blocks.append(_stalls([(stall, "", "") for stall in waits]))
    return blocks


def _swap(record: SwapRecord) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    if record.verdict is not None and record.verdict.reasons:
        blocks.append(Group(*(_text(f"- {reason}") for reason in record.verdict.reasons)))
    if record.before is not None and record.after is not None:
        race = sentences.before_after_seconds(record) if all(sentences.raced_arms(record)) else None
        blocks += _comparison(record.before, record.after, record.ratio, race)
    if record.predicted is not None:
        promises = page.promises(record.predicted, record.before, record.after, record.ratio)
        table = _table("prediction", "predicted", "measured", "outcome")
        for row in promises:
            table.add_row(*map(_text, (row.name, row.predicted, row.measured, row.words)))
        blocks.append(table if promises else _text(f"predicted: {record.predicted.text}"))
    evidence = [_text(f"parity: {sentences.parity_headline(record.parity)}")] if record.parity else []
    for hit in record.receipt:
        by = f"{hit.kernel} ({hit.implementation})" if hit.kernel else hit.implementation
        often = f"{units.count(hit.calls_per_step)} call{'' if hit.calls_per_step == 1 else 's'} a step"
        due = f", due every {hit.every} steps" if hit.every > 1 else ""
        evidence.append(_text(f"receipt: {hit.site} by {by}, {often}{due}"))
    return [*blocks, Group(*evidence)] if evidence else blocks


def _comparison(
    before: ProfileRecord, after: ProfileRecord, ratio: Ratio | None, race: tuple[float, float] | None = None
) -> list[RenderableType]:
    shown = sentences.changed(ratio)
    table = _table("figure", ">before", ">after", "change")
    for row in page.changes(before, after, race=race, shown=shown):
        sides = (_text(row.show(row.before)), _text(row.show(row.after)))
        table.add_row(_text(row.name), *sides, _text(row.words, STYLES[row.tone]))
    blocks = [*_breakdown([("before", before.breakdown), ("after", after.breakdown)], shown=shown), table]
    pairs = page.stall_pairs(sentences.waiting(before.stalls), sentences.waiting(after.stalls))
    if pairs:
        blocks.append(_stalls([(pair.shown, pair.words, STYLES[pair.tone]) for pair in pairs]))
    return blocks


def _breakdown(sides: Sequence[tuple[str, Sequence[Part]]], *, shown: bool = True) -> list[RenderableType]:
    """The step as bars of letters, legible without colour: a full line works, a broken one waits."""
    drawn = page.breakdown(sides, shown=shown)
    if drawn is None:
        return []
    bars = []
    for bar in drawn.bars:
        line = _text(f"{bar.label:<7}" if len(drawn.bars) > 1 else "")
        for segment in bar.segments:
            busy = segment.look.startswith("busy")
            width = round(segment.percent * BAR_WIDTH / 100)
            line.append((segment.letter + ("━" if busy else "╌") * (width - 1))[:width], "cyan" if busy else "yellow")
        bars.append(line)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in drawn.legend:
        amounts = [units.seconds(part) if part is not None else "none" for part in row.seconds]
        if len(drawn.bars) == 1 and drawn.bars[0].seconds:
            amounts.append(units.share((row.seconds[0] or 0.0) / drawn.bars[0].seconds))
        name = _text(f"{row.letter} {row.cause}")
        table.add_row(name, *map(_text, amounts), _text(row.change, STYLES[row.tone]))
    return [Group(*bars, table)]


def _hotspots(hotspots: Sequence[Hotspot]) -> Table:
    table = _table("hotspot", ">own time", ">share", ">calls", "source")
    # The name gives way where the terminal is narrow.
    table.expand = True
    table.columns[0].ratio, table.columns[0].no_wrap, table.columns[0].overflow = 1, True, "ellipsis"
    for item in hotspots:
        table.add_row(
            _text(item.name),
            _text(units.seconds(item.self_seconds_per_step)),
            _text(units.share(item.share)),
            _text(units.count(item.calls_per_step)),
            _text(sentences.place(item.source) if item.source else ""),
        )
    return table


def _stalls(rows: Sequence[tuple[Stall, str, str]]) -> RenderableType:
    """Each read as its place, its facts and its source line."""
    lines = []
    for stall, words, style in rows[:TOP_STALLS]:
        wait = stall.wait_seconds_per_step
        waits = f", waits {units.seconds(wait)} a step" if wait is not None else ""
        facts = f"  {units.count(stall.count_per_step)} a step, {sentences.stall_class(stall)}{waits}"
        head = _text(f"{stall.file}:{stall.line}", "bold").append_text(_text(facts, "not bold"))
        lines.append(head.append_text(_text(f"  {words}", style)) if words else head)
        source = _text(f"    {stall.source.strip()}", "dim")
        source.no_wrap, source.overflow = True, "ellipsis"
        lines.append(source)
    if len(rows) > TOP_STALLS:
        lines.append(_text(f"and {len(rows) - TOP_STALLS} more lines in the report"))
    return Group(*lines)


def _parity(results: Sequence[ParityResult]) -> list[RenderableType]:
    if not results:
        return []
    table = _table("compared", ">passed", ">failed", ">planted errors caught")
    groups = page.parity_groups(results)
    for group in groups:
        failed = _text(str(group.failed), "red" if group.failed else "")
        caught = f"{group.killed} of {group.planted}" if group.planted else ""
        table.add_row(_text(group.kernel), _text(str(len(group.rows) - group.failed)), failed, _text(caught))
    failures = [row for group in groups for row in group.rows if not row.passed]
    lines = [
        _text(f"failed: {row.kernel}, {row.case}, {row.dtype}, {row.mode}: {row.reason}", "red")
        for row in failures[:TOP_FAILURES]
    ]
    if len(failures) > TOP_FAILURES:
        lines.append(_text(f"and {len(failures) - TOP_FAILURES} more failures in the report"))
    return [table, Group(*lines)] if lines else [table]


def _sanitizer(results: Sequence[SanitizerResult]) -> list[RenderableType]:
    if not results:
        return []
    table = _table("kernel", "tool", ">errors", "finding")
    for row in results:
        found = row.reason or "; ".join(row.findings[:TOP_FAILURES])
        table.add_row(
            _text(row.kernel), _text(row.tool), _text(str(row.errors)), _text(found, "" if row.passed else "red")
        )
    return [table]


def _builds(builds: Sequence[Build]) -> list[RenderableType]:
    if not builds:
        return []
    table = _table("kernel", "function", "arch", "dtype", ">registers", ">spills", ">shared", ">instructions", "cases")
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
        told = _text(cases) if row.passed else _text(f"failed: {row.reason} ({cases})", "red")
        names = (row.kernel, row.function, row.arch, row.dtype)
        table.add_row(*map(_text, names), *map(_text, figures), told)
    return [table]


def _bench(record: BenchRecord) -> list[RenderableType]:
    sweeps, rest = sweepplot.apart(record)
    groups = sentences.bench_groups(rest)
    untimed = sentences.not_measured(groups)
    lines = [_text(f"{sentences.NOT_MEASURED}: {'; '.join(names)} ({why})") for why, names in untimed.items()]
    blocks: list[RenderableType] = [Group(*lines)] if lines else []
    blocks += [
        _extra(item) for item in (*sweeps, sweepplot.claims(record), sweepplot.curves(record)) if item is not None
    ]
    for name, rows in groups.items():
        if any(name in names for names in untimed.values()):
            continue
        own = (">launches", ">host reads") if record.workload else (">of roof",)
        table = _table(
            "implementation",
            ">time",
            f">{units.interval_name(record.confidence)}",
            f"against {rows[0].implementation}",
            ">rate",
            *own,
            "label",
        )
        title = _text(name, "bold")
        best = sentences.fastest(rows)
        for row in rows:
            table.add_row(*_bench_row(record, row), style="bold" if row is best and len(rows) > 1 else "")
        blocks.append(Group(title, table))
        blocks += _bench_figures(rows)
    return blocks


def _extra(item: sweepplot.Table) -> RenderableType:
    """A table of a bench that is not one of its cases, with what follows from it."""
    first, *others = item.headings
    table = _table(first, *(f">{heading}" for heading in others))
    for row in item.rows:
        table.add_row(*(_text(cell.text) for cell in row))
    return Group(_text(item.title, "bold"), _text(item.note, "dim"), table, *map(_text, item.said))


def _bench_figures(rows: Sequence[BenchResult]) -> list[RenderableType]:
    """What the workload itself says of each time, and how close it comes to the bandwidth floor."""
    names = list(dict.fromkeys(figure.name for row in rows for figure in row.figures))
    floors = [row.floor for row in rows if row.floor is not None]
    if not names and not floors:
        return []
    share = (">of bandwidth floor",) if any(floor.share is not None for floor in floors) else ()
    table = _table("implementation", *(f">{name}" for name in names), *share)
    for row in rows:
        own = {figure.name: units.figure(figure.value, figure.unit) for figure in row.figures}
        cells = [own.get(name, "") for name in names]
        reached = row.floor.share if row.floor is not None else None
        cells += [units.share(reached) if reached is not None else ""] * len(share)
        table.add_row(_text(row.implementation), *map(_text, cells))
    told = sentences.floors_in_words(rows)
    return [Group(table, *(_text(f"bandwidth floor: {words}") for words in told))]


def _bench_row(record: BenchRecord, row: BenchResult) -> list[Text]:
    if record.workload:
        own = [
            _text(units.count(value) if value is not None else "")
            for value in (row.launches_per_step, row.syncs_per_step)
        ]
    else:
        own = [_text(units.share(row.share_of_roof) if row.share_of_roof is not None else "")]
    label = f"{row.label}: {row.note}" if row.label and row.note else row.label or row.note
    return [
        _text(row.implementation),
        _text(units.seconds(row.seconds) if row.seconds is not None else "-"),
        _text(units.seconds_range(*row.interval) if row.interval else ""),
        _text(units.faster(row.speedup[0]) if row.speedup else ""),
        _text(sentences.bench_rate(row, record.workload)),
        *own,
        _text(label, "yellow" if row.label else ""),
    ]


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(_text(name, "dim"), _text(text))
    return table


def _table(*headings: str) -> Table:
    """A table without lines; a heading that begins with ">" aligns its column to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(_text(heading.removeprefix(">")), justify="right" if heading.startswith(">") else "left")
    return table


def _output() -> Console:
    # A terminal that cannot show a sign shows a question mark instead of a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    on_terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if on_terminal else FILE_WIDTH)


def _text(text: Any, style: str = "") -> Text:
    """Text that rich does not read as markup, without control characters that a terminal would obey."""
    return Text(_printable(str(text)), style=style)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
