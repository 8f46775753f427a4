"""What kernels over the last dimension share: tensors as rows, rounding, and the short way to a launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _shared

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED_PROGRAMS = 3
"""Few programs are less to wait for, and more than one show whether each has a place of its own."""
_HERE: AbstractContextManager[Any] = nullcontext()


@triton.jit  # type: ignore[untyped-decorator]
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, float32, rounded to the nearest of dtype, even on ties; the interpreter's cast to bfloat16 cuts bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = _shared.nearest_bfloat16(x)
    return x.to(dtype)


def watched() -> bool:
    """Whether a compiler, a tracing mode or a profiler has to see an operator; else a launch need not be one.

    A registered operator costs 6 us of Python without gradients and 20 us with them, more than the launch it wraps.
    """
    return (
        torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]
    )


def refuse_second_derivative(kernel: str) -> None:
    """To be called in a backward pass: it would be left out of a graph of gradients without a word.

    Raises:
        RuntimeError: such a graph is being made.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{kernel} has no second derivative; use its reference where create_graph=True")


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor with the elements from row to row of its last dimension.

    It is copied where rows are not equally far apart, or lie on each other, or have gaps inside.
    """
    if tensor.is_contiguous():
        return tensor, tensor.size(-1)
    stride = _row_stride(tensor.shape, tensor.stride())
    return (tensor, stride) if stride else (tensor.contiguous(), tensor.size(-1))


def _row_stride(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements between rows, 0 if there is no such number."""
    if sizes[-1] > 1 and strides[-1] != 1:
        return 0
    first = next_stride = -1
    for size, stride in zip(sizes[-2::-1], strides[-2::-1], strict=True):
        if size == 1:
            continue
        if first < 0:
            first = stride
        elif stride != next_stride:
            return 0
        next_stride = stride * size
    return max(first, 0)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context of a launch: Triton launches on the current device, whatever the tensors are on."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def multiprocessors() -> int:
    """Of the device that Triton launches on."""
    if INTERPRETED.value:
        return 1
    return _multiprocessors(triton.runtime.driver.active.get_current_device())


@cache
def _multiprocessors(device: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"])


def resident(on_each: int) -> int:
    """How many programs run at once, if so many do on each multiprocessor; few in the interpreter."""
    return INTERPRETED_PROGRAMS if INTERPRETED.value else on_each * multiprocessors()


def overlaps() -> bool:
    """Whether a kernel can start here before the one in front has ended: on an H100 and later, not interpreted."""
    return not INTERPRETED.value and _dependent_launch(triton.runtime.driver.active.get_current_device())


@cache
def _dependent_launch(_device: int) -> bool:
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


def overlapping(early: bool) -> dict[str, Any]:
    """Options of a launch that may start early. They are left out where it may not, as not every backend knows them."""
    return {"launch_pdl": True} if early else {}
