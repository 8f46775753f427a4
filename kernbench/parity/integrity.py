"""What a kernel may not do to the program that checks and times it: replace its functions, leave its settings changed.

``watched()`` compares before and after a call, puts back what is not as it was, and says so.
"""

from __future__ import annotations

import builtins
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, is_
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _device

SHOWN = 3
OWNERS: tuple[tuple[str, Any], ...] = (
    ("builtins", builtins),
    ("math", math),
    ("time", time),
    ("torch", torch),
    ("torch.Tensor", Tensor),
    ("torch.autograd", torch.autograd),
    ("torch.cuda", torch.cuda),
    ("torch.cuda.Event", torch.cuda.Event),
    ("torch.cuda.Stream", torch.cuda.Stream),
    ("torch.testing", torch.testing),
)
OURS = "kernbench"
CHANGED_BY_TORCH = frozenset({"torch.manual_seed", "torch.Storage"})
"""torch itself replaces these: when it imports its compiler, and with the default dtype."""
PRECISIONS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))


class Setting(NamedTuple):
    """One global setting of torch."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def _precision() -> tuple[Any, ...]:
    get = torch._C._get_fp32_precision_getter
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to answer after somebody used the newer way of setting it
        old = None
    return (old, *(get(backend, operation) for backend, operation in PRECISIONS))


def _set_precision(was: tuple[Any, ...]) -> None:
    # The newer settings first: they may stand in the way of the older one, which sets some of them too.
    for _ in range(2):
        for (backend, operation), value in zip(PRECISIONS, was[1:], strict=True):
            torch._C._set_fp32_precision_setter(backend, operation, value)
        if was[0] is not None:
            torch._C._set_float32_matmul_precision(was[0])
    for (backend, operation), value in zip(PRECISIONS, was[1:], strict=True):
        torch._C._set_fp32_precision_setter(backend, operation, value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _random_state() -> tuple[bytes, bytes | None]:
    on_gpu = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state().numpy().tobytes(), on_gpu


def _set_random_state(was: tuple[bytes, bytes | None]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(was[0]), dtype=torch.uint8))
    if was[1] is not None:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(was[1]), dtype=torch.uint8))


def _device_and_stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _set_device_and_stream(was: Any) -> None:
    if was is not None:
        torch.cuda.set_stream(was)


def _function_modes() -> int:
    return torch._C._len_torch_function_stack()


def _drop_function_modes(was: int) -> None:
    while torch._C._len_torch_function_stack() > was:
        torch.overrides._pop_mode()  # type: ignore[no-untyped-call]


SETTINGS = (
    Setting("the functions that torch modes override", _function_modes, _drop_function_modes),
    Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("the default device", lambda: _device.CURRENT_DEVICE, torch.set_default_device),
    Setting("the float32 matmul precision", _precision, _set_precision),
    Setting("whether gradients are recorded", torch.is_grad_enabled, torch._C._set_grad_enabled),
    Setting(
        "whether algorithms are deterministic",
        _deterministic,
        lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1]),
    ),
    Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("the current CUDA device or stream", _device_and_stream, _set_device_and_stream),
    Setting("the state of the random generator", _random_state, _set_random_state),
)


@dataclass
class Watch:
    """What was found out; ``reason`` is empty while nothing was."""

    replaced: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """Which functions were replaced and which settings were left changed, in words."""
        shown = [*self.replaced[:SHOWN], *([f"{len(self.replaced) - SHOWN} more"] if self.replaced[SHOWN:] else [])]
        return "; ".join(
            filter(
                None,
                [
                    f"replaces {', '.join(shown)} while it runs" if shown else "",
                    f"leaves {', '.join(self.changed)} changed" if self.changed else "",
                ],
            )
        )


@contextmanager
def watched() -> Iterator[Watch]:
    """Watches a call: afterwards ``reason`` says what it tampered with, and all of it is as it was before."""
    watch = Watch()
    before = _snapshots()
    settings = [setting.read() for setting in SETTINGS]
    try:
        yield watch
    finally:
        for snapshot in before:
            if not snapshot.holds():
                watch.replaced += [f"{snapshot.name}.{member}" for member in _put_back(snapshot)]
        for setting, was in zip(SETTINGS, settings, strict=True):
            if setting.read() != was:
                watch.changed.append(setting.name)
                setting.write(was)


_code = attrgetter("__code__")


class Snapshot:
    """What one owner, a module or class, held: its names, the watched values, and the code of its functions.

    A value is watched by its name and type: a counter or a cache may change, and is not kept alive here. Code is, since
    a function can be replaced, and so can what it does.
    """

    def __init__(self, name: str, owner: Any) -> None:
        self.name = name
        self.owner = owner
        members = dict(vars(owner))
        self.keys = list(members)
        self.is_watched = [_is_watched(name, key, value) for key, value in members.items()]
        self.values = list(compress(members.values(), self.is_watched))
        self.is_other = [not watched for watched in self.is_watched]
        self.types = list(map(type, compress(members.values(), self.is_other)))
        self.functions = [value for value in members.values() if isinstance(value, FunctionType)]
        self.codes = list(map(_code, self.functions))
        self.classes = [
            (f"{name}.{key}", value)
            for key, value in members.items()
            if isinstance(owner, ModuleType) and isinstance(value, type) and value.__module__ == name
        ]

    def holds(self) -> bool:
        """Whether a snapshot taken now would be the same: some 6000 values before and after each call of a kernel."""
        now = vars(self.owner)
        keys, values = list(now), list(now.values())
        return (
            len(keys) == len(self.keys) == len(values)
            and all(map(is_, keys, self.keys))
            and all(map(is_, compress(values, self.is_watched), self.values))
            and all(map(is_, map(type, compress(values, self.is_other)), self.types))
            and all(map(is_, map(_code, self.functions), self.codes))
        )


_taken: dict[str, Snapshot] = {}


def _snapshots() -> list[Snapshot]:
    """Of all owners now: of torch, of our modules as they are imported now, and of the classes in those."""
    found = [_snapshot(name, owner) for name, owner in OWNERS]
    for name, module in list(sys.modules.items()):
        if _is_ours(name) and isinstance(module, ModuleType) and name != __name__:
            ours = _snapshot(name, module)
            found += [ours, *(_snapshot(inner, owner) for inner, owner in ours.classes)]
    return found


def _is_ours(name: str) -> bool:
    return name == OURS or name.startswith(f"{OURS}.")


def _snapshot(name: str, owner: Any) -> Snapshot:
    """One taken before, while it holds."""
    taken = _taken.get(name)
    if taken is None or taken.owner is not owner or not taken.holds():
        taken = _taken[name] = Snapshot(name, owner)
    return taken


def _is_watched(name: str, key: str, value: Any) -> bool:
    kind = callable(value) or isinstance(value, property | classmethod | staticmethod) or key.isupper()
    return kind and f"{name}.{key}" not in CHANGED_BY_TORCH


def _put_back(snapshot: Snapshot) -> list[str]:
    owner, replaced = snapshot.owner, []
    now, codes = vars(owner), dict(zip(snapshot.functions, snapshot.codes, strict=True))
    for key, value in zip(compress(snapshot.keys, snapshot.is_watched), snapshot.values, strict=True):
        code = codes.get(value) if isinstance(value, FunctionType) else None
        if key not in now or now[key] is not value:
            setattr(owner, key, value)
        elif code is not None and value.__code__ is not code:
            value.__code__ = code
        else:
            continue
        replaced.append(key)
    known = set(snapshot.keys)
    for key in [key for key in now if key not in known and _hides(owner, key, snapshot.name)]:
        delattr(owner, key)
        replaced.append(key)
    return replaced


def _hides(owner: Any, key: str, name: str) -> bool:
    """Whether a new name stands before one that was found further off: in a base class, or among the builtins."""
    if isinstance(owner, type):
        return any(key in vars(base) and callable(vars(base)[key]) for base in owner.__mro__[1:])
    return _is_ours(name) and hasattr(builtins, key) and not key.startswith("__")
