"""What a workspace remembers between commands: the workload profiled last, and the phases kept per workload."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct, structs

from kernbench.errors import KernbenchError
from kernbench.record import write_atomically

SCHEMA = 1


class LastProfiled(Struct, frozen=True, kw_only=True):
    """What a swap without a workload's name means."""

    workload: str
    preset: str
    device: str
    weights: str = ""


class KeptPhase(Struct, frozen=True, kw_only=True):
    """A phase whose verdict was keep; ``run_id`` is the swap that earned it."""

    number: int
    implementation: str
    run_id: str
    kept_utc: str


class State(Struct, frozen=True, kw_only=True):
    """The whole memory of a workspace. ``kept`` lists phases per workload in the order they were kept."""

    schema: int = SCHEMA
    last_profiled: LastProfiled | None = None
    kept: dict[str, list[KeptPhase]] = {}

    def profiled(self, workload: str, preset: str, device: str, weights: str = "") -> State:
        """The state after a profile; ``weights`` is the absolute path of their folder, empty without one."""
        last = LastProfiled(workload=workload, preset=preset, device=device, weights=weights)
        return structs.replace(self, last_profiled=last)

    def keeping(self, workload: str, phase: KeptPhase) -> State:
        """The state with ``phase`` on top; a phase kept before moves there with its new implementation."""
        others = [item for item in self.kept.get(workload, []) if item.number != phase.number]
        return structs.replace(self, kept={**self.kept, workload: [*others, phase]})

    def reverting(self, workload: str) -> State:
        """The state without the phase that was kept last.

        Raises:
            KernbenchError: no phase of that workload is kept.
        """
        if not self.kept.get(workload):
            raise KernbenchError(f"no phase of {workload} is kept here, so there is nothing to revert")
        return structs.replace(self, kept={**self.kept, workload: self.kept[workload][:-1]})


def path_of(root: Path) -> Path:
    """The state file of the workspace at ``root``."""
    return root / ".kernbench" / "state.json"


def load(root: Path) -> State:
    """The state of the workspace at ``root``; empty where nothing was saved yet.

    Raises:
        KernbenchError: the file is damaged, written by a newer kernbench, or cannot be read. It is left as it is.
    """
    path = path_of(root)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise KernbenchError(f"cannot read {path} ({error.strerror or error}); make it readable") from None
    try:
        state = msgspec.json.decode(data, type=State)
    except msgspec.MsgspecError as error:
        raise KernbenchError(
            f"{path} is damaged ({error}) and was left as it is; repair it, or move it away to start with no phase kept"
        ) from None
    if state.schema > SCHEMA:
        raise KernbenchError(
            f"{path} has schema {state.schema}, this kernbench reads up to {SCHEMA}; upgrade kernbench, or move it away"
        )
    return state


def update(root: Path, function: Callable[[State], State]) -> State:
    """Replace the state by ``function`` of it, so that concurrent updates come one after the other.

    Raises:
        KernbenchError: the state is damaged (see :func:`load`) or the workspace cannot be written.
    """
    path = path_of(root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            state = function(load(root))
            write_atomically(path, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
    except OSError as error:
        raise _unwritable(path, error) from None
    return state


@contextmanager
def swap_lock(root: Path) -> Iterator[None]:
    """Hold the workspace for one swap. The system drops the lock with its process, however that ends.

    Raises:
        KernbenchError: another swap holds it (the message tells which and since when), or the workspace is read-only.
    """
    holder = path_of(root).with_name("swap.pid")
    lock = FileLock(holder.with_suffix(".lock"))
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        write_atomically(holder, f"process {os.getpid()}, since {now}\n".encode())
    except Timeout:
        raise KernbenchError(
            f"another swap is running in this workspace ({_describe(holder)}); wait for it or stop it"
        ) from None
    except OSError as error:
        lock.release()
        raise _unwritable(holder, error) from None
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    """Who holds the swap lock; it may have been taken a moment ago, before its holder could say so."""
    try:
        return holder.read_text().strip()
    except OSError:
        return "it has just started"


def _unwritable(path: Path, error: OSError) -> KernbenchError:
    reason = error.strerror or error
    return KernbenchError(
        f"cannot write {path} ({reason}); make that folder writable, or set KERNBENCH_WORKSPACE to another"
    )
