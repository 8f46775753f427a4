"""What rms_norm_linear and layer_norm_linear share: which kernels run, the operator, and its gradients.

    n = (x - mean) * r,  r = 1 / sqrt(mean((x - mean)^2) + eps);  an RMS norm takes nothing off
    h = n * scale + shift,  z = h @ weight^T + bias,  y = z or gelu(z)
    dz = dy * gelu'(z),  dbias = sum of dz over rows,  dweight = dz^T @ h,  dh = dz @ weight
    dscale = sum of dh * n over rows,  dshift = sum of dh
    dx = r * (g - n * mean(g * n) - mean(g)),  g = dh * scale;  the last mean in a layer norm alone

Cast order: everything up to h is float32, h is rounded to the dtype; products add up in float32, z and y are rounded
when stored. The gradients dz, dh and all results are rounded when stored.

The backward pass keeps x, and z for a GELU. It makes h again in the kernel that turns dh into dx and reads both anyway.

Shapes: R rows, K inner, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _rows
from ._norm_linear_backward import backward
from ._norm_linear_forward import forward

WHOLE = 16384
"""Longest row, which is kept in registers: 32 numbers a thread, of three tensors at once in the backward pass."""


def check(kernel: str, x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raises:
    ValueError: shapes, dtypes or devices do not fit.
    """
    given = [one for one in (x, scale, shift, weight, bias) if one is not None]
    inner = x.shape[-1:]
    shapes = x.dim() and scale.shape == inner and weight.dim() == 2 and weight.shape[1:] == inner
    shapes = shapes and (shift is None or shift.shape == inner) and (bias is None or bias.shape == weight.shape[:1])
    if not shapes or len({(one.dtype, one.device) for one in given}) > 1:
        described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in given)
        raise ValueError(f"{kernel} takes x [..., K], weights and biases of one dtype and device; they are {described}")
    if x.dtype not in _rows.DTYPES:
        raise ValueError(f"{kernel} takes float32, bfloat16 or float16, not {x.dtype}")
    if inner[0] > WHOLE:
        raise ValueError(f"{kernel} takes rows of at most {WHOLE} numbers, not {inner[0]}")


def norm_linear(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    gelu: bool,
) -> Tensor:  # fmt: skip
    """y [..., N] of checked arguments."""
    learning = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (x, scale, shift, weight, bias)
    )
    y: Tensor
    if _rows.watched():
        y, _ = torch.ops.kernbench.norm_linear.default(
            x, scale, shift, weight, bias, eps, centred, gelu, learning and gelu
        )
    elif learning:
        y = _NormLinear.apply(x, scale, shift, weight, bias, eps, centred, gelu)  # type: ignore[no-untyped-call]
    else:
        y, _ = forward(x, scale, shift, weight, bias, eps, centred, gelu, False)
    return y


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, weight, bias, ctx.eps, ctx.centred, ctx.gelu = inputs[:8]
    ctx.biased = bias is not None
    ctx.save_for_backward(x, scale, shift, weight, output[1] if ctx.gelu else None)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, weight, z = ctx.saved_tensors
    needed = ctx.needs_input_grad
    operator = torch.ops.kernbench.norm_linear_backward.default if _rows.watched() else backward
    dx, dscale, dshift, dweight, dbias = operator(
        dy, dy if z is None else z, x, scale, shift, weight, ctx.eps, ctx.centred, ctx.gelu,
        any(needed[:3]), needed[3], needed[4] and ctx.biased,
    )  # fmt: skip
    found = (dx, dscale, None if shift is None else dshift, dweight, dbias)
    return tuple(one if wanted else None for one, wanted in zip(found, needed, strict=False))


class _NormLinear(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale, shift, weight, bias, eps, centred, gelu = inputs
        output = forward(x, scale, shift, weight, bias, eps, centred, gelu, gelu)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _rows.refuse_second_derivative("norm_linear")
        return (*_gradients(ctx, dy), None, None, None)


def _fake_forward(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    gelu: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _fake_backward(
    dy: Tensor, z: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float, centred: bool,
    gelu: bool, for_input: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape if for_input else 0),
        x.new_empty(scale.shape if for_input else 0),
        x.new_empty(scale.shape if for_input and shift is not None else 0),
        x.new_empty(weight.shape if for_weight else 0),
        x.new_empty(weight.shape[:1] if for_bias else 0),
    )


def _operator_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy), None, None, None, None)


_TENSORS = "Tensor x, Tensor scale, Tensor? shift, Tensor weight"
_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation, _fake in (
    (
        "norm_linear",
        f"({_TENSORS}, Tensor? bias, float eps, bool centred, bool gelu, bool keep) -> (Tensor, Tensor)",
        forward,
        _fake_forward,
    ),
    (
        "norm_linear_backward",
        f"(Tensor dy, Tensor z, {_TENSORS}, float eps, bool centred, bool gelu, bool for_input, bool for_weight, "
        "bool for_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        _fake_backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kernbench::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("kernbench::norm_linear", _operator_gradients, setup_context=_keep, lib=_LIBRARY)
