"""The process that children are forked from. It has done the heavy imports, and it runs nothing of the user's.

A child costs milliseconds this way, and starts as fresh as a new program: no user module, no CUDA context, no thread
that holds a lock. One packet on the control socket asks for a child, and names what is to be imported for it and for
those after it; packets back say which children began and which ended, and how. When the parent is gone the socket ends,
this process ends, and its children, whatever they hang in, are killed by the kernel (see ``worker.live``).

Python's own forkserver will not do: its children import the parent's main module again, hold the pipe that keeps the
server alive (so that a hanging child outlives a killed parent), and may not have children themselves.
"""

from __future__ import annotations

import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kernbench.children import worker

PACKET = struct.Struct("=cii")
"""What happened (one of the three below), to which process, and its wait status."""
REQUEST_BYTES = 1024
"""A plus sign, and names of modules that the child needs."""
FILES = 3
"""Connection, dump and unit; see ``worker.live``."""
READY, BEGAN, ENDED = b"R", b"B", b"E"


def serve(control_fd: int, modules: Sequence[str]) -> None:
    """Import the modules, then fork children until the other end of the control socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python counts every thread; the only ones here are those of a BLAS, which stops and starts them around a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    _import(modules)
    control = socket.socket(fileno=control_fd)
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    control.send(PACKET.pack(READY, 0, 0))
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wake in ready:
                os.read(wake, 4096)
                _report_ended(control)
            if control.fileno() in ready:
                try:
                    asked, files, _, _ = socket.recv_fds(control, REQUEST_BYTES, FILES)
                except ConnectionResetError:
                    # The parent left before it read that this process is ready.
                    return
                if not asked:
                    return
                _import(asked.decode().split()[1:])
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for descriptor in (control.detach(), wake, woken, selector.fileno()):
                        os.close(descriptor)
                    worker.live(*files)
                for descriptor in files:
                    os.close(descriptor)
                control.send(PACKET.pack(BEGAN, pid, 0))


@contextmanager
def imports() -> Iterator[None]:
    """What is imported meanwhile stays, so nothing is collected: a tenth of the time that it takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _import(modules: Sequence[str]) -> None:
    with imports():
        for name in modules:
            importlib.import_module(name)
    # A child that collects garbage, as it does before it times something, need not look at all this: 0.2 s each time.
    gc.freeze()


def _report_ended(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        control.send(PACKET.pack(ENDED, pid, status))
