"""Whether a kernel's random numbers are random: rows of parity for kernels that declare ``stochastic``.

Parity's plain row already compares the stream with the reference's, draw by draw. These rows do not trust the
reference: they look at what the kernel drew, from up to 32 seeds in a row, 131 000 draws where the case has enough.

    same seed       two launches with one seed, another between them, at other addresses: equal to the bit
    other seeds     no seed repeats a run of draws of another, shifted or not; and negative seeds, and those beyond 32
                    bits, give what the reference gives
    distribution    support, mean, variance, Kolmogorov-Smirnov; for "bernoulli" the number of ones
    independence    draws 1 to 1024 apart, neighbouring seeds, runs that occur twice in a launch, and launches that
                    differ by the same number in seed and in size

A row of a right kernel fails by chance once in a million runs: its tests share that rate (Bonferroni), and every
p-value is exact or bounded (module ``laws``). What 131 000 draws show in 99 of 100 runs, measured by test_randomness:

    bernoulli       a share of ones that is off by 0.01 (for p = 1/2, less elsewhere)
    uniform         a mean off by 0.0065
    normal          a mean off by 0.022 standard deviations; a standard deviation off by 1.6 %
    neighbours      a share of agreeing pairs off by 0.016 (a correlation of 0.05 between normal numbers)
    repeats         always, a run of 16 draws ("bernoulli" with p = 1/2: 64)

Draws rounded to bfloat16 hide what is finer than that rounding from Kolmogorov-Smirnov.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernbench.parity import compare, laws
from kernbench.parity.finding import Finding, raised
from kernbench.parity.laws import Draws, Evidence, Law, Repeat
from kernbench.parity.subject import Subject
from kernbench.spec import Case, Inputs, Stochastic

FALSE_ALARM_RATE = 1e-6
"""Of a whole row."""
DRAWS = 2**17
"""Enough to find a share of ones that is off by one percent; the interpreter draws them in about a second."""
SEEDS = 32
LARGEST_LAUNCH = 2**20
"""Draws looked at in one launch; the rest of a large case is left to the comparison with the reference."""
LAGS = (1, 2, 4, 32, 64, 128, 256, 512, 1024)
"""Neighbours in a vectorised access, and blocks that start from the same offsets."""
STRANGE_SEEDS = (-1, 2**31 + 5, 2**32 + 5, 2**63 - 1)


def bodies(subject: Subject) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The rows of a stochastic kernel by mode; none for any other kernel. Draws are shared between the rows."""
    if subject.spec.stochastic is None:
        return
    sample = Sample(subject, subject.spec.stochastic)
    yield "same seed", sample.same_seed
    yield "other seeds", sample.other_seeds
    yield "distribution", sample.distribution
    yield "independence", sample.independence


class Sample:
    """Launches of one kernel with seeds in a row, drawn when they are first asked for."""

    def __init__(self, subject: Subject, stochastic: Stochastic) -> None:
        self.subject = subject
        self.stochastic = stochastic
        self.resolution = float(torch.finfo(subject.dtype).eps)

    @cached_property
    def first_seed(self) -> int:
        return int(self.subject.inputs[self.stochastic.seed])

    @cached_property
    def law(self) -> Law:
        probability = self.stochastic.probability
        return Law(self.stochastic.law, float(probability(self.subject.inputs)) if probability else 0.5)

    @cached_property
    def draws(self) -> Draws:
        """[seeds, draws of one launch]; an even number of seeds, or as many as make ``DRAWS``."""
        first = self._drawn(self.subject.inputs, self.first_seed)
        wanted = math.ceil(DRAWS / max(1, first.size))
        seeds = min(SEEDS, max(2, wanted + wanted % 2))
        others = (self._drawn(self.subject.inputs, self.first_seed + index) for index in range(1, seeds))
        return np.stack([first, *others])

    def _drawn(self, inputs: Inputs, seed: int) -> Draws:
        _, drawn = self._launch(self._with_seed(inputs, seed))
        flat = drawn.detach().reshape(-1)[:LARGEST_LAUNCH]
        return flat.to(device="cpu", dtype=torch.float64).numpy()

    def _launch(self, given: Inputs) -> tuple[compare.Leaves, Tensor]:
        """The results of one call, and the draws that can be told from it."""
        with torch.no_grad():
            output = self.subject.spec.optimized(**given)
            drawn = self.stochastic.draws(given, output)
        return self.subject.results(output, given), drawn

    def _with_seed(self, inputs: Inputs, seed: int) -> Inputs:
        given: Inputs = compare.clone(inputs)
        old: Any = given[self.stochastic.seed]
        given[self.stochastic.seed] = torch.full_like(old, seed) if isinstance(old, Tensor) else seed
        return given

    def same_seed(self) -> Finding:
        """Two launches with one seed, and one with another between them."""
        # What the first launch was given and gave is held, so that the last one gets memory elsewhere.
        given = self._with_seed(self.subject.inputs, self.first_seed)
        kept = self._launch(given)
        first, drawn = compare.clone(kept)
        self._launch(self._with_seed(self.subject.inputs, self.first_seed + 1))
        second, redrawn = self._launch(self._with_seed(self.subject.inputs, self.first_seed))
        bitwise: bool = compare.same_bits(drawn, redrawn)
        if bitwise and self.subject.spec.run_to_run_ulp == 0:
            bitwise = all(compare.same_leaf(leaf, second[name]) for name, leaf in first.items())
        reason = "" if bitwise else f"two launches with seed {self.first_seed} differ"
        return Finding(reason=reason, bitwise=bitwise)

    def other_seeds(self) -> Finding:
        """Seeds in a row give different streams; strange ones give those of the reference."""
        draws = self.draws
        if draws.shape[1] == 0:
            return Finding()
        if reason := self._told_apart(draws):
            return Finding(reason=reason)
        return Finding() if self.subject.case.large else self._strange_seeds()

    def _strange_seeds(self) -> Finding:
        """Streams of unusual seeds against the reference. A kernel may refuse one, but not cut it to 32 bits."""
        refused = ""
        for seed in STRANGE_SEEDS:
            inputs = self._with_strange_seed(seed)
            if inputs is None:
                continue
            truth = self.subject.truth_of(inputs)
            try:
                got = self.subject.call(self.subject.spec.optimized, compare.clone(inputs))
            except ValueError as error:
                refused = f"refused: seed {seed}, {raised(error)}"
                continue
            judged = self.subject.judge(got, truth, inputs)
            if any(item.reason for item in judged):
                return Finding(judged, f"with seed {seed} it does not draw what the reference draws")
        return Finding(reason=refused, passed=True) if refused else Finding()

    def _told_apart(self, draws: Draws) -> str:
        if all(np.array_equal(draws[0], row) for row in draws[1:]) and self._surprising(draws):
            return f"{len(draws)} seeds give the same draws: the seed is ignored"
        across = [item for item in laws.repeats(self.law, list(draws)) if item.launch != item.earlier_launch]
        return self._repeated(across[0], list(range(self.first_seed, self.first_seed + len(draws)))) if across else ""

    def _surprising(self, draws: Draws) -> bool:
        """Whether equal rows are no accident: together they have as many draws as a run that occurs twice."""
        window = self.law.window(draws.size)
        return bool(0 < window <= draws.size - draws.shape[1])

    def _with_strange_seed(self, seed: int) -> Inputs | None:
        old = self.subject.inputs[self.stochastic.seed]
        if isinstance(old, Tensor) and not torch.iinfo(old.dtype).min <= seed <= torch.iinfo(old.dtype).max:
            return None
        return self._with_seed(self.subject.inputs, seed)

    def distribution(self) -> Finding:
        """What one draw looks like, over all seeds together."""
        draws = self.draws
        if draws.size == 0:
            return Finding()
        impossible = self.law.impossible(draws, self.resolution)
        return Finding(reason=impossible or verdict(self.law.fit(draws, self.resolution)))

    def independence(self) -> Finding:
        """What draws say about each other: in a launch, between seeds, between launches of other sizes."""
        draws = self.draws
        if draws.size == 0:
            return Finding()
        block = max((sizes.block or 0 for sizes in self.subject.spec.sizes.values()), default=0)
        evidence = [item for lag in sorted({*LAGS, block} - {0}) for item in laws.at_lag(self.law, draws, lag)]
        evidence += laws.agreement(self.law, draws[0::2], draws[1::2], "equal places of neighbouring seeds")
        within = [item for item in laws.repeats(self.law, [draws[0]]) if item.launch == item.earlier_launch]
        reasons = [
            self._repeated(within[0], [self.first_seed]) if within else "",
            self._between_sizes(draws[0]),
            verdict(evidence),
        ]
        return Finding(reason="; ".join(filter(None, reasons)))

    def _between_sizes(self, drawn: Draws) -> str:
        """A kernel that adds the number of elements to its seed draws twice the same if both differ by one number."""
        inputs = self._smaller()
        if inputs is None:
            return ""
        count = self._drawn(inputs, self.first_seed).size
        if count in (0, drawn.size):
            return ""
        seed = self.first_seed + drawn.size - count
        found = [
            item
            for item in laws.repeats(self.law, [drawn, self._drawn(inputs, seed)])
            if item.launch != item.earlier_launch
        ]
        if not found:
            return ""
        return f"{self._repeated(found[0], [self.first_seed, seed])}: the stream depends on the number of elements"

    def _smaller(self) -> Inputs | None:
        """Inputs of which the largest size is one step smaller; None if there are none."""
        spec, case = self.subject.spec, self.subject.case
        name = max(case.sizes, key=lambda key: case.sizes[key])
        known = spec.sizes.get(name)
        size = case.sizes[name] - (known.multiple_of if known else 1)
        if size < (known.least if known else 1):
            return None
        smaller = Case(f"{case.name}, smaller", large=case.large, **{**case.sizes, name: size})
        return spec.make_inputs(smaller, self.subject.dtype, self.subject.device, self.subject.seed)

    def _repeated(self, repeat: Repeat, seeds: list[int]) -> str:
        seed, earlier = seeds[repeat.launch], seeds[repeat.earlier_launch]
        of = "of the same launch" if repeat.launch == repeat.earlier_launch else f"of seed {earlier}"
        return (
            f"{repeat.length} draws of seed {seed}, from number {repeat.place} on, repeat those {of} from number "
            f"{repeat.earlier} on"
        )


def verdict(evidence: list[Evidence]) -> str:
    """What is wrong by the strangest of some tests that share the row's false-alarm rate; empty if nothing is."""
    strangest = min(evidence, key=lambda item: item.p_value, default=None)
    if strangest is None or strangest.p_value >= FALSE_ALARM_RATE / len(evidence):
        return ""
    return (
        f"{strangest.words} (p = {strangest.p_value:.1g}; {len(evidence)} tests share a false-alarm rate of "
        f"{FALSE_ALARM_RATE:g})"
    )
