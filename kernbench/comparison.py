"""Two runs side by side, or two traces: as what they took, and where their steps differ operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from kernbench import evidence, host, record, registry, runfolder, verdict
from kernbench.analysis import breakdown, hotspots, idle, launches, stalls, timeline
from kernbench.analysis.difference import difference
from kernbench.errors import KernbenchError
from kernbench.measurement import statistics
from kernbench.publish import Outcome, index, render
from kernbench.record import AnalyzeRecord, ProfileRecord
from kernbench.traces import trace
from kernbench.traces.trace import Trace

TRACE = "trace"
"""The preset that the workload of a trace is recorded with: nobody knows the real one."""


@dataclass(frozen=True)
class Side:
    """One of the two: its timed steps, and its trace where it kept one. ``traced`` steps are slowed by the profiler."""

    profile: ProfileRecord
    trace: Trace | None
    traced: bool


def compare(run_a: str, run_b: str, command: str) -> Outcome:
    """Two runs or two traces side by side, with a report under reports/compare/.

    Raises:
        KernbenchError: one is missing, damaged or without timed steps, the two measure different workloads, or one is a
            trace and the other a profile.
    """
    one, other = side(run_a), side(run_b)
    before, after = one.profile, other.profile
    assert before.steps is not None
    assert after.steps is not None
    if one.traced != other.traced:
        traced, timed = (run_a, run_b) if one.traced else (run_b, run_a)
        raise KernbenchError(
            f"the steps of {traced} are traced, which slows them down, and those of {timed} are not; name two traces "
            "(a run's is in its folder), or two runs"
        )
    if not one.traced and (before.workload.name, before.workload.unit) != (after.workload.name, after.workload.unit):
        raise KernbenchError(
            f"{before.workload.name} and {after.workload.name} are different workloads; name two runs of one"
        )
    # A single traced step tells nothing of how much steps vary.
    alone = one.traced and min(len(before.steps.seconds), len(after.steps.seconds)) < 2
    ratio = None if alone else statistics.unpaired_ratio(before.steps.seconds, after.steps.seconds)
    workspace = registry.current()
    run_id = runfolder.new_run_id("compare")
    result = record.CompareRecord(
        run_id=run_id,
        created_utc=runfolder.now_utc().isoformat(timespec="seconds"),
        command=command,
        environment=after.environment,
        git=after.git,
        confidence=statistics.CONFIDENCE,
        before=before,
        after=after,
        ratio=ratio,
        verdict=verdict.compare(ratio) if ratio is not None else None,
        difference=difference(one.trace, other.trace) if one.trace is not None and other.trace is not None else None,
        warnings=_warnings(one, other),
    )
    folder = runfolder.make_folder(workspace, "compare", run_id)
    result.status = "complete"
    record.write(result, folder / "record.json")
    render(result, folder / "report.html")
    index(workspace)
    return Outcome(result, folder / "report.html")


def side(reference: str) -> Side:
    """What a name stands for, as one side of a comparison.

    Raises:
        KernbenchError: there is nothing of that name, or it holds no timed steps.
    """
    found = evidence.find(reference)
    loaded = trace.load(found.trace) if found.trace is not None else None
    if found.record is None:
        assert loaded is not None
        loaded.check()
        return Side(_of_trace(found.name, loaded), loaded, traced=True)
    if isinstance(found.side, AnalyzeRecord):
        return Side(_of_analysis(found.side), loaded, traced=True)
    if found.side is None or found.side.steps is None:
        raise KernbenchError(
            f"{found.name} holds no timed steps, so there is nothing to compare; name profile or swap runs, or traces"
        )
    return Side(found.side, loaded, traced=False)


def _of_trace(name: str, loaded: Trace) -> ProfileRecord:
    windows = idle.step_windows(loaded)
    counted = launches.launches(loaded)
    return ProfileRecord(
        run_id=name,
        created_utc="",
        command="",
        environment=_environment(loaded.info.device, on_gpu=loaded.on_gpu),
        status="complete",
        workload=_workload(loaded.info.file or name),
        steps=record.Steps(seconds=((windows.end - windows.start) / 1e9).tolist(), units_per_step=1),
        breakdown=breakdown.breakdown(loaded),
        hotspots=hotspots.hotspots(loaded, None),
        stalls=stalls.stalls(loaded, None),
        launches_per_step=counted.per_step,
        launches=counted,
        idle=idle.idle(loaded),
        timeline=timeline.timeline(loaded),
    )


def _of_analysis(found: AnalyzeRecord) -> ProfileRecord:
    shown = found.traces[0]
    return ProfileRecord(
        run_id=found.run_id,
        created_utc=found.created_utc,
        command=found.command,
        environment=_environment(shown.device, on_gpu=found.idle is not None),
        status=found.status,
        workload=_workload(shown.file),
        steps=record.Steps(seconds=found.step_seconds, units_per_step=1),
        breakdown=found.breakdown,
        hotspots=found.hotspots,
        stalls=found.stalls,
        launches_per_step=found.launches.per_step if found.launches is not None else None,
        launches=found.launches,
        idle=found.idle,
        timeline=found.timeline,
        analysis=found.analysis,
    )


def _workload(name: str) -> record.WorkloadInfo:
    return record.WorkloadInfo(name=Path(name).name, preset=TRACE, dtype="", seed=0, unit="steps")


def _environment(device: str, *, on_gpu: bool) -> record.Environment:
    """This machine's, with the trace's device: what else recorded it, a trace does not tell."""
    recorded = record.Device(type="cuda" if on_gpu else "cpu", name=device or "unknown")
    return structs.replace(host.environment(), device=recorded, torch="", triton="")


def _warnings(one: Side, other: Side) -> list[str]:
    before, after = one.profile, other.profile
    found = []
    if before.environment.device.name != after.environment.device.name:
        found.append(
            f"the runs are from different devices: {before.environment.device.name} and {after.environment.device.name}"
        )
    if before.workload.preset != after.workload.preset:
        found.append(f"the presets differ: {before.workload.preset} and {after.workload.preset}")
    if before.workload.weights != after.workload.weights:
        weights = [side.workload.weights or "random ones" for side in (before, after)]
        found.append(f"the weights differ: {weights[0]} and {weights[1]}")
    if one.traced:
        found.append("the steps were traced, which slows down what the host does")
    return found
