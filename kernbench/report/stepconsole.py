"""A step on the terminal: where its time goes, what is hot, where the host waits, and what a trace tells of it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from kernbench.record import (
    AnalyzeRecord,
    Difference,
    Finding,
    Hotspot,
    Launches,
    Part,
    ProfileRecord,
    Stall,
    TraceAnalysis,
    WhatIf,
)
from kernbench.report import differences, page, sentences, terminal, traceview, tracewords, units
from kernbench.report.terminal import STYLES

TOP_HOTSPOTS, TOP_STALLS = 8, 6
# A trace has more to tell than a terminal shows; with these the whole is about thirty lines.
FEW_HOTSPOTS, FEW_STALLS, FEW_PARTS, FEW_FINDINGS, FEW_ESTIMATES = 3, 2, 4, 3, 3
BAR_WIDTH = 72


def analyze(record: AnalyzeRecord) -> list[RenderableType]:
    """A trace of others: what it is, and its step."""
    return [terminal.text(_trace_facts(record)), *step(record, record.analysis or TraceAnalysis())]


def step(record: AnalyzeRecord | ProfileRecord, analysis: TraceAnalysis) -> list[RenderableType]:
    """A step of a trace by cause, what was found in it, what would be won, and the hottest kernels."""
    blocks = [*breakdown([("", record.breakdown)], most=FEW_PARTS), *_findings(analysis)]
    waits = sentences.waiting(record.stalls)
    # Findings name the waits that matter.
    if waits and not tracewords.faults(analysis):
        blocks.append(stalls([(stall, "", "") for stall in waits], most=FEW_STALLS))
    if analysis.communication is not None and (words := tracewords.ranks(analysis.communication)):
        blocks.append(terminal.text(words))
    blocks += _whatif(analysis.whatif)
    return [*blocks, hotspots(record.hotspots[:FEW_HOTSPOTS])] if record.hotspots else blocks


def _findings(analysis: TraceAnalysis) -> list[RenderableType]:
    found = tracewords.faults(analysis)
    lines = [row for finding in found[:FEW_FINDINGS] for row in _finding(finding, analysis.headline)]
    if len(found) > FEW_FINDINGS:
        lines.append(terminal.text(f"and {len(found) - FEW_FINDINGS} more in the report"))
    return [Group(*lines)] if lines else []


def _trace_facts(record: AnalyzeRecord) -> str:
    first = record.traces[0]
    names = ", ".join(map(tracewords.trace_name, record.traces[:2]))
    more = f" and {len(record.traces) - 2} more" if len(record.traces) > 2 else ""
    counted = sum(info.counted_steps for info in record.traces)
    facts = [f"{names}{more}", *sentences.devices(record), f"{sum(info.events for info in record.traces):,} events"]
    if first.marker and counted:
        facts.append(f"{counted:,} step{'' if counted == 1 else 's'} counted")
    return ", ".join([*facts, *_launches(record.launches)])


def _launches(found: Launches | None) -> list[str]:
    return [f"{units.count(found.per_step)} launches a step"] if found is not None else []


def _finding(found: Finding, headline: str) -> list[RenderableType]:
    """What it costs and where, and its sentence where the headline has not said it."""
    cost = f", {tracewords.at_most(found)}" if found.seconds_per_step else ""
    where = tracewords.place(found.source)
    at = f", {where}" if where else ""
    rows: list[RenderableType] = [terminal.text(found.cause, "bold").append_text(terminal.text(cost + at, "not bold"))]
    if found.source is not None and found.source.text:
        rows.append(terminal.line(f"    {found.source.text.strip()}", "dim"))
    if found.sentence.rstrip(".").lower() not in headline.lower():
        rows.append(terminal.text(f"    {tracewords.capitalized_sentence(found.sentence)}"))
    return rows


def _whatif(whatif: WhatIf | None) -> list[RenderableType]:
    if whatif is None:
        return []
    error = terminal.text(tracewords.replay_error(whatif))
    rows = [row for _, group in traceview.estimates(whatif) for row in group]
    # The order of removal tells each wait's saving again; the findings tell what each of them costs alone.
    rows = [row for row in rows if row.change != "stalls in best order"]
    rows.sort(key=lambda row: -sum(row.saving_seconds_per_step))
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows[:FEW_ESTIMATES]:
        won = f"{tracewords.saving(row.saving_seconds_per_step)} a step ({units.share(row.share)})"
        where = tracewords.place(row.source)
        title = f"{row.title}, {where}" if where and where not in row.title else row.title
        grid.add_row(terminal.line(title), terminal.text(won), terminal.line("defer" if row.deferred else ""))
    return [Group(error, grid)] if rows else [error]


def breakdown(
    sides: Sequence[tuple[str, Sequence[Part]]], *, shown: bool = True, most: int | None = None
) -> list[RenderableType]:
    """The step as bars of letters, legible without colour: a full line works, a broken one waits.

    Args:
        most: of how many parts the amounts are told, the largest ones; all if None.
    """
    drawn = page.breakdown(sides, shown=shown)
    if drawn is None:
        return []
    bars = []
    for bar in drawn.bars:
        line = terminal.text(f"{bar.label:<7}" if len(drawn.bars) > 1 else "")
        for segment in bar.segments:
            busy = segment.look.startswith("busy")
            width = round(segment.percent * BAR_WIDTH / 100)
            line.append((segment.letter + ("━" if busy else "╌") * (width - 1))[:width], "cyan" if busy else "yellow")
        bars.append(line)
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    by_size = sorted(drawn.legend, key=lambda row: -max(part or 0.0 for part in row.seconds))
    told = by_size[:most]
    for row in drawn.legend:
        if row not in told:
            continue
        amounts = [units.seconds(part) if part is not None else "none" for part in row.seconds]
        if len(drawn.bars) == 1 and drawn.bars[0].seconds:
            amounts.append(units.share((row.seconds[0] or 0.0) / drawn.bars[0].seconds))
        name = terminal.text(f"{row.letter} {row.cause}")
        grid.add_row(name, *map(terminal.text, amounts), terminal.text(row.change, STYLES[row.tone]))
    return [Group(*bars, grid)]


def hotspots(items: Sequence[Hotspot]) -> Table:
    """The hottest kernels or operators, one a line."""
    table = terminal.table("hotspot", ">own time", ">share", ">calls", "source")
    # The name gives way where the terminal is narrow.
    table.expand = True
    table.columns[0].ratio, table.columns[0].no_wrap, table.columns[0].overflow = 1, True, "ellipsis"
    for item in items[:TOP_HOTSPOTS]:
        table.add_row(
            terminal.text(item.name),
            terminal.text(units.seconds(item.self_seconds_per_step)),
            terminal.text(units.share(item.share)),
            terminal.text(units.count(item.calls_per_step)),
            terminal.text(sentences.place(item.source) if item.source else ""),
        )
    return table


def changed_operators(found: Difference | None, shown: bool) -> list[RenderableType]:
    """The operators whose time changed most between two traces, and where they stop doing the same."""
    if found is None:
        return []
    told: list[RenderableType] = [terminal.text(words)] if (words := differences.alike(found)) else []
    if not found.operators:
        return told
    grid = terminal.table("operator", ">before", ">after", ">calls", "change a step")
    for row in differences.operators(found, shown=shown)[:TOP_HOTSPOTS]:
        device = row.item.device_seconds_per_step
        times = device if any(device) else row.item.host_seconds_per_step
        sides = (terminal.text(units.seconds(amount) if amount else "none") for amount in times)
        change = terminal.text(row.words, STYLES[row.tone])
        grid.add_row(terminal.line(row.item.name), *sides, terminal.text(row.calls), change)
    return [Group(grid, *told)]


def stalls(rows: Sequence[tuple[Stall, str, str]], *, most: int = TOP_STALLS) -> RenderableType:
    """Each read as its place, its facts and its source line."""
    lines = []
    for stall, words, style in rows[:most]:
        wait = stall.wait_seconds_per_step
        waits = f", waits {units.seconds(wait)} a step" if wait is not None else ""
        facts = f"  {units.count(stall.count_per_step)} a step, {sentences.stall_class(stall)}{waits}"
        place = f"{stall.file}:{stall.line}" if stall.file else stall.op
        head = terminal.text(place, "bold").append_text(terminal.text(facts, "not bold"))
        lines.append(head.append_text(terminal.text(f"  {words}", style)) if words else head)
        if stall.source.strip():
            lines.append(terminal.line(f"    {stall.source.strip()}", "dim"))
    if len(rows) > most:
        lines.append(terminal.text(f"and {len(rows) - most} more lines in the report"))
    return Group(*lines)
