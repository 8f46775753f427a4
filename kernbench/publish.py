"""The end of every command: the record whole, its report rendered, the index over all runs renewed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernbench import record
from kernbench.registry import Workspace
from kernbench.runfolder import Run


@dataclass(frozen=True)
class Outcome:
    """A finished command: its record and where its report lies."""

    record: record.Record
    report: Path | None

    @property
    def negative(self) -> bool:
        """Whether the answer is a no: parity failed, a build too, a phase was rejected, the second run is slower."""
        match self.record:
            case record.SwapRecord(verdict=verdict):
                return verdict is not None and verdict.decision == "reject"
            case record.ParityRecord(results=results, sanitizer=tools):
                return not (all(row.passed for row in results) and all(tool.passed for tool in tools))
            case record.BenchRecord(builds=builds):
                return not all(build.passed for build in builds)
            case record.CompareRecord(verdict=verdict):
                return verdict is not None and verdict.decision == "reject"
            case _:
                return False


def publish(run: Run[Any], workspace: Workspace) -> Outcome:
    """Mark the record complete, render its report and the index."""
    run.complete()
    render(run.record, run.report_path)
    index(workspace)
    return Outcome(run.record, run.report_path)


def render(result: record.Record, path: Path) -> None:
    """Render a record's report to ``path``, atomically; the traces beside it can be opened from the page."""
    # Here and below: what renders pages takes a tenth of a second to load, which measuring need not wait for.
    from kernbench.report import html

    traces = sorted(
        found.name for found in path.parent.glob("*.json*") if found.name not in ("record.json", "lines.json")
    )
    record.write_atomically(path, html.render(result, traces).encode())


def index(workspace: Workspace) -> Path:
    """Render ``reports/index.html`` over all runs; a damaged record is listed as damaged."""
    from kernbench.report import html

    entries = []
    for path in workspace.records():
        link = path.parent.relative_to(workspace.reports).as_posix() + "/report.html"
        try:
            entries.append(html.IndexEntry(link, record.read(path), ""))
        except record.RecordError as error:
            entries.append(html.IndexEntry(link, None, str(error)))
    target = workspace.reports / "index.html"
    record.write_atomically(target, html.render_index(entries).encode())
    return target
