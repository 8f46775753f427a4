"""Measures a workload on several ranks: a child process for each, one record; what ends one rank ends the run."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import msgspec
import torch

from kernbench import device, group, ranks, record, swap
from kernbench import request as asked
from kernbench.children import isolation, jobs, supervised
from kernbench.children.isolation import ChildBroke, Died, Terms
from kernbench.children.worker import Tell
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.measurement import measure
from kernbench.progress import Silent
from kernbench.ranks import Place
from kernbench.request import Request
from kernbench.runfolder import Run

GRACE_SECONDS = 2.0
"""Once a rank failed, the others have this long to say how they end, which tells a cause from its consequences."""
_LOST_ANOTHER = re.compile(r"gloo|nccl|TCPStore|Connection (closed|reset)|Broken pipe|Dist\w*Error", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Team:
    """All ranks of a run. ``mine`` is the one that a launcher made of this process; None starts all of them here.

    ``notes`` says aloud what was taken instead of what is faster.
    """

    size: int
    device: str
    mine: Place | None = None
    notes: tuple[str, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether another process writes the record."""
        return self.mine is not None and self.mine.rank > 0

    @property
    def home(self) -> str:
        """The device of the rank that this process is, or of the first one that it starts."""
        return self.device if self.mine is None else self.device_of(self.mine)

    def device_of(self, place: Place) -> str:
        """The device of a rank."""
        return f"cuda:{place.local_rank}" if self.device == "cuda" else "cpu"


def team(request: Request) -> Team | None:
    """The ranks that were asked for, on the command line or by a launcher; None for a run of one process.

    Raises:
        KernbenchError: they cannot be had.
    """
    mine = ranks.launched()
    if request.ranks is None and mine is None:
        return None
    if request.ranks is not None:
        if mine is not None:
            raise KernbenchError(
                f"--ranks {request.ranks} starts the ranks itself, and this is rank {mine.rank} of {mine.size} "
                "already; leave --ranks out under torchrun"
            )
        if request.ranks < 1:
            raise KernbenchError(f"--ranks {request.ranks}: there is at least one rank; try --ranks 2")
        if request.in_process:
            raise KernbenchError(
                "--ranks starts a process for each rank; leave --in-process out, or use torchrun with it"
            )
    size = mine.size if mine is not None else request.ranks or 1
    device, notes = _devices(request.device, mine.local_size if mine is not None else size)
    return Team(size=size, device=device, mine=mine, notes=notes)


def _devices(name: str, here: int) -> tuple[str, tuple[str, ...]]:
    """What ``here`` ranks on this machine run on: a GPU each, or the CPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise KernbenchError(f"--device {name} is one device, and every rank takes its own; give cuda, cpu or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and here > count > 0:
        raise KernbenchError(
            f"--device cuda: {here} ranks need {here} GPUs, and there {'is 1' if count == 1 else f'are {count}'} here; "
            "take fewer ranks, or --device cpu"
        )
    if name == "auto" and here > count > 0:
        return "cpu", (
            f"{here} ranks and {count} GPU{'s' if count > 1 else ''}: all ranks run on the CPU, with gloo; "
            f"take at most {count} for a GPU each",
        )
    return ("cuda" if name == "cuda" or (name == "auto" and count) else "cpu"), ()


@dataclass(frozen=True, kw_only=True)
class RankMeasure:
    """One rank's part of a measurement; rank 0, which has ``folder`` and ``result``, sends its stages."""

    imports: ClassVar[tuple[str, ...]] = (*jobs.COMPILER, "kernbench.children.rankruns")
    request: Request
    phases: jobs.Phases
    place: Place
    seconds: float
    folder: Path | None = None
    result: record.ProfileRecord | None = None

    def run(self, tell: Tell) -> None:
        """Measure in step with the others.

        Raises:
            WorkloadFailed: the workload raised, or the others are gone.
        """
        tell.begin("joining the other ranks")
        settings = jobs.settings_of(self.request)
        plan = asked.plan(settings.workload, self.phases)
        with (
            group.joined(self.place, settings.device, self.seconds) as others,
            tempfile.TemporaryDirectory(prefix="kernbench-") as scratch,
        ):
            if self.folder is not None and self.result is not None:
                run = jobs.Relayed(self.folder, self.result, tell)
            else:
                run = _Aside(Path(scratch), _unkept(settings, plan), tell)
            measure.measure(run, run.record, settings, plan, others=others)
            for doubt in device.WARNINGS:
                run.warn(doubt)
            tell.begin("waiting for the other ranks to end")


def _unkept(settings: measure.Settings, plan: swap.Plan) -> record.ProfileRecord:
    """A record for a rank that follows."""
    return record.ProfileRecord(
        run_id="",
        created_utc="",
        command="",
        environment=device.fingerprint(settings.device),
        workload=settings.describe(plan),
    )


class _Aside(jobs.Relayed[record.ProfileRecord]):
    """A run whose record nobody keeps."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tell.begin(name)
        yield

    def warn(self, message: str) -> None:
        return None

    def write(self) -> None:
        return None


def lead(
    run: Run[record.ProfileRecord], request: Request, settings: measure.Settings, plan: swap.Plan, chosen: Team
) -> None:
    """Fill the record of rank 0, and in it what the ranks are to each other, stage by stage.

    Raises:
        WorkloadFailed: a rank raised, took its process down or did not go on, or a loss is not finite; no rank is left.
        KeyboardInterrupt: the user, or the launcher, ended it.
    """
    for note in chosen.notes:
        run.warn(note)
    terms = supervised.terms_of(request, supervised.STAGE_SECONDS)
    work = _Work(request, settings, plan.implementations, chosen, terms)
    if chosen.mine is not None:
        store = group.connect(chosen.mine, terms.seconds)
        group.announce(store)
        failures = work.lead(run, replace(chosen.mine, hosted=True))
    else:
        failures = work.start_all(run)
    if failures:
        error = _verdict(failures, settings.workload.name, chosen)
        _note_ending(run, error)
        raise error


def follow(request: Request, settings: measure.Settings, plan: swap.Plan, chosen: Team) -> None:
    """Take part in a measurement whose record another process writes.

    Raises:
        WorkloadFailed: as for :func:`lead`, or rank 0 does not begin.
        KeyboardInterrupt: the user, or the launcher, ended it.
    """
    assert chosen.mine is not None
    terms = supervised.terms_of(request, supervised.STAGE_SECONDS)
    work = _Work(request, settings, plan.implementations, chosen, terms)
    store = group.connect(chosen.mine, supervised.STAGE_SECONDS)
    group.await_start(store, chosen.mine, supervised.STAGE_SECONDS)
    failure = work.follow(replace(chosen.mine, hosted=True), terms)
    if failure is not None:
        raise _verdict([failure], settings.workload.name, chosen)


@dataclass(frozen=True)
class _Failure:
    rank: int
    error: KernbenchError | Died | ChildBroke | KeyboardInterrupt

    @property
    def lost_another(self) -> bool:
        """Whether this rank only noticed that another one is gone."""
        return isinstance(self.error, WorkloadFailed) and _LOST_ANOTHER.search(str(self.error)) is not None


@dataclass(frozen=True)
class _Work:
    """What every rank is told."""

    request: Request
    settings: measure.Settings
    phases: jobs.Phases
    team: Team
    terms: Terms

    def job(self, place: Place) -> RankMeasure:
        """A rank's job, without a record."""
        on = replace(self.settings, device=torch.device(self.team.device_of(place)))
        return RankMeasure(
            request=supervised.named(self.request, on), phases=self.phases, place=place, seconds=self.terms.seconds
        )

    def lead(self, run: Run[record.ProfileRecord], place: Place, terms: Terms | None = None) -> list[_Failure]:
        """Measure as rank 0."""
        job = replace(self.job(place), folder=run.folder, result=run.record)
        try:
            supervised.follow(run, run.record, job, terms or self.terms)
        except (KernbenchError, Died, ChildBroke) as error:
            return [_Failure(place.rank, error)]
        return []

    def follow(self, place: Place, terms: Terms) -> _Failure | None:
        """Measure as another rank."""
        try:
            isolation.run(self.job(place), _ignore, terms, Silent())
        except isolation.Stopped:
            return None
        except (KernbenchError, Died, ChildBroke, KeyboardInterrupt) as error:
            return _Failure(place.rank, error)
        return None

    def start_all(self, run: Run[record.ProfileRecord]) -> list[_Failure]:
        """Measure on ranks that are all started here; when this returns, or raises, none of them is left."""
        store, port = group.host_store(self.terms.seconds)
        first, *others = ranks.local_places(self.team.size, port)
        threads = max(1, torch.get_num_threads() // self.team.size) if self.team.device == "cpu" else None
        if threads is not None:
            run.record.environment = msgspec.structs.replace(run.record.environment, cpu_threads=threads)
        stop = threading.Event()
        terms = replace(self.terms, threads=threads, stop=stop)
        failures: list[_Failure] = []

        def accompany(place: Place) -> None:
            failure = self.follow(place, terms)
            if failure is not None:
                failures.append(failure)
                threading.Timer(GRACE_SECONDS, stop.set).start()

        with ThreadPoolExecutor(max(1, len(others))) as pool:
            running = [pool.submit(accompany, place) for place in others]
            try:
                failures += self.lead(run, first, terms)
                wait(running, timeout=GRACE_SECONDS if failures else None)
            except isolation.Stopped:
                # Another rank failed, and says why.
                assert failures
            finally:
                stop.set()
        del store
        return failures


def _ignore(said: object) -> None:
    return None


def _verdict(failures: Sequence[_Failure], name: str, chosen: Team) -> BaseException:
    """The one error that a run ends with: that of the rank that failed by itself, where one did."""
    own = [one for one in failures if not one.lost_another] or list(failures)
    for failure in own:
        if isinstance(failure.error, KeyboardInterrupt | ChildBroke):
            return failure.error
    deaths: dict[str, list[int]] = {}
    for failure in own:
        error = failure.error
        if isinstance(error, KernbenchError):
            sentence = f"rank {failure.rank} of {chosen.size}: {error}"
            if failure.lost_another:
                sentence += "; another rank ended before this one, which says why"
            return WorkloadFailed(sentence, error.traceback_text) if error.exit_code == 3 else KernbenchError(sentence)
        assert isinstance(error, Died)
        deaths.setdefault(f"{supervised.as_verb(error.reason)}", []).append(failure.rank)
    stage = next((", ".join(["", *one.error.unit]) for one in own if isinstance(one.error, Died)), "")
    told = [f"rank {' and rank '.join(map(str, sorted(of)))} {reason}" for reason, of in deaths.items()]
    text = "\n".join(one.error.traceback_text for one in own if isinstance(one.error, Died))
    return WorkloadFailed(f"{name}{stage}: {'; '.join(told)}", text)


def _note_ending(run: Run[record.ProfileRecord], error: BaseException) -> None:
    """Rank 0's stage was cut short by another rank, or lost it; the record says what that one ended with."""
    interrupted = isinstance(error, KeyboardInterrupt)
    if interrupted:
        run.show_way_back(error)
    run.record.status = "interrupted" if interrupted else "failed"
    if run.record.stages and run.record.stages[-1].status == "failed":
        message = "" if interrupted else str(error).splitlines()[0]
        run.record.stages[-1] = msgspec.structs.replace(
            run.record.stages[-1], status=run.record.status, message=message
        )
    run.write()
