"""Renders records as HTML: one file each, no request.

A page reads whole without its script, which zooms. The policy in the page lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from xml.sax.saxutils import escape

from kernbench.record import (
    AnalyzeRecord,
    BenchRecord,
    BenchResult,
    CompareRecord,
    ParityRecord,
    ProfileRecord,
    Ratio,
    Record,
    Span,
    SwapRecord,
)
from kernbench.record import kind as kind_of
from kernbench.report import (
    benchwords,
    curveplot,
    differences,
    machine,
    page,
    paritywords,
    phrases,
    picture,
    plots,
    sentences,
    sweepplot,
    traceview,
    tracewords,
    units,
)
from kernbench.report.phrases import Tone
from kernbench.report.templating import Templates
from kernbench.report.templating import source as template_source

# Reads, kernels and rows beyond these stand in a fold.
TOP_STALLS, TOP_HOTSPOTS = 5, 12


@dataclass(frozen=True)
class IndexEntry:
    """A run in the index: where its report lies relative to reports/, and its record or why that cannot be read."""

    path: str
    record: Record | None
    error: str


@dataclass(frozen=True)
class Chip:
    """A short label beside the headline; its mark tells the tone without colour."""

    text: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Script:
    """The page's own script and its hash, as the page's policy names it."""

    text: str
    hash: str


def render(record: Record, traces: Sequence[str] = ()) -> str:
    """The report of any record.

    Args:
        traces: names of the trace files that lie beside the page.
    """
    raw, shortened = page.raw_json(record)
    context = _context(record, traces)
    headline, rest = sentences.headline(record), ""
    if isinstance(record, AnalyzeRecord):
        headline, rest = tracewords.first_sentence(headline)
    return _templates().render(
        f"{kind_of(record)}.html",
        record=record,
        headline=headline,
        tone=_tone(record),
        kind=sentences.kind_in_words(record),
        workload=sentences.workload_of(record),
        chips=_chips(record),
        ending=phrases.capitalized(phrases.ending(record)),
        machine=machine.environment_rows(record.environment),
        ceilings=machine.ceiling_rows(record.environment),
        clocks=machine.clock_rows(machine.clocks_of(record)),
        # Quotes may stand in text as they are; escaped they would double the record's length.
        raw_json=escape(raw),
        raw_shortened=shortened,
        on_gpu=sentences.on_gpu(record),
        lede=" ".join(filter(None, (rest, sentences.lede(record)))),
        environment_title="Where it was analysed" if isinstance(record, AnalyzeRecord) else "Environment",
        measured_here=not isinstance(record, AnalyzeRecord),
        script=_script() if context.get("pictures") or context.get("view") else None,
        **context,
    )


def render_index(entries: Sequence[IndexEntry]) -> str:
    """All runs by workload, the newest first; damaged ones with the reason."""
    groups: dict[str, list[IndexEntry]] = {}
    readable = sorted(
        (entry for entry in entries if entry.record is not None),
        key=lambda entry: entry.record.created_utc if entry.record else "",
        reverse=True,
    )
    for entry in readable:
        assert entry.record is not None
        info = sentences.workload_of(entry.record)
        apart = "traces" if isinstance(entry.record, AnalyzeRecord) else "kernels"
        groups.setdefault(info.name if info else apart, []).append(entry)
    damaged = [entry for entry in entries if entry.record is None]
    return _templates().render("index.html", groups=groups, damaged=damaged, count=len(entries), script=None, lede="")


def _context(record: Record, traces: Sequence[str]) -> dict[str, Any]:
    match record:
        case ProfileRecord():
            return _profile(record, traces)
        case SwapRecord():
            return _swap(record, traces)
        case CompareRecord():
            return _sides(record.before, record.after, record.ratio, traces) | _difference(record)
        case ParityRecord():
            return {"groups": page.parity_groups(record.results), "mutants": paritywords.mutants(record.results)}
        case BenchRecord():
            return _bench(record)
        case AnalyzeRecord():
            return _analyze(record, traces)


def _profile(record: ProfileRecord, traces: Sequence[str]) -> dict[str, Any]:
    time = sentences.step_time(record)
    view = traceview.view(record.analysis, record.environment.ceilings)
    own = ("step", "stalls", "timeline", "hotspots", "launches", "throughput", "environment", "record")
    return {
        "breakdown": page.breakdown([("this step", record.breakdown)]),
        "time": time,
        "times": plots.step_times(record.steps.seconds, time) if record.steps and time and time.count > 1 else None,
        "pictures": _pictures([("", record.timeline)], traces),
        "view": view,
        "contents": traceview.sections(view, own),
    }


def _analyze(record: AnalyzeRecord, traces: Sequence[str]) -> dict[str, Any]:
    view = traceview.view(record.analysis, None)
    breakdown = page.breakdown([("this step", record.breakdown)])
    parts = {
        "step": breakdown,
        "stalls": record.stalls,
        "timeline": record.timeline,
        "hotspots": record.hotspots,
        "launches": record.launches,
    }
    own = [name for name, part in parts.items() if part]
    return {
        "breakdown": breakdown,
        "pictures": _pictures([("", record.timeline)], traces, [tracewords.trace_name(info) for info in record.traces]),
        "view": view,
        "contents": traceview.sections(view, [*own, "traces", "environment", "record"]),
    }


def _pictures(
    sides: Sequence[tuple[str, Sequence[Span]]], beside: Sequence[str], named: Sequence[str] = ()
) -> list[tuple[str, picture.Picture | None, str, bool]]:
    """Each side's label, drawing, trace file, and whether that lies beside the page."""
    drawn = []
    for label, spans in sides:
        if spans:
            wanted = [f"trace.{label}.json" if label else "trace.json"] if not named else named[:1]
            here = next((name for name in beside if name.startswith(wanted[0])), "")
            drawn.append((label, picture.layout(spans), here or (wanted[0] if named else ""), bool(here)))
    return drawn


def _sides(
    before: ProfileRecord,
    after: ProfileRecord,
    ratio: Ratio | None,
    traces: Sequence[str],
    race: tuple[float, float] | None = None,
) -> dict[str, Any]:
    shown = sentences.changed(ratio)
    return {
        "breakdown": page.breakdown([("before", before.breakdown), ("after", after.breakdown)], shown=shown),
        "changes": page.changes(before, after, race=race, shown=shown),
        "stall_pairs": page.stall_pairs(sentences.waiting(before.stalls), sentences.waiting(after.stalls)),
        "hotspot_pairs": page.hotspot_pairs(before.hotspots, after.hotspots, shown=shown),
        "pictures": _pictures([("before", before.timeline), ("after", after.timeline)], traces),
    }


def _difference(record: CompareRecord) -> dict[str, Any]:
    found = record.difference
    if found is None:
        return {}
    shown = sentences.changed(record.ratio)
    return {
        "operators": differences.operators(found, shown=shown),
        "idle_changes": differences.idle(found, shown=shown),
        "alike": differences.alike(found),
    }


def _swap(record: SwapRecord, traces: Sequence[str]) -> dict[str, Any]:
    context: dict[str, Any] = {
        "groups": page.parity_groups(record.parity),
        "mutants": paritywords.mutants(record.parity),
        "promises": page.promises(record.predicted, record.before, record.after, record.ratio)
        if record.predicted
        else [],
        "others": sentences.other_arms(record),
        "ratios": None,
    }
    before, after = sentences.raced_arms(record)
    again = next((arm.seconds for arm in record.arms if arm.name == "again"), [])
    if record.ratio is not None and before and after:
        context["ratios"] = plots.paired_ratios(before, after, again, record.ratio)
    if record.before is None:
        return context
    if record.after is None:
        return context | _profile(record.before, traces)
    race = sentences.before_after_seconds(record) if before and after else None
    return context | _sides(record.before, record.after, record.ratio, traces, race)


def _bench(record: BenchRecord) -> dict[str, Any]:
    cases = []
    sweeps, rest = sweepplot.apart(record)
    groups = benchwords.bench_groups(rest)
    untimed = benchwords.not_measured(groups)
    for name, rows in groups.items():
        if any(name in names for names in untimed.values()):
            continue
        timed = [row for row in rows if row.seconds is not None]
        own = list(dict.fromkeys(figure.name for row in rows for figure in row.figures))
        floors = benchwords.floors_in_words(rows)
        cases.append(
            {
                "name": name,
                "rows": rows,
                "fastest": benchwords.fastest(rows),
                "columns": _bench_columns(rows) - ({"launches_per_step", "syncs_per_step"} if own or floors else set()),
                "first": rows[0].implementation,
                "floor": benchwords.noise_floor(rows),
                "figures": own,
                "of_floor": any(row.floor is not None and row.floor.share is not None for row in rows),
                "floors": floors,
                "plot": plots.implementations(rows, name) if len(timed) > 1 else None,
            }
        )
    ceilings = record.environment.ceilings
    roofline = plots.roofline(record.results, ceilings) if ceilings else None
    extras = filter(None, (*sweeps, sweepplot.claims(record), curveplot.curves(record)))
    return {"cases": cases, "untimed": untimed, "roofline": roofline, "extras": list(extras)}


def _bench_columns(rows: Sequence[BenchResult]) -> set[str]:
    """The optional columns for which some row has a figure."""
    optional = (
        "speedup", "bytes_per_second", "flops_per_second", "share_of_roof", "units_per_second", "launches_per_step",
        "syncs_per_step", "peak_bytes",
    )  # fmt: skip
    return {name for name in optional if any(getattr(row, name) for row in rows)}


def _tone(record: Record) -> Tone:
    """What colour the verdict stands in."""
    match record:
        case SwapRecord(verdict=verdict) if verdict is not None:
            return sentences.DECISIONS.get(verdict.decision, ("", "neutral"))[1]
        case CompareRecord(ratio=ratio) if ratio is not None:
            return sentences.ratio_tone(ratio)
        case ParityRecord(results=results, sanitizer=tools) if results or tools:
            passed = [result.passed for result in results] + [tool.passed for tool in tools]
            return "good" if all(passed) else "bad"
        case BenchRecord(builds=builds) if builds:
            return "good" if all(build.passed for build in builds) else "bad"
        case AnalyzeRecord(analysis=analysis) if analysis is not None and analysis.headline:
            return "warn" if tracewords.faults(analysis) else "good"
        case _:
            return "neutral"


def _chips(record: Record) -> list[Chip]:
    chips = _outcome(record)
    workload = sentences.workload_of(record)
    if workload is not None:
        phases = sentences.phases_in_words(workload)
        on_top = f"on top of {phases}" if isinstance(record, SwapRecord) else f"{phases} in place"
        chips += [Chip(f"preset {workload.preset}"), Chip(workload.dtype), Chip(on_top)]
        chips += [Chip(f"weights {workload.weights}")] if workload.weights else []
    chips += [Chip(text) for text in sentences.devices(record)]
    if record.git is not None and record.git.dirty:
        chips.append(Chip("uncommitted changes", "warn"))
    return chips


def _outcome(record: Record) -> list[Chip]:
    """What came of the run, and its status where that is not "complete"."""
    chips = []
    match record:
        case SwapRecord(verdict=verdict) if verdict is not None:
            chips.append(Chip(*sentences.DECISIONS.get(verdict.decision, (verdict.decision, "neutral"))))
        case ParityRecord(results=results, sanitizer=tools) if results or tools:
            chips.append(Chip("passed", "good") if _tone(record) == "good" else Chip("failed", "bad"))
        case BenchRecord(builds=builds) if builds:
            chips.append(Chip("builds", "good") if _tone(record) == "good" else Chip("does not build", "bad"))
        case CompareRecord(ratio=ratio) if ratio is not None:
            text = {"good": "faster", "bad": "slower"}.get(_tone(record), "no change shown")
            chips.append(Chip(text, _tone(record)))
        case _:
            pass
    if record.status != "complete":
        chips.append(Chip(*phrases.STATUSES.get(record.status, (record.status, "neutral"))))
    return chips


@cache
def _script() -> Script:
    text = template_source("page.js")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(text, f"sha256-{digest}")


@cache
def _templates() -> Templates:
    filters = {
        name: getattr(units, name)
        for name in (
            "number", "seconds", "size", "bytes_rate", "flops_rate", "count", "share", "times", "scientific", "moment",
            "floor", "faster", "interval_name", "moved",
        )
    } | {"floor_in_words": benchwords.floor_in_words}  # fmt: skip
    names = {
        "seconds_range": units.seconds_range,
        "memory_note": benchwords.MEMORY_NOTE,
        "times_range": units.times_range,
        "units_rate": units.units_rate,
        "unit_figure": units.figure,
        "stall_class": sentences.stall_class,
        "waiting": sentences.waiting,
        "evidence_apart": sentences.evidence_apart,
        "headline_of": sentences.headline,
        "kind_of": sentences.kind_in_words,
        "workload_of": sentences.workload_of,
        "phases_of": sentences.phases_in_words,
        "chips_of": _chips,
        "place": tracewords.place,
        "replay_error": tracewords.replay_error,
        "saving_range": tracewords.saving,
        "estimate_note": tracewords.estimate_note,
        "gaps_sentence": tracewords.gaps,
        "line_match": tracewords.line_match,
        "fusion_name": tracewords.fusion_name,
        "roofline_rates": tracewords.roofline_rates,
        "ranks_sentence": tracewords.ranks,
        "sides_in_words": tracewords.sides,
        "collective_rows": tracewords.collective_rows,
        "memory_peak": tracewords.memory_peak,
        "trace_facts": tracewords.trace_facts,
        "bounds": tracewords.BOUNDS,
        "path_kinds": tracewords.PATH_KINDS,
        "top_stalls": TOP_STALLS,
        "top_hotspots": TOP_HOTSPOTS,
    }
    return Templates(filters, names)
