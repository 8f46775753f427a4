"""Sets of intervals in whole nanoseconds: union, coverage, and what is left over. All exact, all vectorised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.nesting import Bools, Ints


@dataclass(frozen=True, eq=False)
class Intervals:
    """Disjoint half-open intervals in ascending order."""

    start: Ints
    end: Ints

    @property
    def total(self) -> int:
        return int((self.end - self.start).sum())

    def covered_before(self, time: Ints) -> Ints:
        """How much of each stretch from minus infinity to ``time`` is covered."""
        if not len(self.start):
            return np.zeros(len(time), np.int64)
        length = self.end - self.start
        before = np.concatenate([[0], np.cumsum(length)])
        position = np.searchsorted(self.start, time, side="right") - 1
        within = np.clip(time - self.start[position], 0, length[position])
        return np.where(position >= 0, before[position] + within, 0)

    def covered(self, start: Ints, end: Ints) -> Ints:
        """How much of each [start, end) is covered; an empty or reversed stretch counts as 0."""
        return self.covered_before(np.maximum(start, end)) - self.covered_before(start)

    def contains(self, time: Ints) -> Bools:
        """Whether each instant lies within an interval (its start does, its end does not)."""
        position = np.searchsorted(self.start, time, side="right") - 1
        inside = np.zeros(len(time), np.bool_)
        found = position >= 0
        inside[found] = time[found] < self.end[position[found]]
        return inside

    def gaps(self, start: int, end: int) -> Intervals:
        """What [start, end) holds that is not covered."""
        return Intervals(np.array([start]), np.array([end])).without(self)

    def without(self, other: Intervals) -> Intervals:
        """What is covered here and not in ``other``."""
        return self._where(other, wanted=False)

    def within(self, other: Intervals) -> Intervals:
        """What is covered here and in ``other``."""
        return self._where(other, wanted=True)

    def _where(self, other: Intervals, *, wanted: bool) -> Intervals:
        edges = np.unique(np.concatenate([self.start, self.end, other.start, other.end]))
        start, end = edges[:-1], edges[1:]
        kept = self.contains(start) & (other.contains(start) == wanted)
        return union(start[kept], end[kept])


def union(start: Ints, end: Ints) -> Intervals:
    """The union of intervals in any order; touching ones merge, empty ones vanish."""
    kept = end > start
    start, end = start[kept], end[kept]
    if not len(start):
        return Intervals(start, end)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    first = np.concatenate([[True], start[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return Intervals(start[first], reach[last])
