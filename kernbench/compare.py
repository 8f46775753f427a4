"""How far two results are apart, and how far they may be: every rule of agreement in one place.

Differences are taken in float64 against the oracle. Their unit is U = RMS(oracle tensor):

    max   the largest |difference| / max(U, |oracle element|), so one huge element is held to its own rounding
    rms   RMS(difference) / U
    mean  the signed mean difference / U: a small bias that the other two miss is what drifts in training

With e for eager's figure, k and floor from the tolerance, eps of the working dtype and n elements, the limits are

    max   k e + floor eps
    rms   k e + floor eps / 4                                one ulp for the default floor of four; rounding has 0.3
    mean  k |e| + 4 rms limit / sqrt(n) + floor eps / 8      what unbiased rounding of n elements can add up to

A tensor that is all zero in the oracle takes eager's RMS as its unit; is that zero too, nothing but zeros passes.
Integers and booleans are compared exactly, and so is where a NaN or an infinity stands.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernbench.record import Errors

CHUNK = 2**24
"""Elements compared at once, so that checking a large tensor does not take the memory the kernel needs."""
LARGEST = 1e300
"""Errors are cut here: JSON knows no infinity, and limits are multiples of errors."""
ZERO = Errors(max=0.0, rms_ratio=0.0, mean=0.0)
Leaves = dict[str, Any]
"""Tensors and scalars of a nested result by their path, for example ``params[3]``."""


@dataclass(frozen=True)
class Rule:
    """How much of eager's error is allowed (``k``), the floor in ulp, and whether a drifting mean counts."""

    k: float
    floor_ulp: float
    mean: bool = True


@dataclass(frozen=True)
class Judged:
    """One tensor's errors, what eager's are, and the limits. ``reason`` says what is wrong, empty if nothing is."""

    name: str
    errors: Errors | None
    eager: Errors | None
    limits: Errors | None
    reason: str

    @property
    def excess(self) -> float:
        """The largest share of a limit that is used up; above 1 fails."""
        if self.errors is None or self.limits is None:
            return math.inf if self.reason else 0.0
        return max(_share(self.errors.max, self.limits.max), _share(self.errors.rms_ratio, self.limits.rms_ratio))


def leaves(value: Any, name: str) -> Leaves:
    """The tensors and scalars in nested mappings, lists and tuples."""
    return dict(_walk(value, name))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}[{index}]")
    else:
        yield name, value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor], seen: dict[int, Tensor] | None = None) -> Any:
    """A copy of a nested value with every tensor mapped; a tensor that stands in two places stays one tensor."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = function(value)
        return seen[id(value)]
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, function, seen) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(item, function, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def clone(value: Any) -> Any:
    """Fresh copies of all tensors, detached."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def upcast(value: Any) -> Any:
    """Fresh copies of all tensors, the floating ones in float64."""
    return map_tensors(value, lambda tensor: tensor.detach().to(_wide(tensor), copy=True))


def _wide(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else tensor.dtype


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and the sign of zero included, on whatever devices they are."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other).to(one.device))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(torch.uint8)


def same_leaf(one: Any, other: Any) -> bool:
    """Whether two leaves are equal, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return type(one) is type(other) and bool(one == other or one != one)


def judge(name: str, actual: Any, eager: Any, oracle: Any, rule: Rule) -> Judged:
    """Hold one leaf of a result against the oracle, with eager's own error as the measure."""
    reason = _difference_in_kind(actual, eager)
    if not reason and not isinstance(oracle, Tensor):
        reason = "" if same_leaf(actual, eager) else f"is {actual!r}, eager gives {eager!r}"
    elif not reason and not (oracle.is_floating_point() or oracle.is_complex()):
        wrong = int((actual != oracle).sum())
        reason = f"differs at {wrong} of {oracle.numel()} places, and must be equal" if wrong else ""
    elif not reason:
        reason = _misplaced(actual, oracle)
        if not reason:
            scale = unit(eager, oracle)
            eps = torch.finfo(actual.dtype).eps
            return limit(name, measure(actual, oracle, scale), measure(eager, oracle, scale), rule, eps, actual.numel())
    return Judged(name, None, None, None, f"{name} {reason}" if reason else "")


def limit(
    name: str, errors: Errors, eager: Errors, rule: Rule, eps: float, elements: int, loudest: float = 0.0
) -> Judged:
    """The judgement that follows from measured errors.

    Args:
        eps: what one ulp is worth, relative.
        loudest: a maximum that eager reaches elsewhere, and that is allowed here too.
    """
    floor = rule.floor_ulp * eps
    rms = rule.k * eager.rms_ratio + floor / 4
    mean = rule.k * abs(eager.mean) + 4 * rms / math.sqrt(max(1, elements)) + floor / 8
    limits = Errors(max=rule.k * max(eager.max, loudest) + floor, rms_ratio=rms, mean=mean)
    reasons = []
    for what, error, own, allowed in (
        ("max", errors.max, eager.max, limits.max),
        ("rms", errors.rms_ratio, eager.rms_ratio, limits.rms_ratio),
        ("mean", abs(errors.mean), abs(eager.mean), limits.mean if rule.mean else math.inf),
    ):
        if not error <= allowed:
            reasons.append(f"{what} error {error:.2g} exceeds {allowed:.2g} (eager's own is {own:.2g})")
    return Judged(name, errors, eager, limits, f"{name} {'; '.join(reasons)}" if reasons else "")


def envelope(one: Errors, other: Errors) -> Errors:
    """The larger of two errors in each figure."""
    return Errors(
        max=max(one.max, other.max),
        rms_ratio=max(one.rms_ratio, other.rms_ratio),
        mean=max(abs(one.mean), abs(other.mean)),
    )


def measure(actual: Tensor, oracle: Tensor, unit: float) -> Errors:
    """Errors of one tensor in units of ``unit`` (see the module's head), over the places where both are finite."""
    largest, squares, total, count = 0.0, 0.0, 0.0, max(1, oracle.numel())
    for got, expected in _chunks(actual, oracle):
        both = got.isfinite() & expected.isfinite()
        difference = torch.where(both, got - expected, 0.0)
        scale = torch.where(both, expected, 0.0).abs().clamp(min=unit)
        largest = max(largest, float((difference.abs() / scale).max()))
        squares += float((difference / unit).square().sum())
        total += float((difference / unit).sum())
    return Errors(
        max=min(largest, LARGEST),
        rms_ratio=min(math.sqrt(squares / count), LARGEST),
        mean=max(-LARGEST, min(total / count, LARGEST)) if not math.isnan(total) else LARGEST,
    )


def root_mean_square(tensor: Tensor) -> float:
    """RMS over the finite elements, without overflow; 0 for an empty tensor."""
    peak, squares, count = 0.0, 0.0, max(1, tensor.numel())
    for chunk, _ in _chunks(tensor, tensor):
        peak = max(peak, float(torch.where(chunk.isfinite(), chunk, 0.0).abs().max()))
    if peak == 0.0:
        return 0.0
    for chunk, _ in _chunks(tensor, tensor):
        squares += float((torch.where(chunk.isfinite(), chunk, 0.0) / peak).square().sum())
    return peak * math.sqrt(squares / count)


def unit(eager: Tensor, oracle: Tensor) -> float:
    """What differences from the oracle are counted in (see the module's head)."""
    return root_mean_square(oracle) or root_mean_square(eager) or sys.float_info.min


def _chunks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = [
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1) for tensor in (one, other)
    ]
    for start in range(0, flat[0].numel(), CHUNK):
        first, second = (tensor[start : start + CHUNK].to(torch.float64) for tensor in flat)
        yield first, second.to(first.device)


def _difference_in_kind(actual: Any, eager: Any) -> str:
    if isinstance(actual, Tensor) != isinstance(eager, Tensor):
        return f"is {_kind(actual)}, eager gives {_kind(eager)}"
    if not isinstance(actual, Tensor):
        return ""
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(actual, what), getattr(eager, what)
        if got != expected:
            show = tuple if what == "shape" else str
            return f"has {what} {show(got)}, eager gives {show(expected)}"
    return ""


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else "no tensor"


def _misplaced(actual: Tensor, oracle: Tensor) -> str:
    expected = oracle.to(actual.dtype)
    spurious = int((actual.isnan() & ~expected.isnan()).sum())
    if spurious:
        return f"is NaN at {spurious} of {oracle.numel()} places where the oracle is not"
    if int((expected.isnan() & ~actual.isnan()).sum()):
        return "is no NaN at places where the oracle is"
    infinite = actual.isinf() | expected.isinf()
    if bool((infinite & (actual != expected)).any()):
        return "is infinite at other places than the oracle"
    return ""


def _share(error: float, allowed: float) -> float:
    if allowed == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / allowed
