"""How far the state may be from the truth after some steps: as far as rounding leads the side before, times 3.

Per tensor the largest error of all runs of the side before counts, with a floor of eight ulp because every step rounds
each tensor anew.

Single elements are held to the largest error of any tensor: AdamW turns a gradient that is all rounding noise into a
whole step, and in which tensor that happens is chance. RMS finds a wrong tensor, as the mutants of each row show. Of a
small tensor one such element is most of the RMS, so a tensor may be judged without a few of them, one in 256: as many
tensors as have such elements on the side before, times 3. (Measured on bio-nanochat bench: of some 100 vectors of 768
weights, three had one such element after a phase in which the side before had none.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare, mutants
from kernbench.parity.compare import Judged, Leaves, Rule
from kernbench.record import Errors

RULE = Rule(k=3.0, floor_ulp=8.0, mean=False)
LOUD = 0.5
"""An element off by more than this share of itself, or of its tensor's RMS, took another step than it should."""
ONE_IN = 256
"""Of so many elements one may be loud, or one of fewer, if these are enough to tell what the others are."""


class Allowance:
    """What rounding does to the side before at one point, by leaf, and what follows for another state there.

    Attributes:
        own, truth: the state of the side before, and the true one.
        eps: of the working dtype. It is the floor's even for a leaf of a wider one: what that is computed from has been
            rounded to the narrower.
        errors, rests: the largest of all runs, and but for a few loud elements.
        loud: the most tensors with such elements in one run.
    """

    def __init__(self, own: Leaves, truth: Leaves, eps: float) -> None:
        self.own = own
        self.truth = truth
        self.eps = eps
        self.errors: dict[str, Errors] = {}
        self.rests: dict[str, Errors] = {}
        self.loud = 0

    def add(self, found: Leaves) -> None:
        """Take a run of the side before into account, by its state at this point."""
        loud = 0
        for name, leaf in found.items():
            if name in self.truth and _is_real(self.own[name]):
                error = rest = self._error(name, leaf)
                if error.max > LOUD:
                    rest = self._without_loud(name, leaf) or error
                    loud += mutants.telling(self.eps, rest)
                self.errors[name] = compare.envelope(self.errors.get(name, compare.ZERO), error)
                self.rests[name] = compare.envelope(self.rests.get(name, compare.ZERO), rest)
        self.loud = max(self.loud, loud)

    def telling(self) -> set[str]:
        """The leaves of which the side before is so near to the truth that a wrong one must be found out."""
        return {name for name, error in self.errors.items() if mutants.telling(self.eps, error)}

    def judged(self, found: Leaves, *, part: bool = False) -> list[Judged]:
        """The judgement of every leaf of a state, or of those that are there if it is only ``part`` of one."""
        quiet = (name for name, rest in self.rests.items() if mutants.telling(self.eps, rest))
        loudest = max((self.errors[name].max for name in quiet), default=0.0)
        judged = {name: self._judge(name, found.get(name), loudest) for name in (found if part else self.own)}
        calmer = {name: calm for name, item in judged.items() if (calm := self._calmer(item, found.get(name)))}
        if len(calmer) <= RULE.k * self.loud:
            judged |= calmer
        return list(judged.values())

    def _judge(self, name: str, after: Any, loudest: float) -> Judged:
        """One leaf. Where it is kept (host or device, number or tensor) is the phase's own business."""
        if after is None or name not in self.truth:
            side = "after" if after is None else "in float64"
            return Judged(name, None, None, None, f"state_dict() has no {name} on the side {side}")
        got, expected, own = _tensor(after), _tensor(self.own[name]), self.errors.get(name)
        if got.shape != expected.shape:
            reason = f"{name} has shape {tuple(got.shape)}, before {tuple(expected.shape)}"
            return Judged(name, None, None, None, reason)
        if own is None:
            wrong = int((got.to(expected.device) != expected).sum())
            reason = f"{name} differs at {wrong} of {got.numel()} places" if wrong else ""
            return Judged(name, None, None, None, reason)
        wrong = int((~got.isfinite()).sum())
        if wrong:
            return Judged(name, None, None, None, f"{name} is not finite at {wrong} of {got.numel()} places")
        coarser = max(self.eps, torch.finfo(expected.dtype).eps)
        return compare.limit(name, self._error(name, got), own, RULE, coarser, got.numel(), loudest)

    def _calmer(self, item: Judged, after: Any) -> Judged | None:
        """What is wrong only in the RMS, and right without its few loud elements, judged so; else None."""
        if item.errors is None or item.limits is None or not item.reason:
            return None
        if not LOUD < item.errors.max <= item.limits.max:
            return None
        rest = self._without_loud(item.name, after)
        if rest is None or not rest.rms_ratio <= item.limits.rms_ratio:
            return None
        return Judged(item.name, rest, item.eager, item.limits, "")

    def _error(self, name: str, value: Any) -> Errors:
        """The error of one leaf, in units that follow from the truth and the side before."""
        truth = _tensor(self.truth[name])
        return compare.measure(_tensor(value).to(truth.device), truth, compare.unit(_tensor(self.own[name]), truth))

    def _without_loud(self, name: str, value: Any) -> Errors | None:
        """The same but for its loud elements; None if these are more than a few, or lost in so large a leaf."""
        got, truth = _tensor(value), _tensor(self.truth[name])
        if got.numel() > compare.CHUNK:
            return None
        unit = compare.unit(_tensor(self.own[name]), truth)
        rest, loud = compare.apart_from(got.to(truth.device), truth, unit, LOUD)
        few = max(got.numel() // ONE_IN, int(got.numel() >= mutants.ENOUGH_TO_TELL))
        return compare.measure(rest, truth, unit) if loud <= few else None


def _is_real(leaf: Any) -> bool:
    tensor = _tensor(leaf)
    return tensor.is_floating_point() or tensor.is_complex()


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
