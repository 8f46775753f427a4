"""Inputs, cases and costs that rms_norm_linear and layer_norm_linear share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs, Peer, Sizes, Tolerance, Values

CASES = (
    Case("ragged", rows=37, inner=101, outputs=53, bias=0, gelu=0),
    Case("gelu", rows=20, inner=72, outputs=40, bias=1, gelu=1),
    Case("bias", rows=3, inner=16, outputs=33, bias=1, gelu=0),
    Case("16384-rows", large=True, rows=16384, inner=2048, outputs=2048, bias=0, gelu=0),
    Case("16384-narrow", large=True, rows=16384, inner=512, outputs=512, bias=0, gelu=0),
    Case("qkv", large=True, rows=2048, inner=512, outputs=1536, bias=0, gelu=0),
    Case("feed-forward", large=True, rows=2048, inner=512, outputs=2048, bias=1, gelu=1),
    Case("ragged-large", large=True, rows=2080, inner=520, outputs=1000, bias=1, gelu=1),
)
SIZES = {
    "rows": Sizes(most=40, block=32),
    "inner": Sizes(most=130, block=64),
    "outputs": Sizes(most=70, block=32),
    "bias": Sizes(most=1),
    "gelu": Sizes(most=1),
}
VALUES = {
    "x": Values(least=-1e4, most=1e4),
    "weight": Values(least=-1e2, most=1e2),
    "bias": Values(least=-1e2, most=1e2),
    "norm_weight": Values(least=-1e2, most=1e2),
    "norm_bias": Values(least=-1e2, most=1e2),
}
TOLERANCE = {"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int, *, shifted: bool) -> Inputs:
    """A residual stream with a mean, norm weights around one, and a weight that keeps the rows' size.

    eps is larger than in models: else nobody could tell whether it counts.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows, inner, outputs = case["rows"], case["inner"], case["outputs"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    given = {"x": normal(rows, inner) * 1.5 + 0.5, "norm_weight": 1 + 0.2 * normal(inner)}
    if shifted:
        given["norm_bias"] = 0.2 * normal(inner)
    given["weight"] = normal(outputs, inner) / max(1, inner) ** 0.5
    inputs: Inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    inputs["bias"] = (0.5 * normal(outputs)).to(dtype).requires_grad_() if case["bias"] else None
    return {**inputs, "eps": 1e-2, "gelu": bool(case["gelu"])}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two operations a product and eight a number that is normalised; each tensor once."""
    rows, inner, outputs = (float(case[name]) for name in ("rows", "inner", "outputs"))
    return Cost(
        flops=2 * rows * inner * outputs + 8 * rows * inner,
        bytes_read=dtype.itemsize * (rows * inner + outputs * inner + inner + case["bias"] * outputs),
        bytes_written=dtype.itemsize * rows * outputs,
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products; the incoming gradient and what the forward pass had read, z for a GELU, and a gradient for each."""
    rows, inner, outputs = (float(case[name]) for name in ("rows", "inner", "outputs"))
    weights = outputs * inner + inner
    return Cost(
        flops=4 * rows * inner * outputs + 16 * rows * inner,
        bytes_read=dtype.itemsize * ((1 + case["gelu"]) * rows * outputs + rows * inner + weights),
        bytes_written=dtype.itemsize * (rows * inner + weights + case["bias"] * outputs),
    )


class _Unread(torch.autograd.Function):
    """y as it is, and gradients of zero for tensors that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *unread: Tensor) -> Tensor:
        ctx.unread = unread
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (dy, *map(torch.zeros_like, ctx.unread))


def _without_norm(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool,
    norm_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    z = functional.linear(x, weight, bias)
    y = functional.gelu(z) if gelu else z
    unread = [one for one in (norm_weight, norm_bias) if one is not None and one.requires_grad]
    return _Unread.apply(y, *unread) if unread else y  # type: ignore[no-untyped-call]


# Not the same function, so no error of it means anything, as long as it is of the size of the result.
WITHOUT_NORM = Peer(
    call=_without_norm, tolerance=Tolerance(floor_ulp=2.0**28), because="it is the linear layer alone, to be set beside"
)
