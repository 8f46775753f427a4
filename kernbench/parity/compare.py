"""How far two results are apart, and how far they may be: every rule of agreement in one place.

Differences are taken in float64 against the oracle. Their unit is U = RMS(oracle tensor):

    max   the largest |difference| / max(U, |oracle element|), so one huge element is held to its own rounding
    rms   RMS(difference) / U
    mean  the signed mean difference / U: a small bias that the other two miss is what drifts in training

With e for eager's figure, k and floor from the tolerance, eps of the working dtype and n elements, the limits are

    max   k e + floor eps
    rms   k e + floor eps / 4                                one ulp for the default floor of four; rounding has 0.3
    mean  k |e| + 4 rms limit / sqrt(n) + floor eps / 8      what unbiased rounding of n elements can add up to

A tensor that is all zero in the oracle takes eager's RMS as its unit. No unit is below the smallest normal number of
the working dtype, so a few of its subnormal ulp pass everywhere; where that number is below 1e-30, differences below it
count nothing, because hardware may flush them.

Integers and booleans are compared exactly, and so is where a NaN or an infinity stands. A value that the working dtype
cannot hold counts as the first power of two that is too large, so that rounding decides whether it is infinite. Where
eager overflows on the way to a value that it could hold, anything that is not finite passes, and what is finite is
compared.
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

# Bound here, so that a kernel that replaces them later does not judge itself.
_equal, _where, _isfinite, _isnan, _isinf = torch.equal, torch.where, Tensor.isfinite, Tensor.isnan, Tensor.isinf

CHUNK = 2**24
"""Elements compared at once, so that checking a large tensor does not take the memory the kernel needs."""
LARGEST = 1e300
"""Errors are cut here: JSON knows no infinity, and limits are multiples of errors."""
ZERO = Errors(max=0.0, rms_ratio=0.0, mean=0.0)
FLUSHED = 1e-30
"""Dtypes with a smaller smallest normal number may be flushed; float16 with its 6e-5 never is."""
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
    return _equal(_bits(one), _bits(other).to(one.device))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 1:
        # One element counts as contiguous whatever its stride, and a view in bytes asks for a stride of one.
        flat = flat.as_strided((1,), (1,))
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
        return _judge_numbers(name, _real(actual), _real(eager), _real(oracle), rule)
    return Judged(name, None, None, None, f"{name} {reason}" if reason else "")


def _judge_numbers(name: str, actual: Tensor, eager: Tensor, oracle: Tensor, rule: Rule) -> Judged:
    for_actual = for_eager = oracle
    lost = _lost(eager, oracle)
    if lost is not None:
        # A NaN in the oracle is a place that is not measured.
        for_eager = _where(lost, math.nan, oracle)
        for_actual = _where(lost & ~_isfinite(actual), math.nan, oracle)
    if reason := _misplaced(actual, oracle, lost):
        return Judged(name, None, None, None, f"{name} {reason}")
    scale = unit(eager, oracle)
    eps = torch.finfo(actual.dtype).eps
    own = measure(eager, for_eager, scale)
    return limit(name, measure(actual, for_actual, scale), own, rule, eps, actual.numel())


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
    largest, squares, total, count = 0.0, 0.0, 0.0, 0
    top, negligible = _range(actual.dtype)
    for chunk, expected in _chunks(actual, oracle):
        known = _isfinite(expected)
        got = _where(_isinf(chunk) & known & (expected.abs() >= top / 2), chunk.clamp(-top, top), chunk)
        both = _isfinite(got) & known
        expected = _where(both, expected.clamp(-top, top), 0.0)
        difference = _where(both, got, 0.0) - expected
        difference = _where(difference.abs() < negligible, 0.0, difference)
        largest = max(largest, float((difference.abs() / expected.abs().clamp(min=unit)).max()))
        squares += float((difference / unit).square().sum())
        total += float((difference / unit).sum())
        count += int(both.sum())
    count = max(1, count)
    return Errors(
        max=min(largest, LARGEST),
        rms_ratio=min(math.sqrt(squares / count), LARGEST),
        mean=max(-LARGEST, min(total / count, LARGEST)) if not math.isnan(total) else LARGEST,
    )


def apart_from(actual: Tensor, oracle: Tensor, unit: float, above: float) -> tuple[Tensor, int]:
    """A copy that is right wherever the error is above ``above``, as ``measure`` counts it, and how often that is."""
    exact = oracle.to(actual.device, torch.float64)
    loud = (actual.double() - exact).abs() > above * exact.abs().clamp(min=unit)
    return _where(loud, exact, actual.double()).to(actual.dtype), int(loud.sum())


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """The first power of two that a dtype cannot hold, and the difference below which it may flush to zero."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return math.inf, 0.0
    info = torch.finfo(dtype)
    return 2.0 ** math.frexp(info.max)[1], info.smallest_normal if info.smallest_normal < FLUSHED else 0.0


def root_mean_square(tensor: Tensor, top: float = math.inf) -> float:
    """RMS over the finite elements, each cut at ``top``, without overflow; 0 for an empty tensor."""
    peak, squares, count = 0.0, 0.0, max(1, tensor.numel())
    for (chunk,) in _chunks(tensor):
        peak = max(peak, float(_where(_isfinite(chunk), chunk, 0.0).abs().max()))
    peak = min(peak, top)
    if peak == 0.0:
        return 0.0
    for (chunk,) in _chunks(tensor):
        squares += float((_where(_isfinite(chunk), chunk, 0.0).clamp(-top, top) / peak).square().sum())
    return peak * math.sqrt(squares / count)


def unit(eager: Tensor, oracle: Tensor) -> float:
    """What differences from the oracle are counted in (see the module's head)."""
    top, _ = _range(eager.dtype)
    smallest = torch.finfo(eager.dtype).smallest_normal if eager.is_floating_point() else sys.float_info.min
    return max(root_mean_square(oracle, top) or root_mean_square(eager), smallest)


def ulps_apart(one: Leaves, other: Leaves) -> float:
    """How far two results are apart, in ulp of max(RMS, element); infinite if not only finite numbers differ."""
    if one.keys() != other.keys():
        return math.inf
    return max((_ulps(leaf, other[name]) for name, leaf in one.items()), default=0.0)


def _ulps(one: Any, other: Any) -> float:
    if same_leaf(one, other):
        return 0.0
    if _difference_in_kind(one, other) or not isinstance(one, Tensor) or not one.is_floating_point():
        return math.inf
    largest, scale = 0.0, unit(other, other)
    for left, right in _chunks(one, other):
        apart = (left - right).abs() / right.abs().clamp(min=scale)
        apart = _where((left == right) | (_isnan(left) & _isnan(right)), 0.0, apart)
        largest = max(largest, float(_where(_isnan(apart), math.inf, apart).max()))
    return largest / torch.finfo(one.dtype).eps


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [_real(tensor).detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield tuple(tensor[start : start + CHUNK].to(flat[0].device, torch.float64) for tensor in flat)


def _difference_in_kind(actual: Any, eager: Any) -> str:
    if isinstance(actual, Tensor) != isinstance(eager, Tensor):
        return f"is {_kind(actual)}, eager gives {_kind(eager)}"
    if not isinstance(actual, Tensor):
        return ""
    if type(actual) not in (Tensor, type(eager)):
        return f"is a {type(actual).__name__}, which may compute later; eager gives a {type(eager).__name__}"
    for what in ("shape", "dtype", "device", "layout"):
        got, expected = getattr(actual, what), getattr(eager, what)
        if got != expected:
            show = tuple if what == "shape" else str
            return f"has {what} {show(got)}, eager gives {show(expected)}"
    return ""


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else "no tensor"


def _lost(eager: Tensor, oracle: Tensor) -> Tensor | None:
    """Where eager is not finite although the oracle is, and is no overflow when rounded; None if nowhere."""
    places = [
        _isfinite(expected) & ~_isfinite(own) & (expected.to(eager.dtype).to(torch.float64) != own)
        for own, expected in _chunks(eager, oracle)
    ]
    if not any(bool(place.any()) for place in places):
        return None
    return torch.cat(places).view(oracle.shape)


def _misplaced(actual: Tensor, oracle: Tensor, lost: Tensor | None) -> str:
    """What is wrong with where NaNs and infinities stand; at ``lost`` places any may."""
    top, _ = _range(actual.dtype)
    spurious = missing = infinite = 0
    free = None if lost is None else lost.reshape(-1)
    for index, (got, expected) in enumerate(_chunks(actual, oracle)):
        held = True if free is None else ~free[index * CHUNK : (index + 1) * CHUNK]
        spurious += int((_isnan(got) & ~_isnan(expected) & held).sum())
        missing += int((_isnan(expected) & ~_isnan(got)).sum())
        known = _isfinite(expected)
        overflowed = known & (expected.abs() >= top / 2) & (got.sign() == expected.sign())
        infinite += int((_isinf(got) & known & ~overflowed & held).sum())
        infinite += int((_isinf(expected) & (got != expected)).sum())
    if spurious:
        return f"is NaN at {spurious} of {oracle.numel()} places where the oracle is not"
    if missing:
        return "is no NaN at places where the oracle is"
    return "is infinite at other places than the oracle" if infinite else ""


def _share(error: float, allowed: float) -> float:
    if allowed == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / allowed
