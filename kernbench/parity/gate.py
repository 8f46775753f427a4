"""The gate grades itself: wrong kernels made from the reference, and hostile ones around it, must all be rejected.

Results that are wrong on purpose and references with one call done wrong go through the comparison that parity uses.
Hostile kernels go through parity itself. One that nobody could tell from the right one is listed, and not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from kernbench.parity import compare, hostile, mutants, trials
from kernbench.parity.alterations import Detached, Wrong, reseeded
from kernbench.parity.compare import Judged, Leaves
from kernbench.parity.finding import Finding
from kernbench.parity.hostile import Setting
from kernbench.parity.subject import is_noise, judge_all
from kernbench.parity.trials import Difference, Trial
from kernbench.record import MutantResult, ParityResult
from kernbench.spec import Case, KernelSpec

Check = Callable[[KernelSpec], Iterator[ParityResult]]
Outcome = Literal["killed", "survived", "equivalent", "needs a GPU"]
SHOWN = 3
TOLD = 1 / 3
"""Share of altered kernels that inputs must tell from the right one: some differ from it in name alone."""


def grade(spec: KernelSpec, *, device: torch.device, dtype: torch.dtype, seed: int, check: Check) -> Finding:
    """Put every wrong and hostile kernel before the gate; those it lets pass are the reason of the finding.

    Args:
        check: the rows of parity for a spec; it is given hostile kernels, with as few cases as they need.
    """
    cases = small_cases(spec, device)
    if not cases:
        return Finding(reason="has no case small enough to grade the gate on; add one that is not large")
    altered = _altered(spec, cases, dtype, device, seed)
    sizes = {case: hostile.elements(spec.make_inputs(case, dtype, device, seed)) for case in cases}
    return finding([*altered, *_hostile(spec, sizes, device, check)])


def finding(graded: Sequence[MutantResult]) -> Finding:
    """What the outcomes come to."""
    survivors = [result for result in graded if result.outcome == "survived"]
    killed = sum(result.outcome == "killed" for result in graded)
    total = killed + len(survivors)
    reason = ""
    if survivors:
        shown = "; ".join(f"{result.name}: {result.reason}" for result in survivors[:SHOWN])
        more = f"; and {len(survivors) - SHOWN} more" if len(survivors) > SHOWN else ""
        reason = f"lets {len(survivors)} of {total} wrong kernels pass: {shown}{more}"
    else:
        reason = _blind(graded)
    return Finding(reason=reason, mutants=(killed, total), graded=list(graded))


def _blind(graded: Sequence[MutantResult]) -> str:
    """Why inputs prove little that tell few altered kernels from the right one; empty if they tell enough."""
    outcomes = [result.outcome for result in graded if result.kind == "altered"]
    told = outcomes.count("killed")
    if told >= TOLD * len(outcomes) and told:
        return ""
    return f"its inputs tell only {told} of {len(outcomes)} altered kernels from the right one: draw inputs that do"


def small_cases(spec: KernelSpec, device: torch.device) -> list[Case]:
    """The cases to grade on: the smallest ragged one first, then by size; large ones on a GPU if all are."""
    cases = [case for case in spec.cases if not case.large]
    if not cases and device.type == "cuda":
        cases = list(spec.cases)
    return sorted(cases, key=lambda case: (not case.ragged, _size(case)))


def _altered(
    spec: KernelSpec, cases: Sequence[Case], dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[MutantResult]:
    forward = _Trials(trials.of(spec, cases, dtype, device, seed))
    first = next(iter(forward))
    yield from _results(first, first.subject.call(spec.reference, first.subject.others()))
    streams = reseeded(spec.stochastic.seed) if spec.stochastic else []
    yield from _outcomes(forward, [*streams, *first.tape.alterations(seed)], dtype)
    if spec.differentiable:
        backward = _Trials(trials.backward_of(trial) for trial in forward)
        first = next(iter(backward))
        assert first.backward is not None
        yield from _results(first, {})
        missing = [Detached(name) for name in first.backward.wanted]
        yield from _outcomes(backward, [*missing, *first.tape.alterations(seed, backward=True)], dtype)


class _Trials:
    """Trials that are made when they are first asked for, and kept."""

    def __init__(self, made: Iterator[Trial]) -> None:
        self._made = made
        self._kept: list[Trial] = []

    def __iter__(self) -> Iterator[Trial]:
        for index in itertools.count():
            if index == len(self._kept):
                self._kept += itertools.islice(self._made, 1)
            if index == len(self._kept):
                return
            yield self._kept[index]


def _outcomes(tried: _Trials, altered: Sequence[Wrong], dtype: torch.dtype) -> Iterator[MutantResult]:
    for alteration in altered:
        if alteration.kind == "tf32" and dtype != torch.float32:
            continue
        result = _outcome(tried, alteration, dtype)
        if result is not None:
            yield result


def _outcome(tried: _Trials, alteration: Wrong, dtype: torch.dtype) -> MutantResult | None:
    """What becomes of one altered kernel; None if it runs on no inputs, as where shapes no longer fit."""
    passed: list[Trial] = []
    for trial in tried:
        reason = trial.rejects(alteration) if trial.fair else None
        if reason and trial.contract:
            return _result(alteration, "killed", f"{trial.label}: {reason}")
        if reason:
            return _result(alteration, "survived", f"it shows only on {trial.label}, which no case draws: add one")
        if reason == "":
            passed.append(trial)
    if not passed:
        return None
    apart = {trial.label: trial.difference(alteration) for trial in passed}
    seen = next((label for label, difference in apart.items() if difference is None or difference.seen), None)
    if seen is not None:
        return _result(alteration, "survived", f"{seen}: {_far(apart[seen])}, and the tolerance lets it")
    label, largest = max(apart.items(), key=lambda item: item[1].size if item[1] else 0.0)
    if largest is None or largest.size == 0.0:
        return _result(alteration, "equivalent", f"computes the same on all {len(passed)} inputs tried")
    name = str(dtype).removeprefix("torch.")
    why = (
        f"differs by at most {largest.size:.2g} ({label}), below the {largest.resolved:.2g} that {name} resolves there"
    )
    return _result(alteration, "equivalent", why)


def _far(difference: Difference | None) -> str:
    if difference is None:
        return "it gives other numbers than the reference"
    return f"it differs by {difference.size:.2g} where {difference.resolved:.2g} can be resolved"


def _result(alteration: Wrong, outcome: Outcome, reason: str) -> MutantResult:
    return MutantResult(name=alteration.name, kind="altered", outcome=outcome, reason=reason)


def _results(trial: Trial, earlier: Leaves) -> Iterator[MutantResult]:
    """Results that are wrong on purpose; ``earlier`` is what the reference makes of other inputs."""
    subject, right = trial.subject, trial.truth.eager
    signal = {item.name for item in judge_all(right, trial.truth, trial.rule) if not _noise(item, right)}
    if trial.backward is None:
        given = {key: leaf for name, value in trial.inputs.items() for key, leaf in compare.leaves(value, name).items()}
        wrong = mutants.of_call(right, subject.results((), trial.inputs), given, earlier)
    else:
        wrong = mutants.of_gradients({name: leaf for name, leaf in right.items() if leaf is not None})
    for mutant in wrong:
        if signal & mutant.changed.keys():
            judged = judge_all(mutant.changed, trial.truth, trial.rule, part=True)
            reason = next((item.reason for item in judged if item.reason), "")
            outcome: Outcome = "killed" if reason else "survived"
            reason = f"{trial.label}: {reason or 'the comparison lets it'}"
            yield MutantResult(name=mutant.name, kind="result", outcome=outcome, reason=reason)


def _hostile(spec: KernelSpec, sizes: Mapping[Case, int], device: torch.device, check: Check) -> Iterator[MutantResult]:
    """Every hostile kernel that can be made of this spec; ``sizes`` counts what each case gives it."""
    first, smallest = next(iter(sizes)), min(sizes, key=sizes.__getitem__)
    # Not each of them must show that nothing was done: where a step is skipped, nothing is what is right.
    larger = tuple(case for case, size in sizes.items() if size > sizes[smallest]) or (first,)
    least = min(sizes[smallest], *(sizes[case] - 1 for case in larger))
    for kernel in hostile.KERNELS:
        if not kernel.suits(spec):
            continue
        if kernel.needs_gpu and device.type == "cpu":
            yield MutantResult(name=kernel.name, kind="hostile", outcome="needs a GPU", reason=kernel.needs_gpu)
            continue
        setting = Setting(spec, device, least)
        # Most show where least has to be computed.
        chosen = tuple(dict.fromkeys((*larger, first) if kernel.by_size else (smallest, first)))
        with hostile.contained(setting):
            rows = check(replace(spec, optimized=kernel.kernel(setting), cases=chosen))
            wrong = next((row for row in rows if not row.passed), None)
        outcome: Outcome = "killed" if wrong else "survived"
        reason = f"{wrong.case}, {wrong.mode}: {wrong.reason}" if wrong else "every row of parity passes"
        yield MutantResult(name=kernel.name, kind="hostile", outcome=outcome, reason=reason)


def _noise(item: Judged, leaves: Leaves) -> bool:
    return is_noise(item, leaves[item.name])


def _size(case: Case) -> int:
    return math.prod(max(1, size) for size in case.sizes.values())
