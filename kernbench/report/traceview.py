"""Arranges what a trace tells for the page: sections in reading order, and only those that found something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernbench.record import (
    Ceilings,
    Change,
    Estimate,
    Finding,
    Hotspot,
    TraceAnalysis,
    WhatIf,
)
from kernbench.report import flameview, traceplots, tracewords
from kernbench.report.drawing import Plot
from kernbench.report.flameview import FlameView

Groups = list[tuple[str, list[Estimate]]]

ESTIMATES: tuple[tuple[tuple[Change, ...], str], ...] = (
    (("without all stalls",), "All waits gone"),
    (("stalls in best order",), "One after the other, the best first"),
    (("without stall",), "Each wait gone alone"),
    (("phase",), "A phase of the plan put in"),
    (("without data loading", "without allocation", "without stream waits"), "Other delays gone"),
    (("graph",), "Launches captured in a graph"),
)

SECTIONS: tuple[tuple[str, str], ...] = (
    ("step", "Step"),
    ("findings", "Findings"),
    ("stalls", "Host reads"),
    ("whatif", "What if"),
    ("timeline", "Timeline"),
    ("idle", "Idle"),
    ("hotspots", "Hotspots"),
    ("launches", "Launches"),
    ("fusion", "Fusion"),
    ("roofline", "Roofline"),
    ("path", "Critical path"),
    ("flame", "Host time"),
    ("memory", "Memory"),
    ("ranks", "Ranks"),
    ("throughput", "Throughput"),
    ("traces", "Trace"),
    ("environment", "Environment"),
    ("record", "Record"),
)


@dataclass(frozen=True)
class TraceView:
    """What the analysis of one trace puts on a page; whatever was not found is None or empty."""

    analysis: TraceAnalysis
    faults: list[Finding]
    no_faults: list[Finding]
    estimates: Groups
    cumulative: bool
    views: list[tuple[str, list[Hotspot]]]
    roofline: Plot | None
    memory: Plot | None
    flame: FlameView | None
    path_seconds: float


def view(analysis: TraceAnalysis | None, ceilings: Ceilings | None) -> TraceView | None:
    """Everything that ``analysis`` found; None where a record has none."""
    if analysis is None:
        return None
    groups = estimates(analysis.whatif)
    ordered = [(tracewords.VIEWS[name], analysis.views[name]) for name in tracewords.VIEWS if analysis.views.get(name)]
    return TraceView(
        analysis=analysis,
        faults=tracewords.faults(analysis),
        no_faults=[
            found for found in analysis.findings if found.cause == "device-bound" and not _said(found, analysis)
        ],
        estimates=groups,
        cumulative=any(row.cumulative_seconds_per_step is not None for _, rows in groups for row in rows),
        # The kernels have a section of their own.
        views=[(name, rows) for name, rows in ordered if name != tracewords.VIEWS["kernel"]],
        roofline=traceplots.roofline(analysis.roofline, ceilings),
        memory=traceplots.memory(analysis.memory),
        flame=flameview.layout(analysis.flame),
        path_seconds=sum(part.seconds_per_step for part in analysis.critical_path),
    )


def _said(found: Finding, analysis: TraceAnalysis) -> bool:
    return found.sentence.rstrip(".").lower() in analysis.headline.lower()


def estimates(whatif: WhatIf | None) -> Groups:
    """The estimates by kind of change, in the order in which they are read; none where the replay refused."""
    if whatif is None or whatif.refused:
        return []
    groups = [(title, [row for row in whatif.estimates if row.change in changes]) for changes, title in ESTIMATES]
    return [(title, rows) for title, rows in groups if rows]


def sections(found: TraceView | None, own: Sequence[str]) -> list[tuple[str, str]]:
    """The table of contents: the sections that a page has of its own and those of its trace, in reading order."""
    present = set(own)
    if found is not None:
        analysis = found.analysis
        parts = {
            "findings": found.faults or found.no_faults,
            "whatif": analysis.whatif,
            "idle": analysis.idle_sites,
            "fusion": analysis.fusion,
            "roofline": analysis.roofline,
            "path": analysis.critical_path,
            "flame": found.flame,
            "memory": found.memory,
            "ranks": analysis.communication,
        }
        present |= {name for name, part in parts.items() if part}
    return [(name, title) for name, title in SECTIONS if name in present]
