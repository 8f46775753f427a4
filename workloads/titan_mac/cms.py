"""CMS mode of the nested optimizer: momenta of three speeds, whose updates a small network proposes per element.

Level l accumulates gradients for 10^l steps, then hands their mean and its momentum to the network. The state is 12
copies of the parameters: momentum, total, average and square of each level; the last two are kept and never used.
Shapes: L levels, E elements, F features, W numbers of the network, J sampled tensors with K elements each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import TitanConfig

LEVELS = 3
PERIOD = 10
KINDS = 4
"""Momentum, total, average and square."""
MOMENTUM_DECAY = 0.9
LARGEST_SHARE = 100.0
"""A momentum is at most this many times as long as the gradient."""
LOG_SCALE = 10.0
FEATURES = 4
TRAIN_EVERY = 5
TRAINED_TENSORS = 20
SAMPLED_ELEMENTS = 4096
LENGTH_WEIGHT, SMOOTHNESS_WEIGHT = 0.1, 0.1
NETWORK_BETA1, NETWORK_BETA2, NETWORK_EPS = 0.9, 0.999, 1e-8


def active_levels(calls: int) -> int:
    """How many levels are due at this call of ``step``; a slow one only where all faster ones are."""
    return sum(calls % PERIOD**level == 0 for level in range(LEVELS))


class MomentumNetwork(nn.Module):
    """The update of an element from its gradient and its momentum: linear layers with SiLU, all weights in one vector.

    Layer by layer a matrix [outputs, inputs], then its biases.
    """

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.sizes = [FEATURES, *[config.momentum_width] * config.momentum_layers, 1]
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for inputs, outputs in zip(self.sizes, self.sizes[1:], strict=False):
            matrix = torch.empty(outputs, inputs)
            nn.init.xavier_uniform_(matrix, gain=config.momentum_gain if outputs == 1 else 1.0, generator=generator)
            parts += [matrix.flatten(), torch.zeros(outputs)]
        self.weights_W = nn.Parameter(torch.cat(parts).to(device=device, dtype=dtype))

    def forward(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Updates in the shape of ``gradient``."""
        hidden_EF = torch.stack([*log_sign(gradient.flatten()), *log_sign(momentum.flatten())], dim=1)
        start = 0
        for inputs, outputs in zip(self.sizes, self.sizes[1:], strict=False):
            if start:
                hidden_EF = functional.silu(hidden_EF)
            matrix = self.weights_W[start : start + outputs * inputs].view(outputs, inputs)
            start += outputs * inputs
            hidden_EF = functional.linear(hidden_EF, matrix, self.weights_W[start : start + outputs])
            start += outputs
        return hidden_EF.view(gradient.shape)


def log_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """Size and sign of each element as two features: logarithmic from e^-10 on, linear below."""
    size = x.abs()
    large = size >= math.exp(-LOG_SCALE)
    logarithm = torch.where(large, size, 1.0).log() / LOG_SCALE
    return torch.where(large, logarithm, -1.0), torch.where(large, x.sign(), x * math.exp(LOG_SCALE))


class Momenta:
    """The state of all parameters, the network that proposes their updates, and its training.

    ``states`` has per parameter [4, L, *shape], at least float32.
    """

    def __init__(
        self,
        groups: list[list[nn.Parameter]],
        config: TitanConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.config = config
        self.parameters = [parameter for group in groups for parameter in group]
        self.group_of = [index for index, group in enumerate(groups) for _ in group]
        self.states = [torch.zeros(KINDS, LEVELS, *one.shape, dtype=dtype, device=device) for one in self.parameters]
        self.network = MomentumNetwork(config, device=device, dtype=dtype, seed=seed)
        self.first_W = torch.zeros_like(self.network.weights_W, requires_grad=False)
        self.second_W = torch.zeros_like(self.first_W)
        self.trainings = torch.zeros((), dtype=dtype, device=device)
        self.known_groups: dict[tuple[int, ...], Tensor] = {}

    def having_gradients(self) -> list[int]:
        """Which parameters take part in this step."""
        return [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]

    def groups_of(self, chosen: tuple[int, ...]) -> Tensor:
        """The group of each chosen parameter, on the device; copied there when they are chosen for the first time."""
        if chosen not in self.known_groups:
            groups = torch.tensor([self.group_of[index] for index in chosen])
            self.known_groups[chosen] = groups.to(self.trainings.device)
        return self.known_groups[chosen]

    @torch.no_grad()
    def update(self, lr: list[float] | Tensor, ok: bool | Tensor, active: int) -> None:
        """One update of all parameters with gradients, at one learning rate per group.

        Host figures (``ok`` is then True) go with branches. Device tensors, lr [G] and a 0-dim bool, go with
        selections, which leave everything as it is where ``ok`` is False.
        """
        for index in self.having_gradients():
            parameter, state, group = self.parameters[index], self.states[index], self.group_of[index]
            if isinstance(lr, Tensor):
                self.select_parameter(parameter, state, lr[group], ok, active)
            else:
                self.update_parameter(parameter, state, lr[group], active)

    def update_parameter(self, parameter: nn.Parameter, state: Tensor, lr: float, active: int) -> None:
        """As the source has it: guards are branches, five reads where one level is active."""
        momenta, totals, averages, squares = state.unbind()
        totals.add_(gradient_of(parameter))
        change, kept = torch.zeros_like(totals[0]), 0
        for level in range(active):
            gradient = totals[level] / PERIOD**level
            totals[level].zero_()
            averages[level].mul_(self.config.beta1).add_(gradient, alpha=1 - self.config.beta1)
            squares[level].mul_(self.config.beta2).addcmul_(gradient, gradient, value=1 - self.config.beta2)
            update = self.network(gradient, momenta[level])
            moved = momenta[level] * MOMENTUM_DECAY + update * (1 - MOMENTUM_DECAY)
            largest, norm = LARGEST_SHARE * gradient.norm(), moved.norm()
            if norm > largest:
                moved.mul_(largest / norm)
            if torch.isnan(update).any() or torch.isinf(update).any():
                continue
            momenta[level].copy_(moved)
            change.add_(update)
            kept += 1
        change.div_(math.sqrt(kept) if kept else math.nan)
        if torch.isnan(change).any() or torch.isinf(change).any():
            return
        wide = parameter.to(state.dtype)
        parameter.copy_(wide - lr * (change + self.config.weight_decay * wide))

    def select_parameter(
        self, parameter: nn.Parameter, state: Tensor, lr: Tensor, ok: bool | Tensor, active: int
    ) -> None:
        """The same with selections on the device."""
        momenta, totals, averages, squares = state.unbind()
        summed = totals + gradient_of(parameter)
        change, kept = torch.zeros_like(summed[0]), torch.zeros((), dtype=state.dtype, device=state.device)
        for level in range(active):
            gradient = summed[level] / PERIOD**level
            summed[level].zero_()
            average = averages[level] * self.config.beta1 + gradient * (1 - self.config.beta1)
            square = torch.addcmul(squares[level] * self.config.beta2, gradient, gradient, value=1 - self.config.beta2)
            update = self.network(gradient, momenta[level])
            moved = momenta[level] * MOMENTUM_DECAY + update * (1 - MOMENTUM_DECAY)
            largest, norm = LARGEST_SHARE * gradient.norm(), moved.norm()
            moved = moved * torch.where(norm > largest, largest / norm, 1.0)
            good = torch.isfinite(update).all()
            keep(averages[level], average, ok)
            keep(squares[level], square, ok)
            keep(momenta[level], moved, good & ok)
            change, kept = change + torch.where(good, update, 0.0), kept + good
        keep(totals, summed, ok)
        change = change / kept.sqrt()
        wide = parameter.to(state.dtype)
        updated = wide - lr * (change + self.config.weight_decay * wide)
        keep(parameter, updated.to(parameter.dtype), torch.isfinite(change).all() & ok)

    def train(self, ok: bool | Tensor) -> None:
        """One Adam step of the network on samples of this step's gradients; nothing is read, whatever ``ok`` is."""
        with torch.enable_grad():
            (gradient_W,) = torch.autograd.grad(self.training_loss(), [self.network.weights_W])
        with torch.no_grad():
            ok = torch.isfinite(gradient_W).all() & ok
            trainings = self.trainings + 1
            first_W = torch.lerp(self.first_W, gradient_W, 1 - NETWORK_BETA1)
            second_W = torch.addcmul(self.second_W * NETWORK_BETA2, gradient_W, gradient_W, value=1 - NETWORK_BETA2)
            root_W = (second_W / (1 - NETWORK_BETA2**trainings)).sqrt() + NETWORK_EPS
            step_W = self.config.momentum_lr * first_W / (1 - NETWORK_BETA1**trainings) / root_W
            for state, new in (
                (self.network.weights_W, self.network.weights_W - step_W),
                (self.first_W, first_W),
                (self.second_W, second_W),
                (self.trainings, trainings),
            ):
                keep(state, new, ok)

    def training_loss(self) -> Tensor:
        """Mean over the sampled tensors of 1 - cos(u, g) + 0.1 (|u| / |g| - 1)^2 + 0.1 mean (u - m)^2, 0-dim."""
        chosen = self.having_gradients()[:TRAINED_TENSORS]
        gradients = [sampled(gradient_of(self.parameters[index])) for index in chosen]
        momenta = [sampled(self.states[index][0, 0]) for index in chosen]
        mask_JK = padded([torch.ones_like(momentum) for momentum in momenta])
        dtype = self.network.weights_W.dtype
        gradient_JK, momentum_JK = padded(gradients).to(dtype), padded(momenta)
        update_JK = self.network(gradient_JK, momentum_JK) * mask_JK
        # Below what the features resolve a length says nothing, and the square of its inverse would drown the rest.
        least_J = math.exp(-LOG_SCALE) * mask_JK.sum(dim=1).sqrt()
        norm_J = torch.maximum(torch.linalg.vector_norm(gradient_JK, dim=1), least_J)
        update_norm_J = torch.linalg.vector_norm(update_JK, dim=1)
        cosine_J = (update_JK * gradient_JK).sum(dim=1) / torch.maximum(update_norm_J * norm_J, least_J.square())
        smoothness_J = ((update_JK - momentum_JK) * mask_JK).square().sum(dim=1) / mask_JK.sum(dim=1)
        length_J = (update_norm_J / norm_J - 1).square()
        loss_J: Tensor = 1 - cosine_J + LENGTH_WEIGHT * length_J + SMOOTHNESS_WEIGHT * smoothness_J
        return loss_J.mean()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on."""
        return {
            "states": self.states,
            "network": self.network.state_dict(),
            **{name: getattr(self, name) for name in self.tensor_names},
        }

    tensor_names = ("first_W", "second_W", "trainings")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``, in place."""
        for own, other in zip(self.states, state["states"], strict=True):
            own.copy_(other)
        self.network.load_state_dict(state["network"])
        for name in self.tensor_names:
            getattr(self, name).copy_(state[name])


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, which the caller knows to be there."""
    assert parameter.grad is not None
    return parameter.grad


def keep(state: Tensor, new: Tensor, ok: bool | Tensor) -> None:
    """Write ``new`` into ``state`` where ``ok``."""
    if isinstance(ok, Tensor):
        new = torch.where(ok, new, state)
    elif not ok:
        return
    state.copy_(new)


def sampled(tensor: Tensor) -> Tensor:
    """At most 4,096 elements, evenly spread."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-len(flat) // SAMPLED_ELEMENTS))]


def padded(rows: list[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor [J, K], with zeros after the shorter ones."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
