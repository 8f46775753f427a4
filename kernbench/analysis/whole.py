"""All analyses of one trace together, for a profile and for a trace of others alike."""

from __future__ import annotations

from collections.abc import Sequence

from kernbench.analysis import (
    communication,
    criticalpath,
    findings,
    flame,
    fusion,
    hotspots,
    idle,
    launches,
    memory,
    shapes,
    stalls,
    whatif,
)
from kernbench.record import Ceilings, Communication, LineLog, Stall, TraceAnalysis
from kernbench.traces.trace import Trace


def enrich(
    trace: Trace,
    lines: LineLog | None,
    ceilings: Ceilings | None,
    found: Sequence[Stall],
    *,
    ranks: Communication | None = None,
    unprofiled_seconds: float | None = None,
    shaped: Trace | None = None,
) -> TraceAnalysis:
    """All that a trace tells beyond a profile's own fields.

    Args:
        lines: the log of the line pass over the same steps; None for a trace of others.
        ceilings: the roofs of the device that the trace is from; None where nobody measured them.
        found: the stalls of this trace, by ``stalls.stalls``; ``whatif.with_savings`` adds what the replay saves.
        ranks: the communication of all ranks of the run; that of this trace alone if left out.
        unprofiled_seconds: a step's time without the profiler, where it was measured.
        shaped: a trace of the same step that holds shapes, if ``trace`` does not.
    """
    replayed = whatif.whatif(trace, found, ceilings, lines, unprofiled_seconds=unprofiled_seconds)
    if ranks is None:
        ranks = communication.communication([trace])
    costs = findings.findings(trace, replayed, lines=lines, communication=ranks, shaped=shaped)
    return TraceAnalysis(
        trace=trace.info,
        headline=findings.headline(trace, costs, replayed),
        findings=costs,
        views={str(view): rows for view, rows in hotspots.views(trace, lines).items()},
        gaps=launches.gaps(trace),
        idle_sites=idle.sites(trace, lines),
        fusion=fusion.fusion(trace, lines, ceilings),
        roofline=shapes.roofline(trace, ceilings),
        communication=ranks,
        memory=memory.memory(trace),
        critical_path=criticalpath.critical_path(trace, lines),
        flame=flame.flame(trace),
        whatif=replayed,
        line_match=stalls.line_match(trace, lines) if lines is not None else None,
    )
