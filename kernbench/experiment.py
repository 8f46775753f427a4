"""One phase on trial: baseline, prediction, parity gate, interleaved race, the side after, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kernbench import record, swap, verdict
from kernbench.children import kernelruns, workloadruns
from kernbench.children.jobs import interpreted
from kernbench.measurement.measure import Settings
from kernbench.request import Request
from kernbench.runfolder import Run
from kernbench.workload import Phase


def judge(
    run: Run[record.SwapRecord],
    request: Request,
    settings: Settings,
    phase: Phase,
    before: swap.Plan,
    candidates: Mapping[str, swap.Plan],
) -> None:
    """Fill the swap record stage by stage; each finished stage is on disk when the next one begins.

    Args:
        candidates: the plan with the phase in, per implementation to try; the fastest green one is chosen.

    Raises:
        WorkloadFailed: the baseline itself fails, or a side dies outside of the gate.
    """
    result = run.record
    result.before = _side_record(result)
    workloadruns.measure_side(run, result.before, request, settings, before, label="before")
    result.predicted = _predict(phase, result.before)
    with run.stage("parity"):
        green = _gate(run, request, settings, before, candidates)
    racing = {name: plan for name, plan in green.items() if not interpreted(settings, plan)}
    chosen = next(iter(racing or green or candidates))
    if racing:
        with run.stage("race"):
            race = workloadruns.run_race(request, settings, before, racing, run.progress)
            chosen = race.fastest
            result.arms, result.clocks, result.ratio = race.arms, race.clocks, race.ratio(chosen)
            result.receipt = race.receipts[chosen]
        result.after = _side_record(result)
        workloadruns.measure_side(run, result.after, request, settings, racing[chosen], label="after")
    elif green:
        run.skip("race", "Triton's interpreter says nothing of a kernel's speed")
        result.receipt = workloadruns.receipt_of_steps(request, settings, green[chosen], run.progress)
    else:
        run.skip("race", "no timing on a red gate")
    result.phase = record.PhaseInfo(number=phase.number, title=phase.title, flag=phase.flag, implementation=chosen)
    with run.stage("verdict"):
        result.verdict = verdict.decide(
            parity=result.parity,
            ratio=result.ratio,
            receipt=own_sites(candidates[chosen], phase, result.receipt),
            speed_measured=bool(racing),
            syncs_before=result.before.syncs_per_step,
            syncs_after=result.after.syncs_per_step if result.after else None,
            not_measured_reason="on the CPU a Triton kernel runs in the interpreter, so its speed is not measured here",
        )


def own_sites(plan: swap.Plan, phase: Phase, receipt: Sequence[record.SiteHit]) -> list[record.SiteHit]:
    """What the receipt says of the phase on trial: it may well make sites of phases before it unreachable."""
    # On a red gate nothing ran, and the receipt is empty.
    numbers = [number for number, _ in plan.sites()] if receipt else []
    return [hit for number, hit in zip(numbers, receipt, strict=True) if number == phase.number]


def _gate(
    run: Run[record.SwapRecord],
    request: Request,
    settings: Settings,
    before: swap.Plan,
    candidates: Mapping[str, swap.Plan],
) -> dict[str, swap.Plan]:
    """The candidates with no red parity row. A red one drops out aloud; if all are red, the first stays on record."""
    rows = {name: _check(run, request, settings, before, name, plan) for name, plan in candidates.items()}
    green = {name: plan for name, plan in candidates.items() if all(row.passed for row in rows[name])}
    for name in green or [next(iter(candidates))]:
        run.record.parity += rows[name]
    for name in candidates:
        red = [row for row in rows[name] if not row.passed]
        if red and green:
            run.warn(f"implementation {name!r} is out: {red[0].kernel}, {red[0].case}: {red[0].reason}")
    return green


def _check(
    run: Run[record.SwapRecord], request: Request, settings: Settings, before: swap.Plan, name: str, plan: swap.Plan
) -> list[record.ParityResult]:
    rows: list[record.ParityResult] = []

    def keep(found: list[record.ParityResult]) -> None:
        rows[:] = found

    if name == "triton":
        # Those of the phases before passed when their own phase was on trial; the steps below run all of them.
        standing = {spec.name for spec in before.kernels}
        kernels = [(spec, None) for spec in plan.kernels if spec.name not in standing]
        working = str(settings.dtype).removeprefix("torch.")
        kernelruns.check_kernels(kernels, request, settings.device, run.progress, keep, working=working)
    return rows + workloadruns.check_phase(request, settings, before, plan, run.progress)


def _side_record(result: record.SwapRecord) -> record.ProfileRecord:
    return record.ProfileRecord(
        run_id=result.run_id,
        created_utc=result.created_utc,
        command=result.command,
        environment=result.environment,
        git=result.git,
        confidence=result.confidence,
        workload=result.workload,
    )


def _predict(phase: Phase, before: record.ProfileRecord) -> record.Prediction:
    """The phase's own promise, and beside it what the replay of the trace before says of the phase."""
    own = record.Prediction(text=phase.predicts, claim=phase.claim)
    if phase.predict is not None:
        own = phase.predict(before)
    replayed = _replayed(phase, before)
    if replayed is None:
        return own
    promised = msgspec.structs.replace(own, replayed=replayed)
    if own.ratio_low is not None:
        return promised
    basis = "; ".join(filter(None, [own.basis, "replay of the trace before"]))
    return msgspec.structs.replace(promised, ratio_low=replayed[0], ratio_high=replayed[1], basis=basis)


def _replayed(phase: Phase, before: record.ProfileRecord) -> tuple[float, float] | None:
    """Range of the ratio before over after; None where nothing was replayed or the site does not show in the trace."""
    found = before.analysis.whatif if before.analysis else None
    step = found.baseline_seconds if found else None
    for estimate in found.estimates if found else ():
        low, high = estimate.saving_seconds_per_step
        if estimate.change == "phase" and estimate.phase == phase.number and step and high < step:
            return step / (step - low), step / (step - high)
    return None
