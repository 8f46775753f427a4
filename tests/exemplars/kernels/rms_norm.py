"""RMS norm over the last dimension with a weight, forward and backward.

    y = x * r * w,  r = 1 / sqrt(mean(x^2) + eps)
    dx = r * (dy * w - x * r^2 * mean(dy * w * x)),  dw = sum over rows of dy * x * r

All arithmetic is float32, y and dx are rounded once. dw is summed in an order that does not change: chunks of rows
first, then the chunks.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _shared

BLOCK = 512
CHUNK = 16


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In plain PyTorch; arguments as in :func:`rms_norm`."""
    wide = x.to(_shared.wide(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(x, weight, y, scales, dim, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles one row of x [rows, dim], and leaves r in scales [rows]; grid is rows."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(x + row * dim + column, mask=column < dim, other=0.0).to(tl.float32)
        squares += value * value
    scale = 1.0 / tl.sqrt(tl.sum(squares) / dim + eps)
    tl.store(scales + row, scale)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = column < dim
        value = tl.load(x + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        _shared.store(y + row * dim + column, value * scale * factor, mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_x_kernel(dy, x, weight, scales, dx, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles one row of dy, x and dx [rows, dim]; grid is rows."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = column < dim
        value = tl.load(x + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        products += tl.load(dy + row * dim + column, mask=mask, other=0.0).to(tl.float32) * factor * value
    mean = tl.sum(products) / dim
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = column < dim
        value = tl.load(x + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(dy + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        _shared.store(dx + row * dim + column, scale * (upstream * factor - value * scale * scale * mean), mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_weight_kernel(  # type: ignore[no-untyped-def]
    dy, x, scales, partial, rows, dim, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """One program sums CHUNK rows of BLOCK columns into partial [chunks, dim]; grid is (chunks, blocks)."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    mask = column < dim
    for row in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, rows)):
        upstream = tl.load(dy + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * dim + column, mask=mask, other=0.0).to(tl.float32)
        total += upstream * value * tl.load(scales + row)
    tl.store(partial + chunk * dim + column, total, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., dim] over its root mean square, times weight [dim]; any layout, copied where it is not contiguous.

    Raises:
        ValueError: weight has another shape or dtype, or a tensor is none that the kernel takes.
    """
    _shared.check("rms_norm", x=x, weight=weight)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"rms_norm takes a weight {tuple(x.shape[-1:])} of {x.dtype}; it is {tuple(weight.shape)}")
    y: Tensor = _forward(x, weight, eps)[0]
    return y


@torch.library.custom_op("kernbench_exemplars::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y, scales = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        _forward_kernel[(scales.numel(),)](x, weight, y, scales, x.shape[-1], eps, BLOCK)
    return y, scales


@torch.library.custom_op("kernbench_exemplars::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    rows, dim = scales.numel(), weight.numel()
    chunks = triton.cdiv(rows, CHUNK)
    dx, partial = torch.empty_like(x), torch.empty(chunks, dim, dtype=torch.float32, device=x.device)
    if x.numel():
        _backward_x_kernel[(rows,)](dy, x, weight, scales, dx, dim, BLOCK)
        _backward_weight_kernel[(chunks, triton.cdiv(dim, BLOCK))](dy, x, scales, partial, rows, dim, CHUNK, BLOCK)
    return dx, partial.sum(0).to(weight.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return (*_backward(dy, *ctx.saved_tensors), None)


_forward.register_autograd(_gradients, setup_context=_keep)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Activations with a mean, and weights around one.

    eps is larger than in models: else x would not change y in a row of one, and its gradient were rounding noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = _shared.normal(generator, (case["rows"], case["dim"]), torch.float32) * 2 + 0.5
    weight = _shared.normal(generator, (case["dim"],), torch.float32) * 0.2 + 1
    return {"x": x.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_(), "eps": 1e-2}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read and y written once, and the weight."""
    elements = case["rows"] * case["dim"]
    return Cost(
        flops=4.0 * elements,
        bytes_read=float(dtype.itemsize * (elements + case["dim"])),
        bytes_written=float(dtype.itemsize * elements),
    )


SPEC = KernelSpec(
    name="rms_norm",
    reference=rms_norm_reference,
    optimized=rms_norm,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, dim=1),
        Case("ragged", rows=19, dim=61),
        Case("wide", rows=2, dim=1100),
        Case("large", large=True, rows=4096, dim=4096),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"rows": Sizes(most=40, block=CHUNK), "dim": Sizes(most=1100, block=BLOCK)},
    values={"x": Values(least=-1e4, most=1e4), "weight": Values(least=-1e2, most=1e2)},
    differentiable=True,
    source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4",
)
