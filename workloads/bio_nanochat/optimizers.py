"""AdamW for embedding, head and all that is no matrix; Muon for the matrices of the blocks, or AdamW for these too.

Source: specification, section 1; Muon is Jordan et al., 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import BioConfig

QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
WIDTH_OF_RATES = 768
"""The width at which the learning rates of embedding and head are as they are given."""


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as the step of a matrix; of each of them where a tensor stacks several.

    The iteration runs in ``dtype``, bfloat16 upstream.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One Nesterov step of every parameter that has a gradient."""
        for group in self.param_groups:
            self.move([parameter for parameter in group["params"] if parameter.grad is not None], group)

    def move(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of each of these, all of which have gradients, at the rates of ``group``."""
        for parameter in parameters:
            gradient, average = parameter.grad, self.average(parameter)
            assert gradient is not None
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(average, group["momentum"]).to(self.dtype))
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * stretch(parameter))

    def average(self, parameter: nn.Parameter) -> Tensor:
        """The running mean of a parameter's gradients, which starts at zero; in its shape and dtype."""
        state: dict[str, Tensor] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def stretch(parameter: Tensor) -> float:
    """How much further a matrix that is taller than wide goes in a step."""
    rows, columns = parameter.shape[-2:]
    return float(max(1, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one, by the quintic Newton-Schulz iteration; also stacked."""
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, config: BioConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """One AdamW, and a Muon where the config asks for it."""
    if config.optimizer == "adamw":
        return [adamw([{"params": list(model.parameters()), "lr": config.lr}], config)]
    scale = (config.width / WIDTH_OF_RATES) ** -0.5
    named = list(model.named_parameters())
    head = [parameter for name, parameter in named if name.startswith("head.")]
    embedding = [parameter for name, parameter in named if name.startswith("embedding.")]
    blocks = [(name, parameter) for name, parameter in named if name.startswith("blocks.")]
    matrices = [parameter for name, parameter in blocks if is_matrix(name, parameter)]
    rest = [parameter for name, parameter in blocks if not is_matrix(name, parameter)]
    groups = [
        {"params": head, "lr": config.head_lr * scale},
        {"params": embedding, "lr": config.embedding_lr * scale},
        {"params": rest, "lr": config.head_lr * scale},
    ]
    muon = Muon(matrices, lr=config.muon_lr, momentum=config.muon_momentum, dtype=dtype)
    return [adamw([group for group in groups if group["params"]], config), muon]


def adamw(groups: list[dict[str, Any]], config: BioConfig) -> torch.optim.AdamW:
    """AdamW without weight decay."""
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon can take a block's parameter; the biases of experts are stacked vectors, and genomes are tables."""
    return parameter.dim() >= 2 and not name.endswith((".bias", "_gain", ".genome"))
