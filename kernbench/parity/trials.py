"""Inputs on which wrong kernels are tried: the cases of a spec, and values that bring small mistakes to light."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare, modes, mutants
from kernbench.parity.alterations import Caller, Tape, Wrong
from kernbench.parity.compare import Leaves, Rule
from kernbench.parity.subject import Subject, Truth, judge_all, passes
from kernbench.record import Errors
from kernbench.spec import Case, Inputs, KernelSpec, Tolerance, Values

SCALES = (1e-4, 1e-8, 1e3, 0.0)
"""Factors on the floating inputs: an epsilon shows where numbers are tiny, a bound where they are large."""
REDRAWN = 2
MAGNITUDES = 3.0
"""Redrawn tensors differ in size by up to as many powers of ten either way: beside a large term a small one hides."""


@dataclass(frozen=True)
class Difference:
    """A difference to the oracle by compare's ``max``, what of it could be resolved, and whether it is ``seen``."""

    size: float
    resolved: float
    seen: bool


SAME = Difference(0.0, 0.0, seen=False)
APART = Difference(compare.LARGEST, 0.0, seen=True)


@dataclass
class Trial:
    """One set of inputs, forward or backward: what is right for it, and what alterations make of it.

    ``contract`` is false for inputs that no case draws: they tell whether a mistake could be seen at all.
    """

    label: str
    subject: Subject
    inputs: Inputs
    backward: modes.Backward | None = None
    contract: bool = True

    @cached_property
    def truth(self) -> Truth:
        if self.backward is None:
            return self.subject.truth_of(self.inputs)
        return self.subject.backward_truth(self.backward, self.inputs)

    @cached_property
    def tape(self) -> Tape:
        return Tape.of(self._caller(compare.clone), self.subject.spec.reference)

    @cached_property
    def wide_tape(self) -> Tape:
        """The tape of the oracle, where some calls may be absent that only cast."""
        return Tape.of(self._caller(compare.upcast), self.subject.spec.reference)

    def rejects(self, alteration: Wrong) -> str | None:
        """Why the comparison of parity rejects the altered kernel here, empty if it does not; None if it cannot run."""
        got = self._run(alteration, compare.clone, lambda: self.tape)
        return None if got is None else self.judge(got)

    def judge(self, got: Leaves) -> str:
        """What is wrong with a result in the working dtype."""
        truth = self.truth
        changed = {name for name, leaf in got.items() if not compare.same_leaf(leaf, truth.eager.get(name))}
        if got.keys() == truth.eager.keys():
            # What equals eager bit for bit is right, and judging it takes most of the time.
            got, truth = (_part(got, changed), Truth(_part(truth.eager, changed), _part(truth.oracle, changed)))
        if self.backward is None:
            judged = self.subject.judge(got, truth, self.inputs)
        else:
            judged = self.subject.judge_backward(got, truth, self.backward, self.inputs)
        return next((item.reason for item in judged if item.reason), "")

    @cached_property
    def fair(self) -> bool:
        """Whether eager itself is right here: where it overflows and the oracle does not, nothing can be told."""
        return passes(judge_all(self.truth.eager, self.truth, self.rule))

    @property
    def rule(self) -> Rule:
        """The limits of the comparison that parity uses."""
        return self.subject.forward if self.backward is None else self.subject.backward

    def difference(self, alteration: Wrong) -> Difference | None:
        """How far the altered kernel is from the oracle when nothing is rounded; None if that cannot be told."""
        got = self._run(alteration, compare.upcast, lambda: self.wide_tape)
        if got is None or got.keys() != self.truth.oracle.keys():
            return None
        found = (self._difference(name, leaf) for name, leaf in got.items())
        return max(found, key=lambda one: (one.seen, one.size), default=SAME)

    def _difference(self, name: str, leaf: Any) -> Difference:
        oracle, eager = self.truth.oracle[name], self.truth.eager[name]
        if compare.same_leaf(leaf, oracle):
            return SAME
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.shape != oracle.shape:
            return APART
        if not torch.equal(leaf.isfinite(), oracle.isfinite()):
            return APART
        scale = compare.unit(eager, oracle)
        item = compare.limit(
            name,
            compare.measure(leaf, oracle, scale),
            self._own_errors(name),
            self._resolution,
            torch.finfo(eager.dtype).eps,
            leaf.numel(),
        )
        assert item.errors is not None and item.limits is not None
        return Difference(item.errors.max, item.limits.max, bool(item.reason))

    @property
    def _resolution(self) -> Rule:
        """What the dtype can tell apart, whatever the spec tolerates: an altered kernel rounds too, as eager does."""
        default = Tolerance()
        return Rule((default.forward if self.backward is None else default.gradient) + 1, default.floor_ulp)

    def _own_errors(self, name: str) -> Errors:
        """Eager's error; where it says nothing, that of the reference on inputs moved by an ulp if it is larger."""
        eager, oracle = self.truth.eager[name], self.truth.oracle[name]
        scale = compare.unit(eager, oracle)
        own = compare.measure(eager, oracle, scale)
        if own != compare.ZERO and mutants.telling(torch.finfo(eager.dtype).eps, own):
            return own
        return compare.envelope(own, compare.measure(self._nudged[name], oracle, scale))

    @cached_property
    def _nudged(self) -> Leaves:
        return self._caller(self.subject.nudged)(self.subject.spec.reference)

    def _run(self, alteration: Wrong, copy: Callable[[Inputs], Inputs], tape: Callable[[], Tape]) -> Leaves | None:
        try:
            return alteration.run(self._caller(copy), self.subject.spec.reference, tape())
        except (RuntimeError, IndexError, ValueError):  # an altered call does not fit what follows: no kernel to judge
            return None

    def _caller(self, copy: Callable[[Inputs], Inputs]) -> Caller:
        run = self.subject.call if self.backward is None else self.backward
        return lambda function: run(function, copy(self.inputs))


def _part(leaves: Leaves, names: set[str]) -> Leaves:
    return {name: leaf for name, leaf in leaves.items() if name in names}


def of(spec: KernelSpec, cases: Sequence[Case], dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Trial]:
    """The cases with two seeds, then hurting values, then inputs that the contract does not speak of."""
    subjects = [Subject(spec, case, dtype, device, seed) for case in cases]
    for subject in subjects:
        yield Trial(subject.case.name, subject, subject.inputs)
    first = subjects[0]
    yield Trial(f"{first.case.name} with another seed", first, first.others())
    for factor in SCALES:
        yield Trial(f"{first.case.name} times {factor:g}", first, scaled(spec, first.inputs, factor))
    for turn in range(REDRAWN):
        yield Trial(f"{first.case.name} with values redrawn", first, redrawn(spec, first.inputs, seed + turn))
    yield Trial(f"{first.case.name} with whole numbers", first, redrawn(spec, first.inputs, seed, whole=True))
    if _booleans(spec, first.inputs):
        label = f"{first.case.name} with {' and '.join(_booleans(spec, first.inputs))} turned round"
        yield Trial(label, first, turned_round(spec, first.inputs), contract=False)


def backward_of(trial: Trial) -> Trial:
    """The backward pass on the inputs of a trial, for a random upstream gradient."""
    subject = trial.subject
    wanted = modes.differentiable_names(trial.inputs, subject.spec.mutates)
    run = modes.Backward(wanted, subject.upstream(trial.truth.eager))
    return Trial(f"gradients of {trial.label}", subject, trial.inputs, run, trial.contract)


def scaled(spec: KernelSpec, inputs: Inputs, factor: float) -> Inputs:
    """The inputs with every floating tensor that the spec does not fix multiplied, and kept within its bounds."""

    def change(values: Values, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        return (tensor.detach() * factor).clamp(values.least, values.most).requires_grad_(tensor.requires_grad)

    return _mapped(spec, inputs, change)


def redrawn(spec: KernelSpec, inputs: Inputs, seed: int, *, whole: bool = False) -> Inputs:
    """The inputs with every floating tensor that the spec does not fix drawn anew.

    Each tensor has a magnitude of its own; ``whole`` numbers are small, so that many are equal, and some zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(values: Values, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        power = MAGNITUDES * (2 * float(torch.rand((), generator=generator)) - 1)
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        drawn = (drawn * 2).round() if whole else drawn * 10**power
        return drawn.clamp(values.least, values.most).to(tensor).requires_grad_(tensor.requires_grad)

    return _mapped(spec, inputs, change)


def turned_round(spec: KernelSpec, inputs: Inputs) -> Inputs:
    """The inputs with every boolean tensor that the spec does not fix negated."""

    def change(values: Values, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return ~tensor if tensor.dtype == torch.bool else tensor.clone()

    return _mapped(spec, inputs, change)


def _mapped(spec: KernelSpec, inputs: Inputs, change: Callable[[Values, Tensor], Tensor]) -> Inputs:
    seen: dict[int, Tensor] = {}
    mapped = {}
    for name, value in inputs.items():
        values = spec.values.get(name, Values())
        function = (lambda tensor: tensor.detach().clone()) if values.fixed else partial(change, values)
        mapped[name] = compare.map_tensors(value, function, seen)
    return mapped


def _booleans(spec: KernelSpec, inputs: Inputs) -> list[str]:
    return [
        name
        for name, value in inputs.items()
        if not spec.values.get(name, Values()).fixed
        and any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in compare.leaves(value, name).values())
    ]
