"""Softmax over rows of which a boolean mask says what counts; a row of which nothing counts becomes zeros.

    y = exp(x - max) / sum exp(x - max) over the columns where mask is true, 0 elsewhere

Rows of any length: one program walks over its row three times. Arithmetic is float32, y is rounded once.

Source: the definition, as torch.softmax of a masked_fill with minus infinity has it, but for rows without a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes

from . import _shared

BLOCK = 256


def masked_softmax_reference(x: Tensor, mask: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`masked_softmax`."""
    wide = x.to(_shared.wide(x.dtype)).masked_fill(~mask, float("-inf"))
    exponentials = torch.softmax(wide, -1)
    return exponentials.masked_fill(~mask, 0.0).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(x, mask, y, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles one row of x, mask and y [rows, columns]; grid is rows."""
    first = tl.program_id(0).to(tl.int64) * columns
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        counts = tl.load(mask + first + column, mask=column < columns, other=0) != 0
        value = tl.load(x + first + column, mask=counts, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value)
    peak = tl.max(largest)
    # A row of which nothing counts would subtract infinity from infinity.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        counts = tl.load(mask + first + column, mask=column < columns, other=0) != 0
        value = tl.load(x + first + column, mask=counts, other=float("-inf")).to(tl.float32)
        total += tl.exp(value - peak)
    divisor = tl.sum(total)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        counts = tl.load(mask + first + column, mask=column < columns, other=0) != 0
        value = tl.load(x + first + column, mask=counts, other=float("-inf")).to(tl.float32)
        _shared.store(y + first + column, tl.exp(value - peak) / divisor, column < columns)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax of x [..., columns] where mask, bool of the same shape, is true; any layout.

    Raises:
        ValueError: mask has another shape or dtype, or a tensor is none that the kernel takes.
    """
    _shared.check("masked_softmax", x=x, mask=mask)
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"masked_softmax takes a bool mask {tuple(x.shape)}; it is {mask.dtype} {tuple(mask.shape)}")
    y: Tensor = _launch(x, mask)
    return y


@torch.library.custom_op("kernbench_exemplars::masked_softmax", mutates_args=())
def _launch(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = x.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _kernel[(x.numel() // x.shape[-1],)](x, mask, y, x.shape[-1], BLOCK)
    return y


@_launch.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Logits of which two thirds count; in every eighth row nothing does."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case["rows"], case["columns"])
    mask = torch.rand(shape, generator=generator, device=device) < 0.67
    mask[7::8] = False
    return {"x": (_shared.normal(generator, shape, torch.float32) * 3).to(dtype), "mask": mask}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x and the mask read once, y written once."""
    elements = float(case["rows"] * case["columns"])
    return Cost(flops=5 * elements, bytes_read=(dtype.itemsize + 1) * elements, bytes_written=dtype.itemsize * elements)


SPEC = KernelSpec(
    name="masked_softmax",
    reference=masked_softmax_reference,
    optimized=masked_softmax,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, columns=1),
        Case("ragged", rows=19, columns=61),
        Case("wide", rows=8, columns=300),
        Case("large", large=True, rows=8192, columns=4096),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"rows": Sizes(most=40), "columns": Sizes(most=700, block=BLOCK)},
    source="torch.softmax after masked_fill with minus infinity",
)
