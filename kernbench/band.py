"""Where rounding alone may lead a training curve, by baseline runs that differ from the baseline in rounding only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernbench.record import Curve

WIDTH = 3.0
"""A curve may be this many times as far from the baseline as runs that differ by rounding, as in parity on steps."""
ROUNDING = 1e-6
"""And at least this share of its value, eight units in the last place of float32: every step rounds anew."""


@dataclass(frozen=True)
class Band:
    """Around the first of ``lines``, the baseline: at each step a curve may lie between ``low`` and ``high``."""

    lines: Sequence[Curve]
    low: list[float]
    high: list[float]

    @property
    def steps(self) -> list[int]:
        """The steps of all lines."""
        return self.lines[0].steps

    def left_by(self, curve: Curve) -> int | None:
        """The step at which a curve is outside for the first time; None where it never is."""
        for step, value, low, high in zip(curve.steps, curve.values, self.low, self.high, strict=True):
            if not low <= value <= high:
                return step
        return None

    def left(self) -> dict[str, int]:
        """The implementations whose curve leaves, and the step at which each does; other orders do not count."""
        judged = [curve for curve in self.lines[1:] if not curve.moved and not curve.reorders]
        steps = {curve.implementation: self.left_by(curve) for curve in judged}
        return {implementation: step for implementation, step in steps.items() if step is not None}

    def in_other_orders(self, implementation: str) -> tuple[int, int]:
        """How many runs of an implementation in other orders of its sums stay, and how many there are."""
        runs = [curve for curve in self.lines if curve.reorders == implementation and not curve.moved]
        return sum(self.left_by(curve) is None for curve in runs), len(runs)


def by_figure(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves of each figure, in their order."""
    return {
        name: [curve for curve in curves if curve.name == name]
        for name in dict.fromkeys(curve.name for curve in curves)
    }


def around(lines: Sequence[Curve]) -> Band | None:
    """The band of one figure, 3 times as wide as the moved runs have gone from the baseline, the first line, so far.

    As wide as parity lets the states of a phase be apart; None where no run was moved.
    """
    moved = [curve for curve in lines if curve.moved]
    if not moved:
        return None
    width, low, high = 0.0, [], []
    for index, middle in enumerate(lines[0].values):
        width = max(width, *(WIDTH * abs(curve.values[index] - middle) for curve in moved))
        wide = max(width, ROUNDING * abs(middle))
        low.append(middle - wide)
        high.append(middle + wide)
    return Band(lines, low, high)
