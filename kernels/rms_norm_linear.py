"""RMS norm and the linear layer behind it, with an exact GELU after that if asked for; forward and backward.

:mod:`._norm_linear` has the formulas, the cast order, and which kernels run when.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4; torch.nn.functional.linear;
Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernbench.spec import KernelSpec

from . import _norm_linear, _norm_linear_cases


def rms_norm_linear_reference(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool
) -> Tensor:
    """In plain PyTorch; arguments as in :func:`rms_norm_linear`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    z = torch.nn.functional.linear((wide * scale * norm_weight).to(x.dtype), weight, bias)
    return torch.nn.functional.gelu(z) if gelu else z


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool = False
) -> Tensor:
    """The RMS norm of x [..., K] times norm_weight [K], through weight [N, K] and bias [N]; [..., N], contiguous.

    Rows of x may be any equal distance apart; other layouts are copied, and weights that are not contiguous.

    Args:
        x: float32, bfloat16 or float16, any number of rows.
        eps: added to the mean square.
        gelu: the exact GELU of the result is returned.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or K is too large.
    """
    _norm_linear.check("rms_norm_linear", x, norm_weight, None, weight, bias)
    return _norm_linear.norm_linear(x, norm_weight, None, weight, bias, eps, False, gelu)


def _torch(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool) -> Tensor:
    normed = torch.nn.functional.rms_norm(x, norm_weight.shape, norm_weight, eps)
    z = torch.nn.functional.linear(normed, weight, bias)
    return torch.nn.functional.gelu(z) if gelu else z


SPEC = KernelSpec(
    name="rms_norm_linear",
    reference=rms_norm_linear_reference,
    optimized=rms_norm_linear,
    make_inputs=partial(_norm_linear_cases.make_inputs, shifted=False),
    cases=_norm_linear_cases.CASES,
    tolerance=_norm_linear_cases.TOLERANCE,
    cost=_norm_linear_cases.cost,
    backward_cost=_norm_linear_cases.backward_cost,
    sizes=_norm_linear_cases.SIZES,
    values={name: bounds for name, bounds in _norm_linear_cases.VALUES.items() if name != "norm_bias"},
    differentiable=True,
    peers={"torch rms_norm": _torch, "linear without the norm": _norm_linear_cases.WITHOUT_NORM},
    source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4; torch.nn.functional.linear",
)
