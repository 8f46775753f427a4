"""A run on disk: its folder, and a record that is written after every stage, whatever becomes of the next one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from kernbench import record
from kernbench.errors import KernbenchError
from kernbench.progress import Progress
from kernbench.registry import Workspace

AnyRecord = TypeVar("AnyRecord", bound=record.Header)


def now_utc() -> datetime:
    """The time that run ids and records carry."""
    return datetime.now(UTC)


def new_run_id(what: str) -> str:
    """A sortable, unique id: ``20261121-142530-swap-phase0-3fa9``."""
    return f"{now_utc():%Y%m%d-%H%M%S}-{what}-{os.urandom(2).hex()}"


def make_folder(workspace: Workspace, group: str, run_id: str) -> Path:
    """Create ``reports/<group>/<run_id>`` before anything is measured, so that hours of work cannot end in "read-only".

    Raises:
        KernbenchError: the folder cannot be made or written.
    """
    folder = workspace.reports / group / run_id
    try:
        folder.mkdir(parents=True)
        record.write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise KernbenchError(
            f"cannot write results to {workspace.reports} ({error.strerror or error}); make it writable, or set "
            "KERNBENCH_WORKSPACE to another folder"
        ) from None
    return folder


class Run(Generic[AnyRecord]):
    """One command's record and folder. Every stage that ends, well or badly, leaves the record on disk."""

    def __init__(self, folder: Path, result: AnyRecord, progress: Progress) -> None:
        self.folder = folder
        self.record = result
        self.progress = progress

    @property
    def record_path(self) -> Path:
        return self.folder / "record.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, note how it ended, and write the record; exceptions go on."""
        started = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt as interrupt:
            self._finish_stage(name, "interrupted", started)
            self._end_interrupted(interrupt)
            raise
        except Exception as error:
            self._finish_stage(name, "failed", started, str(error).splitlines()[0] if str(error) else repr(error))
            self.record.status = "failed"
            self.write()
            raise
        self._finish_stage(name, "done", started)
        try:
            self.write()
        except KeyboardInterrupt as interrupt:
            self._end_interrupted(interrupt)
            raise

    def _end_interrupted(self, interrupt: BaseException) -> None:
        self.record.status = "interrupted"
        self.write()
        self.show_way_back(interrupt)

    def show_way_back(self, interrupt: BaseException) -> None:
        """Let an interrupt say how to see what was finished."""
        interrupt.add_note(f"kernbench report {self.record.run_id} shows what was finished")

    def skip(self, name: str, reason: str) -> None:
        """Note a stage that was left out, and why."""
        self.record.stages.append(record.Stage(name=name, status="skipped", seconds=0.0, message=reason))

    def warn(self, message: str) -> None:
        """Say something once, on the terminal and in the record."""
        if message not in self.record.warnings:
            self.record.warnings.append(message)
            self.progress.note(message)

    def complete(self) -> None:
        """Mark the record as whole and write it."""
        self.record.status = "complete"
        self.write()

    def write(self) -> None:
        """Write the record as it stands.

        Raises:
            KernbenchError: the folder has become read-only or full.
        """
        try:
            record.write(self.record, self.record_path)  # type: ignore[arg-type]
        except OSError as error:
            raise KernbenchError(
                f"cannot write {self.record_path} ({error.strerror or error}); free space there or make it writable"
            ) from None

    def _finish_stage(self, name: str, status: str, started: float, message: str = "") -> None:
        self.record.stages.append(
            record.Stage(name=name, status=status, seconds=time.perf_counter() - started, message=message)  # type: ignore[arg-type]
        )


def find_record(workspace: Workspace, reference: str) -> Path:
    """The record.json that ``reference`` names: a path to it or to its folder, a run id, or the end or start of one.

    Raises:
        KernbenchError: nothing matches, or several runs do.
    """
    path = Path(reference)
    if path.is_file():
        return path
    if (path / "record.json").is_file():
        return path / "record.json"
    found = [item for item in workspace.records() if reference in item.parent.name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise KernbenchError(
            f"there is no run {reference!r} under {workspace.reports}; kernbench list --runs shows them"
        )
    names = ", ".join(item.parent.name for item in found[-4:])
    raise KernbenchError(
        f"{len(found)} runs match {reference!r} ({names}{', …' if len(found) > 4 else ''}); type more of the id"
    )
