"""Phases 1 to 3 and 5: the functions of :mod:`.together` through kernels.

A layer in float64, as an oracle runs it, keeps the PyTorch functions, and it says so.

Shapes: B batch, H width, S seeds, P x Q tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernbench.device import warn_once

from . import together
from .blueprints import TABLE
from .layer import SPARSE_BELOW, TUNED_SHARE, KasminaLayer
from .schedules import LINEAR
from .state import SeedState
from .together import BLENDING, GRAFTING_EPOCHS, Figures, Tiles

BLENDING_BITS = sum(1 << state for state in BLENDING)
NO_KERNEL = "a layer of kasmina in float64 blends and measures with PyTorch's operators: its kernels take no float64"
NO_TILES = "a layer of kasmina is measured with PyTorch's operators: it is in float64, has networks, or phase 1 is out"
NO_RAMPS = "a layer of kasmina asks its schedules with PyTorch's operators: the kernel knows the linear one"
SET_LIFECYCLE, SET_BLUEPRINT = 1, 2
Operator = Callable[..., Any]

# As they are before any swap: what a fused one falls back to.
_blend, _measure, _alphas, _finish = together.blend, together.measure, together.alphas, together.finish


def fits(y_BH: Tensor) -> bool:
    """Whether kernels take a layer of this dtype; says so if not."""
    if y_BH.dtype != torch.float64:
        return True
    warn_once(NO_KERNEL)
    return False


def adapt_blend(op: Operator) -> Callable[..., tuple[Tensor, Tiles | None]]:
    """``together.blend`` through ``op``, the ``seed_blend`` kernel in one of its implementations."""

    def blend(layer: KasminaLayer, y_BH: Tensor, alpha_S: Tensor) -> tuple[Tensor, Tiles | None]:
        if not fits(y_BH):
            return _blend(layer, y_BH, alpha_S)
        seeds = layer.seeds
        blended_BH, *tiles = op(
            y_BH,
            layer.bank_KH,
            seeds.lifecycle_S,
            seeds.blueprint_S,
            layer.operator_S,
            alpha_S,
            layer.config.chunk,
            TABLE,
            BLENDING_BITS,
            SPARSE_BELOW,
        )
        means_PQ, squares_PQ, near_PQ = tiles
        return blended_BH, (means_PQ, squares_PQ, near_PQ)

    return blend


def adapt_move(op: Operator) -> Callable[..., None]:
    """``together.move`` through ``op``, the ``seed_state_update`` kernel in one of its implementations."""

    @torch.no_grad()
    def move(seeds: SeedState, target: int | Tensor, moving_S: Tensor, blueprint_S: Tensor | None = None) -> None:
        values_S4 = seeds.values_S4
        if isinstance(target, Tensor):
            values_S4[:, 0].copy_(target)
        else:
            values_S4[:, 0].fill_(int(target))
        fields_S = moving_S.to(torch.int32)
        if blueprint_S is not None:
            values_S4[:, 1].copy_(blueprint_S)
            fields_S *= SET_LIFECYCLE | SET_BLUEPRINT
        op(seeds.state_S8, seeds.history_SH2, seeds.pointer_S, None, values_S4, fields_S)

    return move


def adapt_measure(op: Operator) -> Callable[..., Figures]:
    """``together.measure`` through ``op``, the ``seed_telemetry`` kernel in one of its implementations.

    It adds up what the blend of phase 1 left. Without phase 1, and for networks, there is nothing to add up.
    """

    @torch.no_grad()
    def measure(layer: KasminaLayer, y_BH: Tensor, tiles: Tiles | None) -> Figures:
        if tiles is None:
            warn_once(NO_TILES)
            return _measure(layer, y_BH, tiles)
        batch, width = y_BH.shape
        return Figures(*op(*tiles, batch, width, layer.config.seeds, layer.config.chunk))

    return measure


def adapt_alphas(op: Operator) -> Callable[[KasminaLayer], tuple[Tensor, Tensor]]:
    """``together.alphas`` through ``op``, the ``seed_alpha`` kernel in one of its implementations."""

    @torch.no_grad()
    def alphas(layer: KasminaLayer) -> tuple[Tensor, Tensor]:
        seeds, config = layer.seeds, layer.config
        if not fits(seeds.performance_S4):
            return _alphas(layer)
        if set(config.schedules) != {LINEAR} or not layer.training:
            if layer.training:
                warn_once(NO_RAMPS)
            return _alphas(layer)
        rows_SK = layer.schedules.on_device(seeds.state_S8.device)
        alpha_S, active = op(
            seeds.state_S8, seeds.performance_S4, rows_SK, float(config.ramp * config.pace), TUNED_SHARE
        )
        return alpha_S.to(layer.bank_KH.dtype), active

    return alphas


def adapt_finish(op: Operator) -> Callable[[KasminaLayer, int, Figures, Tensor], None]:
    """``together.finish`` through ``op``, the ``seed_record`` kernel in one of its implementations."""

    @torch.no_grad()
    def finish(layer: KasminaLayer, batch: int, found: Figures, active: Tensor) -> None:
        seeds, config = layer.seeds, layer.config
        if not fits(seeds.performance_S4):
            _finish(layer, batch, found, active)
            return
        op(
            *found,
            active,
            seeds.state_S8,
            seeds.history_SH2,
            seeds.pointer_S,
            seeds.performance_S4,
            seeds.moments_S2,
            seeds.telemetry_S2,
            batch,
            config.width,
            config.chunk,
            GRAFTING_EPOCHS * config.pace,
        )

    return finish
