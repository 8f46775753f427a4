"""bio-nanochat learns the same with every phase: losses stay where rounding alone may lead the baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from bio_parts import CPU, small
from test_bio_phases import plan

from kernbench import band, curves, registry
from kernbench.measurement import measure
from kernbench.record import Curve
from kernbench.workload import Workload


def followed(**changes: Any) -> Workload:
    """The workload with few steps at a size that is quick."""
    workload = registry.workload("bio-nanochat").declaration
    assert workload.curves is not None
    preset = small(layers=1, experts=3, log_every=10, **changes)
    declared = dataclasses.replace(workload.curves, presets=("tiny",), steps=20, every=4)
    return dataclasses.replace(workload, presets={"tiny": preset}, curves=declared)


def line(workload: Workload, *numbers: int, order: int = 0, exact: bool = False) -> Curve:
    settings = measure.Settings(
        workload=workload, preset="tiny", device=CPU, dtype=torch.float32, seed=0, data=None, steps=1
    )
    declared = curves.wanted(settings)
    assert declared is not None
    training = curves.Training(implementation=str(numbers), plan=plan(*numbers), order=order, exact=exact)
    (found,) = curves.follow(settings, declared, training, lambda _: None)
    return found


def test_the_curves_of_200_steps_have_a_band() -> None:
    declared = registry.workload("bio-nanochat").declaration.curves
    assert declared is not None
    assert (declared.steps, declared.reordered) == (200, 3)
    assert "tiny" in declared.presets


def test_every_phase_learns_within_the_band_of_rounding() -> None:
    workload = followed(optimizer="muon")
    numbers = tuple(phase.number for phase in workload.phases)
    baseline, *moved = (line(workload, order=count) for count in range(2))
    exact = line(workload, exact=True)
    assert not curves.draws_other_numbers([exact], [baseline], torch.float32)
    around = band.around([baseline, *moved, exact])
    assert around is not None
    assert around.left_by(line(workload, *numbers)) is None
    # The band is narrow beside what is learned, and the same with other noise leaves it.
    assert baseline.values[0] - baseline.values[-1] > 1.0 > 100 * (around.high[-1] - around.low[-1])
    assert around.left_by(line(dataclasses.replace(workload, steady=None))) is not None
