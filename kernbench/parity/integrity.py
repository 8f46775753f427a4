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
    before = [(name, owner, _members(name, owner)) for name, owner in (*OWNERS, *_ours())]
    settings = [setting.read() for setting in SETTINGS]
    try:
        yield watch
    finally:
        for name, owner, members in before:
            watch.replaced += [f"{name}.{member}" for member in _put_back(name, owner, members)]
        for setting, was in zip(SETTINGS, settings, strict=True):
            if setting.read() != was:
                watch.changed.append(setting.name)
                setting.write(was)


def _ours() -> Iterator[tuple[str, Any]]:
    """Our modules as they are imported now, and the classes in them."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == OURS and isinstance(module, ModuleType) and name != __name__:
            yield name, module
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    yield f"{name}.{key}", value


Members = dict[str, tuple[Any, Any]]
"""Value and code by name: a function can be replaced, and so can what it does."""
UNWATCHED = object()
"""In place of a value that may change: a counter, a cache."""


def _members(name: str, owner: Any) -> Members:
    members: Members = {}
    for key, value in list(vars(owner).items()):
        watched = callable(value) or isinstance(value, property | classmethod | staticmethod) or key.isupper()
        code = value.__code__ if isinstance(value, FunctionType) else None
        members[key] = (value if watched and f"{name}.{key}" not in CHANGED_BY_TORCH else UNWATCHED, code)
    return members


def _put_back(name: str, owner: Any, members: Members) -> list[str]:
    replaced = []
    now = vars(owner)
    for key, (value, code) in members.items():
        if value is UNWATCHED:
            continue
        if key not in now or now[key] is not value:
            setattr(owner, key, value)
        elif code is not None and value.__code__ is not code:
            value.__code__ = code
        else:
            continue
        replaced.append(key)
    for key in [key for key in now if key not in members and _hides(owner, key, name)]:
        delattr(owner, key)
        replaced.append(key)
    return replaced


def _hides(owner: Any, key: str, name: str) -> bool:
    """Whether a new name stands before one that was found further off: in a base class, or among the builtins."""
    if isinstance(owner, type):
        return any(key in vars(base) and callable(vars(base)[key]) for base in owner.__mro__[1:])
    return name.split(".")[0] == OURS and hasattr(builtins, key) and not key.startswith("__")
