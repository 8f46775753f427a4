"""Inputs that hurt, generated from a kernel's declaration: sizes, values and layouts that no one thought of naming.

Hypothesis draws examples, one theme after another; the first that fails is made simpler until nothing simpler fails.
Nothing is kept between runs: the same seed gives the same examples, as far as time allows.
"""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import hypothesis
import torch
from torch import Tensor

from kernbench.parity import compare, layouts, modes, patterns
from kernbench.parity.compare import Judged, Leaves
from kernbench.parity.examples import UPSTREAM, Domain, Example, Theme
from kernbench.parity.fairness import Trial
from kernbench.parity.finding import Finding, raised
from kernbench.parity.subject import Subject
from kernbench.spec import Inputs

SHRINKING = 2.0
"""Seconds for making a failing example simpler, even where it was found as time ran out."""
DRAWS = 8
"""Draws of a theme at a time. One in four is the simplest example, which is tried once for all themes."""


@dataclass(frozen=True)
class Outcome:
    """What one example showed: something wrong, or a refusal, or nothing."""

    example: Example
    reason: str = ""
    judged: Judged | None = None
    refused: str = ""


T = TypeVar("T")


class _RefusedError(Exception):
    """The kernel or its reference does not take these inputs, and need not."""


class _FailedError(Exception):
    """The kernel, or what the declaration says of it, raises where it may not."""


class _Enough(BaseException):
    """Ends a search from inside: no Exception, which Hypothesis would take for a failing example."""


def check(subject: Subject, *, seconds: float, examples: int, begin: Callable[[str], None] | None = None) -> Finding:
    """Holds a kernel against its reference on generated inputs.

    Args:
        subject: gives kernel, dtype, device and seed; its case does not matter.
        seconds: when to stop; a failing example is still made smaller for a moment.
        examples: how many to try.
        begin: called with each example in words before the kernel sees it, so that a crash can be attributed.

    Returns:
        ``examples`` is how many ran. The reason of a failure is the smallest failing example in words; that of a pass
        says what was refused.

    Raises:
        KernbenchError: the declaration allows no inputs.
    """
    search = _Search(subject, seconds, begin)
    with warnings.catch_warnings():
        # The interpreter computes in numpy, which warns of every overflow that is provoked here.
        warnings.simplefilter("ignore", RuntimeWarning)
        search.run(examples)
    return search.finding()


@dataclass
class _Search:
    subject: Subject
    seconds: float
    begin: Callable[[str], None] | None
    outcomes: dict[Example, Outcome] = field(default_factory=dict)
    failing: Outcome | None = None
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Arguments in a layout that the kernel does not take, with what it says."""

    def __post_init__(self) -> None:
        subject = self.subject
        self.domain = Domain(subject.spec, subject.dtype, subject.device, subject.seed)
        self.deadline = time.perf_counter() + self.seconds
        self.enough = 0

    def run(self, examples: int) -> None:
        """Takes the themes in turns, one new example each, until there are enough, or one fails, or time is up."""
        for turn in itertools.count():
            before = len(self.outcomes)
            for place, theme in enumerate(self.domain.themes()):
                # The simplest example comes first in every theme, and is new only once.
                self.enough = min(examples, len(self.outcomes) + (1 if self.outcomes else 2))
                self._search(theme, turn + place)
                if self.failing is not None:
                    self._simplify(self.failing)
                    return
                if self._late() or len(self.outcomes) >= examples:
                    return
            if len(self.outcomes) == before:
                return

    def _search(self, theme: Theme, turn: int) -> None:
        settings = hypothesis.settings(
            max_examples=DRAWS,
            database=None,
            deadline=None,
            derandomize=False,
            # The library shortens sequences of choices; what is simpler here is better known to the domain.
            phases=(hypothesis.Phase.generate,),
            verbosity=hypothesis.Verbosity.quiet,
        )
        source = random.Random(f"{self.subject.seed} {theme} {turn}")
        try:
            hypothesis.find(self.domain.examples(theme, turn), self._fails, settings=settings, random=source)
        except (hypothesis.errors.NoSuchExample, _Enough):
            return

    def _simplify(self, failing: Outcome) -> None:
        """Goes over to simpler examples as long as one fails and there is time."""
        deadline = max(self.deadline, time.perf_counter() + SHRINKING)
        while time.perf_counter() < deadline:
            for example in self.domain.simpler(failing.example):
                if example not in self.outcomes:
                    self.outcomes[example] = self._outcome(example)
                if self.outcomes[example].reason:
                    failing = self.outcomes[example]
                    break
                if time.perf_counter() > deadline:
                    break
            else:
                break
        self.failing = failing

    def _late(self) -> bool:
        return bool(self.outcomes) and time.perf_counter() > self.deadline

    def _fails(self, example: Example) -> bool:
        if example not in self.outcomes:
            if self._late() or len(self.outcomes) >= self.enough:
                raise _Enough
            outcome = self.outcomes[example] = self._outcome(example)
            self.failing = outcome if outcome.reason else None
        return bool(self.outcomes[example].reason)

    def _outcome(self, example: Example) -> Outcome:
        """Tries an example. Are its layouts refused, it is tried with those that are taken."""
        layouts = dict(example.awkward)
        taken = [name for name, layout in layouts.items() if (name, layout) not in self.refused]
        try:
            return self._tried(example.laid_out(taken))
        except _RefusedError as refusal:
            words = str(refusal)
        plain = self._outcome(example.laid_out([])) if taken else Outcome(example, refused=words)
        if plain.reason or plain.refused:
            return plain
        if len(taken) == 1:
            self.refused[taken[0], layouts[taken[0]]] = words
            return plain
        for name in taken:
            outcome = self._outcome(example.laid_out([name]))
            if outcome.reason:
                return outcome
        some_refused = any((name, layouts[name]) in self.refused for name in taken)
        return self._outcome(example) if some_refused else plain

    def _tried(self, example: Example) -> Outcome:
        if self.begin is not None:
            self.begin(str(example))
        try:
            return _Attempt(self.subject, self.domain, example).outcome()
        except _FailedError as failure:
            return Outcome(example, str(failure))

    def finding(self) -> Finding:
        count = len(self.outcomes)
        if self.failing is not None:
            smallest = self.failing
            judged = [replace(smallest.judged, reason="")] if smallest.judged else []
            reason = f"{smallest.example}: {smallest.reason} [seed {smallest.example.seed}]"
            return Finding(judged, reason, examples=count)
        refusals = [outcome.refused for outcome in self.outcomes.values() if outcome.refused]
        if len(refusals) == count:
            return Finding(reason=f"refused all of {count} generated inputs: {refusals[0]}", examples=count)
        said = [f"refused {len(refusals)} of {count}: {refusals[0]}"] if refusals else []
        said += [f"refused {name} {layout}: {words}" for (name, layout), words in self.refused.items()]
        return Finding(reason="; ".join(said), passed=True, examples=count)


@dataclass
class _Attempt:
    """One example put before the kernel, forward and backward."""

    subject: Subject
    domain: Domain
    example: Example

    def outcome(self) -> Outcome:
        spec = self.subject.spec
        inputs = self._asked(
            "make_inputs",
            lambda: spec.make_inputs(self.example.case, self.subject.dtype, self.subject.device, self.example.seed),
            refusable=self.domain.inferred(self.example),
        )
        wanted = modes.differentiable_names(inputs, spec.mutates)
        values = self.example.filled(inputs, spec.values)
        found = self._forward(values)
        if found.reason or not (spec.differentiable and wanted):
            return found
        return self._backward(values, wanted)

    def _asked(self, who: str, ask: Callable[[], T], *, refusable: bool) -> T:
        """What the declaration's own functions give. They may only fail where they promise nothing."""
        try:
            return ask()
        except Exception as error:
            kind = _RefusedError if refusable else _FailedError
            raise kind(f"{who} {raised(error)}") from error

    def _reference_may_refuse(self) -> bool:
        ordinary = all(filling.pattern == patterns.PLAIN for _, filling in self.example.fillings)
        return self.domain.inferred(self.example) or not ordinary

    def _called(self, call: Callable[[], T]) -> T:
        """What the kernel gives. A ValueError is a refusal where the declaration does not promise these inputs."""
        try:
            return call()
        except ValueError as error:
            if self.domain.inferred(self.example) or self.example.awkward:
                raise _RefusedError((str(error).splitlines() or ["ValueError"])[0]) from error
            raise _FailedError(raised(error)) from error
        except Exception as error:
            raise _FailedError(raised(error)) from error

    def _forward(self, values: Inputs) -> Outcome:
        subject, spec = self.subject, self.subject.spec
        given, _ = self.example.stored(values)
        truth = self._asked("the reference", lambda: subject.truth_of(given), refusable=self._reference_may_refuse())
        trial = Trial(
            lambda inputs, _: subject.call(spec.reference, inputs),
            given, {}, truth, subject.forward, spec.values, self.example.extreme,
        )  # fmt: skip
        return self._put_before(trial, values, None)

    def _backward(self, values: Inputs, wanted: Sequence[str]) -> Outcome:
        subject, spec = self.subject, self.subject.spec
        given, _ = self.example.stored(values)
        drawn = modes.upstream(subject.truth_of(given).eager, self.example.seed, expanded=False)
        if not drawn:
            return Outcome(self.example)
        arriving, _ = self.example.stored(self.example.filled({UPSTREAM: drawn}, {}))
        run = modes.Backward(wanted, arriving[UPSTREAM])
        truth = self._asked(
            "the reference", lambda: subject.backward_truth(run, given), refusable=self._reference_may_refuse()
        )
        trial = Trial(
            lambda inputs, upstream: modes.Backward(wanted, upstream)(spec.reference, inputs),
            given, run.upstream, truth, subject.backward, spec.values, self.example.extreme,
        )  # fmt: skip
        return self._put_before(trial, values, lambda inputs: run(spec.optimized, inputs))

    def _put_before(self, trial: Trial, values: Inputs, run: Callable[[Inputs], Leaves] | None) -> Outcome:
        """Calls the kernel, or ``run`` of it, and judges what it gives and what it does besides."""
        inputs, bands = self.example.stored(values)
        seen = self._called(lambda: self.subject.observe(inputs, trial.inputs, run))
        judged = max(trial.judge(seen.leaves), key=lambda item: (bool(item.reason), item.excess), default=None)
        if judged is not None and judged.reason:
            return Outcome(self.example, judged.reason, judged)
        return Outcome(self.example, seen.reason or _overrun(bands))


def _overrun(bands: Sequence[Tensor]) -> str:
    intact = all(compare.same_bits(band, torch.full_like(band, layouts.gap(band.dtype))) for band in bands)
    return "" if intact else "writes past an end of an argument"
