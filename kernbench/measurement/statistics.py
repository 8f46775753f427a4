"""Medians with their uncertainty: bootstrap over rounds, paired ratios, the noise floor of an A/A run.

Intervals are of 99 %. That many of them hold the true value, so that of 100 races between identical arms at least 95
contain 1 with a probability above 0.99; of intervals of 95 % it would be 0.6. The plain percentile bootstrap of a
median is too narrow for so few rounds, and is therefore expanded as Hesterberg proposes. What the intervals of 30
paired rounds cover when simulated, in percent by the noise of a round (1000 races each, good to 0.3):

    noise                    95 % percentile    99 % percentile    99 % expanded
    normal                              94.3               98.7             99.2
    Student's t, 2 degrees              95.9               98.7             99.5
    two modes                           93.3               98.0             99.4
    first in a round slower             94.8               98.8             99.0

From 10 to 50 rounds the expanded interval covers 99.0 to 99.8 %, with 6 it is the range of the values (96 to 97 %).

Source: Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.2 (expanded percentile interval).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy
from numpy.typing import NDArray

from kernbench.record import Ratio

CONFIDENCE = 0.99
RESAMPLES = 10_000

# Resampled values held at once: bounds memory to 32 MB however long the sample is.
CHUNK_VALUES = 4_000_000


def bootstrap_median(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Median with its bootstrap interval: (median, low, high). One value gives (x, x, x).

    Raises:
        ValueError: no values, or one that is not finite.
    """
    sample = _checked(values, "values")
    middle = float(numpy.median(sample))
    if sample.size == 1:
        return middle, middle, middle
    generator = numpy.random.default_rng(seed)
    medians = numpy.empty(resamples)
    chunk = max(1, CHUNK_VALUES // sample.size)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        drawn = generator.integers(0, sample.size, size=(stop - start, sample.size))
        medians[start:stop] = numpy.median(sample[drawn], axis=1)
    tail = expanded_tail(sample.size)
    low, high = numpy.quantile(medians, (tail, 1 - tail))
    return middle, float(low), float(high)


@functools.cache
def expanded_tail(count: int) -> float:
    """The share of resamples to leave out at either end, for ``count`` values, at least two."""
    # Imported here: loading it takes longer than anything else on the way to a report, and few commands get here.
    from scipy.special import stdtrit

    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * quantile)


def identical_interval(one: Sequence[float], other: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The interval of the paired ratio of two identical arms (A/A); it should hold 1."""
    ratios = [first / second for first, second in zip(one, other, strict=True)]
    _, low, high = bootstrap_median(ratios, seed=seed)
    return low, high


def noise_floor(identical: tuple[float, float]) -> float:
    """Distance from 1 of the farther end of an A/A interval: no claim may be smaller."""
    return max(abs(end - 1) for end in identical)


def paired_ratio(
    before: Sequence[float],
    after: Sequence[float],
    again: Sequence[float],
    *,
    steps_per_round: int,
    dropped_rounds: int = 0,
    seed: int = 0,
) -> Ratio:
    """Step time before over after, paired by round, so that drift common to a round's arms cancels.

    The A/A interval is the same statistic of two identical arms (before over again). The noise floor is the distance
    from 1 of that interval's farther end, not of its median: it is the largest effect that identical arms could still
    be taken to show, which no claim may be smaller than.

    Args:
        before: seconds per step, one figure per round; ``after`` and ``again`` are of the same rounds.

    Raises:
        ValueError: the arms differ in length, hold no rounds, or hold a time that is not finite and positive.
    """
    old, new, twin = (_checked(arm, name) for arm, name in ((before, "before"), (after, "after"), (again, "again")))
    if not old.size == new.size == twin.size:
        raise ValueError(f"arms of {old.size}, {new.size} and {twin.size} rounds cannot be paired")
    if min(old.min(), new.min(), twin.min()) <= 0:
        raise ValueError("a step time is zero or negative")
    median, low, high = bootstrap_median((old / new).tolist(), seed=seed)
    same = identical_interval(old.tolist(), twin.tolist(), seed=seed)
    return Ratio(
        median=median,
        low=low,
        high=high,
        noise_floor=noise_floor(same),
        rounds=old.size,
        steps_per_round=steps_per_round,
        a_a=same,
        dropped_rounds=dropped_rounds,
    )


def unpaired_ratio(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Ratio:
    """Median step time before over after, of steps from separate runs, each side resampled on its own.

    Drift between the runs cannot cancel, so the noise floor is the larger relative half-width of the two medians.

    Raises:
        ValueError: a side has no steps, or a time that is not finite and positive.
    """
    sides = [_checked(values, name) for values, name in ((before, "before"), (after, "after"))]
    if min(side.min() for side in sides) <= 0:
        raise ValueError("a step time is zero or negative")
    generator = numpy.random.default_rng(seed)
    medians = [
        numpy.median(side[generator.integers(0, side.size, size=(RESAMPLES, side.size))], axis=1) for side in sides
    ]
    tails = [0.0 if side.size == 1 else expanded_tail(side.size) for side in sides]
    tail = min(tails)
    low, high = numpy.quantile(medians[0] / medians[1], (tail, 1 - tail))
    widths = [
        numpy.ptp(numpy.quantile(values, (own, 1 - own))) / numpy.median(values) / 2
        for values, own in zip(medians, tails, strict=True)
    ]
    return Ratio(
        median=float(numpy.median(sides[0]) / numpy.median(sides[1])),
        low=float(low),
        high=float(high),
        noise_floor=float(max(widths)),
        rounds=min(side.size for side in sides),
        steps_per_round=1,
    )


def _checked(values: Sequence[float], name: str) -> NDArray[numpy.float64]:
    sample = numpy.asarray(values, dtype=numpy.float64)
    if sample.ndim != 1 or not sample.size:
        raise ValueError(f"{name}: at least one figure is needed")
    if not numpy.isfinite(sample).all():
        raise ValueError(f"{name}: not every figure is finite")
    return sample
