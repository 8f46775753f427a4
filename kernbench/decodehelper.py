"""A second process that decodes every other piece of a large trace, so that reading uses two cores."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from kernbench import kinetopiece
from kernbench.kinetopiece import Piece

_LENGTH_BYTES = 8
_PACKAGE = Path(__file__).resolve().parent.parent


class Helper:
    """One helper process, which takes one piece at a time; :meth:`close` ends it.

    A process that cannot start, or dies, helps no more: its caller then decodes everything itself.
    """

    def __init__(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from kernbench import decodehelper as d; d.serve()"
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._process = None

    def send(self, text: bytes | memoryview) -> bool:
        """Hand over the text of some whole events; False if nobody took it."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            _write(self._process.stdin, text)
        except OSError:
            self.close()
            return False
        return True

    def receive(self) -> Piece | None:
        """The decoded piece; None if its text was no list of events, or the helper is gone."""
        if self._process is None or self._process.stdout is None:
            return None
        try:
            piece: Piece | None = pickle.loads(_read(self._process.stdout))  # noqa: S301 (written by our own code)
        except (OSError, EOFError):
            self.close()
            return None
        return piece

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):  # unsent text of a process that died
                self._process.communicate()
            self._process = None


def serve() -> None:
    """What the helper process does: decode the pieces that come in, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    while True:
        try:
            text = _read(incoming)
        except EOFError:
            return
        try:
            piece = kinetopiece.of_events(kinetopiece.decoded(b"".join((b"[", text, b"]")), list[kinetopiece.Event]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            piece = None
        _write(outgoing, pickle.dumps(piece, protocol=5))


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    file.write(len(data).to_bytes(_LENGTH_BYTES, "little"))
    file.write(data)
    file.flush()


def _read(file: IO[bytes]) -> bytes:
    size = file.read(_LENGTH_BYTES)
    data = file.read(int.from_bytes(size, "little"))
    if len(size) < _LENGTH_BYTES or len(data) < int.from_bytes(size, "little"):
        raise EOFError("the other process has gone")
    return data
