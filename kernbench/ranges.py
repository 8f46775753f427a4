"""NVTX ranges for steps, phases, modules and kernels: visible to Nsight, and as annotations in our own traces.

They are off until :func:`enable` is called, and then cost a lookup and a shared context manager that does nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.profiler import record_function

from kernbench.errors import KernbenchError

_nvtx: ModuleType | None = None
_OFF: AbstractContextManager[None] = nullcontext()


class _Range:
    """One open range, in NVTX and in the profiler, by one name."""

    def __init__(self, name: str, nvtx: ModuleType) -> None:
        self._name = name
        self._nvtx = nvtx
        self._annotation = record_function(name)

    def __enter__(self) -> None:
        self._nvtx.push_range(self._name)
        self._annotation.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        self._annotation.__exit__(*exception)
        self._nvtx.pop_range()


def enable(on: bool = True) -> None:
    """Switch ranges on or off for this process.

    Raises:
        KernbenchError: the package nvtx is not installed.
    """
    global _nvtx
    if not on:
        _nvtx = None
        return
    try:
        _nvtx = importlib.import_module("nvtx")
    except ImportError:
        raise KernbenchError("NVTX ranges need the package nvtx, which is not installed; pip install nvtx") from None


def enabled() -> bool:
    """Whether ranges are on."""
    return _nvtx is not None


def range(name: str) -> AbstractContextManager[None]:  # noqa: A001 (used as ranges.range)
    """A context manager that shows as ``name``; the same idle one every time while ranges are off."""
    return _OFF if _nvtx is None else _Range(name, _nvtx)


def annotation(name: str) -> AbstractContextManager[Any]:
    """A profiler annotation in any case, and an NVTX range too while ranges are on."""
    return record_function(name) if _nvtx is None else _Range(name, _nvtx)


class ModuleRanges:
    """Hooks that open a range around each submodule's forward; :meth:`remove` takes exactly these out again."""

    def __init__(self, modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
        self._open: list[AbstractContextManager[None]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for path, submodule in modules:
            name = path or type(submodule).__name__
            self._hooks.append(submodule.register_forward_pre_hook(self._opener(name)))
            # always_call: a forward that raises must close its range, or all later ones nest in it.
            self._hooks.append(submodule.register_forward_hook(self._close, always_call=True))

    def _opener(self, name: str) -> Any:
        def opened(module: torch.nn.Module, args: Any) -> None:
            entered = range(name)
            entered.__enter__()
            self._open.append(entered)

        return opened

    def _close(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> ModuleRanges:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def annotate_modules(module: torch.nn.Module) -> ModuleRanges:
    """Ranges named by module path around every forward below ``module``; nothing is hooked while ranges are off."""
    return ModuleRanges(module.named_modules() if enabled() else ())
