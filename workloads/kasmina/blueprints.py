"""What a seed blends in: a row of the elementwise bank, or a network of its own.

Shapes: B batch, C columns of the chunk, K rows of the bank, H width of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MULTIPLY, SCALE, SHIFT = range(3)
TABLE = "alpha"
"""Blend operators of the elementwise bank, in the table of upstream's second kernel, which uses alpha."""


def operate(x: Tensor, w: Tensor, alpha: float | Tensor, operator: int) -> Tensor:
    """One blend operator: alpha w x + (1 - alpha) x, w x, or x + w."""
    if operator == MULTIPLY:
        return alpha * w * x + (1 - alpha) * x
    return x * w if operator == SCALE else x + w


class NetworkBlueprint(nn.Sequential):
    """A network [B, C] -> [B, C] of three linear layers, with Xavier weights and zero biases."""

    def __init__(self, chunk: int, *, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> None:
        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, device=device, dtype=dtype)
            bound = (6 / (inputs + outputs)) ** 0.5
            drawn = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                layer.weight.copy_(drawn)
                layer.bias.zero_()
            return layer

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(2 * chunk, device=device, dtype=dtype)

        wide = 2 * chunk
        super().__init__(
            linear(chunk, wide), norm(), nn.ReLU(), linear(wide, wide), norm(), nn.ReLU(), linear(wide, chunk)
        )
