"""The hostile conditions a kernel is called under: what it allocates and what it is given lies between guard bands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench.parity import compare, layouts

BAND_BYTES = 4096
"""On both sides of what a kernel allocates: a multiple of 512, so that it keeps the alignment it may count on."""
UNINITIALIZED: frozenset[Any] = frozenset(
    (torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted, Tensor.new_empty)
    + (Tensor.new_empty_strided,)
)
ALLOCATORS = UNINITIALIZED | {
    *(torch.zeros, torch.zeros_like, torch.ones, torch.ones_like, torch.full, torch.full_like, torch.clone),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.clone, Tensor.contiguous),
}
BACKWARD: frozenset[Any] = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


class Guard(TorchFunctionMode):
    """Puts what is allocated in here between guard bands; if it is uninitialized, it holds NaN or the largest integer.

    A mode, and no replaced function: a kernel file that says ``from torch import empty`` is caught as well. Inside a
    custom operator and inside the backward pass a mode is suspended, so it is entered anew there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Allocation] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in ALLOCATORS and kwargs.get("out") is None:
            tensor = func(*args, **kwargs)
            fresh = not args or tensor is not args[0]
            return self._between_bands(tensor, func in UNINITIALIZED) if fresh and _is_plain(tensor) else tensor
        with self._entered_anew_in(func, args, kwargs):
            return func(*args, **kwargs)

    def _between_bands(self, tensor: Tensor, uninitialized: bool) -> Tensor:
        with torch.no_grad():
            allocation = Allocation.like(tensor)
            inside = allocation.tensor
            inside.fill_(_poison(tensor.dtype)) if uninitialized else inside.copy_(tensor)
        self.allocated.append(allocation)
        return inside.requires_grad_() if tensor.requires_grad else inside

    def _entered_anew_in(self, func: Any, args: Any, kwargs: Any) -> AbstractContextManager[Any]:
        if func in BACKWARD:
            engine: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

            def run_backward(*given: Any, **named: Any) -> Any:
                with self:
                    return engine(*given, **named)

            return mock.patch.object(torch.autograd, "_engine_run_backward", run_backward)
        operator = _custom_operator(func)
        return nullcontext() if operator is None else _Inside(operator, self)

    @property
    def reason(self) -> str:
        """What was written outside of an allocation, in words; waits for the device."""
        return next(filter(None, (allocation.overrun() for allocation in self.allocated)), "")


class _Inside(TorchDispatchMode):
    """Enters a guard where the Python implementation of a custom operator begins, below autograd."""

    def __init__(self, operator: OpOverload, guard: Guard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operator = operator
        self.guard = guard

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch._dynamo, two seconds, to keep it out of a mode that no compiled code enters.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in compare.leaves([args, kwargs], "").values() if isinstance(leaf, Tensor)]
        keys = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
        key = next((keys[tensor.device.type] for tensor in given if tensor.device.type in keys), None)
        if key is None or (func is not self.operator and func.overloadpacket is not self.operator):
            return func(*args, **kwargs)
        with self.guard:
            # Calling the operator would suspend the guard again, so its kernel is called past that door.
            return func._handle.redispatch_boxed(torch._C.DispatchKeySet(key), *args, **kwargs)


def _custom_operator(func: Any) -> Any:
    if not isinstance(func, OpOverload | torch._ops.OpOverloadPacket):
        return None
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    name: str = packet._qualified_op_name
    return None if name.split("::")[0] in ("aten", "prims", "prim", "higher_order") else func


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor can be laid anew: pinned, sparse, fake and captured ones cannot, nor those that autograd has
    derived, and one of no elements may be meant for a later ``resize_``.
    """
    if (
        type(tensor) is not Tensor
        or tensor.grad_fn is not None
        or tensor.layout != torch.strided
        or tensor.device.type not in ("cpu", "cuda")
    ):
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(tensor.numel()) and not tensor.is_quantized and not tensor.is_pinned()


@dataclass
class Allocation:
    """A tensor between two bands of one storage."""

    tensor: Tensor
    storage: Tensor
    used: int
    band: int

    @classmethod
    def like(cls, tensor: Tensor) -> Allocation:
        """Uninitialized, of the shape, strides and dtype of ``tensor``; not a view, as autograd sees it."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        used = extent * tensor.element_size()
        band = 0x7F if tensor.dtype in INTEGERS else 1 if tensor.dtype == torch.bool else 0xFF
        # 0xFF is NaN in every floating dtype, and no NaN that arithmetic makes, so a NaN written over it shows.
        storage = torch.full((2 * BAND_BYTES + used,), band, dtype=torch.uint8, device=tensor.device)
        inside = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset = BAND_BYTES // tensor.element_size()
        inside.set_(storage.untyped_storage(), offset, tensor.shape, tensor.stride())
        return cls(inside, storage, used, band)

    def overrun(self) -> str:
        """How far a write went past an end; empty if none did."""
        what = f"a tensor it allocated, {tuple(self.tensor.shape)} {str(self.tensor.dtype).removeprefix('torch.')}"
        after = (self.storage[BAND_BYTES + self.used :] != self.band).nonzero()
        if len(after):
            return f"writes {_bytes(int(after.max()) + 1)} past the end of {what}"
        before = (self.storage[:BAND_BYTES] != self.band).nonzero()
        return f"writes {_bytes(BAND_BYTES - int(before.min()))} before the start of {what}" if len(before) else ""


INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


def _poison(dtype: torch.dtype) -> complex:
    if dtype == torch.bool:
        return True
    if dtype.is_complex:
        return complex("nan+nanj")
    return torch.iinfo(dtype).max if dtype in INTEGERS else float("nan")


def _bytes(count: int) -> str:
    return f"{count} byte" if count == 1 else f"{count} bytes"


@contextmanager
def guarded(*, below_python: bool = False) -> Iterator[Guard]:
    """A :class:`Guard` around a call; ask its ``reason`` afterwards.

    ``below_python`` fills what C++ allocates too. It is not for comparing runs bit by bit: torch fills only while its
    algorithms are deterministic, which a kernel's own are not then.
    """
    with _filling_below() if below_python else nullcontext(), Guard() as guard:
        yield guard


@contextmanager
def _filling_below() -> Iterator[None]:
    deterministic = torch.utils.deterministic
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    try:
        # torch.use_deterministic_algorithms would import its compiler, to tell it too; that takes a second.
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch._C._set_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = was[2]  # type: ignore[attr-defined]


@dataclass
class Embedded:
    """Inputs of which each tensor lies misaligned between two bands of poison in one storage."""

    bands: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def embed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Contiguous copies of all tensors, each ``layouts.BAND`` elements into a storage of its own."""
        names = {id(leaf): name for name, leaf in compare.leaves(inputs, "").items()}

        def lay(tensor: Tensor) -> Tensor:
            inside, (before, after) = layouts.between_bands(tensor)
            self.bands[names[id(tensor)]] = (before, before.clone(), after, after.clone())
            return inside

        embedded: dict[str, Any] = compare.map_tensors(inputs, lay)
        return embedded

    @property
    def reason(self) -> str:
        """What was written into a band, in words."""
        for name, (before, was_before, after, was_after) in self.bands.items():
            size = before.element_size()
            if changed := _changed(after, was_after):
                return f"writes {_bytes((changed[-1] + 1) * size)} past the end of {name}"
            if changed := _changed(before, was_before):
                return f"writes {_bytes((len(before) - changed[0]) * size)} before the start of {name}"
        return ""


def _changed(band: Tensor, before: Tensor) -> list[int]:
    if compare.same_bits(band, before):
        return []
    return [index for index in range(len(band)) if not compare.same_bits(band[index], before[index])]
