"""Trains a workload with each variant from the same start, and follows its loss and the figures it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch

from kernbench import record
from kernbench.errors import WorkloadFailed
from kernbench.measurement.measure import Settings, Side, workload_errors
from kernbench.parity import trajectory
from kernbench.parity.reordered import ReorderedSums
from kernbench.swap import Plan
from kernbench.workload import Curves

LOSS = "loss"
MOST_APART = 0.01
"""A run in float64 that begins further than this share from the baseline draws other numbers."""


def wanted(settings: Settings) -> Curves | None:
    """The curves of a workload, where its preset is one that trains."""
    curves = settings.workload.curves
    return curves if curves is not None and settings.preset in curves.presets else None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run to follow.

    Attributes:
        implementation: what is in place, as the bench's rows name it.
        order: not 0: sums are added up in another order, another one for each number.
        exact: in float64, from the state that a run in the working dtype begins from.
    """

    implementation: str
    plan: Plan
    order: int = 0
    exact: bool = False

    @property
    def name(self) -> str:
        """The implementation, and what is other than in its plain run."""
        return self.implementation + (" in float64" if self.exact else f" reordered {self.order}" if self.order else "")

    @property
    def moved(self) -> bool:
        """Whether it shows what rounding does to the baseline."""
        return not self.plan.numbers and (self.exact or self.order > 0)


def follow(
    settings: Settings, curves: Curves, training: Training, advance: Callable[[int], None]
) -> list[record.Curve]:
    """One training run from a fresh build, with its steps made comparable; ``advance`` is told of the steps.

    Raises:
        WorkloadFailed: a step or a reading raised, the loss is not finite, or float64 cannot begin from that state.
    """
    side = _in_float64(settings, training.plan) if training.exact else Side(settings, training.plan)
    if settings.workload.steady is not None:
        settings.workload.steady(side.built)
    steps: list[int] = []
    values: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    orders = ReorderedSums(training.order) if training.order else nullcontext()
    with training.plan.applied(side.built):
        for first in range(0, curves.steps, curves.every):
            count = min(curves.every, curves.steps - first)
            with orders:
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
            implementation=training.name,
            steps=steps,
            values=found,
            unit=units[name],
            moved=training.moved,
            reorders=training.implementation if training.order else "",
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
    try:
        trajectory.set_state(side.built, initial)
    except trajectory.NotSettableError as problem:
        raise WorkloadFailed(f"{problem}; let state_dict() return the tensors themselves") from None
    return side
