"""The training loop of TitanMAC as an object that kernbench can step, save and compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .config import TitanConfig
from .data import load_streams
from .model import TitanMac
from .optimizer import DeepNestedOptimizer

LOG_FREQ = 100
LOSSES_KEPT = 512


class Training:
    """One model, its optimizer and its data on one device. ``units_per_step`` counts tokens.

    ``kept`` holds what phases keep from step to step, none of it state.
    """

    def __init__(
        self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype, seed: int, data: str | None
    ) -> None:
        self.config = config
        self.device = device
        self.seed = seed
        self.units_per_step = float(config.batch * config.length)
        self.model = TitanMac(config, device=device, dtype=dtype, seed=seed)
        self.optimizer = DeepNestedOptimizer(self.model, config, device=device, seed=seed)
        self.streams_BN = load_streams(data, batch=config.batch, length=config.length, device=device)
        # Losses that were never read by the host wait here; an entry of None in ``recent`` stands for one of them.
        self.waiting_losses = torch.zeros(LOSSES_KEPT, dtype=dtype, device=device)
        self.recent: deque[tuple[int, float | None]] = deque(maxlen=LOSSES_KEPT)
        self.log_entries: list[list[float] | Tensor] = []
        self.kept: dict[str, Any] = {}

    def step(self, index: int) -> Tensor:
        """Forward, backward and update on batch ``index``; returns the loss, 0-dim and detached."""
        self.optimizer.zero_grad()
        loss = self.loss(self.batch(index))
        loss.backward()  # type: ignore[no-untyped-call]
        loss_value = loss.item()
        self.recent.append((index, loss_value))
        self.optimizer.step(loss_value)
        if (index + 1) % LOG_FREQ == 0:
            self.log_entries.append([value.item() for value in self.log_values()])
        return loss.detach()

    def advance(self, tokens_BT: Tensor) -> Tensor:
        """A step whose loss the optimizer takes from the device, as phase 0 has it; returns the loss, detached."""
        self.optimizer.zero_grad()
        loss = self.loss(tokens_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        self.optimizer.step(loss)
        return loss

    def batch(self, index: int) -> Tensor:
        """Token ids [B, T] of step ``index``: a slice of the resident text, so a step copies nothing to the device."""
        length = self.config.length
        windows = self.streams_BN.shape[1] // length
        start = (self.seed + index) % windows * length
        return self.streams_BN[:, start : start + length]

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean cross entropy of the next token plus the memory loss, 0-dim."""
        logits_BTV, memory_loss = self.model(tokens_BT)
        entropy: Tensor = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), ignore_index=-100
        )
        loss: Tensor = entropy + memory_loss
        return loss

    @torch.no_grad()
    def log_values(self) -> list[Tensor]:
        """What is logged: average loss, both multipliers, norms of the memory's momentum and weights; 0-dim each."""
        weights_P = torch.cat([weight.reshape(-1) for weight in self.model.memory.weights()])
        return [
            self.optimizer.loss_average_G[0],
            *self.optimizer.multipliers_G.unbind(),
            self.model.memory.momentum.norm(),
            weights_P.to(self.model.memory.momentum.dtype).norm(),
        ]

    def losses(self) -> list[float]:
        """The last losses, oldest first; reads the device if some were left there."""
        waiting = self.waiting_losses.tolist() if any(value is None for _, value in self.recent) else []
        return [waiting[index % LOSSES_KEPT] if value is None else value for index, value in self.recent]

    def state_dict(self) -> dict[str, Any]:
        """Everything a later step depends on."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
