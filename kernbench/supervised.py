"""Measuring and checking through child processes: what dies becomes a row or one sentence, and the rest goes on.

Each function does what its namesake in ``parity``, ``bench``, ``measure`` or ``race`` does, through a job of ``jobs``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kernbench import bench, isolation, jobs, measure, race, record, swap
from kernbench.errors import WorkloadFailed
from kernbench.isolation import Died, Terms
from kernbench.jobs import Filled, StageBegan, StageEnded, Warned
from kernbench.parity import phasecheck, trajectory
from kernbench.parity.kernelcheck import PARTS, Part
from kernbench.progress import Advance, Progress
from kernbench.request import Request
from kernbench.runfolder import Run
from kernbench.spec import Case, KernelSpec
from kernbench.worker import Job

UNIT_SECONDS = 120.0
"""Time limit of one row of parity or one timed implementation."""
STAGE_SECONDS = 600.0
"""Time limit of one stage of a profile or a swap."""
ANSWER_SECONDS = 60.0
PARITY_STEPS = 10
INTERPRETED_STEPS = 2
"""Where a Triton kernel runs in the interpreter; ten of its steps would take minutes."""
OUTSIDE = "process"
"""Mode of the row for a process that died before it began with any row, or again and again."""


def survey(request: Request, device: torch.device, progress: Progress) -> tuple[record.Environment, list[str]]:
    """The device with its measured ceilings, and why it could not be asked something.

    Raises:
        WorkloadFailed: the device itself takes the process down.
    """
    # It runs nothing of the user's, so the user's limit is not meant for it.
    job, unlimited = jobs.Survey(str(device)), replace(request, time_limit=None)
    found: tuple[record.Environment, list[str]] = _or_fail(job, unlimited, progress, f"measuring {device}")
    return found


def check_declarations(request: Request, progress: Progress) -> None:
    """Import all kernel files in a child first, so that what one does then is done to nobody.

    Raises:
        KernbenchError: one tampers with what checks and times kernels.
        WorkloadFailed: one raises, does not end, or takes the process down.
    """
    try:
        isolation.run(jobs.Declarations(), _unexpected, terms_of(request), progress)
    except Died as death:
        raise WorkloadFailed(
            f"{''.join(death.unit)}, when it is imported, {as_verb(death.reason)}", death.traceback_text
        ) from None


def check_kernels(
    kernels: Sequence[tuple[KernelSpec, Sequence[Case] | None]],
    request: Request,
    device: torch.device,
    progress: Progress,
    keep: Callable[[list[record.ParityResult]], None],
    *,
    dtypes: Sequence[str] | None = None,
) -> None:
    """Hand over all results so far, one per case, dtype and way of calling, whenever there is a new one. A row that
    takes the process down is a failed result.

    On the CPU a kernel's rows are shared out to a process for each processor; where they stand does not depend on when
    they came.

    Args:
        kernels: each with the cases that were asked for, None for all.

    Raises:
        WorkloadFailed: the device does not answer any more.
    """
    split = device.type == "cpu"
    shares = [share for spec, cases in kernels for share in _shares(spec, cases, dtypes or list(spec.tolerance), split)]
    lanes = min(len(shares), len(os.sched_getaffinity(0)) if split and not request.in_process else 1)
    found: list[list[record.ParityResult]] = [[] for _ in shares]
    shared = _Shared(progress)
    stop = threading.Event()
    terms = replace(
        terms_of(request), stop=stop, threads=max(1, torch.get_num_threads() // lanes) if lanes > 1 else None
    )

    def answer(number: int) -> None:
        def take(row: record.ParityResult) -> None:
            with shared.lock:
                found[number].append(row)
                # What kills every process before it begins with a row is one result.
                rows = [one for rows in found for one in rows]
                keep(list({(one.kernel, one.case, one.dtype, one.mode): one for one in rows}.values()))

        _check(shares[number], request, device, shared, take, terms)

    if lanes <= 1:
        for number in range(len(shares)):
            answer(number)
        return
    with ThreadPoolExecutor(lanes) as pool:
        running = [pool.submit(answer, number) for number in range(len(shares))]
        try:
            for one in as_completed(running):
                one.result()
        except BaseException:
            # Whatever ended this one ends the others, too, so that an interrupted run does not go on in the dark.
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Share(NamedTuple):
    """Rows of one kernel that one process answers."""

    spec: KernelSpec
    cases: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    parts: tuple[Part, ...] = PARTS


def _shares(spec: KernelSpec, cases: Sequence[Case] | None, dtypes: Sequence[str], split: bool) -> list[_Share]:
    names = tuple(case.name for case in cases) if cases is not None else None
    if not split:
        return [_Share(spec, names, tuple(dtypes))]
    whole = [_Share(spec, names, tuple(dtypes), ("kernel",))] if cases is None else []
    return [*(_Share(spec, names, (dtype,), ("inputs",)) for dtype in dtypes), *whole]


def _check(
    share: _Share,
    request: Request,
    device: torch.device,
    progress: Progress,
    take: Callable[[record.ParityResult], None],
    terms: Terms,
) -> None:
    job = jobs.KernelParity(
        kernel=share.spec.name,
        device=str(device),
        dtypes=share.dtypes,
        cases=share.cases,
        seed=request.seed,
        parts=share.parts,
    )
    answered: set[tuple[str, str, str]] = set()

    def answer(row: record.ParityResult) -> None:
        answered.add((row.case, row.dtype, row.mode))
        take(row)

    finished = False
    while not finished:
        before = len(answered)
        try:
            finished = isolation.run(replace(job, skip=frozenset(answered)), answer, terms, progress)
        except Died as death:
            case, dtype, mode, *example = death.unit or ("", "", OUTSIDE)
            late = (case, dtype, mode) in answered
            reason = f"after this row was done, the process {as_verb(death.reason)}" if late else death.reason
            reason = ": ".join([*example, reason])
            answer(
                record.ParityResult(
                    kernel=share.spec.name, case=case, dtype=dtype, mode=mode, passed=False, reason=reason
                )
            )
            # Where nothing new was answered, the same would happen again.
            finished = len(answered) == before or not death.unit
            _make_sure_it_answers(request, device, progress, death)


def bench_kernel(
    spec: KernelSpec,
    request: Request,
    device: torch.device,
    progress: Progress,
    take: Callable[[record.BenchResult], None],
    *,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    ceilings: record.Ceilings | None = None,
    swept: bool = False,
) -> None:
    """Hand over the times of every case, dtype and implementation. One that ends the process is labelled "failed".

    Args:
        cases: by default all; on the CPU large ones are timed only if they stand here.
        swept: the cases are those of a sweep, of which nobody asked for each.

    Raises:
        WorkloadFailed: the device does not answer any more.
    """
    names = list(dtypes if dtypes is not None else spec.tolerance)
    directions = bench.directions_of(spec, request.direction)
    units: list[tuple[str, str, bench.Direction]] = []
    for case in cases if cases is not None else spec.cases:
        for name in names:
            if (cases is None or swept) and case.large and device.type == "cpu":
                why = bench.LARGE_SWEEP if swept else bench.LARGE
                take(_unmeasured(spec, (case.name, name, directions[0]), "eager", bench.NOT_MEASURED, why))
            else:
                units += [(case.name, name, direction) for direction in directions]
    failed: dict[str, str] = {}

    def finish(rows: Sequence[record.BenchResult]) -> None:
        unit = units.pop(0)
        for row in rows:
            take(row)
        for name, reason in failed.items():
            take(_unmeasured(spec, unit, name, bench.FAILED, reason))
        failed.clear()

    while units:
        job = jobs.KernelTimes(
            kernel=spec.name,
            device=str(device),
            units=tuple(units),
            rounds=request.rounds,
            ceilings=ceilings,
            without=frozenset(failed),
        )
        try:
            _not_poisoned(isolation.run(job, finish, terms_of(request), progress))
        except Died as death:
            implementation = "".join(death.unit)
            if implementation and implementation not in failed:
                failed[implementation] = death.reason
            else:
                failed.setdefault("eager", f"before any implementation could run: {death.reason}")
                finish([])
            _make_sure_it_answers(request, device, progress, death)


def check_phase(
    request: Request, settings: measure.Settings, before: swap.Plan, after: swap.Plan, progress: Progress
) -> list[record.ParityResult]:
    """Parity of two plans on real steps of a workload, its faults included; a side after that dies is a failed result.

    Raises:
        WorkloadFailed: the side before takes the process down, or the device does not answer any more.
    """
    steps = INTERPRETED_STEPS if jobs.interpreted(settings, after) else PARITY_STEPS
    job = jobs.PhaseParity(
        request=named(request, settings),
        before=before.implementations,
        after=after.implementations,
        steps=steps,
    )
    rows: list[record.ParityResult] = []
    name = phasecheck.phase_name(settings.workload, before, after)
    try:
        isolation.run(job, rows.append, terms_of(request, STAGE_SECONDS), progress)
    except Died as death:
        if death.unit != (phasecheck.AFTER,):
            raise WorkloadFailed(f"{name}: the side before {as_verb(death.reason)}", death.traceback_text) from None
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
        _make_sure_it_answers(request, settings.device, progress, death)
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
        request=named(request, settings),
        phases=plan.implementations,
        folder=run.folder,
        result=result,
        label=label,
    )
    try:
        follow(run, result, job, terms_of(request, STAGE_SECONDS))
    except Died as death:
        raise _failed(settings, death) from None


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
        request=named(request, settings),
        before=before.implementations,
        candidates={name: plan.implementations for name, plan in candidates.items()},
    )
    found: race.Race = _or_fail(job, request, progress, settings.workload.name)
    return found


def receipt_of_steps(
    request: Request, settings: measure.Settings, plan: swap.Plan, progress: Progress
) -> list[record.SiteHit]:
    """How often each replacement runs in a step, where no race counts it."""
    job = jobs.Receipt(request=named(request, settings), phases=plan.implementations)
    found: list[record.SiteHit] = _or_fail(job, request, progress, settings.workload.name)
    return found


def bench_workload(run: Run[record.BenchRecord], request: Request, settings: measure.Settings) -> None:
    """Race all variants of a workload; one that takes the process down is labelled "failed", and the others go on.

    Raises:
        WorkloadFailed: the baseline failed, or the device does not answer any more.
    """
    failed: dict[str, str] = {}
    while True:
        job = jobs.WorkloadTimes(
            request=named(request, settings), folder=run.folder, result=run.record, failed=failed
        )  # fmt: skip
        try:
            follow(run, run.record, job, terms_of(request, STAGE_SECONDS))
            return
        except Died as death:
            name = death.unit[-1] if death.unit else race.BASELINE
            racing = not run.record.results
            if name in failed or (racing and name == race.BASELINE):
                raise _failed(settings, death) from None
            failed[name] = death.reason
            run.record.status = "running"
            run.warn(f"{name} is out of the race: {death.reason}" if racing else f"{name}: {death.reason}")
            _make_sure_it_answers(request, settings.device, run.progress, death)


def follow(run: Run[Any], result: record.Header, job: Job, terms: Terms) -> None:
    """Keep a record as the job says: its stages, what it fills in, and its warnings."""
    with ExitStack() as stage:

        def take(said: object) -> None:
            match said:
                case StageBegan(name):
                    stage.enter_context(run.stage(name))
                case Filled(found):
                    jobs.fill(result, found)
                    run.write()
                case StageEnded():
                    stage.close()
                case Warned(text):
                    run.warn(text)
                case _:
                    raise AssertionError(f"a job said {said!r}")

        _not_poisoned(isolation.run(job, take, terms, run.progress))


class _Shared:
    """Progress for several threads at once. It says nothing twice: jobs of one kernel begin with the same notes."""

    def __init__(self, progress: Progress) -> None:
        self.lock = threading.RLock()
        self._progress = progress
        self._said: set[str] = set()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        with self.lock:
            stage = self._progress.stage(title, total)
            inner = stage.__enter__()

        def advance(units: int) -> None:
            with self.lock:
                inner(units)

        try:
            yield advance
        finally:
            with self.lock:
                stage.__exit__(None, None, None)

    def note(self, text: str) -> None:
        with self.lock:
            if text not in self._said:
                self._said.add(text)
                self._progress.note(text)


def _not_poisoned(result: jobs.Poisoned | None) -> None:
    """A process that has lost its GPU is as good as dead."""
    if result is not None:
        raise Died(result.reason, (result.unit,))


def _unexpected(said: object) -> None:
    raise AssertionError(f"a job said {said!r}")


def _or_fail(job: Job, request: Request, progress: Progress, what: str) -> Any:
    try:
        return isolation.run(job, _unexpected, terms_of(request, STAGE_SECONDS), progress)
    except Died as death:
        raise WorkloadFailed(_sentence(what, death), death.traceback_text) from None


def _failed(settings: measure.Settings, death: Died) -> WorkloadFailed:
    return WorkloadFailed(_sentence(settings.workload.name, death), death.traceback_text)


def _sentence(what: str, death: Died) -> str:
    return f"{', '.join([what, *death.unit])}: {death.reason}"


def as_verb(reason: str) -> str:
    """A reason that fits behind a subject."""
    return f"was {reason}" if reason.startswith("killed") else reason


def named(request: Request, settings: measure.Settings) -> Request:
    """The request as a child can repeat it: with the device and the preset that were chosen."""
    reference = request.workload or settings.workload.name
    return replace(request, workload=reference, device=str(settings.device), preset=settings.preset)


def terms_of(request: Request, seconds: float = UNIT_SECONDS) -> Terms:
    """How the children of a request are run, ``seconds`` being the limit where the user gives none."""
    return Terms(request.time_limit or seconds, request.in_process)


def _unmeasured(
    spec: KernelSpec, unit: tuple[str, str, bench.Direction], implementation: str, label: str, note: str
) -> record.BenchResult:
    case, dtype, direction = unit
    return record.BenchResult(
        kernel=spec.name, case=case, dtype=dtype, implementation=implementation, seconds=None, direction=direction,
        label=label, note=note,
    )  # fmt: skip


def _make_sure_it_answers(request: Request, device: torch.device, progress: Progress, after: Died) -> None:
    """Whether a new process can still use the GPU.

    Raises:
        WorkloadFailed: it cannot, so nothing that follows could be judged.
    """
    if device.type == "cpu":
        return
    try:
        isolation.run(jobs.Answers(str(device)), lambda _: None, Terms(ANSWER_SECONDS), progress)
    except (Died, isolation.ChildBroke) as problem:
        last = (str(problem).splitlines() or [""])[-1]
        raise WorkloadFailed(
            f"{device} does not answer after a process {as_verb(after.reason)}: {last}; reset it with "
            "nvidia-smi --gpu-reset, or restart the machine",
            after.traceback_text,
        ) from None
