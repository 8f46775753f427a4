"""Trains a workload with each variant from the same start, and follows its loss and the figures it reads."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from kernbench import record
from kernbench.errors import KernbenchError
from kernbench.measurement.measure import Settings, Side, workload_errors
from kernbench.parity import trajectory
from kernbench.parity.modes import nudge
from kernbench.swap import Plan
from kernbench.workload import Curves

LOSS = "loss"


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
) -> list[record.Curve]:
    """One training run from a fresh build, with its steps made comparable; ``advance`` is told of the steps.

    Args:
        moved: not 0: the run begins from its state moved by up to one unit in the last place, another for each number.

    Raises:
        KernbenchError: it cannot be moved, because ``state_dict()`` gives copies.
        WorkloadFailed: a step or a reading raised, or the loss is not finite.
    """
    side = Side(settings, plan)
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
            name=name, implementation=implementation, steps=steps, values=found, unit=units[name], moved=bool(moved)
        )
        for name, found in values.items()
    ]


def _move(side: Side, seed: int) -> None:
    try:
        trajectory.set_state(side.built, nudge(trajectory.state_of(side.built), seed))
    except trajectory.NotSettableError as problem:
        raise KernbenchError(
            f"the curves of {side.settings.workload.name} have no band: {problem}; let state_dict() return the tensors "
            "themselves, or declare Curves with moved=0"
        ) from None
