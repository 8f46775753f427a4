"""Neural memory: a two-layer MLP whose weights are the memory, written by one gradient step per update.

Shapes: B batch, T positions, D width, N = B * T rows, M memory width (= D), P = 2 M M + 2 M memory weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import TitanConfig

Commit = Callable[[Tensor, Tensor], None]
"""Takes the segment [B, T, D], from which the gates follow, and the gradient of the memory [P]."""


class Gate(nn.Module):
    """Linear, SiLU, Linear, sigmoid: one figure in (0, 1) per row."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.width, config.gate_width, device=device, dtype=dtype)
        self.output = nn.Linear(config.gate_width, 1, device=device, dtype=dtype)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Figures [B, 1] for rows [B, D]."""
        return torch.sigmoid(self.output(functional.silu(self.hidden(x_BD))))


class NeuralMemory(nn.Module):
    """One memory for the whole model; its weights W and momentum S persist across steps and batches."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.width
        self.key = nn.Linear(width, width, device=device, dtype=dtype)
        self.value = nn.Linear(width, width, device=device, dtype=dtype)
        self.query = nn.Linear(width, width, device=device, dtype=dtype)
        self.inner = nn.Linear(width, width, device=device, dtype=dtype)
        self.outer = nn.Linear(width, width, device=device, dtype=dtype)
        self.forget_gate = Gate(config, device=device, dtype=dtype)
        self.decay_gate = Gate(config, device=device, dtype=dtype)
        self.step_size = config.memory_step
        self.clip = config.memory_clip
        # At least float32: the momentum of a bfloat16 model would round its small steps away.
        state_dtype = torch.promote_types(dtype, torch.float32)
        size = sum(weight.numel() for weight in self.weights())
        self.momentum: Tensor
        self.register_buffer("momentum", torch.zeros(size, dtype=state_dtype, device=device))

    def weights(self) -> list[Tensor]:
        """The memory itself: W1, b1, W2, b2."""
        return [self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias]

    def retrieve(self, x_BTD: Tensor) -> Tensor:
        """What the memory answers to the queries of ``x_BTD``, outside of autograd: [B, T, M]."""
        with torch.no_grad():
            return recall(self.query(x_BTD), self.weights())

    def update(self, x_BTD: Tensor) -> Tensor:
        """Write ``x_BTD`` into the memory and return the reconstruction loss, 0-dim and in the autograd graph.

        A gradient with NaN or Inf leaves W and S as they were. In evaluation nothing is written.
        """
        rows_ND = x_BTD.flatten(0, 1)
        key_NM, value_NM = self.key(rows_ND), self.value(rows_ND)
        loss = self.reconstruction_loss(key_NM, value_NM)
        if self.training and torch.is_grad_enabled():
            self.learn(x_BTD, key_NM, value_NM, loss, self.commit)
        return loss

    def reconstruction_loss(self, key_NM: Tensor, value_NM: Tensor) -> Tensor:
        """Mean squared error of the recalled values.

        The weights are copied into the graph, so that the backward pass of the training loss sees the weights that the
        loss was taken with, although ``write`` changes them before it runs.
        """
        return functional.mse_loss(recall(key_NM, [weight.clone() for weight in self.weights()]), value_NM)

    def learn(self, x_BTD: Tensor, key_NM: Tensor, value_NM: Tensor, loss: Tensor, commit: Commit) -> None:
        """Take one gradient step on ``loss``, which is that of ``key_NM`` and ``value_NM``; ``commit`` guards it."""
        commit(x_BTD, self.gradient(loss))

    def commit(self, x_BTD: Tensor, gradient_P: Tensor) -> None:
        """Clip the gradient and write it into the memory, unless it has NaN or Inf."""
        norm = gradient_P.norm()
        if norm > self.clip:
            gradient_P = gradient_P * (self.clip / norm)
        if torch.isnan(gradient_P).any() or torch.isinf(gradient_P).any():
            return
        forget, decay = self.gates(x_BTD)
        self.write(gradient_P, forget, decay, True)

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of ``loss`` with respect to the memory, flat [P] in the dtype of the momentum; keeps the graph."""
        gradients = torch.autograd.grad(loss, self.weights(), retain_graph=True)
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).to(self.momentum.dtype)

    @torch.no_grad()
    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """How much to forget (alpha) and how much momentum to keep (eta), 0-dim each."""
        mean_BD = x_BTD.mean(dim=1)
        return self.forget_gate(mean_BD).mean(), self.decay_gate(mean_BD).mean()

    @torch.no_grad()
    def write(self, gradient_P: Tensor, forget: Tensor, decay: Tensor, ok: bool | Tensor) -> None:
        """S <- decay S - step g; W <- (1 - forget) W + S. A device bool ``ok`` selects between the new and the old."""
        weights_P = torch.cat([weight.reshape(-1) for weight in self.weights()])
        momentum_P = decay * self.momentum - self.step_size * gradient_P
        written_P = (1 - forget) * weights_P + momentum_P
        if isinstance(ok, Tensor):
            momentum_P = torch.where(ok, momentum_P, self.momentum)
            written_P = torch.where(ok, written_P, weights_P)
        self.momentum.copy_(momentum_P)
        sizes = [weight.numel() for weight in self.weights()]
        for weight, values in zip(self.weights(), torch.split(written_P, sizes), strict=True):
            weight.copy_(values.view_as(weight))


def recall(key: Tensor, weights: list[Tensor]) -> Tensor:
    """The memory MLP: Linear, SiLU, Linear with ``weights`` W1, b1, W2, b2."""
    inner_weight, inner_bias, outer_weight, outer_bias = weights
    hidden = functional.silu(functional.linear(key, inner_weight, inner_bias))
    return functional.linear(hidden, outer_weight, outer_bias)
