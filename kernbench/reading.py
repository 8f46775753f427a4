"""Commands that only read what is on disk: report, journal. No torch is imported on this path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernbench import journal, record, registry, runfolder
from kernbench.errors import KernbenchError
from kernbench.publish import Outcome, index, render


def _read(reference: str) -> tuple[Path, record.Record]:
    path = runfolder.find_record(registry.current(), reference)
    try:
        return path, record.read(path)
    except record.RecordError as error:
        raise KernbenchError(str(error)) from None


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
