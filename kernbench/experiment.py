"""One phase on trial: baseline, prediction, parity gate, interleaved race, the side after, verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median

from kernbench import bench, parity, record, statistics, swap, verdict
from kernbench.measure import Settings, Side, measure
from kernbench.runfolder import Run
from kernbench.workload import Phase

BLOCK_SECONDS = 0.05
PARITY_STEPS = 10
RECEIPT_STEPS = 2


def judge(
    run: Run[record.SwapRecord],
    settings: Settings,
    phase: Phase,
    before: swap.Plan,
    candidates: Mapping[str, swap.Plan],
    rounds: int,
) -> None:
    """Fill the swap record stage by stage; each finished stage is on disk when the next one begins.

    Args:
        candidates: the plan with the phase in, per implementation to try; the fastest green one is chosen.
        rounds: interleaved rounds of the race.

    Raises:
        WorkloadFailed: the baseline itself fails.
    """
    result = run.record
    result.before = _side_record(result)
    measure(run, result.before, settings, before, label="before")
    result.predicted = _predict(phase, result.before)
    with run.stage("parity"):
        green = _gate(run, settings, before, candidates)
    racing = {name: plan for name, plan in green.items() if not interpreted(settings, plan)}
    chosen = next(iter(racing or green or candidates))
    if racing:
        with run.stage("race"):
            chosen = _race(run, settings, before, racing, rounds)
        result.after = _side_record(result)
        measure(run, result.after, settings, racing[chosen], label="after")
    elif green:
        run.skip("race", "Triton's interpreter says nothing of a kernel's speed")
        result.receipt = _receipt(settings, green[chosen])
    else:
        run.skip("race", "no timing on a red gate")
    result.phase = record.PhaseInfo(number=phase.number, title=phase.title, flag=phase.flag, implementation=chosen)
    with run.stage("verdict"):
        result.verdict = verdict.decide(
            parity=result.parity,
            ratio=result.ratio,
            receipt=result.receipt,
            speed_measured=bool(racing),
            not_measured_reason="on the CPU a Triton kernel runs in the interpreter, so its speed is not measured here",
        )


def interpreted(settings: Settings, plan: swap.Plan) -> bool:
    """Whether a kernel of this plan runs in Triton's interpreter, so that a time would mean nothing."""
    return settings.device.type == "cpu" and any(
        hit.kernel and plan.implementations[number] == "triton" for number, hit in plan.sites()
    )


def _gate(
    run: Run[record.SwapRecord], settings: Settings, before: swap.Plan, candidates: Mapping[str, swap.Plan]
) -> dict[str, swap.Plan]:
    """The candidates with no red parity row. A red one drops out aloud; if all are red, the first stays on record."""
    rows = {name: _check(run, settings, before, name, plan) for name, plan in candidates.items()}
    green = {name: plan for name, plan in candidates.items() if all(row.passed for row in rows[name])}
    for name in green or [next(iter(candidates))]:
        run.record.parity += rows[name]
    for name in candidates:
        red = [row for row in rows[name] if not row.passed]
        if red and green:
            run.warn(f"implementation {name!r} is out: {red[0].kernel}, {red[0].case}: {red[0].reason}")
    return green


def _check(
    run: Run[record.SwapRecord], settings: Settings, before: swap.Plan, name: str, plan: swap.Plan
) -> list[record.ParityResult]:
    rows: list[record.ParityResult] = []
    if name == "triton":
        for spec in plan.kernels:
            rows += parity.check_kernel(spec, device=settings.device, progress=run.progress)
    rows += parity.check_phase(
        settings.workload,
        before,
        plan,
        preset=settings.preset,
        device=settings.device,
        dtype=settings.dtype,
        seed=settings.seed,
        data=settings.data,
        steps=PARITY_STEPS,
        progress=run.progress,
    )
    return rows


def _race(
    run: Run[record.SwapRecord], settings: Settings, before: swap.Plan, racing: Mapping[str, swap.Plan], rounds: int
) -> str:
    """Interleave before, before again and every candidate on the same inputs; the name of the fastest candidate."""
    result = run.record
    baseline = Side(settings, before)
    sides = {name: Side(settings, plan) for name, plan in racing.items()}
    typical = _typical_seconds(baseline, settings)
    steps = max(1, math.ceil(BLOCK_SECONDS / typical))
    first = {"before": _warm(baseline, settings)} | {name: _warm(side, settings) for name, side in sides.items()}
    start = max(first.values())
    receipts = {}
    arms: dict[str, Callable[[int], float]] = {
        "before": _arm(baseline, settings, start, steps),
        "again": _arm(baseline, settings, start, steps),
    }
    for name, side in sides.items():
        receipts[name] = side.plan.receipt()
        arms[f"after {name}"] = _arm(side, settings, start, steps)
    with run.progress.stage("interleaving before and after", rounds) as advance:
        measured, result.clocks, dropped = bench.interleave(arms, rounds=rounds, seed=settings.seed, progress=advance)
    result.arms = measured
    seconds = {arm.name: arm.seconds for arm in measured}
    baseline.check_losses()
    chosen = min(racing, key=lambda name: median(seconds[f"after {name}"]))
    result.ratio = statistics.paired_ratio(
        seconds["before"], seconds[f"after {chosen}"], seconds["again"], steps_per_round=steps, dropped_rounds=dropped
    )
    result.receipt = receipts[chosen].hits((rounds + 1) * steps)
    return chosen


def _typical_seconds(side: Side, settings: Settings, first: int) -> float:
    with side.plan.applied(side.built):
        return median(bench.time_steps(side.step, first=first, count=3, device=settings.device))


def _warm(side: Side, settings: Settings) -> int:
    with side.plan.applied(side.built):
        return bench.warm_up(side.step, settings.device)


def _arm(side: Side, settings: Settings, start: int, steps: int) -> Callable[[int], float]:
    """One block of steps; round r runs the same step indices, so the same inputs, in every arm."""

    def block(number: int) -> float:
        with side.plan.applied(side.built):
            return bench.timed_block(side.step, first=start + number * steps, count=steps, device=settings.device)

    return block


def _side_record(result: record.SwapRecord) -> record.ProfileRecord:
    return record.ProfileRecord(
        run_id=result.run_id,
        created_utc=result.created_utc,
        command=result.command,
        environment=result.environment,
        git=result.git,
        workload=result.workload,
    )


def _predict(phase: Phase, before: record.ProfileRecord) -> record.Prediction:
    if phase.predict is None:
        return record.Prediction(text=phase.predicts, claim=phase.claim)
    return phase.predict(before)
