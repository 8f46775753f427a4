"""A second process that decodes the latter part of a large trace, so that reading uses two cores."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernbench.kinetopiece import Piece

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, eq=False)
class Part:
    """What lies from byte ``start`` of a file's text to its end: the events' pieces, and metadata as JSON text."""

    start: int
    pieces: list[Piece]
    devices: bytes
    distributed: bytes


Decode = Callable[[Path, int, bytes], Part]


class Helper:
    """A process that calls ``decode``, a function of a module, with these arguments; :meth:`close` ends it."""

    def __init__(self, decode: Decode, path: Path, split: int, closing: bytes) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from {decode.__module__} import {decode.__name__}; "
            f"from {__name__} import serve; serve({decode.__name__})"
        )
        command = [sys.executable, "-c", code, str(path), str(split), closing.decode()]
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._process = None

    def part(self) -> Part | None:
        """Wait for the part; None if the process could not start, died, or found the text damaged.

        Its caller then decodes everything itself, and says what is wrong with the text.
        """
        if self._process is None or self._process.stdout is None:
            return None
        try:
            part: Part = pickle.load(self._process.stdout)  # noqa: S301 (written by our own code)
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        return part

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


def serve(decode: Decode) -> None:
    """What the helper process does. If it fails, it ends without a part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path, split, closing = sys.argv[1:]
    pickle.dump(decode(Path(path), int(split), closing.encode()), sys.stdout.buffer, protocol=5)
