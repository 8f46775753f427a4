"""Phase 0: the layer and the controller for all seeds at once, with every decision on the device.

What later phases replace by kernels are the functions :func:`blend`, :func:`move` and :func:`moments` of this file.

Shapes: B batch, H width, S seeds, L live seeds, C columns of a chunk, P x Q tiles of the blend kernel.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import networks, ramps
from .blueprints import MULTIPLY, SCALE, NetworkBlueprint
from .config import BLUEPRINTS
from .controller import Tamiyo
from .layer import SPARSE_BELOW, TUNED_SHARE, KasminaLayer
from .lifecycle import LEAST_EPOCHS, Context, Life, guards
from .ramps import keep
from .schedules import ALPHA
from .state import BLUEPRINT, ERRORS, HISTORY, LIFECYCLE, PARENT, SCORE, STABILITY, SeedState

GRAFTING_EPOCHS = LEAST_EPOCHS[Life.GRAFTING][Life.STABILIZATION]
Tiles = tuple[Tensor, Tensor]
"""Mean and squared distances from it, [P, Q] each, as a kernel leaves them for the layer's whole input."""


class Moments(NamedTuple):
    """Of every seed's chunk: mean and population variance, [S] each; 0 for an empty seed."""

    mean: Tensor
    variance: Tensor


def forward(self: KasminaLayer, x_BI: Tensor) -> Tensor:
    """``KasminaLayer.forward`` without a read. Networks of another form run seed by seed, and it says so."""
    if not all(isinstance(network, NetworkBlueprint) for network in self.networks.values()):
        message = "a blueprint is no NetworkBlueprint, so that seeds cannot be batched: this layer runs seed by seed"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return self.forward_seed_by_seed(x_BI)
    y_BH: Tensor = self.linear(x_BI)
    life_S = self.seeds.lifecycle_S
    grafting_S, tuning_S = life_S == Life.GRAFTING, life_S == Life.FINE_TUNING
    if self.training:
        alpha_S = ramps.advance_all(self, grafting_S)
    else:
        alpha_S = self.schedules.on_device(grafting_S.device)[:, ALPHA]
    alpha_S = alpha_S.masked_fill(tuning_S, TUNED_SHARE).to(self.bank_KH.dtype)
    tiles: Tiles | None = None
    if self.config.blueprint == "network":
        blended_BH = networks.blend(self, y_BH, alpha_S, grafting_S, tuning_S)
    else:
        blended_BH, tiles = blend(self, y_BH, alpha_S, grafting_S | tuning_S)
    if self.training:
        active = (grafting_S | tuning_S | (life_S == Life.TRAINING)).any()
        record(self, y_BH.detach(), moments(self, y_BH.detach(), tiles), active)
        self.seeds.age()
        due_S = grafting_S & (self.seeds.epochs_S >= GRAFTING_EPOCHS * self.config.pace)
        move(self.seeds, Life.STABILIZATION, due_S)
    return blended_BH


def blend(layer: KasminaLayer, y_BH: Tensor, alpha_S: Tensor, blends_S: Tensor) -> tuple[Tensor, Tiles | None]:
    """The elementwise blend of the seeds that do, and statistics of ``y_BH`` where they fall off on the way."""
    seed_H = layer.seed_H
    row_H = layer.seeds.blueprint_S.clamp(min=0)[seed_H].long()
    w_H = layer.bank_KH.gather(0, row_H[None])[0]
    alpha_H = alpha_S[seed_H]
    operator_H = layer.words_S8[:, 3][seed_H]
    scale_H = torch.where(
        operator_H == MULTIPLY, alpha_H * w_H + (1 - alpha_H), torch.where(operator_H == SCALE, w_H, 1.0)
    )
    shift_H = torch.where(operator_H > SCALE, w_H, 0.0)
    blends_H = blends_S[seed_H] & layer.covered_H
    return torch.where(blends_H, (y_BH * scale_H + shift_H).to(y_BH.dtype), y_BH), None


def moments(layer: KasminaLayer, y_BH: Tensor, tiles: Tiles | None) -> Moments:
    """Mean and variance per seed, from one pass over ``y_BH``."""
    wide_BH = y_BH.to(layer.seeds.moments_S2.dtype)
    variance_H, mean_H = torch.var_mean(wide_BH, dim=0, correction=0)
    width_L = layer.widths_L
    mean_L = chunks(layer, mean_H).sum(1) / width_L
    spread_LC = chunks(layer, variance_H + (mean_H - mean_L[layer.seed_H.clamp(max=layer.config.live - 1)]) ** 2)
    return Moments(to_seeds(layer, mean_L), to_seeds(layer, spread_LC.sum(1) / width_L))


def chunks(layer: KasminaLayer, values_H: Tensor) -> Tensor:
    """Figures of columns by live seed [L, C], zero where there is no column."""
    config = layer.config
    return functional.pad(values_H[: config.covered], (0, config.live * config.chunk - config.covered)).view(
        config.live, config.chunk
    )


def to_seeds(layer: KasminaLayer, values_L: Tensor) -> Tensor:
    """Figures of live seeds as those of all, [S]."""
    return functional.pad(values_L, (0, layer.config.seeds - layer.config.live))


@torch.no_grad()
def record(layer: KasminaLayer, y_BH: Tensor, found: Moments, active: Tensor) -> None:
    """Write the figures of every seed; only their sums where no seed is ``active``."""
    seeds = layer.seeds
    sparse_H = (y_BH.abs() < SPARSE_BELOW).sum(0, dtype=found.mean.dtype)
    count_S = to_seeds(layer, layer.widths_L * y_BH.shape[0])
    sparsity_S = to_seeds(layer, chunks(layer, sparse_H).sum(1)) / count_S.clamp(min=1)
    mean_S, variance_S = found
    squares_S = count_S * (variance_S + mean_S * mean_S)
    figures_S4 = torch.stack(
        [variance_S + 0.1 * sparsity_S, 1 - sparsity_S, 1 / (1 + variance_S), squares_S.sqrt().clamp(max=1.0)], dim=1
    )
    keep(seeds.performance_S4, figures_S4.to(seeds.performance_S4.dtype), active)
    keep(seeds.moments_S2, torch.stack(found, dim=1), active)
    keep(seeds.telemetry_S2, torch.stack([count_S * mean_S, squares_S], dim=1), ~active)


@torch.no_grad()
def move(seeds: SeedState, target: int | Tensor, moving_S: Tensor) -> None:
    """``SeedState.change`` for every seed of ``moving_S`` at once; ``target`` is one state or one per seed."""
    before_S = seeds.lifecycle_S.clone()
    target_S = torch.where(moving_S, target, before_S)
    entry_S1 = seeds.pointer_S.long()[:, None]
    for column, value_S in enumerate((before_S, target_S)):
        history_SH = seeds.history_SH2[:, :, column]
        old_S1 = history_SH.gather(1, entry_S1)
        history_SH.scatter_(1, entry_S1, torch.where(moving_S[:, None], value_S[:, None], old_S1))
    keep(seeds.pointer_S, (seeds.pointer_S + 1).remainder(HISTORY), moving_S)
    keep(seeds.state_S8[:, LIFECYCLE], target_S, moving_S)
    seeds.epochs_S.masked_fill_(moving_S, 0)
    keep(seeds.state_S8[:, PARENT], before_S, moving_S)


@torch.no_grad()
def act(self: Tamiyo, layer: KasminaLayer) -> None:
    """``Tamiyo.act`` without a read: all seeds are asked at once."""
    seeds = layer.seeds
    if layer.config.blueprint == "bank":
        germinate_next(layer)
    life_S = seeds.lifecycle_S.long()
    average = self.loss_average.double()
    entered_S = self.entry_loss_S.double()
    delta_S = (entered_S - average) / entered_S
    errors_S = seeds.state_S8[:, ERRORS]
    context = Context(
        delta=delta_S,
        improvement=delta_S,
        stability=seeds.performance_S4[:, STABILITY].double(),
        error_rate=errors_S / seeds.epochs_S.clamp(min=1),
        errors=errors_S,
    )
    evaluating_S = life_S == Life.EVALUATING
    keep(seeds.state_S8[:, SCORE], (1000 * delta_S).round().to(torch.int32), evaluating_S)
    passes = guards(context)
    target_S = self.next_state[life_S]
    target_S = target_S.masked_fill(evaluating_S & passes[Life.EVALUATING, Life.CULLED], Life.CULLED)
    moving_S = target_S >= 0
    for (source, target), passed in passes.items():
        moving_S = moving_S & (passed | ~((life_S == source) & (target_S == target)))
    moving_S = moving_S & (seeds.epochs_S >= self.least_epochs[life_S] * layer.config.pace)
    keep(self.entry_loss_S, self.loss_average, moving_S)
    move(seeds, target_S.to(torch.int32), moving_S)


def germinate_next(layer: KasminaLayer) -> None:
    """Germinate the first dormant seed, if there is one, with the blueprint that is its turn."""
    seeds = layer.seeds
    dormant_S = seeds.lifecycle_S == Life.DORMANT
    first_S = dormant_S & (dormant_S.cumsum(0) == 1)
    move(seeds, Life.GERMINATED, first_S)
    turn_S = torch.arange(layer.config.seeds, dtype=torch.int32, device=first_S.device) % BLUEPRINTS
    keep(seeds.state_S8[:, BLUEPRINT], turn_S, first_S)
    if len(layer.drift_ema_SC):
        keep(layer.drift_ema_SC, layer.rows_of_seeds().to(layer.drift_ema_SC.dtype), first_S[:, None])
