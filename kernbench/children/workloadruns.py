"""Parity, profiles and races of workloads through child processes.

Each function does what its namesake in ``phasecheck``, ``measure`` or ``race`` does, through a job of ``jobs``; what
dies becomes a row or one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernbench import record, swap
from kernbench.children import isolation, jobs, supervised
from kernbench.children.isolation import Died
from kernbench.errors import WorkloadFailed
from kernbench.measurement import measure, race
from kernbench.parity import phasecheck, trajectory
from kernbench.progress import Progress
from kernbench.request import Request
from kernbench.runfolder import Run

PARITY_STEPS = 10
INTERPRETED_STEPS = 2
"""Where a Triton kernel runs in the interpreter; ten of its steps would take minutes."""


def check_phase(
    request: Request, settings: measure.Settings, before: swap.Plan, after: swap.Plan, progress: Progress
) -> list[record.ParityResult]:
    """Parity of two plans on real steps of a workload, its faults included; a side after that dies is a failed result.

    Raises:
        WorkloadFailed: the side before takes the process down, or the device does not answer any more.
    """
    steps = INTERPRETED_STEPS if jobs.interpreted(settings, after) else PARITY_STEPS
    job = jobs.PhaseParity(
        request=supervised.named(request, settings),
        before=before.implementations,
        after=after.implementations,
        steps=steps,
    )
    rows: list[record.ParityResult] = []
    name = phasecheck.phase_name(settings.workload, before, after)
    try:
        isolation.run(job, rows.append, supervised.terms_of(request, supervised.STAGE_SECONDS), progress)
    except Died as death:
        if death.unit != (phasecheck.AFTER,):
            raise WorkloadFailed(
                f"{name}: the side before {supervised.as_verb(death.reason)}", death.traceback_text
            ) from None
        rows.append(
            record.ParityResult(
                kernel=name,
                case=trajectory.after_steps(steps),
                dtype=str(settings.dtype).removeprefix("torch."),
                mode="steps",
                passed=False,
                reason=death.reason,
            )
        )
        supervised.make_sure_it_answers(request, settings.device, progress, death)
    return rows


def measure_side(
    run: Run[Any],
    result: record.ProfileRecord,
    request: Request,
    settings: measure.Settings,
    plan: swap.Plan,
    *,
    label: str = "",
) -> None:
    """Fill ``result`` stage by stage, as :func:`measure.measure` does.

    Raises:
        WorkloadFailed: the workload raised, took the process down, or its loss is not finite.
    """
    job = jobs.Measure(
        request=supervised.named(request, settings),
        phases=plan.implementations,
        folder=run.folder,
        result=result,
        label=label,
    )
    try:
        supervised.follow(run, result, job, supervised.terms_of(request, supervised.STAGE_SECONDS))
    except Died as death:
        raise supervised.failure(settings.workload.name, death) from None


def run_race(
    request: Request,
    settings: measure.Settings,
    before: swap.Plan,
    candidates: Mapping[str, swap.Plan],
    progress: Progress,
) -> race.Race:
    """The side before against the candidates.

    Raises:
        WorkloadFailed: a side raised, took the process down, or its loss is not finite.
    """
    job = jobs.Race(
        request=supervised.named(request, settings),
        before=before.implementations,
        candidates={name: plan.implementations for name, plan in candidates.items()},
    )
    found: race.Race = supervised.run_or_fail(job, request, progress, settings.workload.name)
    return found


def receipt_of_steps(
    request: Request, settings: measure.Settings, plan: swap.Plan, progress: Progress
) -> list[record.SiteHit]:
    """How often each replacement runs in a step, where no race counts it."""
    job = jobs.Receipt(request=supervised.named(request, settings), phases=plan.implementations)
    found: list[record.SiteHit] = supervised.run_or_fail(job, request, progress, settings.workload.name)
    return found


def bench_workload(run: Run[record.BenchRecord], request: Request, settings: measure.Settings) -> None:
    """Race all variants of a workload; one that takes the process down is labelled "failed", and the others go on.

    Raises:
        WorkloadFailed: the baseline failed, or the device does not answer any more.
    """
    failed: dict[str, str] = {}
    while True:
        job = jobs.WorkloadTimes(
            request=supervised.named(request, settings), folder=run.folder, result=run.record, failed=failed
        )  # fmt: skip
        try:
            supervised.follow(run, run.record, job, supervised.terms_of(request, supervised.STAGE_SECONDS))
            return
        except Died as death:
            name = death.unit[-1] if death.unit else race.BASELINE
            racing = not run.record.results
            if name in failed or (racing and name == race.BASELINE):
                raise supervised.failure(settings.workload.name, death) from None
            failed[name] = death.reason
            run.record.status = "running"
            run.warn(f"{name} is out of the race: {death.reason}" if racing else f"{name}: {death.reason}")
            supervised.make_sure_it_answers(request, settings.device, run.progress, death)
