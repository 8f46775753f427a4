"""Whether numbers follow a law and are independent: p-values that are exact, or bounds on exact ones.

Draws come as a matrix, one row per launch. Independence is tested on bits with a known chance of a one: for a
continuous law whether a draw lies above the median, and whether it lies in the outer half; for "bernoulli" the draws
themselves. Pairs of bits that share no draw agree with a known chance, so the number of pairs that agree is binomial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

Draws = NDArray[np.float64]
Bits = NDArray[np.bool_]
LEVELS = 16
"""Equally likely levels that continuous draws are cut into, to look for repeats."""
SPARE_BITS = 30
"""A repeat that is reported happens by chance once in 2^30 runs."""


@dataclass(frozen=True)
class Evidence:
    """One test's answer: the chance of a figure at least as strange if all is right, and what was seen in words."""

    p_value: float
    words: str


@dataclass(frozen=True)
class Law:
    """The distribution of single draws; ``probability`` of a one counts for "bernoulli" alone."""

    name: Literal["uniform", "normal", "bernoulli"]
    probability: float = 0.5

    def impossible(self, draws: Draws, resolution: float) -> str:
        """Which draws cannot come from this law; empty if all can. Rounding up may make a uniform number one."""
        if not np.isfinite(draws).all():
            return f"{int((~np.isfinite(draws)).sum())} of {draws.size} draws are NaN or infinite"
        if self.name == "uniform":
            above = draws > 1.0 if resolution > np.finfo(np.float32).eps else draws >= 1.0
            outside, where = int((above | (draws < 0.0)).sum()), "outside of [0, 1)"
        elif self.name == "bernoulli":
            outside, where = int(((draws != 0.0) & (draws != 1.0)).sum()), "neither 0 nor 1"
        else:
            return ""
        return f"{outside} of {draws.size} draws are {where}" if outside else ""

    def fit(self, draws: Draws, resolution: float) -> list[Evidence]:
        """Tests of the distribution on draws of any shape.

        Args:
            resolution: relative spacing of the numbers that the draws were rounded to.
        """
        flat = draws.reshape(-1)
        count = flat.size
        if self.name == "bernoulli":
            ones = int(flat.sum())
            words = f"{ones / count:.5f} of {count} draws are ones, {self.probability:.5f} expected"
            return [Evidence(_p_of_count(ones, count, self.probability), words)]
        mean = f"the mean of {count} draws is {flat.mean():.5f}, {self._mean:g} expected"
        spread = f"the variance of {count} draws is {self._second_moment(flat):.5f}, {self._variance:.5f} expected"
        return [
            Evidence(self._p_of_mean(flat), mean),
            Evidence(self._p_of_spread(flat), spread),
            self._kolmogorov(flat, resolution / 2),
        ]

    @property
    def _mean(self) -> float:
        return 0.5 if self.name == "uniform" else 0.0

    @property
    def _variance(self) -> float:
        return 1 / 12 if self.name == "uniform" else 1.0

    def _second_moment(self, flat: Draws) -> float:
        return float(np.square(flat - self._mean).mean())

    def _p_of_mean(self, flat: Draws) -> float:
        """Exact for the normal law; a uniform number is sub-Gaussian with its own variance, which bounds the tail."""
        off = abs(float(flat.mean()) - self._mean)
        if self.name == "normal":
            return float(2 * special.ndtr(-off * math.sqrt(flat.size)))
        return min(1.0, 2 * math.exp(-6 * flat.size * off**2))

    def _p_of_spread(self, flat: Draws) -> float:
        """Exact for the normal law (chi-square); Hoeffding's bound for squares in [0, 1/4]."""
        second = self._second_moment(flat)
        if self.name == "normal":
            total = second * flat.size
            return float(min(1.0, 2 * min(special.chdtr(flat.size, total), special.chdtrc(flat.size, total))))
        return min(1.0, 2 * math.exp(-32 * flat.size * (second - 1 / 12) ** 2))

    def _kolmogorov(self, flat: Draws, slack: float) -> Evidence:
        """Kolmogorov-Smirnov with Massart's bound; ``slack`` is what rounding may move the distribution by.

        Source: Massart, The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz Inequality, 1990.
        """
        count = flat.size
        levels = np.sort(self._uniform(flat))
        steps = np.arange(count + 1) / count
        distance = float(max((steps[1:] - levels).max(), (levels - steps[:-1]).max()))
        p_value = min(1.0, 2 * math.exp(-2 * count * max(0.0, distance - slack) ** 2))
        return Evidence(p_value, f"{count} draws are up to {distance:.5f} from the {self.name} distribution function")

    def _uniform(self, draws: Draws) -> Draws:
        """What the law makes uniform, in [0, 1]."""
        levels = special.ndtr(draws) if self.name == "normal" else draws
        return np.clip(np.nan_to_num(levels), 0.0, 1.0)

    def bits(self, draws: Draws) -> list[tuple[str, Bits, float]]:
        """Independent bits of each draw: what they say, the bits, and the chance of a one."""
        if self.name == "bernoulli":
            return [("in value", draws == 1.0, self.probability)]
        levels = self._uniform(draws)
        return [("in sign", levels >= 0.5, 0.5), ("in size", np.abs(levels - 0.5) >= 0.25, 0.5)]

    def codes(self, draws: Draws) -> NDArray[np.uint64]:
        """Each draw as one of few levels."""
        if self.name == "bernoulli":
            return np.asarray(draws == 1.0, dtype=np.uint64)
        return np.asarray(np.minimum(self._uniform(draws) * LEVELS, LEVELS - 1), dtype=np.uint64)

    def window(self, total: int) -> int:
        """How many draws in a row no two places among ``total`` share by chance; 0 if no number is enough."""
        ones = self.probability
        same = ones**2 + (1 - ones) ** 2 if self.name == "bernoulli" else 1 / LEVELS
        if same >= 1.0:
            return 0
        return math.ceil((2 * math.log2(max(2, total)) + SPARE_BITS) / -math.log2(same))


def _p_of_count(ones: int, count: int, chance: float) -> float:
    """Two-sided, exact: twice the smaller tail of the binomial distribution."""
    tail = min(special.bdtr(ones, count, chance), special.bdtrc(ones - 1, count, chance))
    return float(min(1.0, 2 * tail))


def agreement(law: Law, one: Draws, other: Draws, what: str) -> Iterator[Evidence]:
    """Whether pairs of draws, elementwise and no draw in two of them, agree more or less often than by chance."""
    for (kind, left, chance), (_, right, _) in zip(law.bits(one), law.bits(other), strict=True):
        expected = chance**2 + (1 - chance) ** 2
        agree = int((left == right).sum())
        words = f"{what} agree {kind} in {agree / left.size:.4f} of {left.size} pairs, {expected:.4f} expected"
        yield Evidence(_p_of_count(agree, left.size, expected), words)


def at_lag(law: Law, draws: Draws, lag: int) -> Iterator[Evidence]:
    """As :func:`agreement`, of draws that are ``lag`` apart in the same row."""
    whole = draws.shape[1] // (2 * lag) * (2 * lag)
    if whole == 0:
        return
    pairs = draws[:, :whole].reshape(len(draws), -1, 2, lag)
    yield from agreement(law, pairs[:, :, 0], pairs[:, :, 1], f"draws {lag} apart")


@dataclass(frozen=True)
class Repeat:
    """``length`` draws from ``place`` of one launch on equal those from ``earlier`` of another, or of the same."""

    launch: int
    place: int
    earlier_launch: int
    earlier: int
    length: int


def repeats(law: Law, launches: Sequence[Draws]) -> list[Repeat]:
    """Runs of draws that occur twice, in one launch or in two: the first found for every pair of launches.

    A run that overlaps itself is no repeat. Runs are found by a hash of every window and then compared.
    """
    codes = [law.codes(draws.reshape(-1)) for draws in launches]
    window = law.window(sum(len(code) for code in codes))
    long_enough = [index for index, code in enumerate(codes) if 0 < window <= len(code)]
    if not long_enough:
        return []
    factors = np.random.default_rng(0).integers(1, 2**63, window, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = [np.correlate(codes[index], factors, "valid") for index in long_enough]
    launch = np.repeat(long_enough, [len(row) for row in hashes])
    place = np.concatenate([np.arange(len(row)) for row in hashes])
    flat = np.concatenate(hashes)
    order = np.argsort(flat, kind="stable")
    earlier, later = order[:-1], order[1:]
    apart = (launch[earlier] != launch[later]) | (place[later] - place[earlier] >= window)
    candidates = np.flatnonzero((flat[earlier] == flat[later]) & apart)
    found: dict[tuple[int, int], Repeat] = {}
    for one, other in zip(earlier[candidates], later[candidates], strict=True):
        pair = (int(launch[one]), int(launch[other]))
        if pair in found:
            continue
        repeat = _grown(codes, pair, int(place[one]), int(place[other]), window)
        if repeat:
            found[pair] = repeat
    return list(found.values())


def _grown(
    codes: list[NDArray[np.uint64]], pair: tuple[int, int], earlier: int, later: int, window: int
) -> Repeat | None:
    """The longest run around two windows of equal hash; None if they differ after all."""
    one, other = codes[pair[0]], codes[pair[1]]
    if not np.array_equal(one[earlier : earlier + window], other[later : later + window]):
        return None
    back = _shared_prefix(one[:earlier][::-1], other[:later][::-1])
    ahead = _shared_prefix(one[earlier:], other[later:])
    length = back + ahead
    if pair[0] == pair[1]:
        length = min(length, later - earlier)
    return Repeat(pair[1], later - back, pair[0], earlier - back, length)


def _shared_prefix(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> int:
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
