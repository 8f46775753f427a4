"""Blueprint networks of all seeds that have one, as batched products.

Shapes: B batch, H width, S seeds, N seeds with a network, C columns of a chunk, W columns within a network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .layer import KasminaLayer


def blend(layer: KasminaLayer, y_BH: Tensor, alpha_S: Tensor, grafting_S: Tensor, tuning_S: Tensor) -> Tensor:
    """``y_BH`` with the networks' shares: without a gradient where seeds graft, with one where they are fine-tuned."""
    batch, width = y_BH.shape
    seed_N = seeds_with_networks(layer)
    y_SBC = y_BH.view(batch, layer.config.seeds, layer.config.chunk).transpose(0, 1)
    y_NBC = y_SBC[seed_N]
    made_NBC = apply_all(layer, y_NBC)
    made_NBC = torch.where(tuning_S[seed_N, None, None], made_NBC, made_NBC.detach())
    alpha_N = alpha_S[seed_N, None, None]
    mixed_NBC = ((1 - alpha_N) * y_NBC + alpha_N * made_NBC).to(y_BH.dtype)
    mixed_NBC = torch.where((grafting_S | tuning_S)[seed_N, None, None], mixed_NBC, y_NBC)
    return y_SBC.index_copy(0, seed_N, mixed_NBC).transpose(0, 1).reshape(batch, width)


def seeds_with_networks(layer: KasminaLayer) -> Tensor:
    """Their numbers on the device, in the order of ``layer.network_of``; sent once, for networks come with building."""
    known: Tensor | None = getattr(layer, "seed_N", None)
    if known is None or len(known) != len(layer.network_of):
        known = torch.tensor(list(layer.network_of), device=layer.starts_S.device)
        layer.seed_N = known
    return known


def apply_all(layer: KasminaLayer, x_NBC: Tensor) -> Tensor:
    """Every network on its own chunk, [N, B, C]."""
    networks: list[Any] = [layer.networks[str(blueprint)] for blueprint in layer.network_of.values()]

    def stacked(place: int, name: str) -> Tensor:
        return torch.stack([getattr(network[place], name) for network in networks])

    def linear(place: int, x_NBW: Tensor) -> Tensor:
        return torch.baddbmm(stacked(place, "bias")[:, None], x_NBW, stacked(place, "weight").mT)

    def norm(place: int, x_NBW: Tensor) -> Tensor:
        scaled = functional.layer_norm(x_NBW, x_NBW.shape[-1:], eps=networks[0][place].eps)
        return scaled * stacked(place, "weight")[:, None] + stacked(place, "bias")[:, None]

    wide_NBW = functional.relu(norm(1, linear(0, x_NBC)))
    return linear(6, functional.relu(norm(4, linear(3, wide_NBW))))
