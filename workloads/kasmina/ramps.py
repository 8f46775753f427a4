"""The five alpha schedules for all seeds at once, on the device; :mod:`.schedules` says what each one does.

Shapes: S seeds, C columns of a chunk, K columns of the schedules' memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import EMA_KEPT, KasminaLayer
from .schedules import (
    ACCURACIES,
    ADAPTIVE,
    ALPHA,
    DRIFT,
    FAILURES,
    FAILURES_ALLOWED,
    HOLD,
    LAST_ACCURACY,
    LINEAR,
    LOSSES,
    MOMENTUM,
    PROGRESS,
    SEEN,
    STABILITY,
    STABLE_ALPHA,
    VELOCITY,
    WATCH_DRIFT,
    WINDOW,
)
from .state import ACCURACY, LOSS, SCHEDULE


@torch.no_grad()
def advance_all(layer: KasminaLayer, grafting_S: Tensor) -> Tensor:
    """Alpha [S] in float64, of this forward pass where ``grafting_S``; moves the memory of those seeds alone."""
    config, seeds = layer.config, layer.seeds
    rows_SK = layer.schedules.on_device(grafting_S.device)
    progress_S = seeds.epochs_S.double() / (config.ramp * config.pace)
    alpha_S = progress_S.clamp(0.0, 1.0)
    accuracy_S = seeds.performance_S4[:, ACCURACY].double()
    if set(config.schedules) != {LINEAR}:
        kind_S = seeds.state_S8[:, SCHEDULE]
        drift_S = drift(layer, grafting_S & is_any(kind_S, WATCH_DRIFT)).double() if len(layer.drift_ema_SC) else None
        delta_S = (accuracy_S - rows_SK[:, LAST_ACCURACY]).masked_fill(rows_SK[:, SEEN] == 0, 0.0)
        if drift_S is not None:
            adaptive_S = kind_S == ADAPTIVE
            drifting_S = adaptive_S & (drift_S > config.adaptive_drift)
            moving_S = adaptive_S & ~drifting_S & (delta_S > config.adaptive_delta)
            kind_S = kind_S.masked_fill(moving_S, MOMENTUM).masked_fill(drifting_S, DRIFT)
            alpha_S = hold(rows_SK, grafting_S & (kind_S == DRIFT), alpha_S, drift_S, layer)
        alpha_S = push(rows_SK, grafting_S & (kind_S == MOMENTUM), alpha_S, progress_S, delta_S, layer)
        loss_S = seeds.performance_S4[:, LOSS].double()
        alpha_S = bound(rows_SK, grafting_S & (kind_S == STABILITY), alpha_S, progress_S, loss_S, accuracy_S, layer)
    keep(rows_SK[:, ALPHA], alpha_S, grafting_S)
    keep(rows_SK[:, LAST_ACCURACY], accuracy_S, grafting_S)
    rows_SK[:, SEEN] += grafting_S
    current_S: Tensor = rows_SK[:, ALPHA]
    return current_S


def is_any(values_S: Tensor, choices: tuple[int, ...]) -> Tensor:
    """Where a value is one of a few."""
    found_S = values_S == choices[0]
    for choice in choices[1:]:
        found_S = found_S | (values_S == choice)
    return found_S


def keep(target: Tensor, new: Tensor, where: Tensor) -> None:
    """Write ``new`` into ``target`` in place where asked."""
    target.copy_(torch.where(where, new, target))


def drift(layer: KasminaLayer, watched_S: Tensor) -> Tensor:
    """How far each seed's blueprint is from its moving average, as a share of it [S]; moves the watched averages."""
    ema_SC = layer.drift_ema_SC
    w_SC = layer.rows_of_seeds().to(ema_SC.dtype)
    drift_S: Tensor = torch.linalg.vector_norm(w_SC - ema_SC, dim=1) / torch.linalg.vector_norm(ema_SC, dim=1)
    keep(ema_SC, ema_SC * EMA_KEPT + w_SC * (1 - EMA_KEPT), watched_S[:, None])
    return drift_S


def hold(rows_SK: Tensor, mine_S: Tensor, alpha_S: Tensor, drift_S: Tensor, layer: KasminaLayer) -> Tensor:
    """Drift-controlled: the last alpha while a pause lasts."""
    pause_S = rows_SK[:, HOLD].masked_fill(drift_S > layer.config.drift_threshold, float(layer.config.pause))
    holding_S = mine_S & (pause_S > 0)
    keep(rows_SK[:, HOLD], pause_S - holding_S.double(), mine_S)
    return torch.where(holding_S, rows_SK[:, ALPHA], alpha_S)


def push(
    rows_SK: Tensor, mine_S: Tensor, alpha_S: Tensor, progress_S: Tensor, delta_S: Tensor, layer: KasminaLayer
) -> Tensor:
    """Momentum: the ramp plus a velocity, never back."""
    config = layer.config
    velocity_S = config.momentum_factor * rows_SK[:, VELOCITY] + config.delta_factor * delta_S
    keep(rows_SK[:, VELOCITY], velocity_S, mine_S)
    pushed_S = torch.maximum(progress_S + velocity_S, rows_SK[:, ALPHA]).clamp(max=1.0)
    return torch.where(mine_S, pushed_S, alpha_S)


def bound(
    rows_SK: Tensor,
    mine_S: Tensor,
    alpha_S: Tensor,
    progress_S: Tensor,
    loss_S: Tensor,
    accuracy_S: Tensor,
    layer: KasminaLayer,
) -> Tensor:
    """Stability: every window judges the ramp."""
    config = layer.config
    for window, value_S in ((LOSSES, loss_S), (ACCURACIES, accuracy_S)):
        keep(rows_SK[:, window], torch.cat([rows_SK[:, window][:, 1:], value_S[:, None]], dim=1), mine_S[:, None])
    ramp_S = (rows_SK[:, PROGRESS] * progress_S).clamp(0.0, 1.0)
    judged_S = mine_S & ((rows_SK[:, SEEN] + 1).remainder(WINDOW) == 0)
    stable_S = (rows_SK[:, LOSSES].var(dim=1, correction=0) < config.stable_loss_variance) & (
        rows_SK[:, ACCURACIES].var(dim=1, correction=0) < config.stable_accuracy_variance
    )
    failed_S = judged_S & ~stable_S
    failures_S = rows_SK[:, FAILURES] + failed_S
    returns_S = failed_S & (failures_S >= FAILURES_ALLOWED)
    keep(rows_SK[:, STABLE_ALPHA], ramp_S, judged_S & stable_S)
    keep(rows_SK[:, FAILURES], failures_S.masked_fill(returns_S | stable_S, 0.0), judged_S)
    keep(rows_SK[:, PROGRESS], rows_SK[:, PROGRESS] * 0.5, failed_S)
    return torch.where(mine_S, torch.where(returns_S, rows_SK[:, STABLE_ALPHA], ramp_S), alpha_S)
