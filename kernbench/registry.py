"""Finds workspaces and loads every declaration in them by file location.

A workspace is a folder with ``kernels/`` and/or ``workloads/``. Neither folder has an ``__init__.py`` nor becomes a
top-level import name (the PyPI package ``kernels`` must keep working beside us), so each public file is imported as
``kernbench_workspace.<alias>.<folder>.<name>``. A workload may also be a folder with a ``workload.py`` in it.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

import kernbench
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.spec import KernelSpec
from kernbench.workload import Workload

ROOT_PACKAGE = "kernbench_workspace"
Declaration = TypeVar("Declaration", KernelSpec, Workload)


@dataclass(frozen=True)
class Workspace:
    """A folder with declarations, reports/ and JOURNAL.md; ``alias`` names it in module names."""

    alias: str
    root: Path

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def records(self) -> list[Path]:
        """The record of every run in this workspace, by group and run id."""
        return sorted(self.reports.glob("*/*/record.json"))

    @property
    def journal(self) -> Path:
        return self.root / "JOURNAL.md"


@dataclass(frozen=True)
class Found(Generic[Declaration]):
    """A declaration, the file it stands in and the workspace that holds the file."""

    declaration: Declaration
    file: Path
    workspace: Workspace


def builtin() -> Workspace:
    """The workspace that ships with kernbench: ``kernbench/builtin`` in a wheel, the repository in a checkout."""
    package = Path(kernbench.__file__).parent
    installed = package / "builtin"
    return Workspace("builtin", installed if installed.is_dir() else package.parent)


def current(start: Path | None = None) -> Workspace:
    """The workspace for results: ``$KERNBENCH_WORKSPACE``, else the nearest folder upward that is one, else here."""
    named = os.environ.get("KERNBENCH_WORKSPACE")
    if start is None and named:
        start = Path(named)
        if not start.is_dir():
            raise KernbenchError(f"KERNBENCH_WORKSPACE names {named}, which is no folder; correct or unset it")
        root = start.resolve()
    else:
        here = (start or Path.cwd()).resolve()
        root = next((folder for folder in (here, *here.parents) if _is_workspace(folder)), here)
    if root == builtin().root.resolve():
        return builtin()
    return Workspace(f"w{hashlib.sha256(str(root).encode()).hexdigest()[:8]}", root)


def _is_workspace(folder: Path) -> bool:
    if (folder / ".kernbench").is_dir():
        return True
    return (folder / "JOURNAL.md").is_file() and ((folder / "workloads").is_dir() or (folder / "kernels").is_dir())


def workspaces() -> tuple[Workspace, ...]:
    """The built-in workspace, then the current one where that is another."""
    here = current()
    return (builtin(),) if here == builtin() else (builtin(), here)


def kernels() -> dict[str, Found[KernelSpec]]:
    """All kernel specs by name, over all workspaces.

    Raises:
        KernbenchError: two files declare one name.
        WorkloadFailed: a file raises while it is imported.
    """
    return _collect("kernels", KernelSpec)


def workloads() -> dict[str, Found[Workload]]:
    """All workloads by name, over all workspaces; raises as :func:`kernels` does."""
    return _collect("workloads", Workload)


def kernel_imports() -> Iterator[tuple[Path, Callable[[], ModuleType]]]:
    """The file of every kernel, each with the call that imports it."""
    for workspace in workspaces():
        for name, file in _public_files(workspace, "kernels"):
            yield file, functools.partial(_import_file, file, name)


def kernel(name: str) -> Found[KernelSpec]:
    """The kernel spec of that name.

    Raises:
        KernbenchError: there is none; the message suggests the nearest name.
    """
    return _pick(name, kernels(), "kernel")


def workload(reference: str) -> Found[Workload]:
    """The workload that ``reference`` names: a registered name, ``./file.py`` or ``./file.py:name``.

    Raises:
        KernbenchError: unknown name (the nearest is suggested), no such file, or not one declaration in it.
        WorkloadFailed: the file raises while it is imported.
    """
    path, _, name = reference.partition(":")
    if path.endswith(".py") or os.sep in path:
        return _workload_in_file(Path(path), name)
    return _pick(reference, workloads(), "workload")


def _workload_in_file(path: Path, name: str) -> Found[Workload]:
    if not path.is_file():
        raise KernbenchError(
            f"there is no file {path}; give a workload's name (see kernbench list) or the path of its .py file"
        )
    file = path.resolve()
    module = _import_file(file, _module_name_of(file))
    found = {item.name: item for item in _declared(module, Workload)}
    if not found:
        raise KernbenchError(
            f"{path} declares no workload; add WORKLOAD = kernbench.workload.Workload(...), as in kernbench init"
        )
    if name:
        return Found(_pick_value(name, found, f"workload in {path}"), file, current())
    if len(found) > 1:
        raise KernbenchError(
            f"{path} declares {len(found)} workloads; say which: " + " or ".join(f"{path}:{item}" for item in found)
        )
    return Found(next(iter(found.values())), file, current())


def _module_name_of(file: Path) -> str:
    """The name a file already has as part of a workspace, or one of its own, so that no file is imported twice."""
    for workspace in workspaces():
        for folder in ("workloads", "kernels"):
            for name, candidate in _public_files(workspace, folder):
                if candidate.resolve() == file:
                    return name
    return f"{ROOT_PACKAGE}.file_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem.replace('-', '_')}"


def _collect(folder: str, kind: type[Declaration]) -> dict[str, Found[Declaration]]:
    found: dict[str, Found[Declaration]] = {}
    for workspace in workspaces():
        for name, file in _public_files(workspace, folder):
            for declaration in _declared(_import_file(file, name), kind):
                if declaration.name in found:
                    other = found[declaration.name].file
                    raise KernbenchError(f"{declaration.name!r} is declared twice, by {other} and {file}; rename one")
                found[declaration.name] = Found(declaration, file, workspace)
    return found


def _public_files(workspace: Workspace, folder: str) -> Iterator[tuple[str, Path]]:
    parent = workspace.root / folder
    if not parent.is_dir():
        return
    package = f"{ROOT_PACKAGE}.{workspace.alias}.{folder}"
    for path in sorted(parent.iterdir()):
        if path.name.startswith(("_", ".")):
            continue
        if path.suffix == ".py":
            yield f"{package}.{path.stem}", path
        elif (path / "workload.py").is_file():
            yield f"{package}.{path.name}.workload", path / "workload.py"


def _declared(module: ModuleType, kind: type[Declaration]) -> list[Declaration]:
    """Declarations of a module in the order they stand there; an imported or aliased one counts once."""
    unique = {
        id(value): value for name, value in vars(module).items() if isinstance(value, kind) and not name.startswith("_")
    }
    return list(unique.values())


def _import_file(file: Path, name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    _make_parents(name, file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise KernbenchError(f"{file} is no Python file; a workload is a .py file that declares WORKLOAD")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise WorkloadFailed(
            f"{file} raised {type(error).__name__} while it was imported: {error}", traceback.format_exc()
        ) from error
    return module


def _make_parents(name: str, file: Path) -> None:
    """Synthetic parent packages, so that ``from . import _shared`` works inside a workspace folder."""
    parts = name.split(".")[:-1]
    folder = file.parent
    for depth in range(len(parts), 0, -1):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            parent = ModuleType(package)
            parent.__path__ = [str(folder)] if depth > 1 else []
            sys.modules[package] = parent
        folder = folder.parent


def _pick(name: str, found: Mapping[str, Found[Declaration]], what: str) -> Found[Declaration]:
    return found[nearest(name, list(found), what)]


def _pick_value(name: str, found: Mapping[str, Workload], what: str) -> Workload:
    return found[nearest(name, list(found), what)]


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """``name`` itself if it is known.

    Raises:
        KernbenchError: it is not; the message suggests the nearest known name.
    """
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    raise KernbenchError(f"there is no {what} named {name!r}; {hint}")
