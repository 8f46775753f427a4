"""A second process that decodes the latter part of a large trace, so that reading uses two cores."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernbench.traces.kinetopiece import Piece

GZIP = b"\x1f\x8b"

_PACKAGE = Path(__file__).resolve().parents[2]
_START = f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from kernbench.traces import tracefile; tracefile.serve()"
_PIPE_BYTES = 1 << 20
# Bytes that its reader decodes before a process that starts at the same time, or with the reader's own modules still to
# be loaded, is where it begins.
_HEAD_START, _HEAD_START_IF_PREPARED = 26 << 20, -6 << 20
_SMALLEST, _SMALLEST_COMPRESSED = 16 << 20, 1 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """What lies from byte ``start`` of a file's text to its end: the events' pieces, and metadata as JSON text."""

    start: int
    pieces: list[Piece]
    devices: bytes
    distributed: bytes


class Helper:
    """A process that decodes what follows byte ``split`` of a file's text; :meth:`close` ends it."""

    def __init__(self, path: Path, split: int) -> None:
        self.split = split
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-c", _START, str(path), str(split)],
                bufsize=_PIPE_BYTES,
                pipesize=_PIPE_BYTES,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
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
            with contextlib.suppress(OSError), self._process as process:
                process.kill()
            self._process = None


_prepared: dict[Path, Helper] = {}


def prepare(path: Path) -> None:
    """Start the process for this file, if it is large, while what reads the file has its modules still to load."""
    split = _split(path, _HEAD_START_IF_PREPARED)
    if split is not None:
        _prepared[path] = Helper(path, split)
        # Should nothing come to read the file.
        atexit.register(_prepared[path].close)


def helper(path: Path) -> Helper | None:
    """The process that was prepared for this file, else one that starts now; None for a small file."""
    if path in _prepared:
        return _prepared.pop(path)
    split = _split(path, _HEAD_START)
    return Helper(path, split) if split is not None else None


def _split(path: Path, head_start: int) -> int | None:
    """Where in the text of a large file a helper begins, so that both end at about the same time."""
    if (os.cpu_count() or 1) < 2 or not sys.executable:
        return None
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(2) == GZIP and size > _SMALLEST_COMPRESSED:
            # The last member's size modulo 2^32, which is the text's in nearly all files; else the halves are unequal.
            file.seek(-4, os.SEEK_END)
            size = max(int.from_bytes(file.read(4), "little"), size)
        if size > _SMALLEST + 2 * max(head_start, 0):
            return size // 2 + head_start
    return None
