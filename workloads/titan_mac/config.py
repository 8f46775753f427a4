"""Sizes and settings of one TitanMAC training run; every preset is one value of this type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["mag", "mac", "mal"]
AttentionKind = Literal["windowed", "block"]
OptimizerMode = Literal["adamw", "cms"]


@dataclass(frozen=True, kw_only=True)
class TitanConfig:
    """Model, optimizer and batch sizes, in tokens, features or steps.

    Attributes:
        variant: memory as gate (mag), as context (mac) or as layer (mal).
        attention: windowed SDPA (attention A) or block-sparse (attention B).
        segment: tokens per segment, memory_tokens: retrieved tokens before each segment; both for mac only.
        memory_step: theta, the constant step of the memory's own gradient descent.
        exploration: weight of the spread of the multipliers in the controller's proxy loss.
        optimizer: AdamW, or momenta of three speeds whose updates a network proposes (cms); for cms alone are the
            network's layers, units per layer, scale of the output layer's first weights, and learning rate.
    """

    vocabulary: int = 256
    width: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 512
    length: int = 128
    batch: int = 4
    persistent: int = 4
    window: int = 64
    block: int = 32
    segment: int = 64
    memory_tokens: int = 8
    gate_width: int = 32
    variant: Variant = "mag"
    attention: AttentionKind = "windowed"

    memory_step: float = 0.01
    memory_clip: float = 1.0

    base_lr: float = 3e-4
    weight_decay: float = 0.2
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    controller_width: int = 32
    controller_layers: int = 5
    controller_update_freq: int = 1
    loss_average_rate: float = 0.1
    meta_lr: float = 1e-4
    meta_update_freq: int = 50
    exploration: float = 0.01
    optimizer: OptimizerMode = "adamw"
    momentum_layers: int = 4
    momentum_width: int = 20
    momentum_gain: float = 0.01
    momentum_lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
