"""What the phases put in place: the same training step with no host reads, and AdamW through one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernbench.device import warn_once

from .cms import Momenta, gradient_of, keep
from .memory import NeuralMemory
from .optimizer import DeepNestedOptimizer, LearningRateController
from .training import LOG_FREQ, LOSSES_KEPT, Training

FusedAdamW = Callable[..., None]
FusedCms = Callable[..., None]
NOT_CMS = "phase 5 of titan-mac does nothing here: it fuses the optimizer's CMS mode, which tiny-cms and seed-cms have"

# As it is before any swap.
_move_parameters = DeepNestedOptimizer.move_parameters


def update_memory(self: NeuralMemory, x_BTD: Tensor) -> Tensor:
    """``NeuralMemory.update`` with the clip and the NaN guard as selections on the device."""
    rows_ND = x_BTD.flatten(0, 1)
    key_NM, value_NM = self.key(rows_ND), self.value(rows_ND)
    loss = self.reconstruction_loss(key_NM, value_NM)
    if self.training and torch.is_grad_enabled():
        self.learn(x_BTD, key_NM, value_NM, loss, partial(commit_selected, self))
    return loss


def commit_selected(self: NeuralMemory, x_BTD: Tensor, gradient_P: Tensor) -> None:
    """``NeuralMemory.commit`` without a branch on the device's numbers."""
    norm = gradient_P.norm()
    gradient_P = gradient_P * (self.clip / norm).masked_fill(~(norm > self.clip), 1.0)
    forget, decay = self.gates(x_BTD)
    self.write(gradient_P, forget, decay, torch.isfinite(gradient_P).all())


def control(self: LearningRateController, statistics_G3: Tensor) -> Tensor:
    """``LearningRateController.forward`` with both guards as one selection on the device."""
    multipliers_G = self.multipliers(statistics_G3)
    ok = torch.isfinite(statistics_G3).all() & torch.isfinite(multipliers_G).all()
    return multipliers_G.masked_fill(~ok, 1.0)


@torch.no_grad()
def group_statistics(self: DeepNestedOptimizer) -> Tensor:
    """``DeepNestedOptimizer.group_statistics`` with all norms of a group at once and nothing read."""
    columns = []
    for group in self.adamw.param_groups:
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        columns += [total_norm(gradients, self.depths_G.dtype), total_norm(group["params"], self.depths_G.dtype)]
    norms_G2 = torch.stack(columns).view(len(self.adamw.param_groups), 2)
    statistics_G3 = torch.cat([norms_G2, self.depths_G[:, None]], dim=1)
    return torch.where(torch.isfinite(statistics_G3), statistics_G3, self.default_statistics_G3)


def total_norm(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """L2 norm over all ``tensors``, 0-dim in ``dtype``."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)).to(dtype))
    return norm


@torch.no_grad()
def step_optimizer(self: DeepNestedOptimizer, loss: Tensor) -> None:
    """``DeepNestedOptimizer.step`` for a loss that stays on the device: a bad step selects the old state."""
    self.count_call()
    step_on_device(self, loss)


@torch.no_grad()
def step_on_device(self: DeepNestedOptimizer, loss: Tensor) -> None:
    """What every call of ``step_optimizer`` launches."""
    loss_ok = torch.isfinite(loss)
    rate = self.config.loss_average_rate
    average_G = self.loss_average_G * (1 - rate) + rate * loss.to(self.loss_average_G.dtype)
    keep(self.loss_average_G, average_G, loss_ok)
    keep(self.statistics_G3, self.group_statistics(), loss_ok)
    if self.calls % self.config.controller_update_freq == 0:
        keep(self.multipliers_G, self.controller(self.statistics_G3), loss_ok)
    norm = self.clip_gradients()
    self.move_parameters(self.config.base_lr * self.multipliers_G, loss_ok & torch.isfinite(norm))


def meta_update(self: DeepNestedOptimizer) -> None:
    """``DeepNestedOptimizer.meta_update`` with the choice of good multipliers on the device."""
    average = self.loss_average_G.mean()
    keep(self.good_multipliers_G, self.multipliers_G, average < self.earlier_average)
    self.earlier_average.copy_(average)
    self.train_controller()


def step_training(self: Training, index: int) -> Tensor:
    """``Training.step`` that leaves the loss on the device until ``losses()`` asks for it."""
    loss = self.advance(self.batch(index))
    self.waiting_losses[index % LOSSES_KEPT].copy_(loss)
    self.recent.append((index, None))
    if (index + 1) % LOG_FREQ == 0:
        self.log_entries.append(torch.stack(self.log_values()))
    return loss


def adapt_fused_adamw(op: FusedAdamW) -> Callable[[DeepNestedOptimizer, Any, Any], None]:
    """``DeepNestedOptimizer.apply_update`` through ``op``, the ``fused_adamw`` kernel in one of its implementations."""

    @torch.no_grad()
    def apply_update(self: DeepNestedOptimizer, lr: list[float] | Tensor, ok: bool | Tensor) -> None:
        if not isinstance(lr, Tensor):
            lr = on_device(lr, self.multipliers_G)
        if not isinstance(ok, Tensor):
            ok = torch.full((), ok, dtype=torch.bool, device=self.device)
        state = self.attached_state()
        op(
            state.parameters,
            state.gradients(),
            state.exp_avgs,
            state.exp_avg_sqs,
            state.steps_n,
            lr.to(torch.float32).index_select(0, state.group_n),
            self.config.weight_decay,
            self.config.beta1,
            self.config.beta2,
            self.config.eps,
            ok,
        )

    return apply_update


def adapt_fused_cms(op: FusedCms) -> Callable[[Momenta, Any, Any, int], None]:
    """``Momenta.update`` through ``op``, the ``fused_cms`` kernel in one of its implementations."""

    @torch.no_grad()
    def update(self: Momenta, lr: list[float] | Tensor, ok: bool | Tensor, active: int) -> None:
        dtype, device = self.trainings.dtype, self.trainings.device
        if not isinstance(lr, Tensor):
            lr = on_device(lr, self.trainings.new_empty(len(lr)))
        if not isinstance(ok, Tensor):
            ok = torch.full((), ok, dtype=torch.bool, device=device)
        chosen = self.having_gradients()
        op(
            [self.parameters[index] for index in chosen],
            [gradient_of(self.parameters[index]) for index in chosen],
            [self.states[index] for index in chosen],
            self.network.weights_W.detach(),
            lr.to(dtype).index_select(0, self.groups_of(tuple(chosen))),
            ok,
            active,
            self.config.momentum_width,
            self.config.momentum_layers,
            self.config.weight_decay,
            self.config.beta1,
            self.config.beta2,
        )

    return update


def move_parameters(self: DeepNestedOptimizer, lr: list[float] | Tensor, ok: bool | Tensor) -> None:
    """``DeepNestedOptimizer.move_parameters``, which says so where there is nothing for phase 5 to replace."""
    if self.momenta is None:
        warn_once(NOT_CMS)
    _move_parameters(self, lr, ok)


def on_device(lrs: list[float], like: Tensor) -> Tensor:
    """Host learning rates beside ``like``, by fills: a copy from pageable memory would make the host wait."""
    lr_G = torch.empty_like(like)
    for index, lr in enumerate(lrs):
        lr_G[index].fill_(lr)
    return lr_G
