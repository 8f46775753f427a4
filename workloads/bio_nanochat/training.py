"""The training loop of bio-nanochat as an object that kernbench can step, save and compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import parallel
from .config import BioConfig
from .data import Text
from .gradients import GradientMean
from .model import build_model
from .neuroscore import NeuroScore
from .optimizers import make_optimizers
from .structure import StructuralController

LOSSES_KEPT = 512


class Training:
    """One model with its optimizers, scores, controller and data on one device. ``units_per_step`` counts tokens.

    ``kept`` holds what phases keep from step to step, none of it state.
    """

    def __init__(
        self, config: BioConfig, *, device: torch.device, dtype: torch.dtype, seed: int, data: str | None
    ) -> None:
        self.config = config
        self.device = device
        self.seed = seed
        self.units_per_step = float(config.batch * config.length)
        self.model = build_model(config, device=device, dtype=dtype, seed=seed)
        self.text = Text(data, batch=config.batch, length=config.length, device=device)
        self.parameters = list(self.model.parameters())
        self.optimizers = make_optimizers(self.model, config, dtype)
        self.gradient_mean = GradientMean(self.parameters)
        wide = torch.promote_types(dtype, torch.float32)
        self.scores = [
            NeuroScore(config.experts, every=config.log_every, dtype=wide, tag=f"layer {layer}")
            for layer, _ in enumerate(self.model.mixtures())
        ]
        self.controller = StructuralController(config.structure, seed)
        # Losses that were never read by the host wait here; an entry of None in ``recent`` stands for one of them.
        self.waiting_losses = torch.zeros(LOSSES_KEPT, dtype=wide, device=device)
        self.recent: deque[tuple[int, float | None]] = deque(maxlen=LOSSES_KEPT)
        self.gradient_norm: float | Tensor = 0.0
        self.steps = 0
        self.kept: dict[str, Any] = {}

    def step(self, index: int) -> Tensor:
        """A step on batch ``index`` between two synchronisations, as upstream times it; its loss, 0-dim."""
        self.synchronize()
        self.seed_noise(index)
        loss = self.advance(*self.batch(index))
        self.recent.append((index, loss.item()))
        self.after_step()
        self.synchronize()
        return loss

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seed_noise(self, index: int) -> None:
        """Let equal steps draw equal noise."""
        torch.manual_seed((self.seed << 32) + index)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens of step ``index`` and the ones that follow them, [B, T] each; other ones on every rank."""
        rank, ranks = parallel.world()
        return self.text.batch(self.seed + index * ranks + rank)

    def advance(self, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
        """What every step computes: forward, backward, clip, update, scores; the loss, detached.

        The configuration may ask for a forward pass with gradients off alone, where profile K learns online.
        """
        if self.config.step == "forward":
            with torch.no_grad():
                loss = self.loss(tokens_BT, next_BT)
        else:
            loss = self.differentiate(tokens_BT, next_BT)
            self.gradient_norm = self.clip_gradients()
            self.update()
        for score, mixture in zip(self.scores, self.model.mixtures(), strict=True):
            score.observe(mixture)
        return loss

    def differentiate(self, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
        """Gradients of the loss, averaged over all ranks; this rank's loss is returned detached."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens_BT, next_BT)
        self.gradient_mean.begin()
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradient_mean.finish()
        return loss.detach()

    def clip_gradients(self) -> float | Tensor:
        """Scale gradients down to the allowed norm; the norm they had."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip).item()

    def update(self) -> None:
        """One step of every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def loss(self, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
        """Mean cross entropy of the next token plus the balance of the experts, 0-dim, float32 or wider."""
        logits_BTV, balance = self.model(tokens_BT)
        entropy = functional.cross_entropy(logits_BTV.flatten(0, 1).to(balance.dtype), next_BT.flatten())
        loss: Tensor = entropy + self.config.balance * balance
        return loss

    def after_step(self) -> None:
        """What comes now and then: a log of the experts' scores, and moves of experts."""
        self.steps += 1
        mixtures = self.model.mixtures()
        for score, mixture in zip(self.scores, mixtures, strict=True):
            score.count(mixture)
        if self.config.step == "train":
            self.controller.step(mixtures, self.optimizers, self.steps)

    def losses(self) -> list[float]:
        """The last losses, oldest first; reads the device if some were left there."""
        waiting = self.waiting_losses.tolist() if any(value is None for _, value in self.recent) else []
        return [waiting[index % LOSSES_KEPT] if value is None else value for index, value in self.recent]

    def state_dict(self) -> dict[str, Any]:
        """Everything a later step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scores": [score.state_dict() for score in self.scores],
            "controller": self.controller.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        # Optimizers take other tensors for their state.
        self.kept.clear()
        self.model.load_state_dict(state["model"])
        for part, saved in zip(self.optimizers, state["optimizers"], strict=True):
            part.load_state_dict(saved)
        for score, saved in zip(self.scores, state["scores"], strict=True):
            score.load_state_dict(saved)
        self.controller.load_state_dict(state["controller"])
        self.steps = state["steps"]
