"""Whole steps side by side: variants of a workload interleaved block by block on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import msgspec
import torch

from kernbench import band, bench, curves, device, record, swap
from kernbench.analysis import launches, stalls
from kernbench.errors import WorkloadFailed
from kernbench.measurement import statistics
from kernbench.measurement.measure import TRACED_STEPS, Settings, Side, trace_side, watch_side
from kernbench.progress import Progress
from kernbench.runfolder import Run
from kernbench.workload import Built, Curves

BLOCK_SECONDS = 0.05
"""A block of steps takes this long on the fastest side, so that starting and ending it does not count."""
LONGEST_BLOCK_SECONDS = 0.5
"""A block takes the slowest side no longer than this for the sake of a faster one."""
FIRST_STEPS = 2
RECEIPT_STEPS = 2
BASELINE = "baseline"


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
    settings: Settings,
    before: swap.Plan,
    candidates: Mapping[str, swap.Plan],
    *,
    rounds: int,
    progress: Progress,
    begin: Callable[[str], None],
) -> Race:
    """Interleave the side before, the same side again (A/A), and every candidate.

    Args:
        begin: told which arm runs next, outside of what is timed.

    Raises:
        WorkloadFailed: a side raised, or its loss is not finite.
    """
    sides: dict[str, Side] = {}
    seconds: dict[str, float] = {}
    start = 0
    with progress.stage("warming up both sides"):
        for name, plan in {"before": before, **{f"after {name}": plan for name, plan in candidates.items()}}.items():
            begin(name)
            sides[name] = Side(settings, plan)
            start = max(start, _warm(sides[name]))
        for name, side in sides.items():
            begin(name)
            seconds[name] = _step_seconds(side, start)
        steps, start = steps_per_round(seconds, "before"), start + FIRST_STEPS
    receipts = {name: sides[f"after {name}"].plan.receipt() for name in candidates}
    twice = {"before": sides["before"], "again": sides["before"]}
    arms = {name: _arm(name, side, start, steps, begin) for name, side in {**twice, **sides}.items()}
    with progress.stage("interleaving before and after", rounds) as advance:
        measured, clocks, dropped = bench.interleave(
            arms,
            rounds=rounds,
            seed=settings.seed,
            progress=advance,
            clocks=partial(device.read_clocks, settings.device),
        )
    for side in sides.values():
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


def bench_workload(
    run: Run[record.BenchRecord],
    settings: Settings,
    variants: Sequence[Variant],
    rounds: int,
    *,
    failed: Mapping[str, str],
    begin: Callable[[str], None],
) -> None:
    """Race all variants; then say for each how many launches and host syncs its step has.

    A variant that raises gets a row labelled "failed" with the reason, and the others go on. A record that has rows
    already is gone on with: only what is not counted yet is counted.

    Args:
        failed: variants not to be run, with the reasons.
        begin: told which variant runs next, outside of what is timed.

    Raises:
        WorkloadFailed: the first variant, the baseline, failed.
    """
    result = run.record
    sides: dict[str, Side] = {}
    start = 0
    if not result.results:
        with run.stage("race"):
            sides, start = _race_variants(run, settings, variants, rounds, failed, begin)
    with run.stage("launches and syncs"), run.progress.stage("counting launches", len(variants)) as advance:
        for number, (variant, row) in enumerate(zip(variants, result.results, strict=True)):
            if row.seconds is not None and row.launches_per_step is None and not row.note:
                begin(variant.name)
                if variant.name in failed:
                    counted = msgspec.structs.replace(row, note=f"launches not counted: {failed[variant.name]}")
                else:
                    counted = _counted(settings, variant, row, sides.pop(variant.name, None), start)
                result.results[number] = counted
                run.write()
            advance(1)
    _follow_curves(run, settings, [variant for variant in variants if variant.name not in failed], begin)


def _follow_curves(
    run: Run[record.BenchRecord], settings: Settings, variants: Sequence[Variant], begin: Callable[[str], None]
) -> None:
    """Training with the baseline and with each phase, where the workload declares curves; peers change no phase."""
    declared = curves.wanted(settings)
    if declared is None:
        return
    plans = {variant.name: variant.plan for variant in variants if variant.prepare is None}
    orders = range(1, declared.reordered + 1)
    baseline, *phases = (curves.Training(implementation=name, plan=plan) for name, plan in plans.items())
    others = [replace(baseline, order=order) for order in orders]
    if others and settings.dtype != torch.float64:
        others.append(replace(baseline, exact=True))
    with run.stage("training curves"):
        _follow(run, settings, declared, [baseline, *others, *phases], begin)
        gone = _astray(run.record.curves)
        astray = [training for training in phases if training.implementation in gone]
        again = [replace(training, order=order) for training in astray for order in orders]
        _follow(run, settings, declared, again, begin)


def _astray(lines: Sequence[record.Curve]) -> set[str]:
    """The implementations that leave the band of any figure."""
    bands = map(band.around, band.by_figure(lines).values())
    return {name for around in bands if around is not None for name in around.left()}


def _follow(
    run: Run[record.BenchRecord],
    settings: Settings,
    declared: Curves,
    trainings: Sequence[curves.Training],
    begin: Callable[[str], None],
) -> None:
    """Follow those that the record does not have yet; one that fails is left out, and that is said."""
    known = {curve.implementation for curve in run.record.curves}
    left = [training for training in trainings if training.name not in known]
    if not left:
        return
    with run.progress.stage("following training curves", declared.steps * len(left)) as advance:
        for training in left:
            begin(training.implementation)
            try:
                found = curves.follow(settings, declared, training, advance)
                if training.exact and curves.draws_other_numbers(found, run.record.curves, settings.dtype):
                    run.warn(f"{training.name} draws other numbers, so it is left out of the training curves")
                else:
                    run.record.curves += found
            except WorkloadFailed as error:
                run.warn(f"{training.name} has no training curve: {error}")
            run.write()


def _race_variants(
    run: Run[record.BenchRecord],
    settings: Settings,
    variants: Sequence[Variant],
    rounds: int,
    failed: Mapping[str, str],
    begin: Callable[[str], None],
) -> tuple[dict[str, Side], int]:
    """Fill in the rows of the record; the sides as the race leaves them, and the step that comes next."""
    result, failures = run.record, dict(failed)
    sides: dict[str, Side] = {}
    start = 0
    with run.progress.stage("warming up", len(variants)) as advance:
        for variant in variants:
            if variant.name not in failures:
                begin(variant.name)
                try:
                    side = Side(settings, variant.plan, variant.prepare)
                    start = max(start, _warm(side))
                    # What the workload says of a time is asked for once the race is over, and must not fail then.
                    side.figures(1.0)
                    side.floor(1.0, result.environment.ceilings)
                    sides[variant.name] = side
                except WorkloadFailed as error:
                    failures[variant.name] = _drop(run, variants, variant.name, error)
            advance(1)
    seconds: dict[str, float] = {}
    for name, side in list(sides.items()):
        begin(name)
        try:
            seconds[name] = _step_seconds(side, start)
        except WorkloadFailed as error:
            failures[name] = _drop(run, variants, name, error)
            del sides[name]
    baseline = sides[variants[0].name]
    result.workload = settings.describe(variants[0].plan, baseline.built)
    steps, start = steps_per_round(seconds, variants[0].name), start + FIRST_STEPS
    arms = {name: _arm(name, side, start, steps, begin) for name, side in sides.items()}
    with run.progress.stage("interleaving variants", rounds) as advance:
        finished = bench.race(
            arms, device=settings.device, rounds=rounds, seed=settings.seed, progress=advance, twin=True
        )
    for name, reason in finished.failed.items():
        failures[name] = _drop(run, variants, name, WorkloadFailed(reason))
    result.arms = finished.arms
    result.results = bench.workload_results(
        replace(finished, failed=failures),
        [variant.name for variant in variants],
        workload=settings.workload.name,
        preset=settings.preset,
        dtype=result.workload.dtype,
        units_per_step=baseline.units_per_step,
    )
    result.results = [_told(row, sides.get(row.implementation), result.environment.ceilings) for row in result.results]
    return sides, start + rounds * steps


def _told(row: record.BenchResult, side: Side | None, ceilings: record.Ceilings | None) -> record.BenchResult:
    """The row with what the workload itself says of its time."""
    if side is None or row.seconds is None:
        return row
    return msgspec.structs.replace(row, figures=side.figures(row.seconds), floor=side.floor(row.seconds, ceilings))


def _drop(run: Run[record.BenchRecord], variants: Sequence[Variant], name: str, error: WorkloadFailed) -> str:
    """Why a variant is out, said aloud.

    Raises:
        WorkloadFailed: it is the baseline, without which nothing can be compared.
    """
    if name == variants[0].name:
        raise error
    run.warn(f"{name} is out of the race: {error}")
    return str(error)


def _counted(
    settings: Settings, variant: Variant, row: record.BenchResult, side: Side | None, first: int
) -> record.BenchResult:
    """The row with launches and syncs per step; or with the reason why they are not known."""
    try:
        if side is None:
            side = Side(settings, variant.plan, variant.prepare)
            first = _warm(side)
        events, _ = trace_side(side, first, None)
        log = watch_side(side, first + TRACED_STEPS)
    except WorkloadFailed as error:
        return msgspec.structs.replace(row, note=f"launches not counted: {error}")
    return msgspec.structs.replace(
        row, launches_per_step=launches.launches(events).per_step, syncs_per_step=stalls.syncs_per_step(log)
    )


def _warm(side: Side) -> int:
    with side.plan.applied(side.built):
        return bench.warm_up(side.step, side.settings.device)


def _step_seconds(side: Side, first: int) -> float:
    """Seconds of a step, from the first ones after the warm-up.

    Every side runs them: one whose warm-up was shorter may have to catch up, as a decoder that needs the frames before,
    and must not do so while it is timed.
    """
    with side.plan.applied(side.built):
        return bench.timed_block(side.step, first=first, count=FIRST_STEPS, device=side.settings.device)


def steps_per_round(seconds: Mapping[str, float], baseline: str) -> int:
    """How many steps make a block: equally many for every side, whose step takes ``seconds``.

    They fill the time of a block on the fastest side, unless the slowest one would take too long for them; on the
    baseline they fill it in any case.
    """
    wanted, least = (math.ceil(BLOCK_SECONDS / one) for one in (min(seconds.values()), seconds[baseline]))
    return max(least, min(wanted, int(LONGEST_BLOCK_SECONDS / max(seconds.values()))))


def _arm(name: str, side: Side, start: int, steps: int, begin: Callable[[str], None]) -> Callable[[int], float]:
    """Round r of every arm runs the same step indices, so the same inputs."""

    def block(number: int) -> float:
        begin(name)
        with side.plan.applied(side.built):
            first = start + number * steps
            return bench.timed_block(side.step, first=first, count=steps, device=side.settings.device)

    return block
