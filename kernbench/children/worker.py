"""A child's side: it takes one job, runs it, and tells the parent what it begins, what it finds and how it ends.

Everything that crosses is a pair of a word and a value, pickled by ``multiprocessing.connection``. Nothing of the
user's is ever pickled: jobs hold names and numbers, and find the declarations again.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.progress import Advance, Progress

Unit = tuple[str, ...]
"""What a job begins: names that the parent knows it by."""

WHERE = signal.SIGUSR2
"""The parent asks with it where a child hangs; the answer is written without the help of the interpreter's loop."""
UNIT_BYTES = 2048
ADVANCE_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class Tell(Protocol):
    """What a job can say while it runs."""

    @property
    def progress(self) -> Progress:
        """Where stages of the work are announced."""

    def begin(self, *unit: str) -> None:
        """A unit of work begins, and with it its time limit; if the process ends now, it was this unit."""

    def send(self, payload: Any) -> None:
        """Something was found."""


class Job(Protocol):
    """Work for a child: a picklable value that finds what it needs by name.

    ``imports`` names modules that take long and that it will need; children of one server share them.
    """

    imports: ClassVar[tuple[str, ...]]

    def run(self, tell: Tell) -> Any:
        """Do it; what it returns goes to the parent."""


@dataclass(frozen=True)
class Here:
    """Tells the caller in the same process."""

    send: Callable[[Any], None]
    progress: Progress

    def begin(self, *unit: str) -> None:
        return None


@dataclass(frozen=True)
class Setting:
    """What a process is told by its surroundings, which may have changed since the server started."""

    folder: str = field(default_factory=os.getcwd)
    arguments: list[str] = field(default_factory=lambda: list(sys.argv))
    path: list[str] = field(default_factory=lambda: list(sys.path))
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    threads: int | None = field(
        default_factory=lambda: sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    )

    def enter(self) -> None:
        """Make it this process's."""
        os.chdir(self.folder)
        sys.argv[:] = self.arguments
        sys.path[:] = self.path
        os.environ.clear()
        os.environ.update(self.environment)
        if self.threads is not None:
            import torch

            if torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Failure:
    """A KernbenchError on its way to the parent."""

    message: str
    traceback_text: str
    workload: bool

    def error(self) -> KernbenchError:
        return WorkloadFailed(self.message, self.traceback_text) if self.workload else KernbenchError(self.message)


def live(connection_fd: int, dump_fd: int, unit_fd: int) -> NoReturn:
    """The whole life of a child, from its fork on.

    Args:
        dump_fd: where a crash, or the answer to WHERE, is written.
        unit_fd: where the unit stands that has begun last.
    """
    _belong_to_the_server(os.getppid())
    # A kernel that crashes or hangs leaves its Python lines here, for the parent to read.
    faulthandler.enable(dump_fd, all_threads=False)
    faulthandler.register(WHERE, dump_fd, all_threads=False)
    code = 1
    try:
        connection = Connection(connection_fd)
        setting, job = connection.recv()
        setting.enter()
        _run(job, _Remote(connection, unit_fd))
        code = 0
    except (EOFError, BrokenPipeError):
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of the process: what arrives here is shown, then it ends
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # No finalizers: a context that a kernel has broken would hang or crash in them.
        os._exit(code & 0xFF)


def _belong_to_the_server(server: int) -> None:
    """A process group of its own, killed with the server, and the first to go when memory runs out."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != server:
        os._exit(1)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        # A container may forbid it; then the kernel chooses by size, which this process has.
        return


def _run(job: Job, tell: _Remote) -> None:
    connection = tell.connection
    try:
        result = job.run(tell)
    except KeyboardInterrupt:
        connection.send(("interrupted", None))
    except KernbenchError as error:
        failure = Failure(str(error), error.traceback_text, isinstance(error, WorkloadFailed))
        connection.send(("failed", failure))
    except Exception:  # noqa: BLE001 - a bug of ours; the parent raises it with these lines
        connection.send(("broke", traceback.format_exc()))
    else:
        connection.send(("done", result))


class _Remote:
    """Tells the parent. Beginnings are written where it looks now and then: a message would wake it up beside what is
    about to be timed."""

    def __init__(self, connection: Connection, unit_fd: int) -> None:
        self.connection = connection
        self.unit_fd = unit_fd
        self.progress = _RemoteProgress(connection)

    def begin(self, *unit: str) -> None:
        os.pwrite(self.unit_fd, json.dumps([time.monotonic(), *unit]).encode().ljust(UNIT_BYTES), 0)

    def send(self, payload: Any) -> None:
        self.connection.send(("payload", payload))


class _RemoteProgress:
    """Progress that shows in the parent; small steps are sent together."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.depth = 0

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        self.connection.send(("stage", (title, total)))
        level, waiting, sent = self.depth, 0, time.monotonic()
        self.depth += 1

        def advance(units: int) -> None:
            nonlocal waiting, sent
            waiting += units
            if time.monotonic() - sent >= ADVANCE_SECONDS:
                self.connection.send(("advance", (level, waiting)))
                waiting, sent = 0, time.monotonic()

        try:
            yield advance
        finally:
            self.depth -= 1
            # Without a parent nobody counts stages any more, and what ended this one is on its way already.
            with suppress(BrokenPipeError):
                self.connection.send(("stage ends", None))

    def note(self, text: str) -> None:
        self.connection.send(("note", text))
