"""Checks a phase on real steps: losses and the whole state against the same steps in float64.

Four runs from one initial state: the side before, the side before once more from a state moved by up to one ulp, the
side after, and the oracle, which is the side before in float64. Training amplifies rounding, so the measure of what is
allowed is what rounding does to the side before: per tensor the larger error of its two runs, times 3, and a floor of
eight ulp, because every step rounds each tensor anew and sums in an order of its own. What a wrong gradient or a lost
term does is far above that, which the mutants of each row show.

Where no oracle can be had (the workload does not run in float64, or draws other numbers there) the side before takes
its place, and its nudged run is the measure.
"""

from __future__ import annotations

import operator
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernbench import compare, mutants, trajectory
from kernbench.compare import Judged, Leaves, Rule
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.finding import Finding, raised
from kernbench.modes import nudge
from kernbench.progress import Progress, Silent
from kernbench.record import ParityResult
from kernbench.swap import Plan
from kernbench.trajectory import LOSS, NotSettableError, Trajectory
from kernbench.workload import Built, Workload

RULE = Rule(k=3.0, floor_ulp=8.0, mean=False)
FOLLOWS = 0.05
"""An oracle whose first loss is further than this share from the side before computes something else."""


def check_phase(
    workload: Workload,
    before: Plan,
    after: Plan,
    *,
    preset: str,
    device: torch.device,
    seed: int,
    data: str | None,
    dtype: torch.dtype | None = None,
    steps: int = 10,
    faults: bool = True,
    progress: Progress | None = None,
) -> Iterator[ParityResult]:
    """One result after the first step, one after ``steps``, one per fault: protected state unchanged, then fine again.

    Raises:
        WorkloadFailed: the side before raises.
        KernbenchError: a site of a plan matches nothing.
    """
    working = dtype or getattr(torch, workload.dtype)
    runs = _Runs(workload, before, after, preset, device, seed, data, working, sorted({1, steps}), faults)
    started = time.perf_counter()
    total = 4 * (steps + 2 * len(runs.faults))
    name = _phase_name(workload, before, after)
    with (progress or Silent()).stage(f"checking {name} on real steps", total) as advance:
        runs.advance = advance
        try:
            sides = runs.all_sides()
        except _AfterFailedError as failure:
            yield failure.finding.row(name, f"{steps} steps", _text(working), "steps", time.perf_counter() - started)
            return
    seconds = time.perf_counter() - started
    for case, finding in _findings(sides, runs):
        yield finding.row(name, case, _text(working), "steps", seconds)
        seconds = 0.0


def _phase_name(workload: Workload, before: Plan, after: Plan) -> str:
    added = [str(number) for number in after.numbers if number not in before.numbers]
    return f"{workload.name} phase {'+'.join(added or map(str, after.numbers))}"


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _AfterFailedError(Exception):
    """The side after raised; ``finding`` says how."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.reason)
        self.finding = finding


@dataclass
class _Sides:
    """All runs. Without an oracle ``truth`` is ``before``, and ``note`` says why; ``eps`` is the working dtype's."""

    before: Trajectory
    nudged: Trajectory
    after: Trajectory
    truth: Trajectory
    note: str
    eps: float


@dataclass
class _Runs:
    """Builds and runs each side from the same initial state, one at a time, so that only one takes memory."""

    workload: Workload
    before: Plan
    after: Plan
    preset: str
    device: torch.device
    seed: int
    data: str | None
    dtype: torch.dtype
    marks: list[int]
    with_faults: bool
    advance: Callable[[int], None] = lambda units: None

    @property
    def faults(self) -> tuple[Any, ...]:
        return self.workload.faults if self.with_faults else ()

    def all_sides(self) -> _Sides:
        try:
            before = self.run(self.before, self.dtype, None)
            nudged = self.run(self.before, self.dtype, nudge(before.initial, self.seed))
        except KernbenchError:
            raise
        except NotSettableError as problem:
            raise KernbenchError(
                f"{self.workload.name} cannot be compared: {problem}; let state_dict() return the tensors themselves"
            ) from None
        except Exception as error:
            text = f"{self.workload.name} failed before the swap: {raised(error)}"
            raise WorkloadFailed(text, traceback.format_exc()) from error
        try:
            after = self.run(self.after, self.dtype, before.initial)
        except KernbenchError:
            raise
        except Exception as error:
            raise _AfterFailedError(Finding(reason=raised(error))) from error
        oracle, note = self.oracle(before)
        return _Sides(before, nudged, after, oracle or before, note, torch.finfo(self.dtype).eps)

    def oracle(self, before: Trajectory) -> tuple[Trajectory | None, str]:
        """The side before in float64, or why there is none."""
        try:
            oracle = self.run(self.before, torch.float64, before.initial)
        except Exception as error:  # noqa: BLE001 - a workload need not support float64, and the reason is reported
            return None, f"no float64 oracle ({raised(error)}): held against the side before"
        own, exact = before.marks[1].get(LOSS), oracle.marks[1].get(LOSS)
        if own is not None and exact is not None and not float((own - exact).abs()) <= FOLLOWS * float(exact.abs()):
            return None, "the float64 run draws other numbers: held against the side before"
        return oracle, ""

    def run(self, plan: Plan, dtype: torch.dtype, initial: Mapping[str, Any] | None) -> Trajectory:
        built: Built = self.workload.make(self.preset, self.device, dtype, self.seed, self.data)
        if initial is not None:
            trajectory.set_state(built, initial)
        return trajectory.run(
            built,
            plan,
            marks=self.marks,
            faults=self.faults,
            seed=self.seed,
            device=self.device,
            advance=self.advance,
        )


def _findings(sides: _Sides, runs: _Runs) -> Iterator[tuple[str, Finding]]:
    for mark in runs.marks:
        yield f"{mark} step{'s' if mark > 1 else ''}", _compared(sides, operator.attrgetter("marks"), mark)
    for fault in runs.faults:
        finding = _compared(sides, lambda side: {name: found.leaves for name, found in side.faults.items()}, fault.name)
        for name, side in (("before", sides.before), ("after", sides.after)):
            changed = side.faults[fault.name].changed
            if changed:
                reason = f"the bad step changes {', '.join(changed[:3])} on the side {name}"
                finding.judged.insert(0, Judged("", None, None, None, reason))
                finding.passed = False
        yield f"fault {fault.name}", finding


def _compared(sides: _Sides, observed: Callable[[Trajectory], Mapping[Any, Leaves]], key: Any) -> Finding:
    after, before, nudged, truth = (
        observed(side)[key] for side in (sides.after, sides.before, sides.nudged, sides.truth)
    )
    judged = [_judge(name, after.get(name), before[name], nudged[name], truth.get(name), sides.eps) for name in before]
    tells = {item.name for item in judged if item.eager and mutants.telling(sides.eps, item.eager)}
    right = {name: leaf for name, leaf in before.items() if name in tells and isinstance(leaf, Tensor)}
    initial = {name: leaf for name, leaf in sides.before.initial.items() if name in right}
    survey = mutants.survey(
        mutants.of_state(right, initial, sides.eps),
        lambda changed: (
            not any(
                _judge(name, leaf, before[name], nudged[name], truth[name], sides.eps).reason
                for name, leaf in changed.items()
            )
        ),
    )
    bitwise = all(name in after and compare.same_leaf(after[name], leaf) for name, leaf in before.items())
    failed = survey.reason or any(item.reason for item in judged)
    return Finding(
        judged, "; ".join(filter(None, [survey.reason, sides.note])), not failed, (survey.killed, survey.total), bitwise
    )


def _judge(name: str, after: Any, before: Any, nudged: Any, truth: Any, eps: float) -> Judged:
    """One leaf of the state. Where it is kept (host or device, number or tensor) is the phase's own business.

    ``eps`` is the floor's even for a leaf of a wider dtype: what it is computed from has been rounded to the narrower.
    """
    if after is None or truth is None:
        side = "after" if after is None else "in float64"
        return Judged(name, None, None, None, f"state_dict() has no {name} on the side {side}")
    got, own, other, exact = (_tensor(value) for value in (after, before, nudged, truth))
    if got.shape != own.shape:
        return Judged(name, None, None, None, f"{name} has shape {tuple(got.shape)}, before {tuple(own.shape)}")
    got = got.to(exact.device)
    if not (own.is_floating_point() or own.is_complex()):
        wrong = int((got != own.to(got.device)).sum())
        return Judged(name, None, None, None, f"{name} differs at {wrong} of {own.numel()} places" if wrong else "")
    wrong = int((~got.isfinite()).sum())
    if wrong:
        return Judged(name, None, None, None, f"{name} is not finite at {wrong} of {got.numel()} places")
    unit = compare.unit(own, exact)
    errors, first, second = (compare.measure(value.to(exact.device), exact, unit) for value in (got, own, other))
    eager = compare.envelope(first, second)
    return compare.limit(name, errors, eager, RULE, max(eps, torch.finfo(own.dtype).eps), own.numel())


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
