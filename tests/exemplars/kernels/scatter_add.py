"""Rows added up by bin, with atomics: out[index[i]] += values[i], in float32.

The order of the additions is left to the device, so two calls differ in rounding: see ``run_to_run_ulp``.

Shapes: values [count, dim], index [count], out [bins, dim].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _shared

BLOCK = 256


def scatter_add_reference(values: Tensor, index: Tensor, bins: int) -> Tensor:
    """In plain PyTorch; arguments as in :func:`scatter_add`."""
    wide = _shared.wide(values.dtype)
    out = torch.zeros(bins, values.shape[1], dtype=wide, device=values.device)
    return out.index_add(0, index, values.to(wide))


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(values, index, out, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds one row of values to a row of out; grid is count."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index + row)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(values + row * dim + column, mask=column < dim, other=0.0).to(tl.float32)
        tl.atomic_add(out + target * dim + column, value, mask=column < dim, sem="relaxed")


def scatter_add(values: Tensor, index: Tensor, bins: int) -> Tensor:
    """The sum over i of values[i] in row index[i] of a float32 [bins, dim]; index int64, each in [0, bins).

    Raises:
        ValueError: other shapes or dtypes than these.
    """
    _shared.check("scatter_add", values=values, index=index)
    if values.dim() != 2 or index.shape != values.shape[:1] or index.dtype != torch.int64:
        raise ValueError(
            f"scatter_add takes values [count, dim] and an int64 index [count]; they are {tuple(values.shape)} and "
            f"{index.dtype} {tuple(index.shape)}"
        )
    out: Tensor = _launch(values, index, bins)
    return out


@torch.library.custom_op("kernbench_exemplars::scatter_add", mutates_args=())
def _launch(values: Tensor, index: Tensor, bins: int) -> Tensor:
    values, index = values.contiguous(), index.contiguous()
    count, dim = values.shape
    out = torch.zeros(bins, dim, dtype=torch.float32, device=values.device)
    if values.numel():
        _kernel[(count,)](values, index, out, dim, BLOCK)
    return out


@_launch.register_fake
def _(values: Tensor, index: Tensor, bins: int) -> Tensor:
    return values.new_empty(bins, values.shape[1], dtype=torch.float32)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Values that do not cancel, or their order would count for more, and bins of which some stay empty."""
    generator = torch.Generator(device).manual_seed(seed)
    values = _shared.normal(generator, (case["count"], case["dim"]), torch.float32).abs()
    index = torch.randint(case["bins"], (case["count"],), generator=generator, device=device)
    return {"values": values.to(dtype), "index": index, "bins": case["bins"]}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Values and index read once, the sums written once."""
    elements = float(case["count"] * case["dim"])
    return Cost(
        flops=elements,
        bytes_read=dtype.itemsize * elements + 8 * case["count"],
        bytes_written=4.0 * case["bins"] * case["dim"],
    )


SPEC = KernelSpec(
    name="scatter_add",
    reference=scatter_add_reference,
    optimized=scatter_add,
    make_inputs=make_inputs,
    cases=(
        Case("one", count=1, dim=1, bins=1),
        Case("ragged", count=61, dim=37, bins=19),
        Case("wide", count=7, dim=600, bins=3),
        Case("large", large=True, count=65536, dim=256, bins=4096),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"count": Sizes(most=70), "dim": Sizes(most=600, block=BLOCK), "bins": Sizes(least=1, most=40)},
    values={"values": Values(least=0.0, most=1e6)},
    # Each of 70 additions rounds a partial sum, at most the whole, by half an ulp at most; and there are two calls.
    run_to_run_ulp=70.0,
    source="torch.Tensor.index_add",
)
