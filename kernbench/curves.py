"""Trains a workload with each variant from the same start, and follows its loss and the figures it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch

from kernbench import record
from kernbench.errors import KernbenchError
from kernbench.measurement.measure import Settings, Side, workload_errors
from kernbench.parity import compare, trajectory
from kernbench.parity.modes import nudge
from kernbench.swap import Plan
from kernbench.workload import Curves

LOSS = "loss"
MOST_APART = 0.01
"""A run in float64 that begins further than this share from the baseline draws other numbers."""


def wanted(settings: Settings) -> Curves | None:
    """The curves of a workload, where its preset is one that trains."""
    curves = settings.workload.curves
    return curves if curves is not None and settings.preset in curves.presets else None


def follow(
    settings: Settings,
    plan: Plan,
    curves: Curves,
    implementation: str,
    advance: Callable[[int], None],
    *,
    moved: int = 0,
    exact: bool = False,
) -> list[record.Curve]:
    """One training run from a fresh build, with its steps made comparable; ``advance`` is told of the steps.

    Args:
        moved: not 0: the run begins from its state moved by up to one unit in the last place, another for each number.
        exact: the run is in float64, from the state that one in the working dtype begins from.

    Raises:
        KernbenchError: it cannot be moved, because ``state_dict()`` gives copies.
        WorkloadFailed: a step or a reading raised, or the loss is not finite.
    """
    side = _in_float64(settings, plan) if exact else Side(settings, plan)
    if settings.workload.steady is not None:
        settings.workload.steady(side.built)
    if moved:
        _move(side, settings.seed + moved)
    steps: list[int] = []
    values: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    with plan.applied(side.built):
        for first in range(0, curves.steps, curves.every):
            count = min(curves.every, curves.steps - first)
            for index in range(first, first + count):
                side.step(index)
            steps.append(first + count)
            losses = side.check_losses()
            figures = {LOSS: (fmean(losses), "")} if losses else {}
            with workload_errors(f"the curves of {settings.workload.name} could not be read"):
                figures |= curves.read(side.built)
            for name, (value, unit) in figures.items():
                values.setdefault(name, []).append(float(value))
                units[name] = unit
            advance(count)
    return [
        record.Curve(
            name=name,
            implementation=implementation,
            steps=steps,
            values=found,
            unit=units[name],
            moved=exact or bool(moved),
        )
        for name, found in values.items()
    ]


def draws_other_numbers(exact: Sequence[record.Curve], known: Sequence[record.Curve], dtype: torch.dtype) -> bool:
    """Whether a run in float64 is not the baseline with less rounding: its first loss, or figure, is elsewhere already.

    Args:
        known: curves of other runs, the baseline's first; none if it has none.
    """
    own = next((curve.values[0] for curve in known if exact and curve.name == exact[0].name), None)
    if own is None:
        return False
    near = min(MOST_APART, math.sqrt(torch.finfo(dtype).eps))
    return not abs(exact[0].values[0] - own) <= near * abs(own)


def _in_float64(settings: Settings, plan: Plan) -> Side:
    initial = trajectory.state_of(Side(settings, plan).built)
    side = Side(dataclasses.replace(settings, dtype=torch.float64), plan)
    _set_state(side, initial)
    return side


def _move(side: Side, seed: int) -> None:
    _set_state(side, nudge(trajectory.state_of(side.built), seed))


def _set_state(side: Side, state: compare.Leaves) -> None:
    try:
        trajectory.set_state(side.built, state)
    except trajectory.NotSettableError as problem:
        raise KernbenchError(
            f"the curves of {side.settings.workload.name} have no band: {problem}; let state_dict() return the tensors "
            "themselves, or declare Curves with moved=0"
        ) from None
