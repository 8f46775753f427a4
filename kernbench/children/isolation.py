"""Runs jobs in child processes with a limit on time and memory, and puts into words how a child died.

This side imports neither torch nor any kernel; the children come from ``childserver``, which has imported both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import connection as channel
from pathlib import Path
from typing import Any

import kernbench
from kernbench import hostmemory
from kernbench.children import servers
from kernbench.children.servers import ChildBroke as ChildBroke
from kernbench.children.servers import Server
from kernbench.children.worker import UNIT_BYTES, WHERE, Failure, Here, Job, Setting, Unit
from kernbench.errors import WorkloadFailed
from kernbench.progress import Advance, Progress

DUMP_SECONDS = 0.3
"""A hanging child has this long to write down where it is."""
LEAVE_SECONDS = 5.0
END_SECONDS = 20.0
"""A killed process is gone by then, also one whose GPU context the driver has to take down."""
SHOWN_FRAMES = 12
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)


class Died(Exception):  # noqa: N818 - it names what happened to a child; the callers make a result of it
    """A child did not finish. ``reason`` says it in words, ``unit`` is what it had begun last (empty: nothing)."""

    def __init__(self, reason: str, unit: Unit, dump: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.unit = unit
        self.traceback_text = dump


class Stopped(Exception):  # noqa: N818 - as above
    """Whoever runs several jobs at once wants no more of them."""


@dataclass(frozen=True)
class Terms:
    """How jobs are run: seconds per unit of work, or in this process without any limit.

    ``threads`` is how many torch computes with in a child (None: as many as here). ``stop``, once set, ends the child.
    """

    seconds: float
    in_process: bool = False
    threads: int | None = None
    stop: threading.Event | None = None


def run(job: Job, take: Callable[[Any], None], terms: Terms, progress: Progress) -> Any:
    """Run a job, hand what it finds to ``take`` as it comes, and return what it returns.

    Several threads may each run a job at once.

    Raises:
        Died: the child ended before the job did, or was stopped because of time or memory.
        Stopped: ``terms.stop`` was set. KernbenchError: the job raised it. KeyboardInterrupt: the job, or the user.
    """
    if terms.in_process:
        return job.run(Here(take, progress))
    with (
        contextlib.closing(_Child(servers.current(), job.imports)) as child,
        contextlib.closing(_Shown(progress)) as shown,
    ):
        child.connection.send((Setting(threads=terms.threads) if terms.threads else Setting(), job))
        for word, value in child.messages(terms):
            match word:
                case "payload":
                    take(value)
                case "done":
                    child.leave()
                    return value
                case "failed":
                    assert isinstance(value, Failure)
                    raise value.error()
                case "broke":
                    raise ChildBroke(f"in a child process:\n{value}")
                case "interrupted":
                    raise KeyboardInterrupt
                case _:
                    shown.show(word, value)
        raise AssertionError("a child's messages end with its result or its death")


class _Shown:
    """The child's progress, in the parent's."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.open: list[tuple[ExitStack, Advance]] = []

    def show(self, word: str, value: Any) -> None:
        match word:
            case "stage":
                stack = ExitStack()
                self.open.append((stack, stack.enter_context(self.progress.stage(*value))))
            case "advance":
                level, units = value
                self.open[level][1](units)
            case "stage ends":
                self.open.pop()[0].close()
            case "note":
                self.progress.note(value)
            case _:
                raise AssertionError(f"a child said {word!r}")

    def close(self) -> None:
        while self.open:
            self.open.pop()[0].close()


class _Child:
    """One process from its fork to its end, which :meth:`close` makes sure of."""

    def __init__(self, server: Server, imports: Sequence[str]) -> None:
        self.server = server
        self.kills = hostmemory.kills()
        self.began = time.monotonic()
        self.dump = os.memfd_create("kernbench-dump")
        self.unit = os.memfd_create("kernbench-unit")
        ours, theirs = socket.socketpair()
        self.pid = server.fork([theirs.fileno(), self.dump, self.unit], imports)
        theirs.close()
        self.connection: channel.Connection = channel.Connection(ours.detach())
        self.most = hostmemory.budget()

    def messages(self, terms: Terms) -> Iterator[tuple[str, Any]]:
        """What the child says, until it has said how its job ended.

        Raises:
            Died: it ended first, or a unit took longer than it may, or it took more memory than there is.
            Stopped: nobody wants its result any more.
        """
        looked = 0.0
        while True:
            ready = channel.wait([self.connection, self.server.control], servers.LOOK_SECONDS)
            # What a child said before it died counts, so its words come before the news of its death.
            if self.connection in ready:
                try:
                    message: tuple[str, Any] = self.connection.recv()
                except (EOFError, OSError):
                    raise self._death() from None
                yield message
            elif self.server.control in ready:
                self.server.read()
            elif self.pid in self.server.ended:
                raise self._death()
            if time.monotonic() >= looked + servers.LOOK_SECONDS:
                if terms.stop is not None and terms.stop.is_set():
                    raise Stopped
                self._look(terms.seconds)
                looked = time.monotonic()

    def _look(self, seconds: float) -> None:
        held = hostmemory.resident(self.pid)
        if held > self.most:
            raise self._stopped(
                f"ran out of memory: it took {held / 1e9:.1f} GB of the {self.most / 1e9:.1f} GB that it may hold, "
                "and was stopped"
            )
        if time.monotonic() > self._unit()[0] + seconds:
            raise self._stopped(f"did not finish within {seconds:g} s, and was stopped")

    def _unit(self) -> tuple[float, Unit]:
        """When the unit began that has begun last, and what it is."""
        try:
            began, *unit = json.loads(os.pread(self.unit, UNIT_BYTES, 0))
        except ValueError:
            # Nothing is there yet, or it is being written just now.
            return self.began, ()
        return began, tuple(unit)

    def _death(self) -> Died:
        status = self.server.wait_for_end(self.pid, 2.0)
        if status is None:
            return self._stopped("closed its connection to kernbench, and was stopped")
        return self._died(_in_words(status, hostmemory.kills() > self.kills))

    def _stopped(self, reason: str) -> Died:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, WHERE)
        self.server.wait_for_end(self.pid, DUMP_SECONDS)
        self._kill()
        return self._died(reason)

    def _died(self, reason: str) -> Died:
        with open(self.dump, "rb", closefd=False) as file:
            file.seek(0)
            dump = file.read().decode(errors="replace")
        frames = list(_FRAME.finditer(dump))
        lines = [frame[0] for frame in frames[:SHOWN_FRAMES]]
        place = next((frame for frame in frames if _of_the_user(frame["file"])), None)
        if place is not None:
            reason = f"{reason}, in {place['function']} ({_shortened(place['file'])}:{place['line']})"
        return Died(reason, self._unit()[1], "\n".join(["What ran, innermost call first:", *lines]) if lines else "")

    def _kill(self) -> None:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        if self.server.wait_for_end(self.pid, END_SECONDS) is None:
            raise WorkloadFailed(
                f"a child process (id {self.pid}) does not end although it was killed, so its device is stuck; "
                "look at dmesg, and restart the machine if the process stays"
            )

    def leave(self) -> None:
        """Give a child whose job is done the time to end by itself, so that its device is free again."""
        self.server.wait_for_end(self.pid, LEAVE_SECONDS)

    def close(self) -> None:
        """End the process with all that it started, if it has not ended yet."""
        self.connection.close()
        try:
            if self.server.wait_for_end(self.pid, 0.0) is None:
                self._kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        finally:
            self.server.ended.pop(self.pid, None)
            os.close(self.dump)
            os.close(self.unit)


def _in_words(status: int, lacked_memory: bool) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended the process with exit code {code}"
    if code == -signal.SIGKILL and lacked_memory:
        return f"ran out of memory (killed by signal {-code})"
    name = (signal.strsignal(-code) or "unknown").lower()
    return f"killed by signal {-code} ({name})"


def _of_the_user(file: str) -> bool:
    """Whether a file belongs to neither Python, nor an installed package, nor kernbench's engine."""
    package = Path(kernbench.__file__).parent
    path = Path(file)
    if path.is_relative_to(package):
        return path.is_relative_to(package / "builtin")
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return file[:1] != "<" and not any(path.is_relative_to(library) for library in libraries)


def _shortened(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
