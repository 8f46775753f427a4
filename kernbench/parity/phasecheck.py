"""Checks a phase on real steps: losses and the whole state against the same steps in float64.

All runs start from one state: the side before, the side after, and the oracle, which is the side before in float64.
Training amplifies rounding, so what is allowed is what rounding does to the side before. That is sampled: the side
before runs again from states moved by up to one ulp, and per tensor the largest error of all its runs counts, times
3, with a floor of eight ulp because every step rounds each tensor anew. One such run is made, and up to five where
the side after is not within its limits but near them. (Measured on titan-mac tiny over 30 seeds, the side after
summing every linear layer in another order: one run would fail 3 seeds wrongly, three runs none; with five the worst
tensor is at half its limit.)

Single elements are held to the largest error of any tensor: AdamW turns a gradient that is all rounding noise into a
whole step, and in which tensor that happens is chance. RMS finds a wrong tensor, as the mutants of each row show. Of a
small tensor one such element is most of the RMS, so a tensor may be judged without a few of them, one in 256: as many
tensors as have such elements on the side before, times 3. (Measured on bio-nanochat bench: of some 100 vectors of 768
weights, three had one such element after a phase in which the side before had none.)

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
from kernbench.parity.compare import Judged, Leaves, Rule
from kernbench.parity.finding import Finding, raised
from kernbench.parity.modes import nudge
from kernbench.parity.trajectory import LOSS, NotSettableError, Trajectory
from kernbench.progress import Progress, Silent
from kernbench.record import Errors, Oracle, ParityResult
from kernbench.swap import Plan
from kernbench.workload import Built, Fault, Workload

BEFORE, AFTER = "before", "after"
RULE = Rule(k=3.0, floor_ulp=8.0, mean=False)
DRAWS = 5
"""Most runs of the side before from a moved state."""
CLEAR = 30.0
"""An error this many times its limit is wrong, and no further run would explain it."""
LOUD = 0.5
"""An element off by more than this share of itself, or of its tensor's RMS, took another step than it should."""
ONE_IN = 256
"""Of so many elements one may be loud, or one of fewer, if these are enough to tell what the others are."""
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
            found = self._wider(before, getattr(torch, name))
            if isinstance(found, Trajectory):
                note = f"{'; '.join(refusals)}: {name} takes its place" if refusals else ""
                return Truth(found, name, note)
            refusals.append(found)
        return Truth(before, "the side before", f"{'; '.join(refusals)}: held against the side before")

    def _wider(self, before: Trajectory, dtype: torch.dtype) -> Trajectory | str:
        """The oracle in that dtype, or why there is none."""
        name = str(dtype).removeprefix("torch.")
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
        oracle = runs.oracle(self.before)
        self.truth, self.note, self.oracle = oracle.run, oracle.note, oracle.name
        self.draws = 0
        self.measure: dict[str, dict[str, Errors]] = {}
        # The same but for a few loud elements, and the most tensors that have such in one run.
        self.rest: dict[str, dict[str, Errors]] = {}
        self.loud: dict[str, int] = {}
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
        return {point: self._finding(point, after) for point in self.measure}

    def _excess(self, after: Trajectory) -> float:
        judged = [item for point in self.measure for item in self._judged(point, after.points[point])]
        return max((item.excess for item in judged), default=0.0)

    def _draw(self) -> None:
        self.draws += 1
        self._add(self.runs.baseline(nudge(self.before.initial, self.runs.seed + self.draws)))

    def _add(self, run: Trajectory) -> None:
        for point, found in run.points.items():
            errors, rests, loud = self.measure.setdefault(point, {}), self.rest.setdefault(point, {}), 0
            for name, leaf in found.items():
                exact, own = self.truth.points[point].get(name), self.before.points[point][name]
                if exact is not None and _is_real(own):
                    error = rest = _error(leaf, own, exact)
                    if error.max > LOUD:
                        rest = _without_loud(leaf, own, exact) or error
                        loud += mutants.telling(self.eps, rest)
                    errors[name] = compare.envelope(errors.get(name, compare.ZERO), error)
                    rests[name] = compare.envelope(rests.get(name, compare.ZERO), rest)
            self.loud[point] = max(self.loud.get(point, 0), loud)

    def _judged(self, point: str, found: Leaves, *, part: bool = False) -> list[Judged]:
        own, truth, errors = self.before.points[point], self.truth.points[point], self.measure[point]
        quiet = (name for name, rest in self.rest[point].items() if mutants.telling(self.eps, rest))
        loudest = max((errors[name].max for name in quiet), default=0.0)
        judged = [
            _judge(name, found.get(name), own[name], truth.get(name), errors.get(name), self.eps, loudest)
            for name in (found if part else own)
        ]
        again = {
            index: calmer
            for index, item in enumerate(judged)
            if (calmer := self._calmer(item, found.get(item.name), own[item.name], truth.get(item.name)))
        }
        if len(again) <= RULE.k * self.loud[point]:
            judged = [again.get(index, item) for index, item in enumerate(judged)]
        return judged

    def _calmer(self, item: Judged, after: Any, before: Any, truth: Any) -> Judged | None:
        """What is wrong only in the RMS, and right without its few loud elements, judged so; else None."""
        if item.errors is None or item.eager is None or item.limits is None or not item.reason:
            return None
        if not LOUD < item.errors.max <= item.limits.max:
            return None
        rest = _without_loud(after, before, truth)
        if rest is None or not rest.rms_ratio <= item.limits.rms_ratio:
            return None
        return Judged(item.name, rest, item.eager, item.limits, "")

    def _finding(self, point: str, after: Trajectory) -> Finding:
        own = self.before.points[point]
        judged = self._judged(point, after.points[point])
        for name, side in (("before", self.before), ("after", after)):
            changed = side.changed.get(point)
            if changed:
                reason = f"the bad step changes {', '.join(changed[:3])} on the side {name}"
                judged.insert(0, Judged("", None, None, None, reason))
        telling = {name for name, error in self.measure[point].items() if mutants.telling(self.eps, error)}
        right = {name: leaf for name, leaf in own.items() if name in telling and isinstance(leaf, Tensor)}
        initial = {name: leaf for name, leaf in self.before.initial.items() if name in right}
        survey = mutants.survey(
            mutants.of_state(right, initial, self.eps),
            lambda changed: _passes(self._judged(point, changed, part=True)),
        )
        return Finding(
            judged,
            reason="; ".join(filter(None, [survey.reason, self.note])),
            passed=not survey.reason and _passes(judged),
            oracle=self.oracle,
            mutants=(survey.killed, survey.total),
            bitwise=all(
                name in after.points[point] and compare.same_leaf(after.points[point][name], leaf)
                for name, leaf in own.items()
            ),
        )


def _passes(judged: Sequence[Judged]) -> bool:
    return not any(item.reason for item in judged)


def _is_real(leaf: Any) -> bool:
    tensor = _tensor(leaf)
    return tensor.is_floating_point() or tensor.is_complex()


def _error(value: Any, before: Any, exact: Any) -> Errors:
    """The error of one leaf, in units that follow from the truth and the side before."""
    truth = _tensor(exact)
    return compare.measure(_tensor(value).to(truth.device), truth, compare.unit(_tensor(before), truth))


def _without_loud(value: Any, before: Any, exact: Any) -> Errors | None:
    """The error of one leaf but for its loud elements; None if these are more than a few, or lost in so large a one."""
    got, truth = _tensor(value), _tensor(exact)
    if got.numel() > compare.CHUNK:
        return None
    unit = compare.unit(_tensor(before), truth)
    rest, loud = compare.apart_from(got.to(truth.device), truth, unit, LOUD)
    few = max(got.numel() // ONE_IN, int(got.numel() >= mutants.ENOUGH_TO_TELL))
    return compare.measure(rest, truth, unit) if loud <= few else None


def _judge(name: str, after: Any, before: Any, truth: Any, own: Errors | None, eps: float, loudest: float) -> Judged:
    """One leaf of the state. Where it is kept (host or device, number or tensor) is the phase's own business.

    ``eps`` is the floor's even for a leaf of a wider dtype: what it is computed from has been rounded to the narrower.
    """
    if after is None or truth is None:
        side = "after" if after is None else "in float64"
        return Judged(name, None, None, None, f"state_dict() has no {name} on the side {side}")
    got, expected = _tensor(after), _tensor(before)
    if got.shape != expected.shape:
        return Judged(name, None, None, None, f"{name} has shape {tuple(got.shape)}, before {tuple(expected.shape)}")
    if own is None:
        wrong = int((got.to(expected.device) != expected).sum())
        reason = f"{name} differs at {wrong} of {got.numel()} places" if wrong else ""
        return Judged(name, None, None, None, reason)
    wrong = int((~got.isfinite()).sum())
    if wrong:
        return Judged(name, None, None, None, f"{name} is not finite at {wrong} of {got.numel()} places")
    coarser = max(eps, torch.finfo(expected.dtype).eps)
    return compare.limit(name, _error(got, before, truth), own, RULE, coarser, got.numel(), loudest)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
