"""Dropout with a stream of its own: element i is kept if uniform number i of the seed is at least p.

    y = x / (1 - p) where tl.rand(seed, i) >= p, else 0;  dx = dy / (1 - p) where kept, else 0

The reference draws the same numbers from ``kernbench.philox``, so both drop the same elements.

Source: Srivastava et al., Dropout, 2014, scaled while training as torch.nn.functional.dropout does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench import philox
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Stochastic, Values

from . import _shared

BLOCK = 2048


def dropout_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """In plain PyTorch; arguments as in :func:`dropout`."""
    offset = torch.arange(x.numel(), device=x.device).view(x.shape)
    kept = philox.rand(seed, offset) >= p
    return torch.where(kept, x.to(_shared.wide(x.dtype)) * _scale(p), 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _kernel(x, y, count, p, scale, seed, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK elements of x and y [count]; grid is count / BLOCK, rounded up."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    kept = tl.rand(seed, offset) >= p
    _shared.store(y + offset, tl.where(kept, value * scale, 0.0), mask)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x of any shape and layout, dropped with probability p in [0, 1].

    Raises:
        ValueError: p is no probability, or x none that the kernel takes.
    """
    _shared.check("dropout", x=x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout takes a probability, not {p}")
    y: Tensor = _launch(x, p, seed)
    return y


def _scale(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@torch.library.custom_op("kernbench_exemplars::dropout", mutates_args=())
def _launch(x: Tensor, p: float, seed: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        _kernel[(triton.cdiv(count, BLOCK),)](x, y, count, p, _scale(p), seed, BLOCK)
    return y


@_launch.register_fake
def _(x: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.drawn = inputs[1:]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _launch(dy, *ctx.drawn), None, None


_launch.register_autograd(_gradients, setup_context=_keep)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Activations away from zero, so that a zero in the output was dropped."""
    drawn = _shared.normal(torch.Generator(device).manual_seed(seed), (case["rows"], case["dim"]), torch.float32)
    x = torch.where(drawn < 0, drawn - 0.25, drawn + 0.25).to(dtype).requires_grad_()
    return {"x": x, "p": 0.25, "seed": 1000 * seed + 7}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read and y written once; some 100 integer operations an element are no flops."""
    elements = float(case["rows"] * case["dim"])
    return Cost(flops=elements, bytes_read=dtype.itemsize * elements, bytes_written=dtype.itemsize * elements)


SPEC = KernelSpec(
    name="dropout",
    reference=dropout_reference,
    optimized=dropout,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, dim=1),
        Case("ragged", rows=37, dim=129),
        Case("large", large=True, rows=8192, dim=4096),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"rows": Sizes(most=40), "dim": Sizes(most=200, block=BLOCK)},
    values={"p": Values(fixed=True)},
    stochastic=Stochastic(
        seed="seed",
        law="bernoulli",
        draws=lambda inputs, output: (output != 0).float(),
        probability=lambda inputs: 1.0 - float(inputs["p"]),
    ),
    differentiable=True,
    source="Srivastava et al., Dropout, 2014; torch.nn.functional.dropout",
)
