"""Phase 0: the layer and the controller for all seeds at once, with every decision on the device.

What later phases replace by kernels are the functions :func:`blend`, :func:`move`, :func:`measure`, :func:`alphas` and
:func:`finish` of this file.

Shapes: B batch, H width, S seeds, L live seeds, C columns of a chunk, P x Q tiles of the blend kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.device import warn_once

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
UNBATCHED = "a blueprint of kasmina is no NetworkBlueprint, so seeds cannot be batched: its layer runs seed by seed"
# Numbers, since torch.compile (2.13) takes a tensor to be unequal to a member of an enumeration.
TRAINING, GRAFTING, FINE_TUNING = int(Life.TRAINING), int(Life.GRAFTING), int(Life.FINE_TUNING)
BLENDING = (GRAFTING, FINE_TUNING)
Tiles = tuple[Tensor, Tensor, Tensor]
"""Mean, squared distances from it and near zeros [P, Q], as a kernel leaves them of parts of the layer's input."""


class Figures(NamedTuple):
    """Of every seed's chunk: mean, population variance and share of near zeros, [S] each; 0 for an empty seed."""

    mean: Tensor
    variance: Tensor
    sparsity: Tensor


def forward(self: KasminaLayer, x_BI: Tensor) -> Tensor:
    """``KasminaLayer.forward`` without a read. Networks of another form run seed by seed, and it says so."""
    if not all(isinstance(network, NetworkBlueprint) for network in self.networks.values()):
        warn_once(UNBATCHED)
        return self.forward_seed_by_seed(x_BI)
    y_BH: Tensor = self.linear(x_BI)
    alpha_S, active = alphas(self)
    tiles: Tiles | None = None
    if self.config.blueprint == "network":
        life_S = self.seeds.lifecycle_S
        blended_BH = networks.blend(self, y_BH, alpha_S, *(life_S == state for state in BLENDING))
    else:
        blended_BH, tiles = blend(self, y_BH, alpha_S)
    if self.training:
        finish(self, len(y_BH), measure(self, y_BH.detach(), tiles), active)
    return blended_BH


def alphas(layer: KasminaLayer) -> tuple[Tensor, Tensor]:
    """Alpha of every seed in the bank's dtype [S], and whether any seed is active, bool []."""
    life_S = layer.seeds.lifecycle_S
    grafting_S, tuning_S = life_S == GRAFTING, life_S == FINE_TUNING
    if layer.training:
        alpha_S = ramps.advance_all(layer, grafting_S)
    else:
        alpha_S = layer.schedules.on_device(grafting_S.device)[:, ALPHA]
    alpha_S = alpha_S.masked_fill(tuning_S, TUNED_SHARE).to(layer.bank_KH.dtype)
    return alpha_S, (grafting_S | tuning_S | (life_S == TRAINING)).any()


def finish(layer: KasminaLayer, batch: int, found: Figures, active: Tensor) -> None:
    """What a forward pass leaves of every seed: its figures, an epoch more, and the step on of those that are due."""
    seeds = layer.seeds
    record(layer, batch, found, active)
    grafting_S = seeds.lifecycle_S == GRAFTING
    seeds.age()
    due_S = grafting_S & (seeds.epochs_S >= GRAFTING_EPOCHS * layer.config.pace)
    move(seeds, Life.STABILIZATION, due_S)


def blend(layer: KasminaLayer, y_BH: Tensor, alpha_S: Tensor) -> tuple[Tensor, Tiles | None]:
    """The elementwise blend of the seeds that do, and statistics of ``y_BH`` where they fall off on the way."""
    seed_H = layer.seed_H
    life_S = layer.seeds.lifecycle_S
    blends_H = ((life_S == BLENDING[0]) | (life_S == BLENDING[1]))[seed_H] & layer.covered_H
    row_H = layer.seeds.blueprint_S.clamp(min=0)[seed_H].long()
    w_H = layer.bank_KH.gather(0, row_H[None])[0]
    alpha_H, operator_H = alpha_S[seed_H], layer.operator_S[seed_H]
    lerped_H = alpha_H * w_H + (1 - alpha_H)
    # No torch.where with a number: it would be copied to the device, and the host would wait for that.
    scale_H = torch.where(operator_H == MULTIPLY, lerped_H, w_H.masked_fill(operator_H != SCALE, 1.0))
    shift_H = w_H.masked_fill(operator_H <= SCALE, 0.0)
    return torch.where(blends_H, (y_BH * scale_H + shift_H).to(y_BH.dtype), y_BH), None


@torch.no_grad()
def measure(layer: KasminaLayer, y_BH: Tensor, tiles: Tiles | None) -> Figures:
    """The figures of every seed, from passes over ``y_BH``."""
    wide_BH = y_BH.to(layer.seeds.moments_S2.dtype)
    variance_H, mean_H = torch.var_mean(wide_BH, dim=0, correction=0)
    mean_L = chunks(layer, mean_H).sum(1) / layer.widths_L
    distance_H = mean_H - mean_L[layer.seed_H.clamp(max=layer.config.live - 1)]
    variance_L = chunks(layer, variance_H + distance_H * distance_H).sum(1) / layer.widths_L
    near_H = (y_BH.abs() < SPARSE_BELOW).sum(0, dtype=mean_H.dtype)
    sparsity_L = chunks(layer, near_H).sum(1) / (layer.widths_L * len(y_BH))
    return Figures(to_seeds(layer, mean_L), to_seeds(layer, variance_L), to_seeds(layer, sparsity_L))


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
def record(layer: KasminaLayer, batch: int, found: Figures, active: Tensor) -> None:
    """Write the figures of every seed; only their sums where no seed is ``active``."""
    seeds = layer.seeds
    mean_S, variance_S, sparsity_S = found
    count_S = to_seeds(layer, layer.widths_L * batch)
    squares_S = count_S * (variance_S + mean_S * mean_S)
    performance_S4 = torch.stack(
        [variance_S + 0.1 * sparsity_S, 1 - sparsity_S, 1 / (1 + variance_S), squares_S.sqrt().clamp(max=1.0)], dim=1
    )
    keep(seeds.performance_S4, performance_S4, active)
    keep(seeds.moments_S2, torch.stack([mean_S, variance_S], dim=1), active)
    keep(seeds.telemetry_S2, torch.stack([count_S * mean_S, squares_S], dim=1), ~active)


@torch.no_grad()
def move(seeds: SeedState, target: int | Tensor, moving_S: Tensor, blueprint_S: Tensor | None = None) -> None:
    """``SeedState.change`` for every seed of ``moving_S`` at once; ``target`` is one state or one per seed.

    Their blueprints are set where some are given.
    """
    before_S = seeds.lifecycle_S.clone()
    if isinstance(target, Tensor):
        target_S = torch.where(moving_S, target, before_S)
    else:
        target_S = before_S.masked_fill(moving_S, target)
    entry_S1 = seeds.pointer_S.long()[:, None]
    for column, value_S in enumerate((before_S, target_S)):
        history_SH = seeds.history_SH2[:, :, column]
        old_S1 = history_SH.gather(1, entry_S1)
        history_SH.scatter_(1, entry_S1, torch.where(moving_S[:, None], value_S[:, None], old_S1))
    keep(seeds.pointer_S, (seeds.pointer_S + 1).remainder(HISTORY), moving_S)
    keep(seeds.state_S8[:, LIFECYCLE], target_S, moving_S)
    seeds.epochs_S.masked_fill_(moving_S, 0)
    keep(seeds.state_S8[:, PARENT], before_S, moving_S)
    if blueprint_S is not None:
        keep(seeds.state_S8[:, BLUEPRINT], blueprint_S, moving_S)


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
    turn_S = torch.arange(layer.config.seeds, dtype=torch.int32, device=first_S.device) % BLUEPRINTS
    move(seeds, Life.GERMINATED, first_S, turn_S)
    if len(layer.drift_ema_SC):
        keep(layer.drift_ema_SC, layer.rows_of_seeds().to(layer.drift_ema_SC.dtype), first_S[:, None])
