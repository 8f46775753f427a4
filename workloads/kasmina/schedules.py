"""The five alpha schedules, on the host, seed by seed.

A schedule's memory is one row of numbers per seed; the rows are a tensor, so that a checkpoint has them and phase 0 can
take them to the device. On the host they are a NumPy view, whose numbers cost nothing to read.

Shapes: S seeds, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .config import KasminaConfig

LINEAR, DRIFT, MOMENTUM, ADAPTIVE, STABILITY = range(5)
WATCH_DRIFT = (DRIFT, ADAPTIVE)
WINDOW = 5
FAILURES_ALLOWED = 3
ALPHA, HOLD, VELOCITY, LAST_ACCURACY, STABLE_ALPHA, FAILURES, PROGRESS, SEEN = range(8)
LOSSES = slice(8, 8 + WINDOW)
ACCURACIES = slice(8 + WINDOW, 8 + 2 * WINDOW)
COLUMNS = 8 + 2 * WINDOW
Row = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


@dataclass(frozen=True)
class Metrics:
    """What the layer knows of a grafting seed: epochs in state, its four figures, and drift where it is watched."""

    epochs: float
    loss: float
    accuracy: float
    stability: float
    efficiency: float
    drift: float = 0.0


class ScheduleMemory(nn.Module):
    """Rows of all seeds in float64, on the host unless phase 0 took them to the device."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        rows_SK = torch.zeros(seeds, COLUMNS, dtype=torch.float64)
        rows_SK[:, PROGRESS] = 1.0
        self.rows_SK: Tensor
        self.register_buffer("rows_SK", rows_SK)

    def on_host(self) -> Row:
        """The rows as a writable view; fetched if they lie on the device."""
        if self.rows_SK.device.type != "cpu":
            self.rows_SK = self.rows_SK.cpu()
        rows: Row = self.rows_SK.numpy()
        return rows

    def on_device(self, device: torch.device) -> Tensor:
        """The rows as a tensor on ``device``, moved once."""
        if self.rows_SK.device != device:
            self.rows_SK = self.rows_SK.to(device)
        return self.rows_SK


def advance(kind: int, row: Row, seen: Metrics, config: KasminaConfig) -> float:
    """Alpha of this forward pass; ``row`` is the seed's memory and is written."""
    delta = seen.accuracy - row[LAST_ACCURACY] if row[SEEN] else 0.0
    if kind == ADAPTIVE:
        kind = DRIFT if seen.drift > config.adaptive_drift else MOMENTUM if delta > config.adaptive_delta else LINEAR
    progress = seen.epochs / (config.ramp * config.pace)
    if kind == DRIFT:
        alpha = _drift_controlled(row, progress, seen.drift, config)
    elif kind == MOMENTUM:
        row[VELOCITY] = config.momentum_factor * row[VELOCITY] + config.delta_factor * delta
        alpha = min(max(progress + row[VELOCITY], row[ALPHA]), 1.0)
    elif kind == STABILITY:
        alpha = _stability_bound(row, progress, seen, config)
    else:
        alpha = min(max(progress, 0.0), 1.0)
    row[ALPHA], row[LAST_ACCURACY] = alpha, seen.accuracy
    row[SEEN] += 1
    return float(alpha)


def _drift_controlled(row: Row, progress: float, drift: float, config: KasminaConfig) -> float:
    """Ramp, held for a while where the weights drift."""
    if drift > config.drift_threshold:
        row[HOLD] = config.pause
    if row[HOLD] > 0:
        row[HOLD] -= 1
        return float(row[ALPHA])
    return min(max(progress, 0.0), 1.0)


def _stability_bound(row: Row, progress: float, seen: Metrics, config: KasminaConfig) -> float:
    """Ramp, halved with each unstable window; the third one returns to the last stable alpha."""
    row[LOSSES] = numpy.append(row[LOSSES][1:], seen.loss)
    row[ACCURACIES] = numpy.append(row[ACCURACIES][1:], seen.accuracy)
    alpha = min(max(row[PROGRESS] * progress, 0.0), 1.0)
    if int(row[SEEN] + 1) % WINDOW:
        return float(alpha)
    loss_variance, accuracy_variance = row[LOSSES].var(), row[ACCURACIES].var()
    if loss_variance < config.stable_loss_variance and accuracy_variance < config.stable_accuracy_variance:
        row[STABLE_ALPHA], row[FAILURES] = alpha, 0
        return float(alpha)
    row[FAILURES] += 1
    row[PROGRESS] *= 0.5
    if row[FAILURES] >= FAILURES_ALLOWED:
        row[FAILURES] = 0
        return float(row[STABLE_ALPHA])
    return float(alpha)
