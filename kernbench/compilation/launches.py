"""Records what Triton would compile for a kernel's launches on a GPU that need not be here.

For a process of its own, :mod:`kernbench.compilation.buildworker`: what is replaced in Triton stays replaced.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from kernbench.compilation.builds import SHARED_LIMIT_BYTES

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of the A100, H100 SXM and B200, for kernels that choose their grid by it. Source: NVIDIA's architecture papers."""

ALIGNED = "divisible by 16"


class _Driver:
    """What Triton and kernels ask about the GPU, answered for the one whose turn it is in this thread."""

    def __init__(self) -> None:
        self._thread = threading.local()
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    @contextmanager
    def standing_for(self, capability: int) -> Iterator[None]:
        self._thread.capability = capability
        yield

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._thread.capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps its kernels by device, so every architecture is one."""
        capability: int = self._thread.capability
        return capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def _properties(self, device: int) -> dict[str, int]:
        capability: int = self._thread.capability
        return {
            "max_shared_mem": SHARED_LIMIT_BYTES[f"sm_{capability}"],
            "max_num_regs": 65536,
            "multiprocessor_count": MULTIPROCESSORS.get(capability, 132),
            "warpSize": 32,
        }


@dataclass(eq=False)
class Launch:
    """A Triton function with everything that it is compiled for, and the cases that launch it by kernel and dtype."""

    source: Any
    target: GPUTarget
    options: dict[str, Any]
    serves: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def arch(self) -> str:
        return f"sm_{self.target.arch}"

    @property
    def name(self) -> str:
        return str(self.source.fn.__name__)

    def traits(self) -> dict[str, str]:
        """What sets this launch apart from others of its function: values compiled in, and what is known of others."""
        names = self.source.fn.arg_names
        known = {_path(path, names): _shown(value) for path, value in self.source.constants.items()}
        aligned = {_path(path, names): ALIGNED for path, value in self.source.attrs.items() if value}
        return {**known, **aligned, **{key: str(self.options.get(key)) for key in ("num_warps", "num_stages")}}


class Recorder:
    """The launches that are made instead of run, while it is told for which architecture, kernel, dtype and case."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.driver = _Driver()
        self._serving: tuple[str, str, str] | None = None
        driver.set_active(self.driver)
        run = JITFunction.run

        def recorded_run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            launch = run(function, *args, grid=grid, warmup=True, **kwargs)
            assert self._serving is not None
            kernel, dtype, case = self._serving
            cases = launch.serves.setdefault((kernel, dtype), [])
            if case not in cases:
                cases.append(case)
            return launch

        JITFunction.run = recorded_run
        Autotuner.run = _run_every_config
        # A JIT function takes this name when it is first called, and keeps what it returns by what it is compiled for.
        triton.compiler.compile = self._compile

    def _compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> Launch:
        launch = Launch(source, target, dict(options or {}))
        self.launches.append(launch)
        return launch

    @contextmanager
    def serving(self, arch: str, kernel: str, dtype: str, case: str) -> Iterator[None]:
        self._serving = (kernel, dtype, case)
        with self.driver.standing_for(int(arch.removeprefix("sm_"))):
            yield


def _run_every_config(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of Autotuner.run, which would time the configurations: each is launched."""
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    launch = None
    for config in tuner.prune_configs(kwargs):
        if config.pre_hook is not None:
            config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
        launch = tuner.fn.run(*args, **kwargs, **config.all_kwargs())
    tuner.nargs = None
    return launch


def labels(launches: list[Launch]) -> dict[Launch, str]:
    """The function's name, and in brackets what tells it from its other launches for the same kernels and dtypes."""
    groups: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((id(launch.source.fn), launch.target.arch, *launch.serves), []).append(launch)
    found = {}
    for group in groups.values():
        traits = [launch.traits() for launch in group]
        keys = dict.fromkeys(key for known in traits for key in known)
        differing = [key for key in keys if len({known.get(key) for known in traits}) > 1]
        for launch, known in zip(group, traits, strict=True):
            words = [f"{key}={known[key]}" for key in differing if known.get(key, ALIGNED) != ALIGNED]
            if aligned := [key for key in differing if known.get(key) == ALIGNED]:
                words.append(f"{' and '.join(aligned)} divisible by 16")
            found[launch] = f"{launch.name}({', '.join(words)})" if words else launch.name
    return found


def _path(path: Any, names: list[str]) -> str:
    first, *rest = path if isinstance(path, tuple) else (path,)
    name = names[first] if isinstance(first, int) else str(first)
    return ".".join([name, *map(str, rest)])


def _shown(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def where(error: BaseException, function: Any) -> tuple[str, str]:
    """File and line of the kernel's source that a compiler error is about, or nothing, and the error's own words."""
    deepest: Any = error
    while isinstance(getattr(deepest.__cause__, "node", None), ast.AST):
        deepest = deepest.__cause__
    place = ""
    node: Any = getattr(deepest, "node", None)
    owner = next((known for known in _reachable(function, set()) if known.src == getattr(deepest, "src", None)), None)
    if owner is not None and hasattr(node, "lineno"):
        lines, start = owner.raw_src, owner.starting_line_number
        above = next(index for index, line in enumerate(lines) if line.strip().startswith("def "))
        place = f"{owner.fn.__code__.co_filename}:{start + above + node.lineno - 1}"
    message = getattr(deepest, "error_message", None) or (deepest.__cause__ and str(deepest.__cause__))
    return place, message or str(deepest)


def _reachable(function: Any, seen: set[int]) -> Iterator[Any]:
    """``function`` and the JIT functions that it may call, by the names that its module knows."""
    if id(function) in seen:
        return
    seen.add(id(function))
    yield function
    for value in list(function.__globals__.values()):
        members = vars(value).values() if isinstance(value, ModuleType) else [value]
        for member in members:
            if isinstance(member, JITFunction):
                yield from _reachable(member, seen)
