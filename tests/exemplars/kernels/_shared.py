"""What the exemplar kernels share: storing with the right rounding, checking tensors, drawing inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {str(dtype).removeprefix("torch."): Tolerance() for dtype in DTYPES}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def store(pointer, x, mask):  # type: ignore[no-untyped-def]
    """Store x, float32, rounded to what pointer points to.

    The interpreter's cast to bfloat16 cuts bits off where hardware rounds, so there the value is rounded first, to the
    nearest, even on ties.
    """
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


def check(kernel: str, **tensors: Tensor) -> None:
    """Floating tensors that a kernel can take.

    Triton itself refuses tensors on the CPU where it does not interpret.

    Raises:
        ValueError: a tensor has a dtype that no exemplar takes, or they lie on different devices.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"{kernel} takes float32, bfloat16 and float16; {name} is {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{kernel} takes tensors on one device; {name} is on {tensor.device}, not on {device}")


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float32 so that each dtype gets the same ones, rounded."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a reference computes in: float32 at least, float64 for the oracle."""
    return torch.promote_types(dtype, torch.float32)
