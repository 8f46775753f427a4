"""How far from the oracle a right kernel may be on inputs near the ends of a dtype, with ties, or that cancel.

On ordinary inputs eager's own error measures what is hard. On hostile ones it may be lucky: a sum that cancels exactly
in one order and not in another, a square that is just still representable. So a result that misses the ordinary limits
is held against the largest error that the reference makes on this and on neighbouring inputs:

    moved        each number, and each result on the way, by an ulp or what n roundings of float32 add up to; in float64
    moved alike  equal numbers by equal shares, in the working dtype: ties stay ties
    scaled       by 16 and 1/16 where numbers are near the ends of the dtype: it overflows or underflows nearby
    flushed      with subnormal numbers taken for zero, as some instructions of a GPU do
    again        called once more: is eager itself deterministic

Where the result jumps however little the inputs move, ties are decided, and what is moved there is no excuse. Only the
maximum counts: with equal or few values rounding errors are equal too and do not average out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare
from kernbench.parity.compare import Judged, Leaves, Rule
from kernbench.parity.roundoff import Roundoff
from kernbench.parity.subject import Truth, judge_all
from kernbench.record import Errors
from kernbench.spec import Inputs, Values

ACCUMULATION = 2.0**-23
"""Sums are taken in float32, also of shorter dtypes."""
NEXT_TO_NOTHING = 2.0**-44
"""A share by which float64 numbers are moved to tell a jump from a slope."""
JUMP = 2.0**-8
"""A result that moves by this share of what an ulp moves it, when inputs move by next to nothing, jumps."""
SCALES = (16.0, 1 / 16.0)
MOVES = 4
USELESS = 0.25
"""Beyond this error eager has overflowed on the way, if its numbers are near the ends of the dtype."""


@dataclass(frozen=True)
class Trial:
    """One run of a kernel on hostile inputs, and how the reference is run on others like them.

    Attributes:
        reference: ``(inputs, upstream gradients) -> leaves``; it may write into the inputs.
        values: what the declaration says of each argument; fixed ones are not moved.
        extreme: some numbers are near the ends of their dtype.
    """

    reference: Callable[[Inputs, Leaves], Leaves]
    inputs: Inputs
    upstream: Leaves
    truth: Truth
    rule: Rule
    values: Mapping[str, Values]
    extreme: bool

    def judge(self, got: Leaves) -> list[Judged]:
        """Each leaf by the ordinary limits, and where it misses those, by what is hard about the inputs."""
        got = {name: self._or_none(name, leaf) for name, leaf in got.items()}
        judged = judge_all(got, self.truth, self.rule)
        return [self._again(item, got) if item.reason and item.name in got else item for item in judged]

    def _or_none(self, name: str, leaf: Any) -> Any:
        """A gradient of zeros is as good as none where eager gives none."""
        none = self.truth.eager.get(name, leaf) is None and isinstance(leaf, Tensor) and not leaf.count_nonzero()
        return None if none else leaf

    def _again(self, item: Judged, got: Leaves) -> Judged:
        actual, eager, oracle = got[item.name], self.truth.eager.get(item.name), self.truth.oracle.get(item.name)
        if not (isinstance(actual, Tensor) and isinstance(eager, Tensor) and isinstance(oracle, Tensor)):
            return item
        if (actual.shape, actual.dtype, actual.device) != (eager.shape, eager.dtype, eager.device):
            return item
        if actual.is_complex() or (item.errors and item.limits and item.errors.max <= item.limits.max):
            return item if actual.is_complex() else replace(item, reason="")
        if not actual.is_floating_point():
            return self._decided(item, actual, eager, oracle)
        return self._close(item, actual, eager, oracle)

    def _decided(self, item: Judged, actual: Tensor, eager: Tensor, oracle: Tensor) -> Judged:
        """Integers: right where they are eager's or the oracle's, and where an ulp decides between others."""
        wrong = (actual != oracle) & (actual != eager)
        for leaves in self._alike if bool(wrong.any()) else ():
            wrong &= leaves[item.name] == oracle
        count = int(wrong.sum())
        reason = f"{item.name} differs at {count} of {oracle.numel()} places, and must be equal" if count else ""
        return Judged(item.name, None, None, None, reason)

    def _close(self, item: Judged, actual: Tensor, eager: Tensor, oracle: Tensor) -> Judged:
        rounded = oracle.to(actual.dtype)
        scale = compare.unit(eager, oracle)
        free = eager.isfinite() != rounded.isfinite()
        if self.extreme:
            free |= ((eager.double() - oracle).abs() / oracle.abs().clamp(min=scale)) > USELESS
        brink = oracle.isfinite() & (2 * oracle.abs() > torch.finfo(actual.dtype).max)
        wrong = ~free & ~brink & ~_same_kind(actual, eager) & ~_same_kind(actual, rounded)
        if bool(wrong.any()) and not self._overflows_nearby(item.name):
            return Judged(item.name, None, None, None, f"{item.name} {_misplaced(actual, rounded, wrong)}")
        compared = ~free & ((actual.double() - oracle).abs() > _nothing(actual.dtype))
        errors = compare.measure(torch.where(compared, actual.double(), oracle), oracle, scale)
        hard = [compare.measure(eager, oracle, scale), *self._errors(item.name, oracle, scale, actual.dtype)]
        worst = max((error.max for error in hard), default=0.0)
        allowed = self.rule.k * worst + self.rule.floor_ulp * torch.finfo(actual.dtype).eps
        reason = ""
        if not errors.max <= allowed:
            own = f"eager's own is {hard[0].max:.2g}"
            reason = f"{item.name} max error {errors.max:.2g} exceeds {allowed:.2g} ({own}{self._doubt(item.name)})"
        # RMS and mean in units of the RMS are at most this multiple of the maximum.
        limit = min(math.sqrt(2) * allowed, compare.LARGEST)
        limits = Errors(max=min(allowed, compare.LARGEST), rms_ratio=limit, mean=limit)
        return Judged(item.name, errors, hard[0], limits, reason)

    def _doubt(self, name: str) -> str:
        same = all(compare.same_leaf(self.truth.eager[name], leaves[name]) for leaves in self._repeated)
        return "" if same else ", and differs from call to call"

    def _errors(self, name: str, oracle: Tensor, scale: float, dtype: torch.dtype) -> Iterator[Errors]:
        """The errors of the reference on neighbouring inputs."""
        for far, near in self._moved:
            jumps = (near[name] - oracle).abs() > JUMP * (far[name] - oracle).abs()
            yield compare.measure(torch.where(jumps, oracle, far[name]), oracle, scale)
        for leaves in (*self._alike, *self._flushed, *self._repeated):
            yield compare.measure(leaves[name], oracle, scale)
        for truth in self._scaled:
            eager, exact = truth.eager[name], truth.oracle[name]
            lost = ~eager.isfinite() & exact.to(dtype).isfinite() & self.truth.eager[name].isfinite()
            yield compare.measure(eager, exact, compare.unit(eager, exact))
            if bool(lost.any()):
                yield Errors(max=compare.LARGEST, rms_ratio=compare.LARGEST, mean=compare.LARGEST)

    def _overflows_nearby(self, name: str) -> bool:
        here = self.truth.eager[name].isfinite()
        return any(bool((here & ~truth.eager[name].isfinite()).any()) for truth in self._scaled)

    @cached_property
    def _moved(self) -> list[tuple[Leaves, Leaves]]:
        """Float64 results with inputs and roundings moved by an ulp, and by next to nothing in the same direction."""
        floating = [leaf for leaf in compare.leaves(self.inputs, "").values() if _floats(leaf)]
        longest = max((leaf.numel() for leaf in floating), default=1)
        ulp = max((torch.finfo(leaf.dtype).eps for leaf in floating), default=0.0)
        share = max(ulp, math.sqrt(longest) * ACCUMULATION)

        def move(seed: int, share: float, tensor: Tensor, values: Values) -> Tensor:
            return _nudged(tensor.double(), share, _uniform(tensor, seed), values)

        pairs = []
        for seed in range(MOVES):
            far, near = (
                self._run(partial(move, seed, width), dtype=torch.float64, inside=Roundoff(width, seed))
                for width in (share, NEXT_TO_NOTHING)
            )
            pairs += [(far, near)] if far is not None and near is not None else []
        return pairs

    @cached_property
    def _alike(self) -> list[Leaves]:
        """Eager's results for inputs of which equal numbers are moved by equal shares, up to an ulp."""

        def move(seed: int, tensor: Tensor, values: Values) -> Tensor:
            distinct, which = torch.unique(tensor, return_inverse=True)
            shifts = _uniform(distinct, seed)[which]
            return _nudged(tensor.double(), torch.finfo(tensor.dtype).eps, shifts, values).to(tensor.dtype)

        runs = [self._run(partial(move, seed)) for seed in range(MOVES)]
        return [leaves for leaves in runs if leaves is not None]

    @cached_property
    def _scaled(self) -> list[Truth]:
        """The reference on inputs each of which, and then all of which, are scaled."""
        if not self.extreme:
            return []
        found = []
        names = [name for name, value in self.inputs.items() if any(map(_floats, compare.leaves(value, "").values()))]
        for only in (*names, "", None):
            for factor in SCALES:

                def scale(tensor: Tensor, values: Values, factor: float = factor) -> Tensor:
                    return _bounded(tensor.double() * factor, values).to(tensor.dtype)

                eager, oracle = self._run(scale, only), self._run(scale, only, dtype=torch.float64)
                found += [Truth(eager, oracle)] if eager is not None and oracle is not None else []
        return found

    @cached_property
    def _flushed(self) -> list[Leaves]:
        """Eager on the CPU with subnormal numbers taken for zero; none where the CPU cannot."""
        devices = {name: leaf.device for name, leaf in self.truth.eager.items() if isinstance(leaf, Tensor)}
        with _flushing() as flushes:
            leaves = self._run(lambda tensor, _: tensor, device="cpu") if flushes else None
        if leaves is None:
            return []
        return [{name: leaf.to(devices[name]) if name in devices else leaf for name, leaf in leaves.items()}]

    @cached_property
    def _repeated(self) -> list[Leaves]:
        leaves = self._run(lambda tensor, _: tensor)
        return [] if leaves is None else [leaves]

    def _run(
        self,
        change: Callable[[Tensor, Values], Tensor],
        only: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        inside: AbstractContextManager[Any] | None = None,
    ) -> Leaves | None:
        """The reference on inputs that are changed and then cast; None where they are none to it.

        Args:
            only: the argument to change, by default all; "" is the upstream gradient.
            inside: a context for the reference alone.
        """
        seen: dict[int, Tensor] = {}

        def changed(values: Values, apply: bool, tensor: Tensor) -> Tensor:
            given = tensor.detach()
            if not given.is_floating_point():
                return given.to(device, copy=True)
            moved = change(given, values) if apply and not values.fixed else given
            return moved.to(device, dtype or tensor.dtype, copy=True)

        inputs = {}
        for name, value in self.inputs.items():
            apply = only in (None, name)
            inputs[name] = compare.map_tensors(value, partial(changed, self.values.get(name, Values()), apply), seen)
        upstream = compare.map_tensors(self.upstream, partial(changed, Values(), only in (None, "")), seen)
        try:
            with inside or nullcontext():
                return self.reference(inputs, upstream)
        except (ValueError, RuntimeError):
            # A neighbour outside of what the reference takes, such as a probability above one, says nothing.
            return None


def _uniform(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + like.numel())
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(like.device)


def _nudged(numbers: Tensor, share: float, shifts: Tensor, values: Values) -> Tensor:
    return _bounded(numbers * (1 + shifts * share), values)


def _bounded(numbers: Tensor, values: Values) -> Tensor:
    return torch.where(numbers.isfinite(), numbers.clamp(min=values.least, max=values.most), numbers)


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _same_kind(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors are both finite, both NaN, or the same infinity."""
    return (one.isfinite() & other.isfinite()) | (one.isnan() & other.isnan()) | (one.isinf() & (one == other))


def _misplaced(actual: Tensor, expected: Tensor, wrong: Tensor) -> str:
    count = int(wrong.sum())
    first = int(wrong.reshape(-1).nonzero()[0])
    got, right = (float(tensor.reshape(-1)[first]) for tensor in (actual, expected))
    return f"is {got:.6g} where the oracle is {right:.6g}, at {count} of {actual.numel()} places"


def _nothing(dtype: torch.dtype) -> float:
    """What two results may always differ by: numbers that a GPU may flush, or some rounding of those."""
    info = torch.finfo(dtype)
    return 4 * info.smallest_normal * info.eps if dtype == torch.float16 else 2 * info.smallest_normal


@contextmanager
def _flushing() -> Iterator[bool]:
    """Subnormal numbers are zero on this thread; says whether the CPU can do that."""
    before = float(torch.tensor(2.0**-149) * 1.0) == 0.0
    supported = torch.set_flush_denormal(True)
    try:
        yield supported
    finally:
        torch.set_flush_denormal(before)
