"""One phase on trial: baseline, prediction, parity gate, interleaved race, the side after, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernbench import parity, record, swap, verdict
from kernbench.measure import Settings, measure
from kernbench.progress import Progress
from kernbench.race import receipt_of_steps, run_race
from kernbench.runfolder import Run
from kernbench.workload import Phase

PARITY_STEPS = 10
INTERPRETED_STEPS = 2
"""Where a Triton kernel runs in the interpreter; ten of its steps would take minutes."""


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
            race = run_race(settings, before, racing, rounds=rounds, progress=run.progress)
            chosen = race.fastest
            result.arms, result.clocks, result.ratio = race.arms, race.clocks, race.ratio(chosen)
            result.receipt = race.receipts[chosen]
        result.after = _side_record(result)
        measure(run, result.after, settings, racing[chosen], label="after")
    elif green:
        run.skip("race", "Triton's interpreter says nothing of a kernel's speed")
        result.receipt = receipt_of_steps(settings, green[chosen])
    else:
        run.skip("race", "no timing on a red gate")
    result.phase = record.PhaseInfo(number=phase.number, title=phase.title, flag=phase.flag, implementation=chosen)
    with run.stage("verdict"):
        result.verdict = verdict.decide(
            parity=result.parity,
            ratio=result.ratio,
            receipt=result.receipt,
            speed_measured=bool(racing),
            syncs_before=result.before.syncs_per_step,
            syncs_after=result.after.syncs_per_step if result.after else None,
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
    return rows + list(check_phase(settings, before, plan, run.progress))


def check_phase(
    settings: Settings, before: swap.Plan, after: swap.Plan, progress: Progress
) -> Iterator[record.ParityResult]:
    """Parity of two plans on real steps of a workload, its faults included."""
    return parity.check_phase(
        settings.workload,
        before,
        after,
        preset=settings.preset,
        device=settings.device,
        dtype=settings.dtype,
        seed=settings.seed,
        data=settings.data,
        steps=INTERPRETED_STEPS if interpreted(settings, after) else PARITY_STEPS,
        progress=progress,
    )


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
