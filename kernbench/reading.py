"""Commands that only read what is on disk: compare, report, journal. No torch is imported on this path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernbench import journal, record, registry, runfolder, statistics, verdict
from kernbench.errors import KernbenchError
from kernbench.publish import Outcome, index, render


def _read(reference: str) -> tuple[Path, record.Record]:
    path = runfolder.find_record(registry.current(), reference)
    try:
        return path, record.read(path)
    except record.RecordError as error:
        raise KernbenchError(str(error)) from None


def _profile(reference: str) -> record.ProfileRecord:
    """The profile in a run: itself, or the side after of a swap.

    Raises:
        KernbenchError: the run holds no timed steps.
    """
    path, found = _read(reference)
    side = found
    if isinstance(found, record.SwapRecord):
        side = found.after or found.before or found
    if not isinstance(side, record.ProfileRecord) or side.steps is None:
        raise KernbenchError(f"{path} holds no timed steps, so there is nothing to compare; name profile or swap runs")
    return side


def compare(run_a: str, run_b: str, command: str) -> Outcome:
    """Two runs side by side, with a report under reports/compare/.

    Raises:
        KernbenchError: a run is missing, damaged, or the two measure different workloads or units.
    """
    before, after = _profile(run_a), _profile(run_b)
    if (before.workload.name, before.workload.unit) != (after.workload.name, after.workload.unit):
        raise KernbenchError(
            f"{before.workload.name} and {after.workload.name} are different workloads; name two runs of one"
        )
    assert before.steps is not None
    assert after.steps is not None
    workspace = registry.current()
    run_id = runfolder.new_run_id("compare")
    ratio = statistics.unpaired_ratio(before.steps.seconds, after.steps.seconds)
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
        verdict=verdict.compare(ratio),
    )
    if before.environment.device.name != after.environment.device.name:
        result.warnings.append(
            f"the runs are from different devices: {before.environment.device.name} and {after.environment.device.name}"
        )
    if before.workload.preset != after.workload.preset:
        result.warnings.append(f"the presets differ: {before.workload.preset} and {after.workload.preset}")
    if before.workload.weights != after.workload.weights:
        one, other = (side.workload.weights or "random ones" for side in (before, after))
        result.warnings.append(f"the weights differ: {one} and {other}")
    folder = runfolder.make_folder(workspace, "compare", run_id)
    result.status = "complete"
    record.write(result, folder / "record.json")
    render(result, folder / "report.html")
    index(workspace)
    return Outcome(result, folder / "report.html")


def render_again(reference: str) -> Outcome:
    """Render a run's report again from its record, and the index.

    Raises:
        KernbenchError: the run is missing or damaged, or its folder cannot be written.
    """
    path, found = _read(reference)
    target = path.with_name("report.html")
    try:
        render(found, target)
        index(registry.current())
    except OSError as error:
        raise KernbenchError(f"cannot write {target} ({error.strerror or error}); make its folder writable") from None
    return Outcome(found, target)


def journal_entries(*, rebuild: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The journal's entries, oldest first, and what had to be left out.

    Args:
        rebuild: first add the missing entries, from the records; a damaged record is left out, with the reason.
    """
    workspace = registry.current()
    left_out: list[str] = []
    if rebuild:
        swaps, skipped = journal.collect(workspace.records())
        journal.rebuild(workspace.journal, swaps)
        left_out = [reason for _, reason in skipped]
    return [record.to_builtins(entry) for entry in journal.entries(workspace.journal)], left_out
