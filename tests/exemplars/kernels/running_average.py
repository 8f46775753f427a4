"""An exponential moving average, updated in place: average += (value - average) * share.

The average is kept in float32 (in the reference float64 for the oracle), whatever the dtype of the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes

from . import _shared

BLOCK = 512


@torch.no_grad()
def running_average_reference(average: Tensor, value: Tensor, share: float) -> None:
    """In plain PyTorch; arguments as in :func:`running_average`."""
    average.lerp_(value.to(average.dtype), share)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(average, value, count, share, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK elements of average and value [count]; grid is count / BLOCK, rounded up."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    old = tl.load(average + offset, mask=mask)
    new = tl.load(value + offset, mask=mask).to(tl.float32)
    tl.store(average + offset, old + (new - old) * share, mask=mask)


def running_average(average: Tensor, value: Tensor, share: float) -> None:
    """Moves average, float32 and contiguous, towards value of the same shape by share in [0, 0.5).

    Raises:
        ValueError: the tensors differ in shape, or average is no contiguous float32 tensor.
    """
    _shared.check("running_average", average=average, value=value)
    if average.dtype != torch.float32 or not average.is_contiguous() or average.shape != value.shape:
        raise ValueError("running_average takes a contiguous float32 average of the shape of the value")
    _launch(average, value, share)


@torch.library.custom_op("kernbench_exemplars::running_average", mutates_args=("average",))
def _launch(average: Tensor, value: Tensor, share: float) -> None:
    if count := average.numel():
        _kernel[(triton.cdiv(count, BLOCK),)](average, value.contiguous(), count, share, BLOCK)


@_launch.register_fake
def _(average: Tensor, value: Tensor, share: float) -> None:
    return None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """An average that has seen some values, and another value."""
    generator = torch.Generator(device).manual_seed(seed)
    average = _shared.normal(generator, (case["size"],), _shared.wide(dtype)) * 0.3
    return {"average": average, "value": _shared.normal(generator, (case["size"],), dtype), "share": 0.1}


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The next value, in place."""
    value = inputs["value"]
    value.copy_(_shared.normal(torch.Generator(value.device).manual_seed(seed), value.shape, value.dtype))


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Both read, the average written."""
    size, state_bytes = float(case["size"]), _shared.wide(dtype).itemsize
    return Cost(flops=3 * size, bytes_read=(state_bytes + dtype.itemsize) * size, bytes_written=state_bytes * size)


SPEC = KernelSpec(
    name="running_average",
    reference=running_average_reference,
    optimized=running_average,
    make_inputs=make_inputs,
    cases=(
        Case("one", size=1),
        Case("ragged", size=1037),
        Case("aligned", size=1024),
        Case("large", large=True, size=2**26),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    mutates=("average",),
    stateful=True,
    next_inputs=next_inputs,
    sizes={"size": Sizes(most=2000, block=BLOCK)},
    source="torch.lerp",
)
