"""What all runs through child processes share: their terms, what a death is in words, and that the device lives on.

``kernelruns`` and ``workloadruns`` hold the runs themselves.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from kernbench import record
from kernbench.children import isolation, jobs
from kernbench.children.isolation import Died, Terms
from kernbench.children.jobs import Filled, StageBegan, StageEnded, Warned
from kernbench.children.worker import Job
from kernbench.errors import WorkloadFailed
from kernbench.measurement import measure
from kernbench.progress import Progress
from kernbench.request import Request
from kernbench.runfolder import Run

UNIT_SECONDS = 120.0
"""Time limit of one row of parity or one timed implementation."""
STAGE_SECONDS = 600.0
"""Time limit of one stage of a profile or a swap."""
ANSWER_SECONDS = 60.0


def survey(request: Request, device: torch.device, progress: Progress) -> tuple[record.Environment, list[str]]:
    """The device with its measured ceilings, and why it could not be asked something.

    Raises:
        WorkloadFailed: the device itself takes the process down.
    """
    # It runs nothing of the user's, so the user's limit is not meant for it.
    job, unlimited = jobs.Survey(str(device)), replace(request, time_limit=None)
    found: tuple[record.Environment, list[str]] = run_or_fail(job, unlimited, progress, f"measuring {device}")
    return found


def check_declarations(request: Request, progress: Progress) -> None:
    """Import all kernel files in a child first, so that what one does then is done to nobody.

    Raises:
        KernbenchError: one tampers with what checks and times kernels.
        WorkloadFailed: one raises, does not end, or takes the process down.
    """
    try:
        isolation.run(jobs.Declarations(), unexpected, terms_of(request), progress)
    except Died as death:
        raise WorkloadFailed(
            f"{''.join(death.unit)}, when it is imported, {as_verb(death.reason)}", death.traceback_text
        ) from None


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

        not_poisoned(isolation.run(job, take, terms, run.progress))


def not_poisoned(result: jobs.Poisoned | None) -> None:
    """A process that has lost its GPU is as good as dead."""
    if result is not None:
        raise Died(result.reason, (result.unit,))


def unexpected(said: object) -> None:
    """Takes what a job says that has nothing to say."""
    raise AssertionError(f"a job said {said!r}")


def run_or_fail(job: Job, request: Request, progress: Progress, what: str) -> Any:
    """What a job returns.

    Raises:
        WorkloadFailed: the process died; the sentence begins with ``what`` it did.
    """
    try:
        return isolation.run(job, unexpected, terms_of(request, STAGE_SECONDS), progress)
    except Died as death:
        raise failure(what, death) from None


def failure(what: str, death: Died) -> WorkloadFailed:
    """A death as an error of ``what`` died, and of the unit that it died in."""
    return WorkloadFailed(f"{', '.join([what, *death.unit])}: {death.reason}", death.traceback_text)


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


def make_sure_it_answers(request: Request, device: torch.device, progress: Progress, after: Died) -> None:
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
