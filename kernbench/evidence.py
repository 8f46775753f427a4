"""What a name on the command line stands for: a run with its record and the trace that it kept, or a trace file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kernbench import record, registry, runfolder
from kernbench.errors import KernbenchError
from kernbench.record import AnalyzeRecord, ProfileRecord, Record

RECORD = "record.json"
TRACES = ("trace.json.gz", "trace.after.json.gz", "trace.before.json.gz")
"""What a measured run calls the trace that it keeps; of a swap's two, the one after counts."""

_RECORD_BEGINS = re.compile(rb'\s*\{\s*"kind"\s*:')


@dataclass(frozen=True)
class Evidence:
    """What there is under one name: ``side`` is the profile or analysis in the record, None for a bare trace file."""

    name: str
    record: Record | None
    side: ProfileRecord | AnalyzeRecord | None
    trace: Path | None


def find(reference: str) -> Evidence:
    """What ``reference`` names: a run folder, its record.json, part of a run id, or a trace file.

    Raises:
        KernbenchError: nothing matches, several runs do, or the record is damaged.
    """
    path = Path(reference)
    if is_trace(path):
        return Evidence(path.name, None, None, path)
    file = runfolder.find_record(registry.current(), reference)
    try:
        found = record.read(file)
    except record.RecordError as error:
        raise KernbenchError(str(error)) from None
    names = [one.file for one in found.traces] if isinstance(found, AnalyzeRecord) else TRACES
    kept = next((file.with_name(name) for name in names if file.with_name(name).is_file()), None)
    return Evidence(file.parent.name if file.name == RECORD else file.name, found, side_of(found), kept)


def is_trace(path: Path) -> bool:
    """Whether a path is a file that can only be a trace: neither named nor begun like a record."""
    if path.name == RECORD or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _RECORD_BEGINS.match(file.read(64)) is None
    except OSError as error:
        raise KernbenchError(f"cannot read {path}: {error.strerror or error}; name a run or a trace") from None


def side_of(found: Record) -> ProfileRecord | AnalyzeRecord | None:
    """The profile or analysis in a record: itself, or the side after of a swap or comparison."""
    if isinstance(found, record.SwapRecord):
        return found.after or found.before
    if isinstance(found, record.CompareRecord):
        return found.after
    return found if isinstance(found, ProfileRecord | AnalyzeRecord) else None
