"""Medians with their uncertainty: percentile bootstrap over rounds, paired ratios, the noise floor of an A/A run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from kernbench.record import Ratio

CONFIDENCE = 0.95
RESAMPLES = 10_000

# Resampled values held at once: bounds memory to 32 MB however long the sample is.
CHUNK_VALUES = 4_000_000


def bootstrap_median(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Median with its 95 % percentile bootstrap interval: (median, low, high). One value gives (x, x, x).

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
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(medians, (tail, 1 - tail))
    return middle, float(low), float(high)


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
    old, new, same = (_checked(arm, name) for arm, name in ((before, "before"), (after, "after"), (again, "again")))
    if not old.size == new.size == same.size:
        raise ValueError(f"arms of {old.size}, {new.size} and {same.size} rounds cannot be paired")
    if min(old.min(), new.min(), same.min()) <= 0:
        raise ValueError("a step time is zero or negative")
    median, low, high = bootstrap_median((old / new).tolist(), seed=seed)
    _, same_low, same_high = bootstrap_median((old / same).tolist(), seed=seed)
    return Ratio(
        median=median,
        low=low,
        high=high,
        noise_floor=max(abs(same_low - 1), abs(same_high - 1)),
        rounds=old.size,
        steps_per_round=steps_per_round,
        a_a=(same_low, same_high),
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
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(medians[0] / medians[1], (tail, 1 - tail))
    widths = [numpy.ptp(numpy.quantile(values, (tail, 1 - tail))) / numpy.median(values) / 2 for values in medians]
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
