"""Tamiyo, the controller: every now and then it germinates a seed and asks every other one to move on.

Upstream's Tamiyo is a policy beyond this workload's subject; this one follows a rule, and judges a seed by how the
training loss fell since the seed entered its state.

Shapes: S seeds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import BLUEPRINTS
from .data import CLASSES
from .layer import KasminaLayer
from .lifecycle import EPOCHS as EPOCHS_IN
from .lifecycle import Context, Life, guards
from .state import EPOCHS, ERRORS, LIFECYCLE, SCORE, STABILITY

PERIOD = 10
"""Steps from one round of requests to the next."""
NEXT = {
    Life.GERMINATED: Life.TRAINING,
    Life.TRAINING: Life.GRAFTING,
    Life.STABILIZATION: Life.EVALUATING,
    Life.EVALUATING: Life.FINE_TUNING,
    Life.FINE_TUNING: Life.FOSSILIZED,
}
"""What the controller asks for. Grafting ends by itself; a seed that evaluates badly is culled instead."""


class Tamiyo(nn.Module):
    """The average training loss, and what it was when each seed entered its state."""

    def __init__(self, seeds: int, *, rate: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.rate = rate
        # What guessing costs.
        guess = torch.full((), math.log(CLASSES), dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.loss_average: Tensor
        self.entry_loss_S: Tensor
        self.next_state: Tensor
        self.least_epochs: Tensor
        following = torch.tensor([NEXT.get(state, -1) for state in Life], device=device)
        self.register_buffer("next_state", following, persistent=False)
        least = torch.tensor([EPOCHS_IN.get(state, 0) for state in Life], device=device)
        self.register_buffer("least_epochs", least, persistent=False)
        self.register_buffer("loss_average", guess)
        self.register_buffer("entry_loss_S", guess.repeat(seeds))

    def observe(self, loss: Tensor) -> None:
        """Take one training loss into the average."""
        self.loss_average.lerp_(loss.to(self.loss_average.dtype), self.rate)

    def act(self, layer: KasminaLayer) -> None:
        """One round: germinate the first dormant seed, then ask each seed in turn."""
        average = self.loss_average.item()
        if layer.config.blueprint == "bank":
            self.germinate_next(layer)
        for seed in range(layer.config.seeds):
            state = Life(int(layer.seeds.state_S8[seed, LIFECYCLE].item()))
            if state not in NEXT:
                continue
            context = self.context(layer, seed, average)
            target = NEXT[state]
            if state == Life.EVALUATING:
                layer.seeds.state_S8[seed, SCORE] = round(1000 * context.delta)
                if guards(context)[Life.EVALUATING, Life.CULLED]:
                    target = Life.CULLED
            if layer.request_transition(seed, target, context):
                self.entry_loss_S[seed] = average

    def germinate_next(self, layer: KasminaLayer) -> None:
        """Germinate the first dormant seed, if there is one, with the blueprint that is its turn."""
        dormant = torch.nonzero(layer.seeds.lifecycle_S == Life.DORMANT).flatten()
        if len(dormant):
            seed = int(dormant[0].item())
            layer.germinate(seed, seed % BLUEPRINTS)

    def context(self, layer: KasminaLayer, seed: int, average: float) -> Context:
        """What the guards are told of one seed; its reconstruction is vouched for, as upstream trains nothing."""
        entered = self.entry_loss_S[seed].item()
        delta = (entered - average) / entered
        errors = int(layer.seeds.state_S8[seed, ERRORS].item())
        return Context(
            delta=delta,
            improvement=delta,
            stability=layer.seeds.performance_S4[seed, STABILITY].item(),
            error_rate=errors / max(layer.seeds.state_S8[seed, EPOCHS].item(), 1),
            errors=errors,
        )
