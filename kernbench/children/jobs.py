"""What runs in a child process: each job names what it works on, finds it again there, and says what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic

import msgspec
import torch

from kernbench import bench, device, ranges, record, registry, swap
from kernbench import request as asked
from kernbench.children.worker import Tell
from kernbench.errors import KernbenchError
from kernbench.measurement import measure, race
from kernbench.parity import integrity, kernelcheck, phasecheck
from kernbench.request import Request
from kernbench.runfolder import AnyRecord, Run

Phases = Mapping[int, str]
"""Numbers of phases in place, each with its implementation."""
COMPILER = ("torch._dynamo",)
"""Its optimizers and torch.compile import it. What takes neither is spared a second."""


@dataclass(frozen=True)
class Survey:
    """What the device is and can do, with why it could not be asked something."""

    imports: ClassVar[tuple[str, ...]] = ()
    device: str

    def run(self, tell: Tell) -> tuple[record.Environment, list[str]]:
        tell.begin("the device's ceilings")
        chosen = device.resolve(self.device)
        with tell.progress.stage("measuring this device's ceilings"):
            ceilings = device.measure_ceilings(chosen)
        return device.fingerprint(chosen, ceilings=ceilings), device.WARNINGS


@dataclass(frozen=True)
class Declarations:
    """Imports all kernel files. Its units are the files.

    Raises:
        KernbenchError: one replaces functions or leaves settings changed, in which no other kernel could be judged.
    """

    imports: ClassVar[tuple[str, ...]] = ()

    def run(self, tell: Tell) -> None:
        for file, import_it in registry.kernel_imports():
            tell.begin(str(file))
            with integrity.watched() as watch:
                import_it()
            if watch.reason:
                raise KernbenchError(f"{file} is not used: when it is imported, it {watch.reason}; take that out")


@dataclass(frozen=True)
class Answers:
    """Raises what the device raises, if it cannot add two numbers any more."""

    imports: ClassVar[tuple[str, ...]] = ()
    device: str

    def run(self, tell: Tell) -> float:
        return float(torch.ones(2, device=device.resolve(self.device)).sum())


@dataclass(frozen=True, kw_only=True)
class KernelParity:
    """Parity of one kernel; sends each row. Returns whether all rows are answered: if not, go on in a new process."""

    imports: ClassVar[tuple[str, ...]] = ()
    kernel: str
    device: str
    dtypes: tuple[str, ...] | None = None
    cases: tuple[str, ...] | None = None
    seed: int = 0
    skip: frozenset[tuple[str, str, str]] = frozenset()
    parts: tuple[kernelcheck.Part, ...] = kernelcheck.PARTS

    def run(self, tell: Tell) -> bool:
        chosen = device.resolve(self.device)
        rows = kernelcheck.check_kernel(
            registry.kernel(self.kernel).declaration,
            device=chosen,
            dtypes=self.dtypes,
            cases=self.cases,
            seed=self.seed,
            progress=tell.progress,
            skip=self.skip,
            begin=tell.begin,
            parts=self.parts,
        )
        for row in rows:
            broken = _broken(chosen)
            if broken and row.passed:
                row = msgspec.structs.replace(row, passed=False, reason=f"leaves the GPU unusable: {broken}")
            tell.send(row)
            if broken:
                return False
        return True


def _broken(chosen: torch.device, *, wait: bool = True) -> str:
    """Why this process can no longer use its GPU; empty if it can, or, without waiting, if nothing is known yet."""
    if chosen.type != "cuda":
        return ""
    try:
        if wait:
            torch.cuda.synchronize(chosen)
        else:
            torch.cuda.current_stream(chosen).query()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@dataclass(frozen=True)
class Poisoned:
    """After this unit the process could not use its GPU any more, so what else it found says nothing."""

    unit: str
    reason: str


class _Stop(BaseException):
    """Ends a job whose GPU is lost; no exception that a kernel's failure is made of may catch it."""

    def __init__(self, poisoned: Poisoned) -> None:
        super().__init__(poisoned.reason)
        self.poisoned = poisoned


class _Watch:
    """Tells what begins, and blames the one before if the GPU is lost by then: all others would fail after it."""

    def __init__(self, tell: Tell, chosen: torch.device) -> None:
        self.tell = tell
        self.chosen = chosen
        self.running = ""

    def begin(self, unit: str) -> None:
        self.end(wait=False)
        self.running = unit
        self.tell.begin(unit)

    def end(self, *, wait: bool = True) -> None:
        if reason := _broken(self.chosen, wait=wait):
            raise _Stop(Poisoned(self.running, f"leaves the GPU unusable: {reason}"))


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """Times of one kernel; sends the rows of one case, dtype and direction together. Returns what made it stop early,
    if it did.

    ``without`` leaves implementations out of the first of the units.
    """

    imports: ClassVar[tuple[str, ...]] = COMPILER
    kernel: str
    device: str
    units: tuple[tuple[str, str, str], ...]
    rounds: int
    ceilings: record.Ceilings | None
    without: frozenset[str] = frozenset()

    def run(self, tell: Tell) -> Poisoned | None:
        spec = registry.kernel(self.kernel).declaration
        chosen = device.resolve(self.device)
        watch = _Watch(tell, chosen)
        without = self.without
        for case, dtype, direction in self.units:
            try:
                watch.begin("")
                rows = bench.bench_kernel(
                    spec,
                    device=chosen,
                    dtypes=[dtype],
                    cases=[spec.case(case)],
                    rounds=self.rounds,
                    ceilings=self.ceilings,
                    progress=tell.progress,
                    without=without,
                    begin=watch.begin,
                    directions=[direction],
                )
                found = list(rows)
                watch.end()
            except _Stop as stop:
                return stop.poisoned
            tell.send(found)
            without = frozenset()
        return None


@dataclass(frozen=True, kw_only=True)
class PhaseParity:
    """Parity of a phase on real steps; sends each row. Its units are the sides, "before" and "after"."""

    imports: ClassVar[tuple[str, ...]] = COMPILER
    request: Request
    before: Phases
    after: Phases
    steps: int

    def run(self, tell: Tell) -> None:
        settings = settings_of(self.request)
        rows = phasecheck.check_phase(
            settings.workload,
            asked.plan(settings.workload, self.before),
            asked.plan(settings.workload, self.after),
            preset=settings.preset,
            device=settings.device,
            dtype=settings.dtype,
            seed=settings.seed,
            data=settings.data,
            steps=self.steps,
            progress=tell.progress,
            begin=tell.begin,
        )
        for row in rows:
            tell.send(row)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One side of a workload measured; sends its stages, see :class:`Relayed`."""

    imports: ClassVar[tuple[str, ...]] = COMPILER
    request: Request
    phases: Phases
    folder: Path
    result: record.ProfileRecord
    label: str = ""

    def run(self, tell: Tell) -> None:
        settings = settings_of(self.request)
        run = Relayed(self.folder, self.result, tell)
        measure.measure(run, run.record, settings, asked.plan(settings.workload, self.phases), label=self.label)
        for doubt in device.WARNINGS:
            run.warn(doubt)


@dataclass(frozen=True, kw_only=True)
class Race:
    """The side before against the candidates, interleaved. Its units are the arms."""

    imports: ClassVar[tuple[str, ...]] = COMPILER
    request: Request
    before: Phases
    candidates: Mapping[str, Phases]

    def run(self, tell: Tell) -> race.Race:
        settings = settings_of(self.request)
        return race.run_race(
            settings,
            asked.plan(settings.workload, self.before),
            {name: asked.plan(settings.workload, phases) for name, phases in self.candidates.items()},
            rounds=self.request.rounds,
            progress=tell.progress,
            begin=tell.begin,
        )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """How often each replacement of a plan runs in a step."""

    imports: ClassVar[tuple[str, ...]] = COMPILER
    request: Request
    phases: Phases

    def run(self, tell: Tell) -> list[record.SiteHit]:
        settings = settings_of(self.request)
        tell.begin("counting replacements")
        return race.receipt_of_steps(settings, asked.plan(settings.workload, self.phases))


@dataclass(frozen=True, kw_only=True)
class WorkloadTimes:
    """All variants of a workload raced and counted; sends its stages. Its units are the variants. Returns what made it
    stop early, if it did.

    ``failed`` says why variants are left out that took an earlier process down.
    """

    imports: ClassVar[tuple[str, ...]] = COMPILER
    request: Request
    folder: Path
    result: record.BenchRecord
    failed: Mapping[str, str] = field(default_factory=dict)

    def run(self, tell: Tell) -> Poisoned | None:
        settings = settings_of(self.request)
        run = Relayed(self.folder, self.result, tell)
        watch = _Watch(tell, settings.device)
        variants = _variants(settings, self.request.use)
        try:
            race.bench_workload(run, settings, variants, self.request.rounds, failed=self.failed, begin=watch.begin)
        except _Stop as stop:
            return stop.poisoned
        for doubt in device.WARNINGS:
            run.warn(doubt)
        return None


def settings_of(request: Request) -> measure.Settings:
    """The settings of a request, in the process that measures."""
    assert request.workload is not None
    ranges.enable(request.nvtx)
    return asked.settings(request, request.workload)


def _variants(settings: measure.Settings, use: str) -> list[race.Variant]:
    """Baseline, the plan's phases one on top of the other, and the workload's peers of the baseline."""
    phases = settings.workload.phases
    bare = asked.plan(settings.workload, {})
    found = [race.Variant(race.BASELINE, bare)]
    for count in range(1, len(phases) + 1):
        numbers = [phase.number for phase in phases[:count]]
        name = f"phase{'s' if count > 1 else ''} {'+'.join(map(str, numbers))}"
        plan = asked.plan(settings.workload, dict.fromkeys(numbers, use))
        if interpreted(settings, plan):
            continue
        found.append(race.Variant(name, plan))
    return found + [race.Variant(peer.name, bare, peer.prepare) for peer in settings.workload.peers]


def interpreted(settings: measure.Settings, plan: swap.Plan) -> bool:
    """Whether a kernel of this plan runs in Triton's interpreter, so that a time would mean nothing."""
    return settings.device.type == "cpu" and any(
        hit.kernel and plan.implementations[number] == "triton" for number, hit in plan.sites()
    )


# --- stages of a record, told to the process that keeps it ------------------------------------------------------------


@dataclass(frozen=True)
class StageBegan:
    name: str


@dataclass(frozen=True)
class StageEnded:
    pass


@dataclass(frozen=True)
class Warned:
    text: str


@dataclass(frozen=True)
class Filled(Generic[AnyRecord]):
    """The record as far as it is known; the header belongs to the process that keeps it."""

    record: AnyRecord


class Relayed(Run[AnyRecord]):
    """A run whose record is kept elsewhere: what it would write or note is sent."""

    def __init__(self, folder: Path, result: AnyRecord, tell: Tell) -> None:
        super().__init__(folder, result, tell.progress)
        self.tell = tell

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As a run's stage; one that raises is ended by the process that keeps the record."""
        self.tell.begin(name)
        self.tell.send(StageBegan(name))
        yield
        self.write()
        self.tell.send(StageEnded())

    def warn(self, message: str) -> None:
        self.tell.send(Warned(message))

    def write(self) -> None:
        self.tell.send(Filled(self.record))


def fill(kept: record.Header, found: record.Header) -> None:
    """Take over what a job found, but not the header."""
    for name in found.__struct_fields__:
        if name not in record.Header.__struct_fields__:
            setattr(kept, name, getattr(found, name))
