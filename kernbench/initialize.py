"""Starts a workspace: a workload and a kernel of the user's own, small and ready to run, and a journal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from kernbench import journal
from kernbench.errors import KernbenchError

IGNORED = ".kernbench/"


def init(folder: Path, note: Callable[[str], None] | None = None) -> list[Path]:
    """Create what is missing of a workspace in ``folder``, which is created too; files that exist are never touched.

    Args:
        folder: the workspace's root, often a repository of the user's.
        note: told of each file that stays as it is.

    Returns:
        The paths that were created or, as .gitignore can be, extended.

    Raises:
        KernbenchError: the folder cannot be written.
    """
    changed: list[Path] = []
    try:
        for path, text in _files(folder):
            if _create(path, text):
                changed.append(path)
            elif note:
                note(f"kept {path}: it exists already")
        ignore = folder / ".gitignore"
        if _ignore_state(ignore):
            changed.append(ignore)
        # The folder marks the workspace, also before there is anything to remember.
        (folder / ".kernbench").mkdir(exist_ok=True)
    except OSError as error:
        raise KernbenchError(
            f"cannot start a workspace in {folder} ({error.strerror or error}: {error.filename}); choose a folder that "
            "you can write to"
        ) from None
    return changed


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    scaffold = resources.files("kernbench") / "scaffold"
    yield folder / "workloads" / "my_model.py", (scaffold / "my_model.py.txt").read_text(encoding="utf-8")
    yield folder / "kernels" / "my_kernel.py", (scaffold / "my_kernel.py.txt").read_text(encoding="utf-8")
    yield folder / "reports" / ".gitkeep", ""
    yield folder / "JOURNAL.md", journal.HEADER


def _create(path: Path, text: str) -> bool:
    """Write a new file; False if something stands there already, whoever put it there and however late."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _ignore_state(path: Path) -> bool:
    """Make git ignore the workspace's state; False if it does already."""
    before = path.read_bytes() if path.exists() else b""
    if re.search(rb"^/?\.kernbench/?\s*$", before, re.MULTILINE):
        return False
    gap = b"" if not before or before.endswith(b"\n") else b"\n"
    with path.open("ab") as file:
        file.write(gap + IGNORED.encode() + b"\n")
    return True
