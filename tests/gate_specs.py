"""Declarations for the tests of the gate: right kernels of many kinds, each written otherwise than its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Tolerance

EPS = 1e-5


def no_cost(case: Case, dtype: torch.dtype) -> Cost:
    return Cost(flops=1, bytes_read=1, bytes_written=1)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def spec(name: str, reference: Any, optimized: Any, make_inputs: Any, **options: Any) -> KernelSpec:
    cases = (Case("ragged", rows=5, dim=37), Case("larger", rows=6, dim=48))
    tolerance = {"float32": Tolerance(), "bfloat16": Tolerance()}
    given: dict[str, Any] = {"cases": cases, "tolerance": tolerance, "cost": no_cost} | options
    return KernelSpec(name=name, reference=reference, optimized=optimized, make_inputs=make_inputs, **given)


def norm_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x, weight, bias = normal(seed, (case["rows"], case["dim"]), (case["dim"],), (case["dim"],))
    return {
        "x": (x * 3 + 1).to(device, dtype),
        "weight": (weight + 2).to(device, dtype),
        "bias": bias.to(device, dtype),
    }


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight + bias


def other_rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.flip(-1).square().sum(-1, keepdim=True) / x.shape[-1]
    return (wide / torch.sqrt(mean + EPS) * weight.float() + bias.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def other_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return (centred * scale * weight.float() + bias.float()).to(x.dtype)


def softmax_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x, drawn = normal(seed, *[(case["rows"], case["dim"])] * 2)
    mask = drawn > 0
    mask[:, 0] = True
    return {"x": x.to(device, dtype), "mask": mask.to(device)}


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(~mask, -1e30), -1)


def other_masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    wide = torch.where(mask, x.float(), -1e30)
    powers = torch.exp(wide - wide.detach().amax(-1, keepdim=True))
    return (powers / powers.sum(-1, keepdim=True)).to(x.dtype)


def linear_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x, weight, bias = normal(seed, (case["rows"], case["dim"]), (case["dim"], case["dim"]), (case["dim"],))
    return {name: value.to(device, dtype) for name, value in (("x", x), ("weight", weight), ("bias", bias))}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def other_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ((x.float().unsqueeze(-2) * weight.float()).sum(-1) + bias.float()).to(x.dtype)


def rows_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    (table,) = normal(seed, (case["rows"], case["dim"]))
    index = torch.randint(case["rows"], (11,), generator=torch.Generator().manual_seed(seed))
    return {"table": table.to(device, dtype), "index": index.to(device)}


def gathered(table: Tensor, index: Tensor) -> Tensor:
    return functional.embedding(index, table)


def other_gathered(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


def average_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    state, x = normal(seed, *[(case["rows"] * case["dim"],)] * 2)
    return {"state": [state.to(device, dtype)], "x": x.to(device, dtype)}


def average(state: list[Tensor], x: Tensor) -> None:
    state[0].mul_(0.9).add_(x, alpha=0.1)


def other_average(state: list[Tensor], x: Tensor) -> None:
    wide = state[0].float() * 0.9
    state[0].copy_(wide.to(x.dtype) + x * 0.1)


def redraw(inputs: Inputs, seed: int) -> None:
    inputs["x"].normal_(generator=torch.Generator().manual_seed(seed))


def gated_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    return softmax_inputs(case, dtype, device, seed) | {"open": torch.tensor(True, device=device)}


def gated(x: Tensor, mask: Tensor, open: Tensor) -> Tensor:
    return torch.where(open, torch.where(mask, x * 2, x), x)


def other_gated(x: Tensor, mask: Tensor, open: Tensor) -> Tensor:
    return x + x * (mask & open)


NORM = spec("norm", rms_norm, other_rms_norm, norm_inputs, differentiable=True)
LAYER_NORM = spec("layer_norm", layer_norm, other_layer_norm, norm_inputs, differentiable=True)
SOFTMAX = spec("softmax", masked_softmax, other_masked_softmax, softmax_inputs, differentiable=True)
LINEAR = spec("linear", linear, other_linear, linear_inputs, differentiable=True)
GATHERED = spec("gathered", gathered, other_gathered, rows_inputs, differentiable=True)
AVERAGE = spec("average", average, other_average, average_inputs, mutates=("state",), stateful=True, next_inputs=redraw)
GATED = spec("gated", gated, other_gated, gated_inputs)
LIBRARY = {spec.name: spec for spec in (NORM, LAYER_NORM, SOFTMAX, LINEAR, GATHERED, AVERAGE)}
