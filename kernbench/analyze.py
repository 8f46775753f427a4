"""Traces of any program, in one record: what profile finds in its own trace, without torch and without a workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernbench import host, registry, runfolder
from kernbench.analysis import breakdown, communication, findings, hotspots, idle, launches, stalls, timeline, whatif
from kernbench.analysis.whole import enrich
from kernbench.errors import KernbenchError
from kernbench.progress import Progress
from kernbench.publish import Outcome, publish
from kernbench.record import AnalyzeRecord, Communication
from kernbench.traces import trace
from kernbench.traces.trace import Trace

GROUP = "analyze"
"""The folder under reports/ that runs of this command go to."""

OWN_FILES = ("record.json", "report.html")


def analyze(paths: Sequence[Path], command: str, progress: Progress, *, page: bool = True) -> Outcome:
    """Analyse one trace, or those of the ranks of one run, into a run folder of the current workspace.

    The first verdict is noted as soon as it is known. Nothing is written before all traces are read.

    Args:
        page: also render the report and the index; else the folder holds the record alone.

    Raises:
        KernbenchError: a file is absent, damaged or no trace; two are of one rank; the workspace cannot be written.
    """
    workspace = registry.current()
    with progress.stage("reading"):
        files, traces = load(paths)
    run_id = runfolder.new_run_id(GROUP)
    result = AnalyzeRecord(
        run_id=run_id,
        created_utc=runfolder.now_utc().isoformat(timespec="seconds"),
        command=command,
        environment=host.environment(),
        traces=[one.info for one in traces],
    )
    run = runfolder.Run(runfolder.make_folder(workspace, GROUP, run_id), result, progress)
    with run.stage("analysis"), progress.stage("analysing"):
        chosen = measure(traces, result, progress)
    _link(run, files[traces.index(chosen)])
    for note in dict.fromkeys(note for one in traces for note in one.info.notes):
        run.warn(note)
    if page:
        return publish(run, workspace)
    run.complete()
    return Outcome(result, None)


def _link(run: runfolder.Run[AnalyzeRecord], file: Path) -> None:
    """Let the run know its trace, for queries and for the page; it is not copied, as traces are large."""
    link = run.folder / file.name
    if link.name in OWN_FILES:
        return
    try:
        link.symlink_to(file.resolve())
    except OSError as error:
        run.warn(f"{link} could not be made ({error.strerror or error}), so name {file} itself in kernbench query")


def load(paths: Sequence[Path]) -> tuple[list[Path], list[Trace]]:
    """The files and their traces, in order of rank.

    Raises:
        KernbenchError: as ``trace.load`` and ``Trace.check``, or two files are one, or of one rank.
    """
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise KernbenchError(f"{paths[position]} is named twice; name each rank's trace once")
    traces = [trace.load(path) for path in paths]
    for one in traces:
        one.check()
    if len(traces) == 1:
        return list(paths), traces
    ranks: dict[int, int] = {}
    for position, one in enumerate(traces):
        rank = one.info.rank
        if rank is None:
            raise KernbenchError(
                f"{paths[position]} does not tell its rank, so it cannot be set beside others; analyze one trace at a "
                "time, or compare two with kernbench compare"
            )
        if rank in ranks:
            raise KernbenchError(
                f"{paths[ranks[rank]]} and {paths[position]} are both of rank {rank}; name different ranks, or "
                "compare the two with kernbench compare"
            )
        ranks[rank] = position
    order = [ranks[rank] for rank in sorted(ranks)]
    return [paths[position] for position in order], [traces[position] for position in order]


def measure(traces: Sequence[Trace], result: AnalyzeRecord, progress: Progress) -> Trace:
    """Fill ``result``, what the first verdict needs before all else; returns the trace that the figures are of."""
    ranks = communication.communication(traces)
    chosen = _slowest(traces, ranks)
    result.stalls = stalls.stalls(chosen, None)
    progress.note(findings.headline(chosen, findings.findings(chosen, communication=ranks)))
    windows = idle.step_windows(chosen)
    result.step_seconds = ((windows.end - windows.start) / 1e9).tolist()
    result.idle = idle.idle(chosen)
    result.launches = launches.launches(chosen)
    result.breakdown = breakdown.breakdown(chosen)
    result.hotspots = hotspots.hotspots(chosen, None)
    result.timeline = timeline.timeline(chosen)
    result.analysis = enrich(chosen, None, None, result.stalls, ranks=ranks)
    result.stalls = whatif.with_savings(result.stalls, result.analysis.whatif)
    return chosen


def _slowest(traces: Sequence[Trace], ranks: Communication | None) -> Trace:
    """The trace of the rank that the others wait for, else the first one."""
    if ranks is None or ranks.slowest_rank is None:
        return traces[0]
    return next(one for one in traces if one.info.rank == ranks.slowest_rank)
