"""What a kernel is held against: its reference on the same inputs, in the working dtype (eager) and float64 (oracle).

A ``Subject`` is one kernel, case and dtype. Every way of checking takes one: kernelcheck, generated, gate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare, conditions, integrity, modes, mutants
from kernbench.parity.compare import Judged, Leaves, Rule
from kernbench.record import Errors
from kernbench.spec import Case, Inputs, KernelSpec, Tolerance

SETTLING_S = 0.02
"""How long a thread that a call has started may take until it changes what the call returned."""
FEW = 32
"""Elements from which on the error of eager says how much there is to round: their RMS scatters by an eighth."""
DRAWS = 8
HOPELESS = 8.0
"""So many times a limit is no luck of one draw: no further one is worth its time."""


@dataclass
class Truth:
    """What the reference makes of some inputs, in the working dtype and in float64."""

    eager: Leaves
    oracle: Leaves


@dataclass
class Observed:
    """What one call of the kernel gave, copied at once, and what it did besides that it may not; empty if nothing."""

    leaves: Leaves
    reason: str


class Subject:
    """One kernel, case and dtype, with what the reference says of them computed once."""

    def __init__(self, spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.spec = spec
        self.case = case
        self.dtype = dtype
        self.device = device
        self.seed = seed
        tolerance: Tolerance = spec.tolerance[str(dtype).removeprefix("torch.")]
        self.forward = Rule(tolerance.forward, tolerance.floor_ulp)
        self.backward = Rule(tolerance.gradient, tolerance.floor_ulp)
        self.broken = True
        """Until the reference has run: as long as it does not, nothing can be judged."""

    @cached_property
    def inputs(self) -> Inputs:
        return self.spec.make_inputs(self.case, self.dtype, self.device, self.seed)

    def others(self) -> Inputs:
        """Inputs of another seed, which a kernel that caches its result gets wrong; not kept, they may be large."""
        return self.spec.make_inputs(self.case, self.dtype, self.device, self.seed + 1)

    @cached_property
    def truth(self) -> Truth:
        return self.truth_of(self.inputs)

    def truth_of(self, inputs: Inputs) -> Truth:
        truth = Truth(
            self.call(self.spec.reference, compare.clone(inputs)),
            self.call(self.spec.reference, compare.upcast(inputs)),
        )
        self.broken = False
        return truth

    def call(self, function: Callable[..., Any], inputs: Inputs) -> Leaves:
        """Outputs and mutated arguments of one call by name."""
        with torch.no_grad():
            output = function(**inputs)
        return self.results(output, inputs)

    def observe(
        self,
        inputs: Inputs,
        unchanged: Inputs,
        run: Callable[[Inputs], Leaves] | None = None,
        *,
        guard: bool = True,
        below_python: bool = False,
    ) -> Observed:
        """One call of the kernel, or one ``run`` of it, by all rules other than that of the result.

        Args:
            inputs: its own, to write into.
            unchanged: what the arguments that it does not declare as mutated must hold afterwards.
            guard: put what it allocates between guard bands; ``below_python`` as in :func:`conditions.guarded`.
        """
        running = set(threading.enumerate())
        guards = conditions.guarded(below_python=below_python) if guard else nullcontext(None)
        with integrity.watched() as watch, guards as allocations:
            live = run(inputs) if run else self.call(self.spec.optimized, inputs)
            taken = {name: _taken(leaf) for name, leaf in live.items()}
        self._settle(running)
        changed = [
            name for name, leaf in live.items() if leaf is not taken[name] and not compare.same_bits(leaf, taken[name])
        ]
        reasons = [
            watch.reason,
            allocations.reason if allocations is not None else "",
            f"{changed[0]} changes after the call has returned: work goes on elsewhere" if changed else "",
            self.touched(inputs, unchanged),
        ]
        return Observed(taken, "; ".join(filter(None, reasons)))

    def _settle(self, running: set[threading.Thread]) -> None:
        """Wait for what a call has left running: on the device, and in threads of its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if set(threading.enumerate()) - running:
            time.sleep(SETTLING_S)

    def touched(self, inputs: Inputs, unchanged: Inputs) -> str:
        """Which arguments were written into and not declared as mutated, in words."""
        changed = [
            name
            for argument, value in inputs.items()
            if argument not in self.spec.mutates
            for name, leaf in compare.leaves(value, argument).items()
            if not compare.same_leaf(leaf, compare.leaves(unchanged[argument], argument).get(name))
        ]
        return f"writes into {', '.join(changed[:3])}, which it does not declare in mutates" if changed else ""

    def results(self, output: Any, inputs: Inputs) -> Leaves:
        """An output and the mutated arguments by name."""
        found = compare.leaves(output, "output")
        for name in self.spec.mutates:
            found |= compare.leaves(inputs[name], name)
        return found

    def judge(self, got: Leaves, truth: Truth, inputs: Inputs) -> list[Judged]:
        """Hold a result of ``inputs`` against the truth about them."""
        return judge_fairly(
            got, truth, self.forward, lambda draw: self.call(self.spec.reference, self.nudged(inputs, draw))
        )

    def upstream(self, eager: Leaves, *, expanded: bool = False) -> Leaves:
        """The gradient that arrives at each floating output: random, or that of ``sum()``, with strides of zero."""
        return modes.upstream(eager, self.seed, expanded=expanded)

    def backward_truth(self, run: modes.Backward, inputs: Inputs) -> Truth:
        """The gradients of the reference, in the working dtype and in float64."""
        return Truth(run(self.spec.reference, compare.clone(inputs)), run(self.spec.reference, compare.upcast(inputs)))

    def judge_backward(self, got: Leaves, truth: Truth, run: modes.Backward, inputs: Inputs) -> list[Judged]:
        """Hold gradients to ``inputs`` against the truth about them; zeros are as good as none."""
        got = {
            name: leaf if truth.eager.get(name, leaf) is not None else _none_if_zero(leaf) for name, leaf in got.items()
        }
        return judge_fairly(got, truth, self.backward, lambda draw: run(self.spec.reference, self.nudged(inputs, draw)))

    def nudged(self, inputs: Inputs, draw: int = 0) -> Inputs:
        """The inputs, each number moved by up to one ulp; every draw moves them another way."""
        moved: Inputs = modes.nudge(inputs, self.seed + draw)
        return moved


def _taken(leaf: Any) -> Any:
    # Of another type is refused later; copying it could make it compute what it has put off.
    return leaf.detach().clone() if type(leaf) is Tensor else leaf


def _none_if_zero(leaf: Any) -> Any:
    return None if isinstance(leaf, Tensor) and not bool(leaf.count_nonzero()) else leaf


def judge_all(got: Leaves, truth: Truth, rule: Rule, *, part: bool = False) -> list[Judged]:
    """Every leaf of a result held against the truth; in a ``part``, leaves may be absent."""
    judged = [
        compare.judge(name, got[name], eager, truth.oracle[name], rule)
        for name, eager in truth.eager.items()
        if name in got
    ]
    if part:
        return judged
    missing, extra = truth.eager.keys() - got.keys(), got.keys() - truth.eager.keys()
    if missing or extra:
        what = f"gives {', '.join(sorted(got))}, eager gives {', '.join(sorted(truth.eager))}"
        judged.append(Judged("output", None, None, None, what))
    return judged


def judge_fairly(got: Leaves, truth: Truth, rule: Rule, nudged: Callable[[int], Leaves]) -> list[Judged]:
    """As :func:`judge_all`, with a second measure where eager's own error is none.

    That is where it is exactly zero, where a tensor is so small that eager may have been lucky, and where the error is
    so large that the tensor holds rounding noise, of which a right kernel draws other numbers. There ``nudged``, some
    draws of the reference on inputs moved by up to one ulp, counts if it is worse.
    """
    judged = judge_all(got, truth, rule)
    unfair = {item.name for item in judged if item.eager and _no_measure(item, got[item.name])}
    for draw in range(DRAWS):
        if not any(item.reason and (not draw or item.excess < HOPELESS) for item in judged if item.name in unfair):
            break
        moved = {item.name: item.errors for item in judge_all(nudged(draw), truth, rule)}
        judged = [
            _judged_again(item, moved.get(item.name), rule, got) if item.name in unfair else item for item in judged
        ]
    return judged


def _no_measure(item: Judged, leaf: Tensor) -> bool:
    return item.eager == compare.ZERO or leaf.numel() < FEW or is_noise(item, leaf)


def _judged_again(item: Judged, moved: Errors | None, rule: Rule, got: Leaves) -> Judged:
    if moved is None or item.errors is None or item.eager is None:
        return item
    leaf = got[item.name]
    larger = compare.envelope(item.eager, moved)
    return compare.limit(item.name, item.errors, larger, rule, torch.finfo(leaf.dtype).eps, leaf.numel())


def passes(judged: Sequence[Judged]) -> bool:
    """Whether nothing is wrong with any leaf."""
    return not any(item.reason for item in judged)


def is_noise(judged: Judged, leaf: Any) -> bool:
    """Whether eager is so far from the oracle that the tensor holds rounding noise."""
    return judged.eager is not None and not mutants.telling(torch.finfo(leaf.dtype).eps, judged.eager)
