"""Starts the process that children are forked from, and takes the news of them; ``childserver`` is what runs in it.

It is a new program, or a copy of this one where this one has done the same imports, and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import connection as channel
from pathlib import Path
from typing import NoReturn

from kernbench.children import childserver
from kernbench.children.childserver import BEGAN, ENDED, PACKET

MODULES = ("torch", "kernbench.children.jobs")
LOOK_SECONDS = 0.1
"""How often it is looked at what a child holds and what it has begun."""
TRITON_INTERPRET = "TRITON_INTERPRET"


class ChildBroke(Exception):  # noqa: N818 - it names what happened to a child; the callers make a result of it
    """A job raised what it should have made a result of; the message is its traceback."""


def prepare(device: str) -> None:
    """Start the server as a new program now, so that its imports run beside this process's own.

    A wrong guess of what "auto" will be costs only time.
    """
    _start("1" if on_cpu(device) else None)


def fork() -> None:
    """Make a copy of this process the server, which spares its imports.

    For a program that has imported modules and done nothing else: it has no thread, no CUDA, no module of the user's.
    """
    _start(os.environ.get(TRITON_INTERPRET), copied=True)


def on_cpu(device: str) -> bool:
    """Whether a device as typed is no GPU for sure; "auto" may be one where a driver of NVIDIA is."""
    return device.startswith("cpu") or (device == "auto" and not Path("/dev/nvidiactl").exists())


class Server:
    """The process that children are forked from, and the news of them, which any of several threads may take."""

    def __init__(self, interpreted: str | None, *, copied: bool = False) -> None:
        self.interpreted = interpreted
        self.owner = os.getpid()
        self.began: list[int] = []
        self.ended: dict[int, int] = {}
        self.is_ready = False
        self.forking, self.reading = threading.Lock(), threading.Lock()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = _Copy(self.control, theirs) if copied else _new_program(interpreted, theirs)
        theirs.close()

    def wait_until_ready(self) -> None:
        while not self.is_ready:
            self.read()

    def fork(self, files: list[int], imports: Sequence[str]) -> int:
        """A new child with these files and these modules; its process id."""
        # One at a time, since the news of a beginning does not say whose child it is.
        with self.forking:
            self.wait_until_ready()
            socket.send_fds(self.control, [" ".join(["+", *imports]).encode()], files)
            while not self.began:
                self.read()
            return self.began.pop()

    def read(self) -> None:
        """Take one piece of news, or none if it does not come soon: another thread may have taken it.

        Raises:
            ChildBroke: there is no server any more.
        """
        with self.reading:
            if channel.wait([self.control], LOOK_SECONDS):
                self._take(self.control.recv(PACKET.size))

    def _take(self, packet: bytes) -> None:
        if not packet:
            raise ChildBroke(f"the process that starts kernels ended with exit code {self.process.wait()}")
        what, pid, status = PACKET.unpack(packet)
        if what == BEGAN:
            self.began.append(pid)
        elif what == ENDED:
            self.ended[pid] = status
        else:
            self.is_ready = True

    def wait_for_end(self, pid: int, seconds: float) -> int | None:
        """The wait status of a child, or None if it is still there after ``seconds``."""
        deadline = time.monotonic() + seconds
        while pid not in self.ended:
            if channel.wait([self.control], min(LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
                self.read()
            elif time.monotonic() >= deadline:
                return None
        return self.ended[pid]

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        self.control.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


def _new_program(interpreted: str | None, control: socket.socket) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != TRITON_INTERPRET}
    if interpreted is not None:
        environment[TRITON_INTERPRET] = interpreted
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from kernbench.children import childserver; "
        f"childserver.serve({control.fileno()}, {MODULES!r})"
    )
    # What a kernel prints goes to standard error, for standard output is the record's; and a group of its own
    # keeps Ctrl-C away, whose effect on the children this process decides.
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL, stdout=2, env=environment, pass_fds=[control.fileno()], process_group=0,
    )  # fmt: skip


class _Copy:
    """A copy of this process that serves; it has what is used of ``subprocess.Popen``."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.status: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # A Ctrl-C that comes before the copy has left this process's group is for this process alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with warnings.catch_warnings():
            # As in childserver: the threads that Python counts are those of a BLAS.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            ours.close()
            _serve(theirs, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        status = self._ended(0)
        assert status is not None
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, options: int) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, options)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status


def _serve(control: socket.socket, mask: set[signal.Signals] | set[int]) -> NoReturn:
    """The rest of a copy's life."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.unraisablehook = sys.__unraisablehook__
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        childserver.serve(control.detach(), MODULES)
        code = 0
    except BaseException:  # noqa: BLE001 - the last frame of the process: what arrives here is shown, then it ends
        traceback.print_exc()
    finally:
        # No finalizers: they are the original's.
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


_server: Server | None = None
_starting = threading.Lock()


def current() -> Server:
    """The server whose Triton was imported as this process would import it now."""
    return _start(os.environ.get(TRITON_INTERPRET))


def _start(interpreted: str | None, *, copied: bool = False) -> Server:
    with _starting:
        return _started(interpreted, copied)


def _started(interpreted: str | None, copied: bool) -> Server:
    global _server
    if _server is None or _server.interpreted != interpreted or not _server.usable:
        if _server is None:
            atexit.register(_end_server)
        else:
            _server.close()
        _server = Server(interpreted, copied=copied)
    return _server


def _end_server() -> None:
    if _server is not None:
        _server.close()
