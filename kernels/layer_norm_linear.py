"""Layer norm and the linear layer behind it, with an exact GELU after that if asked for; forward and backward.

:mod:`._norm_linear` has the formulas, the cast order, and which kernels run when.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016, equation 3; torch.nn.functional.linear; Hendrycks and Gimpel,
Gaussian Error Linear Units, 2016.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernbench.spec import KernelSpec

from . import _norm_linear, _norm_linear_cases


def layer_norm_linear_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    gelu: bool,
) -> Tensor:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`layer_norm_linear`."""
    normed = torch.nn.functional.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    z = torch.nn.functional.linear(normed, weight, bias)
    return torch.nn.functional.gelu(z) if gelu else z


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    gelu: bool = False,
) -> Tensor:  # fmt: skip
    """The layer norm of x [..., K] with norm_weight and norm_bias [K], through weight [N, K] and bias [N]; [..., N].

    Rows of x may be any equal distance apart; other layouts are copied, and weights that are not contiguous.

    Args:
        x: float32, bfloat16 or float16, any number of rows.
        eps: added to the variance.
        gelu: the exact GELU of the result is returned.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or K is too large.
    """
    _norm_linear.check("layer_norm_linear", x, norm_weight, norm_bias, weight, bias)
    return _norm_linear.norm_linear(x, norm_weight, norm_bias, weight, bias, eps, True, gelu)


SPEC = KernelSpec(
    name="layer_norm_linear",
    reference=layer_norm_linear_reference,
    optimized=layer_norm_linear,
    make_inputs=partial(_norm_linear_cases.make_inputs, shifted=True),
    cases=_norm_linear_cases.CASES,
    tolerance=_norm_linear_cases.TOLERANCE,
    cost=_norm_linear_cases.cost,
    backward_cost=_norm_linear_cases.backward_cost,
    sizes=_norm_linear_cases.SIZES,
    values=_norm_linear_cases.VALUES,
    differentiable=True,
    peers={"linear without the norm": _norm_linear_cases.WITHOUT_NORM},
    source="Ba, Kiros and Hinton, Layer Normalization, 2016, equation 3; torch.nn.functional.linear",
)
