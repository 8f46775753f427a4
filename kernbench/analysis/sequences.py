"""Sequences of kernels that occur again: runs of names cut into units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What one kernel may reasonably do, and the longest pattern that is looked for.
LONGEST_UNIT = 24
LONGEST_PERIOD = 16
# Twice is a coincidence, or two halves of one chain; a kernel on its own needs one more to be a pattern.
LEAST_REPEATS = 3
LEAST_ALIKE = 4


@dataclass(frozen=True)
class Unit:
    """Positions [begin, end) of a run. ``alike``: the same kernel over and over, on one tensor after the other."""

    begin: int
    end: int
    alike: bool = False


def units(run: Sequence[int]) -> list[Unit]:
    """Cut a run into repeated patterns, kernels all alike, and the chains between them; none is of length 1."""
    found: list[Unit] = []
    begin = position = 0
    while position < len(run):
        period, repeats = _pattern(run, position)
        if not period:
            position += 1
            continue
        found += _chain(begin, position)
        if period == 1:
            found.append(Unit(position, position + repeats, alike=True))
        else:
            found += [Unit(position + period * number, position + period * (number + 1)) for number in range(repeats)]
        begin = position = position + period * repeats
    return [*found, *_chain(begin, len(run))]


def _pattern(run: Sequence[int], position: int) -> tuple[int, int]:
    """Length of the shortest pattern that begins here and repeats, and how often it stands there; 0 without one."""
    longest = min(LONGEST_PERIOD, (len(run) - position) // LEAST_REPEATS)
    for period in range(1, longest + 1):
        if run[position] != run[position + period]:
            continue
        pattern = run[position : position + period]
        repeats = 1
        while run[position + period * repeats : position + period * (repeats + 1)] == pattern:
            repeats += 1
        if repeats >= (LEAST_ALIKE if period == 1 else LEAST_REPEATS):
            return period, repeats
    return 0, 0


def _chain(begin: int, end: int) -> list[Unit]:
    pieces = [Unit(start, min(start + LONGEST_UNIT, end)) for start in range(begin, end, LONGEST_UNIT)]
    return [piece for piece in pieces if piece.end - piece.begin > 1]
