"""Races arms on a device until all that can finish have: who fails leaves, and the others start over together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from kernbench.device import read_clocks
from kernbench.measurement.statistics import bootstrap_median, identical_interval, noise_floor
from kernbench.measurement.timing import interleave, too_many_dropped
from kernbench.measurement.witness import WrongResult
from kernbench.progress import Advance
from kernbench.record import Arm, BenchResult, Clocks

Blocks = Mapping[str, Callable[[int], float]]

FAILED = "failed"
WRONG = "wrong"
TWIN = "again"
"""The arm of an A/A pair that is no row of its own."""


@dataclass(frozen=True)
class Race:
    """Seconds per step and round of each arm that finished, and why the others did not.

    ``wrong`` are those of the ``failed`` that gave a wrong result. ``identical`` is the A/A interval of the first arm
    that finished, run twice in every round; None without a twin.
    """

    arms: list[Arm]
    clocks: list[Clocks]
    dropped_rounds: int
    failed: dict[str, str]
    wrong: set[str] = field(default_factory=set)
    identical: tuple[float, float] | None = None

    def seconds(self, name: str) -> list[float] | None:
        return next((arm.seconds for arm in self.arms if arm.name == name), None)

    def label(self, name: str) -> str:
        """ "wrong" or "failed" for an arm without times, else empty."""
        if name in self.wrong:
            return WRONG
        return FAILED if name in self.failed else ""

    @property
    def noise_floor(self) -> float | None:
        """Half-width around 1 that identical arms showed."""
        return None if self.identical is None else noise_floor(self.identical)

    @property
    def warning(self) -> str:
        """In words that more rounds were dropped than kept, empty if not."""
        return too_many_dropped(self.clocks, self.dropped_rounds)

    @property
    def usual_clocks(self) -> Clocks | None:
        """The median of clocks and power, the highest temperature, and every throttle reason that was seen."""
        return _summary(self.clocks) if self.clocks else None


def race(
    arms: Blocks,
    *,
    device: torch.device,
    rounds: int,
    seed: int = 0,
    progress: Advance | None = None,
    twin: bool = False,
) -> Race:
    """Interleave the arms on a device; when one raises, all start over without it, so that the others stay paired.

    Args:
        twin: run the first arm that works twice in every round, for the A/A floor.

    Raises:
        KernbenchError: the device was throttled in every round.
    """
    left = {name: _named(name, arm) for name, arm in arms.items()}
    failed: dict[str, str] = {}
    wrong: set[str] = set()
    while True:
        running = dict(left)
        if twin and left:
            running[TWIN] = next(iter(left.values()))
        try:
            measured, clocks, dropped = interleave(
                running, rounds=rounds, seed=seed, progress=progress, clocks=partial(read_clocks, device)
            )
        except _ArmFailed as failure:
            failed[failure.name] = reason(failure.error)
            wrong |= {failure.name} if isinstance(failure.error, WrongResult) else set()
            del left[failure.name]
            continue
        identical = None
        if twin and left:
            identical = identical_interval(measured[0].seconds, measured.pop().seconds)
        return Race(measured, clocks, dropped, failed, wrong, identical)


def reason(error: Exception) -> str:
    """First line of an exception, with its type where that is not ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, WrongResult):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def speedup(baseline: list[float] | None, seconds: list[float] | None) -> tuple[float, float, float] | None:
    """Baseline over this, paired by round: median, low, high."""
    if not baseline or not seconds:
        return None
    return bootstrap_median([before / after for before, after in zip(baseline, seconds, strict=True)])


def workload_results(
    finished: Race, names: Sequence[str], *, workload: str, preset: str, dtype: str, units_per_step: float
) -> list[BenchResult]:
    """One row per arm in the order of ``names``; speedups are paired by round with the first, failures are labelled."""
    rows = []
    for name in names:
        seconds = finished.seconds(name)
        middle, low, high = bootstrap_median(seconds) if seconds else (None, None, None)
        rows.append(
            BenchResult(
                kernel=workload,
                case=preset,
                dtype=dtype,
                implementation=name,
                seconds=middle,
                interval=None if low is None or high is None else (low, high),
                units_per_second=None if middle is None else units_per_step / middle,
                speedup=None if name == names[0] else speedup(finished.seconds(names[0]), seconds),
                noise_floor=finished.noise_floor,
                clocks=finished.usual_clocks,
                label=finished.label(name),
                note=finished.failed.get(name, finished.warning),
            )
        )
    return rows


class _ArmFailed(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name = name
        self.error = error


def _named(name: str, arm: Callable[[int], float]) -> Callable[[int], float]:
    def block(number: int) -> float:
        try:
            return arm(number)
        except Exception as error:
            raise _ArmFailed(name, error) from error

    return block


def _summary(clocks: list[Clocks]) -> Clocks:
    def told(name: str, pick: Callable[[list[float]], float]) -> float | None:
        known = [value for one in clocks if (value := getattr(one, name)) is not None]
        return float(pick(known)) if known else None

    return Clocks(
        sm_hz=told("sm_hz", median),
        memory_hz=told("memory_hz", median),
        power_watts=told("power_watts", median),
        temperature_celsius=told("temperature_celsius", max),
        throttle_reasons=sorted({reason for one in clocks for reason in one.throttle_reasons}),
    )
