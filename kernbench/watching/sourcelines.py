"""Numbers the source lines of the user's program and finds the one that is executing."""

from __future__ import annotations

import importlib.util
import linecache
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

from kernbench import registry
from kernbench.record import SourceLine

ENGINE = Path(__file__).resolve().parent.parent
DRIVER = str(ENGINE / "capture.py")
_INTERACTIVE = ("<stdin>", "<ipython")
# A mode of the program's own passes on what another line does.
_MODES = ("__torch_function__", "__torch_dispatch__")
_NOWHERE = SourceLine(file="?", line=0, text="(no line of the program was executing)")


def _package_folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent) + "/"


def _present(*names: str) -> tuple[str, ...]:
    return tuple(folder for folder in map(_package_folder, names) if folder)


class SourceTable:
    """The lines seen so far; an index into :attr:`lines` stands for a line everywhere else.

    A line belongs to the user's program unless its file lies in torch, NumPy, Triton, the standard library or the
    engine itself. Other installed libraries count as the program: the line of a model in ``transformers`` is what its
    user wants to see.
    """

    def __init__(self) -> None:
        self.lines: list[SourceLine] = []
        self.owner = threading.get_ident()
        self._index: dict[tuple[str, int], int] = {}
        self._user: dict[str, bool] = {}
        self._shown: dict[str, str] = {}
        self._triton = _present("triton")
        self._skipped = (*_present("torch", "numpy", "nvtx"), *self._triton)
        self._standard = tuple({sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib")})
        self._roots = [registry.current().root, registry.builtin().root, Path.cwd()]

    def locate(self, frame: FrameType | None, *, of_owner: bool = True) -> int | None:
        """Index of the innermost line of the program in ``frame`` or its callers.

        A thread of the autograd engine runs no line of the program; the line that waits for it in the owner's thread
        is taken, as on the CPU, where the engine runs in the caller's thread. None means that Triton is reading on its
        own behalf (its interpreter copies every argument), which no GPU would do. -1 means no line was executing.

        Args:
            of_owner: whether another thread than the owner's works for the owner, as autograd's does.
        """
        found = self._walk(frame)
        if found == -1 and of_owner and threading.get_ident() != self.owner:
            return self._walk(sys._current_frames().get(self.owner))
        return found

    def _walk(self, frame: FrameType | None) -> int | None:
        inside_triton = False
        while frame is not None:
            file = frame.f_code.co_filename
            if frame.f_code.co_name not in _MODES and self.is_program(file):
                return None if inside_triton else self.number(frame)
            if file == DRIVER:
                break
            inside_triton = inside_triton or file.startswith(self._triton)
            frame = frame.f_back
        return -1

    def is_program(self, file: str) -> bool:
        """Whether a code object's file name belongs to the user's program."""
        known = self._user.get(file)
        if known is None:
            known = self._user[file] = self._is_program(file)
        return known

    def _is_program(self, file: str) -> bool:
        if file.startswith("<"):
            return file.startswith(_INTERACTIVE)
        if file.startswith(self._skipped):
            return False
        installed = "/site-packages/" in file or "/dist-packages/" in file
        if not installed and file.startswith(self._standard):
            return False
        engine = str(ENGINE) + "/"
        return not file.startswith(engine) or file.startswith(engine + "builtin/")

    def number(self, frame: FrameType) -> int:
        """Index of the line that ``frame`` is executing."""
        key = (frame.f_code.co_filename, frame.f_lineno or 0)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.lines)
            file, line = key
            self.lines.append(
                SourceLine(
                    file=self._show(file),
                    line=line,
                    text=linecache.getline(file, line, frame.f_globals).strip(),
                    function=frame.f_code.co_qualname,
                )
            )
        return index

    def nowhere(self) -> int:
        """Index of the entry for reads that no line of the program was executing."""
        if ("", 0) not in self._index:
            self._index["", 0] = len(self.lines)
            self.lines.append(_NOWHERE)
        return self._index["", 0]

    def _show(self, file: str) -> str:
        shown = self._shown.get(file)
        if shown is None:
            shown = self._shown[file] = self._relative(Path(file))
        return shown

    def _relative(self, file: Path) -> str:
        resolved = file.resolve() if file.exists() else file
        for root in self._roots:
            inside = resolved.relative_to(root.resolve()) if resolved.is_relative_to(root.resolve()) else None
            if inside is not None and "site-packages" not in inside.parts:
                return inside.as_posix()
        parts = resolved.parts
        for folder in ("site-packages", "dist-packages"):
            if folder in parts:
                return Path(*parts[parts.index(folder) + 1 :]).as_posix()
        return str(file)
