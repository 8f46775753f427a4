"""Sets of intervals in whole nanoseconds: union, coverage, and what is left over. All exact, all vectorised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.traces.nesting import Bools, Ints


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
        before = np.append(np.iinfo(np.int64).min, other.end)
        after = np.append(other.start, np.iinfo(np.int64).max)
        return self.within(Intervals(before, after))

    def within(self, other: Intervals) -> Intervals:
        """What is covered here and in ``other``."""
        first = np.searchsorted(other.end, self.start, side="right")
        last = np.searchsorted(other.start, self.end, side="left")
        count = last - first
        # One row for each pair of an interval here and one of ``other`` that it meets.
        here = np.repeat(np.arange(len(count)), count)
        there = np.arange(len(here)) + np.repeat(first - (np.cumsum(count) - count), count)
        return Intervals(np.maximum(self.start[here], other.start[there]), np.minimum(self.end[here], other.end[there]))


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


def grouped(*columns: Ints) -> tuple[list[tuple[int, ...]], Ints]:
    """Distinct rows of columns (entries -1 or larger) in ascending order, and each row's position among them."""
    key = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        key = key * (int(column.max(initial=-1)) + 2) + column + 1
    _, first, position = np.unique(key, return_index=True, return_inverse=True)
    return list(zip(*(column[first].tolist() for column in columns), strict=True)), position
