"""Whole steps side by side: variants of a workload interleaved block by block on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import msgspec

from kernbench import bench, device, record, statistics, swap
from kernbench.analysis import launches, stalls
from kernbench.measure import Settings, Side, trace_side, watch
from kernbench.progress import Progress
from kernbench.runfolder import Run
from kernbench.workload import Built

BLOCK_SECONDS = 0.05
"""A block of steps takes at least this long, so that starting and ending it does not count."""
RECEIPT_STEPS = 2


@dataclass(frozen=True)
class Variant:
    """A way to run the steps: the plan in place, or a peer that ``prepare`` installs in the built workload."""

    name: str
    plan: swap.Plan
    prepare: Callable[[Built], None] | None = None


@dataclass(frozen=True)
class Race:
    """What interleaving showed: seconds per step and round of "before", "again", and "after NAME" per candidate."""

    arms: list[record.Arm]
    clocks: list[record.Clocks]
    receipts: dict[str, list[record.SiteHit]]
    steps_per_round: int
    dropped_rounds: int

    @property
    def fastest(self) -> str:
        """The candidate with the smallest median."""
        return min(self.receipts, key=lambda name: median(self._seconds(f"after {name}")))

    def ratio(self, name: str) -> record.Ratio:
        """Before over this candidate, with interval and A/A floor."""
        return statistics.paired_ratio(
            self._seconds("before"),
            self._seconds(f"after {name}"),
            self._seconds("again"),
            steps_per_round=self.steps_per_round,
            dropped_rounds=self.dropped_rounds,
        )

    def _seconds(self, name: str) -> list[float]:
        return next(arm.seconds for arm in self.arms if arm.name == name)


def run_race(
    settings: Settings, before: swap.Plan, candidates: Mapping[str, swap.Plan], *, rounds: int, progress: Progress
) -> Race:
    """Interleave the side before, the same side again (A/A), and every candidate.

    Raises:
        WorkloadFailed: a side raised, or its loss is not finite.
    """
    baseline = Side(settings, before)
    sides = {name: Side(settings, plan) for name, plan in candidates.items()}
    with progress.stage("warming up both sides"):
        start = max(_warm(side) for side in (baseline, *sides.values()))
        steps = _steps_per_block(baseline, start)
    receipts = {name: side.plan.receipt() for name, side in sides.items()}
    arms = {"before": _arm(baseline, start, steps), "again": _arm(baseline, start, steps)}
    arms |= {f"after {name}": _arm(side, start, steps) for name, side in sides.items()}
    with progress.stage("interleaving before and after", rounds) as advance:
        measured, clocks, dropped = bench.interleave(
            arms,
            rounds=rounds,
            seed=settings.seed,
            progress=advance,
            clocks=partial(device.read_clocks, settings.device),
        )
    for side in (baseline, *sides.values()):
        side.check_losses()
    hits = {name: receipt.hits(rounds * steps) for name, receipt in receipts.items()}
    return Race(measured, clocks, hits, steps, dropped)


def receipt_of_steps(settings: Settings, plan: swap.Plan) -> list[record.SiteHit]:
    """How often each replacement runs in a step, where no race counts it."""
    side = Side(settings, plan)
    with plan.applied(side.built) as receipt:
        for index in range(RECEIPT_STEPS):
            side.step(index)
        return receipt.hits(RECEIPT_STEPS)


def bench_workload(run: Run[record.BenchRecord], settings: Settings, variants: Sequence[Variant], rounds: int) -> None:
    """Race all variants; then say for each how many launches and host syncs its step has."""
    result = run.record
    with run.stage("race"):
        sides = {variant.name: Side(settings, variant.plan, variant.prepare) for variant in variants}
        result.workload = settings.describe(variants[0].plan, sides[variants[0].name].built)
        with run.progress.stage("warming up", len(sides)) as advance:
            start = 0
            for side in sides.values():
                start = max(start, _warm(side))
                advance(1)
            steps = _steps_per_block(sides[variants[0].name], start)
        arms = {name: _arm(side, start, steps) for name, side in sides.items()}
        with run.progress.stage("interleaving variants", rounds) as advance:
            finished = bench.race(arms, device=settings.device, rounds=rounds, seed=settings.seed, progress=advance)
        result.arms = finished.arms
        result.results = bench.workload_results(
            finished,
            list(arms),
            workload=settings.workload.name,
            preset=settings.preset,
            dtype=result.workload.dtype,
            units_per_step=sides[variants[0].name].units_per_step,
        )
    with run.stage("launches and syncs"), run.progress.stage("counting launches", len(variants)) as advance:
        for number, variant in enumerate(variants):
            events, _ = trace_side(sides.pop(variant.name), start + rounds * steps, None)
            log = watch(settings, variant.plan, variant.prepare)
            result.results[number] = msgspec.structs.replace(
                result.results[number],
                launches_per_step=launches.launches(events).per_step,
                syncs_per_step=stalls.syncs_per_step(log),
            )
            advance(1)


def _warm(side: Side) -> int:
    with side.plan.applied(side.built):
        return bench.warm_up(side.step, side.settings.device)


def _steps_per_block(side: Side, first: int) -> int:
    with side.plan.applied(side.built):
        seconds = bench.timed_block(side.step, first=first, count=2, device=side.settings.device)
    return max(1, math.ceil(BLOCK_SECONDS / seconds))


def _arm(side: Side, start: int, steps: int) -> Callable[[int], float]:
    """Round r of every arm runs the same step indices, so the same inputs."""

    def block(number: int) -> float:
        with side.plan.applied(side.built):
            first = start + number * steps
            return bench.timed_block(side.step, first=first, count=steps, device=side.settings.device)

    return block
