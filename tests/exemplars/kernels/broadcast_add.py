"""The sum of two matrices of any strides, zero included: a row or a column is added to a matrix without a copy.

Arithmetic is float32, the sum is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _shared

BLOCK = 512


def broadcast_add_reference(x: Tensor, y: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`broadcast_add`."""
    wide = _shared.wide(x.dtype)
    return (x.to(wide) + y.to(wide)).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, y, out, rows, columns, x_row_stride, x_column_stride, y_row_stride, y_column_stride, BLOCK: tl.constexpr
):
    """One program handles BLOCK elements of out [rows, columns], contiguous; grid is the rest, rounded up."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = offset // columns, offset % columns
    mask = row < rows
    left = tl.load(x + row * x_row_stride + column * x_column_stride, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(y + row * y_row_stride + column * y_column_stride, mask=mask, other=0.0).to(tl.float32)
    _shared.store(out + offset, left + right, mask)


def broadcast_add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, two matrices of one dtype that broadcast against each other.

    Raises:
        ValueError: they are no matrices, differ in dtype, or do not broadcast.
    """
    _shared.check("broadcast_add", x=x, y=y)
    fit = all(one == other or 1 in (one, other) for one, other in zip(x.shape, y.shape, strict=False))
    if not (x.dim() == y.dim() == 2 and x.dtype == y.dtype and fit):
        raise ValueError(f"broadcast_add takes matrices of one dtype; they are {tuple(x.shape)} and {tuple(y.shape)}")
    out: Tensor = _launch(x, y)
    return out


@torch.library.custom_op("kernbench_exemplars::broadcast_add", mutates_args=())
def _launch(x: Tensor, y: Tensor) -> Tensor:
    rows, columns = (max(pair) if min(pair) else 0 for pair in zip(x.shape, y.shape, strict=True))
    x, y = x.expand(rows, columns), y.expand(rows, columns)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if count := out.numel():
        _kernel[(triton.cdiv(count, BLOCK),)](x, y, out, rows, columns, *x.stride(), *y.stride(), BLOCK)
    return out


@_launch.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((x + y).shape)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A matrix stored the other way round, and a row that is added to each of its rows."""
    generator = torch.Generator(device).manual_seed(seed)
    x = _shared.normal(generator, (case["columns"], case["rows"]), dtype).t()
    return {"x": x, "y": _shared.normal(generator, (1, case["columns"]), dtype)}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """The matrix and the row read once, a matrix written once."""
    elements = float(case["rows"] * case["columns"])
    return Cost(
        flops=elements,
        bytes_read=dtype.itemsize * (elements + case["columns"]),
        bytes_written=dtype.itemsize * elements,
    )


SPEC = KernelSpec(
    name="broadcast_add",
    reference=broadcast_add_reference,
    optimized=broadcast_add,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, columns=1),
        Case("ragged", rows=37, columns=61),
        Case("large", large=True, rows=8192, columns=4096),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"rows": Sizes(most=40), "columns": Sizes(most=600, block=BLOCK)},
    values={"x": Values(nonfinite=True), "y": Values(nonfinite=True)},
    source="torch.add",
)
