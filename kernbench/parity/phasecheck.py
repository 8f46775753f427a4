"""Checks a phase on real steps: losses and the whole state against the same steps in float64.

All runs start from one state: the side before, the side after, and the oracle, which is the side before in float64.
Training amplifies rounding, so what is allowed is what rounding does to the side before (:mod:`.allowance`). That is
sampled: the side before runs again from states moved by up to one ulp. One such run is made, and up to five where the
side after is not within its limits but near them. (Measured on titan-mac tiny over 30 seeds, the side after summing
every linear layer in another order: one run would fail 3 seeds wrongly, three runs none; with five the worst tensor is
at half its limit.)

Where there is no float64 oracle (the workload does not run in it, has no memory for it, or draws other numbers there),
one in float32 takes its place for shorter dtypes; else the side before does, and its moved runs are the measure. These
say little in a mixed precision: moving float32 weights by an ulp is less than rounding them to bfloat16.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.parity import compare, mutants, trajectory
from kernbench.parity.allowance import Allowance
from kernbench.parity.compare import Judged
from kernbench.parity.finding import Finding, raised
from kernbench.parity.modes import nudge
from kernbench.parity.trajectory import LOSS, NotSettableError, Trajectory
from kernbench.progress import Progress, Silent
from kernbench.record import Oracle, ParityResult
from kernbench.swap import Plan
from kernbench.workload import Built, Fault, Workload

BEFORE, AFTER = "before", "after"
DRAWS = 5
"""Most runs of the side before from a moved state."""
CLEAR = 30.0
"""An error this many times its limit is wrong, and no further run would explain it."""
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
    begin: Callable[[str], None] | None = None,
) -> Iterator[ParityResult]:
    """One result after the first step, one after ``steps``, one per fault: protected state unchanged, then fine again.

    Then one per comparison of the workload's own.

    Args:
        begin: told which side runs next, BEFORE or AFTER, so that it is known which one took the process down.

    Raises:
        WorkloadFailed: the side before raises.
        KernbenchError: a site of a plan matches nothing.
    """
    working = dtype or getattr(torch, workload.dtype)
    runs = _Runs(workload, before, after, preset, device, seed, data, working, sorted({1, steps}), faults)
    if begin is not None:
        runs.begin = begin
    name = phase_name(workload, before, after)
    started = time.perf_counter()
    with (progress or Silent()).stage(f"checking {name} on real steps", 4 * runs.length) as advance:
        runs.advance = advance
        findings = _Comparison(runs).findings()
    seconds = time.perf_counter() - started
    dtype_name = str(working).removeprefix("torch.")
    for case, finding in findings.items():
        yield finding.row(name, case, dtype_name, "steps", seconds / len(findings))
    if workload.compare is not None:
        with (progress or Silent()).stage(f"comparing what {name} computes"):
            yield from _own_comparisons(runs, steps, name, dtype_name)


def _own_comparisons(runs: _Runs, steps: int, name: str, dtype: str) -> Iterator[ParityResult]:
    """The rows of the workload's own comparisons. A side after that raises ends them with a failed one.

    Raises:
        WorkloadFailed: the side before raises.
    """
    assert runs.workload.compare is not None
    running = [BEFORE]

    def side(which: str, plan: Plan) -> Callable[..., AbstractContextManager[Built]]:
        @contextmanager
        def built(dtype: torch.dtype | None = None) -> Iterator[Built]:
            running[0] = which
            runs.begin(which)
            made = runs.workload.make(runs.preset, runs.device, dtype or runs.dtype, runs.seed, runs.data)
            with plan.applied(made):
                yield made

        return built

    try:
        started = time.perf_counter()
        sides = (side(BEFORE, runs.bare), side(BEFORE, runs.before), side(AFTER, runs.after))
        for found in runs.workload.compare(*sides, steps):
            now = time.perf_counter()
            yield ParityResult(
                kernel=name, case=found.name, dtype=dtype, mode="comparison", passed=found.passed, reason=found.note,
                seconds=now - started,
            )  # fmt: skip
            started = now
    except KernbenchError:
        raise
    except Exception as error:
        if running[0] == BEFORE:
            text = f"{runs.workload.name} failed before the swap: {raised(error)}"
            raise WorkloadFailed(text, traceback.format_exc()) from error
        yield ParityResult(
            kernel=name, case="comparison", dtype=dtype, mode="comparison", passed=False, reason=raised(error)
        )


def phase_name(workload: Workload, before: Plan, after: Plan) -> str:
    """What a row of the record calls the phases that ``after`` adds."""
    added = [str(number) for number in after.numbers if number not in before.numbers]
    return f"{workload.name} phase {'+'.join(added or map(str, after.numbers))}"


class Truth(NamedTuple):
    """The run that the sides are held against, what it is, and a remark on that."""

    run: Trajectory
    name: Oracle
    note: str


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
    begin: Callable[[str], None] = lambda side: None

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.workload.faults if self.with_faults else ()

    @property
    def bare(self) -> Plan:
        """The workload as it stands."""
        return Plan(self.workload, (), (), ())

    @property
    def length(self) -> int:
        """Steps of one run."""
        return max(self.marks) + 2 * len(self.faults)

    def baseline(self, initial: Mapping[str, Any] | None = None) -> Trajectory:
        """The side before, from its own initial state or from another."""
        try:
            return self.run(self.before, self.dtype, initial)
        except KernbenchError:
            raise
        except NotSettableError as problem:
            raise KernbenchError(
                f"{self.workload.name} cannot be compared: {problem}; let state_dict() return the tensors themselves"
            ) from None
        except Exception as error:
            text = f"{self.workload.name} failed before the swap: {raised(error)}"
            raise WorkloadFailed(text, traceback.format_exc()) from error

    def oracle(self, before: Trajectory) -> Truth:
        """The side before in a wider dtype, or the unswapped workload where its kernels take none; else before itself.

        Its note says why it is no float64.
        """
        refusals: list[str] = []
        wider: tuple[Oracle, ...] = ("float64", "float32") if self.dtype.itemsize < 4 else ("float64",)
        for name in wider:
            found = self._wider(before, name)
            if isinstance(found, Trajectory):
                note = f"{'; '.join(refusals)}: {name} takes its place" if refusals else ""
                return Truth(found, name, note)
            refusals.append(found)
        return Truth(before, "the side before", f"{'; '.join(refusals)}: held against the side before")

    def _wider(self, before: Trajectory, name: str) -> Trajectory | str:
        """The oracle in the dtype of that name, or why there is none."""
        dtype = getattr(torch, name)
        try:
            try:
                oracle = self.run(self.before, dtype, before.initial)
            except Exception:
                if not self.before.kernels:
                    raise
                oracle = self.run(self.bare, dtype, before.initial)
        except Exception as error:  # noqa: BLE001 - a workload need not support it, and the reason is reported
            return f"no {name} oracle ({raised(error)})"
        own, exact = (side.points[trajectory.after_steps(1)].get(LOSS) for side in (before, oracle))
        if own is not None and exact is not None and not float((own - exact).abs()) <= FOLLOWS * float(exact.abs()):
            return f"the {name} run draws other numbers"
        return oracle

    def run(self, plan: Plan, dtype: torch.dtype, initial: Mapping[str, Any] | None) -> Trajectory:
        self.begin(AFTER if plan is self.after else BEFORE)
        built: Built = self.workload.make(self.preset, self.device, dtype, self.seed, self.data)
        if initial is not None:
            trajectory.set_state(built, initial)
        if self.workload.steady is not None:
            self.workload.steady(built)
        return trajectory.run(
            built,
            plan,
            marks=self.marks,
            faults=self.faults,
            seed=self.seed,
            device=self.device,
            advance=self.advance,
        )


class _Comparison:
    """The side after against the truth, with the errors of the side before as the measure.

    Of each moved run only its errors are kept, so it takes no memory beside the other sides.
    """

    def __init__(self, runs: _Runs) -> None:
        self.runs = runs
        self.eps = torch.finfo(runs.dtype).eps
        self.before = runs.baseline()
        self.truth = runs.oracle(self.before)
        self.draws = 0
        self.allowed = {
            point: Allowance(own, self.truth.run.points[point], self.eps) for point, own in self.before.points.items()
        }
        self._add(self.before)

    def findings(self) -> dict[str, Finding]:
        """What was found at each point. A side after that raises is one finding, at the last step."""
        try:
            after = self.runs.run(self.runs.after, self.runs.dtype, self.before.initial)
        except KernbenchError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a phase raises is the result of checking it
            return {trajectory.after_steps(max(self.runs.marks)): Finding(reason=raised(error))}
        self._draw()
        while self.draws < DRAWS and 1.0 < self._excess(after) < CLEAR:
            self._draw()
        return {point: self._finding(point, after) for point in self.allowed}

    def _excess(self, after: Trajectory) -> float:
        judged = [item for point, allowed in self.allowed.items() for item in allowed.judged(after.points[point])]
        return max((item.excess for item in judged), default=0.0)

    def _draw(self) -> None:
        self.draws += 1
        self._add(self.runs.baseline(nudge(self.before.initial, self.runs.seed + self.draws)))

    def _add(self, run: Trajectory) -> None:
        for point, found in run.points.items():
            self.allowed[point].add(found)

    def _finding(self, point: str, after: Trajectory) -> Finding:
        allowed, own = self.allowed[point], self.before.points[point]
        judged = allowed.judged(after.points[point])
        for name, side in (("before", self.before), ("after", after)):
            changed = side.changed.get(point)
            if changed:
                reason = f"the bad step changes {', '.join(changed[:3])} on the side {name}"
                judged.insert(0, Judged("", None, None, None, reason))
        telling = allowed.telling()
        right = {name: leaf for name, leaf in own.items() if name in telling and isinstance(leaf, Tensor)}
        initial = {name: leaf for name, leaf in self.before.initial.items() if name in right}
        survey = mutants.survey(
            mutants.of_state(right, initial, self.eps),
            lambda changed: _passes(allowed.judged(changed, part=True)),
        )
        return Finding(
            judged,
            reason="; ".join(filter(None, [survey.reason, self.truth.note])),
            passed=not survey.reason and _passes(judged),
            oracle=self.truth.name,
            mutants=(survey.killed, survey.total),
            bitwise=all(
                name in after.points[point] and compare.same_leaf(after.points[point][name], leaf)
                for name, leaf in own.items()
            ),
        )


def _passes(judged: Sequence[Judged]) -> bool:
    return not any(item.reason for item in judged)
