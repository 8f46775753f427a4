"""Rows of a table chosen by an index, as an embedding does: out[i] = table[index[i]]; nothing is rounded.

Shapes: the table [vocabulary, dim], the index [count].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _shared

BLOCK = 256


def gather_rows_reference(table: Tensor, index: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`gather_rows`."""
    return table.index_select(0, index)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(table, index, out, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program copies one row to out [count, dim]; grid is count. The index is int64, and so are addresses."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(table + source * dim + column, mask=column < dim, other=0.0)
        tl.store(out + row * dim + column, value, mask=column < dim)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Row index[i] of table [vocabulary, dim] for every i of index [count], int64, each in [0, vocabulary).

    Raises:
        ValueError: other shapes or dtypes than these.
    """
    _shared.check("gather_rows", table=table, index=index)
    if table.dim() != 2 or index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"gather_rows takes a matrix and an int64 vector; they are {table.shape} and {index.shape}")
    out: Tensor = _launch(table, index)
    return out


@torch.library.custom_op("kernbench_exemplars::gather_rows", mutates_args=())
def _launch(table: Tensor, index: Tensor) -> Tensor:
    table, index = table.contiguous(), index.contiguous()
    out = torch.empty(len(index), table.shape[1], dtype=table.dtype, device=table.device)
    if out.numel():
        _kernel[(len(index),)](table, index, out, table.shape[1], BLOCK)
    return out


@_launch.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(index.shape[0], table.shape[1])


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A normal table, and rows drawn with repeats."""
    generator = torch.Generator(device).manual_seed(seed)
    return {
        "table": _shared.normal(generator, (case["vocabulary"], case["dim"]), dtype),
        "index": torch.randint(case["vocabulary"], (case["count"],), generator=generator, device=device),
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """The index and, where rows are chosen once, as many rows of the table read as written."""
    elements = float(case["count"] * case["dim"])
    rows = min(case["count"], case["vocabulary"])
    return Cost(
        flops=0.0,
        bytes_read=float(8 * case["count"] + dtype.itemsize * rows * case["dim"]),
        bytes_written=dtype.itemsize * elements,
    )


SPEC = KernelSpec(
    name="gather_rows",
    reference=gather_rows_reference,
    optimized=gather_rows,
    make_inputs=make_inputs,
    cases=(
        Case("one", vocabulary=1, count=1, dim=1),
        Case("ragged", vocabulary=29, count=53, dim=37),
        Case("wide", vocabulary=5, count=3, dim=600),
        Case("large", large=True, vocabulary=65536, count=16384, dim=1024),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"vocabulary": Sizes(least=1, most=60), "count": Sizes(most=60), "dim": Sizes(most=600, block=BLOCK)},
    values={"table": Values(nonfinite=True)},
    source="torch.nn.functional.embedding",
)
