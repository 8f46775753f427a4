"""Inputs and cost of router_genetics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs

from ._genes import GENES


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Products of tokens with a router and a probe, genomes some way from zero, and tired experts."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, width, experts, features = (case[name] for name in ("tokens", "width", "experts", "features"))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    wide = torch.promote_types(dtype, torch.float32)
    inputs: Inputs = {
        name: drawn(*shape).to(dtype).requires_grad_()
        for name, shape in (("router", (tokens, experts)), ("x", (tokens, width)), ("probe", (tokens, features)))
    }
    return inputs | {
        "genome": drawn(experts, GENES).to(wide).requires_grad_(),
        "embedding": functional.normalize(drawn(experts, features), dim=-1).to(wide),
        "energy": drawn(experts).sigmoid().to(wide),
        "fatigue": drawn(experts).sigmoid().to(wide),
        "metabolic": bool(case["metabolic"]),
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Tokens, their two products and the experts' tensors read; logits and genes written."""
    tokens, width, experts, features = (float(case[name]) for name in ("tokens", "width", "experts", "features"))
    return Cost(
        flops=tokens * (width + 2 * experts * features + 6 * experts),
        bytes_read=dtype.itemsize * tokens * (width + experts + features) + 4 * experts * (features + GENES + 2),
        bytes_written=4 * experts * (tokens + GENES),
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Gradients of the logits, probe and the experts' tensors read; four gradients written, of x a number a token."""
    tokens, experts, features = (float(case[name]) for name in ("tokens", "experts", "features"))
    return Cost(
        flops=tokens * (2 * experts * features + 4 * experts),
        bytes_read=tokens * (4 * experts + dtype.itemsize * features) + 4 * experts * (features + GENES),
        bytes_written=dtype.itemsize * tokens * (experts + features + 1) + 4 * experts * GENES,
    )
