"""A second process that decodes the latter part of a large trace, so that reading uses two cores."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from kernbench.kinetopiece import Piece

GZIP = b"\x1f\x8b"

_PACKAGE = Path(__file__).resolve().parent.parent
_START = f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from kernbench import tracefile; tracefile.serve()"
# Bytes that its reader decodes before a process that starts with it, or started before it, has loaded its modules.
_HEAD_START, _HEAD_START_IF_PREPARED = 26 << 20, 4 << 20
_SMALLEST_COMPRESSED = 1 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """What lies from byte ``start`` of a file's text to its end: the events' pieces, and metadata as JSON text."""

    start: int
    pieces: list[Piece]
    devices: bytes
    distributed: bytes


class Helper:
    """A process that decodes one part; :meth:`close` ends it, as the end of this process does."""

    def __init__(self) -> None:
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            self._process = None

    def begin(self, path: Path, split: int, closing: bytes) -> None:
        """Let it decode what follows byte ``split`` of the text; ``closing`` is as in ``tracefile.latter_part``."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # It died; then there will be no part either.
                pickle.dump((path, split, closing), self._process.stdin)
                self._process.stdin.flush()

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
            with contextlib.suppress(OSError), self._process as process:
                process.kill()
            self._process = None


_prepared: list[Helper] = []


def prepare(path: Path) -> None:
    """Start the process for this file, if it is large, so that it loads its modules while the caller loads its own."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if _middle(file, _HEAD_START_IF_PREPARED) is not None:
            _prepared.append(Helper())


def helper() -> Helper:
    """The process that was prepared, else one that starts now."""
    return _prepared.pop() if _prepared else Helper()


def split(file: BinaryIO) -> int | None:
    """Where in the text of a file a helper begins, so that both end at about the same time; None for a small file."""
    return _middle(file, _HEAD_START_IF_PREPARED if _prepared else _HEAD_START)


def _middle(file: BinaryIO, head_start: int) -> int | None:
    size, head = os.fstat(file.fileno()).st_size, file.read(2)
    if head == GZIP and size > _SMALLEST_COMPRESSED:
        # The last member's size modulo 2^32, which is the text's in nearly all files; else the halves are unequal.
        file.seek(-4, os.SEEK_END)
        size = max(int.from_bytes(file.read(4), "little"), size)
    file.seek(0)
    middle = size // 2 + head_start
    return middle if middle < size and (os.cpu_count() or 1) > 1 and sys.executable else None


def serve(decode: Callable[[Path, int, bytes], Part]) -> None:
    """What the helper process does. If it fails, or nothing is asked of it, it ends without a part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        path, begins, closing = pickle.load(sys.stdin.buffer)  # noqa: S301 (written by our own code)
        pickle.dump(decode(path, begins, closing), sys.stdout.buffer, protocol=5)
