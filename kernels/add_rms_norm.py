"""Residual addition and RMS norm in one pass, forward and backward.

    summed = x + residual
    normed = summed * r * w,  r = 1 / sqrt(mean(summed^2) + eps)
    dsummed += r * (dnormed * w - n * mean(dnormed * w * n)),  n = summed * r;  it is the gradient of x and of residual
    dw = sum over rows of dnormed * n

One program handles one row, each element once. The backward pass reads both incoming gradients and summed, no more;
its programs add up dw of several rows each, and a second, small kernel adds up the programs, always in one order. A
few rows take one launch.

Cast order, that of the Llama models: summed is rounded to the dtype and the mean square is of what was rounded, in
float32; n is rounded before it is multiplied by w, and dnormed * w before it is taken further.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance, Values

from . import _add_rms_norm, _rows
from ._add_rms_norm import MOST_ROWS, WHOLE


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`add_rms_norm`."""
    summed = x + residual
    wide = summed.to(torch.promote_types(summed.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(summed.dtype) * weight, summed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of x + residual [..., D] times weight [D], and the sum itself; both contiguous.

    Rows of x and residual may be any equal distance apart; other layouts are copied.

    Args:
        x: float32, bfloat16 or float16, any number of rows.
        residual: as x.
        weight: of the same dtype.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    shape, dtype, device = x.shape, x.dtype, x.get_device()
    fits = residual.shape == shape and weight.shape == shape[-1:] and residual.dtype == dtype == weight.dtype
    if not (fits and shape and residual.get_device() == device == weight.get_device()):
        described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in (x, residual, weight))
        raise ValueError(
            f"add_rms_norm takes [..., D], the same and [D], of one dtype and device; they are {described}"
        )
    if dtype not in _rows.DTYPES:
        raise ValueError(f"add_rms_norm takes float32, bfloat16 or float16, not {dtype}")
    results: tuple[Tensor, Tensor]
    if _rows.watched():
        results = torch.ops.kernbench.add_rms_norm.default(x, residual, weight, eps)
    elif torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        results = _AddRMSNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
    else:
        results = _add_rms_norm.forward(x, residual, weight, eps)
    return results


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if dnormed is None:
        return dsummed, dsummed, None, None
    summed, weight = ctx.saved_tensors
    backward = torch.ops.kernbench.add_rms_norm_backward.default if _rows.watched() else _add_rms_norm.backward
    dx, dweight = backward(dnormed, dsummed, summed, weight, ctx.eps)
    return dx, dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        output = _add_rms_norm.forward(x, residual, weight, eps)
        _keep(ctx, (x, residual, weight, eps), output)
        return output

    @staticmethod
    def backward(
        ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        _rows.refuse_second_derivative("add_rms_norm")
        return _gradients(ctx, dnormed, dsummed)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation in (
    (
        "add_rms_norm",
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        _add_rms_norm.forward,
    ),
    (
        "add_rms_norm_backward",
        "(Tensor dnormed, Tensor? dsummed, Tensor summed, Tensor weight, float eps) -> (Tensor, Tensor)",
        _add_rms_norm.backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "kernbench::add_rms_norm",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "kernbench::add_rms_norm_backward",
    lambda dnormed, dsummed, summed, weight, eps: (summed.new_empty(summed.shape), weight.new_empty(weight.shape)),
    lib=_LIBRARY,
)
torch.library.register_autograd("kernbench::add_rms_norm", _gradients, setup_context=_keep, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """What a layer adds, a residual stream with a mean, and weights around one.

    eps is larger than in models: else nobody could tell whether it counts, and in a row of one number neither input
    would change the result by more than rounding.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, residual = normal(case["rows"], case["dim"]), normal(case["rows"], case["dim"]) * 1.5 + 0.5
    weight = normal(case["dim"]) * 0.2 + 1
    given = {"x": x, "residual": residual, "weight": weight}
    return {**{name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}, "eps": 1e-2}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x and residual read and both results written once, and the weight."""
    elements = float(case["rows"] * case["dim"])
    return Cost(
        flops=5 * elements,
        bytes_read=dtype.itemsize * (2 * elements + case["dim"]),
        bytes_written=dtype.itemsize * 2 * elements,
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two incoming gradients and the sum read, one gradient for both inputs written; weight and its gradient."""
    elements = float(case["rows"] * case["dim"])
    return Cost(
        flops=13 * elements,
        bytes_read=dtype.itemsize * (3 * elements + case["dim"]),
        bytes_written=dtype.itemsize * (elements + case["dim"]),
    )


def _torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return torch.nn.functional.rms_norm(summed, weight.shape, weight, eps), summed


def _liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # type: ignore[import-not-found]

    # Neither an offset of the weight, nor gradients written over those that come in.
    results: tuple[Tensor, Tensor] = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
    return results


SPEC = KernelSpec(
    name="add_rms_norm",
    reference=add_rms_norm_reference,
    optimized=add_rms_norm,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, dim=1),
        Case("ragged", rows=11, dim=61),
        Case("long", rows=5, dim=301),
        Case("decode", large=True, rows=1, dim=2048),
        Case("decode-1024", large=True, rows=1, dim=1024),
        Case("16-rows", large=True, rows=16, dim=2048),
        Case("512-rows", large=True, rows=512, dim=2048),
        Case("16384-rows", large=True, rows=16384, dim=2048),
        Case("16384-wide", large=True, rows=16384, dim=4096),
        Case("512-long", large=True, rows=512, dim=12288),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=cost,
    backward_cost=backward_cost,
    sizes={"rows": Sizes(most=12, block=MOST_ROWS), "dim": Sizes(most=400, block=WHOLE)},
    values={
        "x": Values(least=-1e4, most=1e4, nonfinite=True),
        "residual": Values(least=-1e4, most=1e4, nonfinite=True),
        "weight": Values(least=-1e2, most=1e2, nonfinite=True),
    },
    sweeps=(
        Sweep(
            size="rows",
            values=(1, 16, 512, 16384),
            sizes=lambda rows: {"rows": rows, "dim": 2048},
            fixed="2048 columns, the talker's width",
        ),
    ),
    differentiable=True,
    peers={"torch rms_norm": _torch, "liger": _liger},
    source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4",
)
