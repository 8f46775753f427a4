"""Tensors at real addresses whose large contents are never computed, so that a call can be prepared without its memory.

A launch depends on addresses, shapes, strides and plain numbers, not on what large tensors hold. Under ``Uncomputed``
every operation on a large tensor only says what its result looks like; the result lies in address space that takes no
memory until somebody writes to it. Small tensors, which hold counters and lengths, are computed as always.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

LARGE_BYTES = 2**18
# Pages that are promised but not there, more of them than memory and swap could hold.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_META = torch.device("meta")


@dataclass(frozen=True)
class _Argument:
    """The result is the argument at this place: an operation in place."""

    at: int


class _Plan:
    """What an operation gives, as meta tensors and arguments, and whether that is too much to compute."""

    def __init__(self, func: Any, given: list[Any], structure: Any) -> None:
        stand_ins: dict[int, Tensor] = {}
        for value in given:
            if isinstance(value, Tensor) and id(value) not in stand_ins:
                shape, strides = value.shape, value.stride()
                stand_ins[id(value)] = torch.empty_strided(shape, strides, dtype=value.dtype, device=_META)
        moved = [
            stand_ins[id(value)] if isinstance(value, Tensor) else None if isinstance(value, torch.Generator) else value
            for value in given
        ]
        args, kwargs = tree_unflatten(moved, structure)
        if _makes(func):
            kwargs["device"] = _META
        leaves, self.structure = tree_flatten(func(*args, **kwargs))
        places = {id(value): _Argument(index) for index, value in enumerate(moved) if isinstance(value, Tensor)}
        self.leaves = [places.get(id(leaf), leaf) for leaf in leaves]
        self.large = any(isinstance(value, Tensor) and _bytes(value) >= LARGE_BYTES for value in (*moved, *leaves))


class Uncomputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """CPU tensors above ``LARGE_BYTES`` are laid out but not computed; what is small and derived from them is zero."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plans: dict[Any, _Plan | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims"):
            # An operator of a kernel: its own body runs under this mode too.
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        if func.is_view or _NEEDS_VALUES.intersection(func.tags):
            return func(*args, **kwargs)
        given, structure = tree_flatten((args, kwargs))
        plan = self._plan(func, given, structure)
        if plan is None or not plan.large:
            return func(*args, **kwargs)
        leaves = [
            given[leaf.at] if isinstance(leaf, _Argument) else _laid_out(leaf) if isinstance(leaf, Tensor) else leaf
            for leaf in plan.leaves
        ]
        return tree_unflatten(leaves, plan.structure)

    def _plan(self, func: Any, given: list[Any], structure: Any) -> _Plan | None:
        """None for an operation whose result cannot be foretold; it has to run, errors of its own included."""
        if not any(isinstance(value, Tensor) for value in given) and not _makes(func):
            return None
        key = (func, structure, tuple(map(_described, given)))
        if key not in self._plans:
            try:
                self._plans[key] = _Plan(func, given, structure)
            except RuntimeError:
                self._plans[key] = None
        return self._plans[key]


def _makes(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return None if isinstance(value, torch.Generator) else (type(value), value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _laid_out(like: Tensor) -> Tensor:
    """A CPU tensor of the shape, strides and dtype of ``like``."""
    if _bytes(like) < LARGE_BYTES:
        return torch.zeros(like.shape, dtype=like.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    pages = mmap.mmap(-1, span * like.element_size(), flags=_FLAGS)
    return torch.frombuffer(pages, dtype=like.dtype).as_strided(like.shape, like.stride())
