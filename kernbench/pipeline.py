"""The product in order: each measuring command of the terminal is one function here, from request to record on disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernbench
from kernbench import (
    bench,
    device,
    experiment,
    journal,
    measure,
    parity,
    race,
    ranges,
    record,
    registry,
    runfolder,
    state,
)
from kernbench import request as asked
from kernbench.errors import KernbenchError
from kernbench.progress import Progress
from kernbench.publish import Outcome, publish
from kernbench.registry import Workspace
from kernbench.request import Request
from kernbench.runfolder import AnyRecord, Run
from kernbench.spec import Case, KernelSpec


def profile(request: Request, progress: Progress) -> Outcome:
    """Run steps of a workload, rank hotspots and stalls, and write record, trace and report.

    Raises:
        KernbenchError: bad input. WorkloadFailed: the workload's own code failed.
    """
    assert request.workload is not None
    workspace = registry.current()
    settings = asked.settings(request, request.workload)
    plan = asked.plan(settings.workload, asked.active(settings.workload, request, workspace))
    ranges.enable(request.nvtx)
    run = _start(
        record.ProfileRecord, request, "profile", settings.workload.name, settings.device, progress,
        workload=settings.describe(plan),
    )  # fmt: skip
    if experiment.interpreted(settings, plan):
        run.warn(
            "a Triton kernel in place runs in the interpreter here: its step times say nothing of its speed on a GPU"
        )
    measure.measure(run, run.record, settings, plan)
    _remember_profile(workspace, request, settings)
    return publish(run, workspace)


def swaps(request: Request, number: int | None, progress: Progress) -> Iterator[Outcome]:
    """Try one phase, or with ``number`` None every phase of the plan that is not kept yet, one outcome after the other.

    Raises:
        KernbenchError: bad input, or another swap is running in this workspace.
        WorkloadFailed: the workload's own code failed.
    """
    workspace = registry.current()
    reference, request = asked.workload_or_last(request, workspace)
    with state.swap_lock(workspace.root):
        settings = asked.settings(request, reference)
        if number is not None:
            numbers = [number]
        else:
            active = asked.active(settings.workload, request, workspace)
            numbers = [phase.number for phase in settings.workload.phases if phase.number not in active]
        for one in numbers:
            yield _swap(request, settings, one, workspace, progress)


def _swap(
    request: Request, settings: measure.Settings, number: int, workspace: Workspace, progress: Progress
) -> Outcome:
    phase = asked.phase(settings.workload, number)
    kept = {one: name for one, name in asked.active(settings.workload, request, workspace).items() if one != number}
    before = asked.plan(settings.workload, kept)
    candidates = {
        name: asked.plan(settings.workload, {**kept, number: name}) for name in asked.candidates(phase, request.use)
    }
    run = _start(
        record.SwapRecord, request, f"swap-phase{number}", settings.workload.name, settings.device, progress,
        workload=settings.describe(before),
        phase=record.PhaseInfo(number=number, title=phase.title, flag=phase.flag),
    )  # fmt: skip
    result = run.record
    experiment.judge(run, settings, phase, before, candidates, request.rounds)
    assert result.verdict is not None
    if result.verdict.decision == "keep":
        _keep(workspace, result)
    outcome = publish(run, workspace)
    journal.append(workspace.journal, result, run.report_path)
    return outcome


def revert(request: Request) -> dict[str, Any]:
    """Take the phase kept last out again.

    Raises:
        KernbenchError: nothing is kept for this workload.
    """
    workspace = registry.current()
    reference, _ = asked.workload_or_last(request, workspace)
    name = registry.workload(reference).declaration.name
    with state.swap_lock(workspace.root):
        kept = state.load(workspace.root).kept.get(name, [])
        state.update(workspace.root, lambda now: now.reverting(name))
    left = [phase.number for phase in kept[:-1]]
    sentence = f"{name}: phase {kept[-1].number} is out; kept now: {', '.join(map(str, left)) or 'none'}"
    return {"workload": name, "reverted": kept[-1].number, "kept": left, "sentence": sentence}


def check(request: Request, names: Sequence[str], case: str | None, progress: Progress) -> Outcome:
    """Parity of the named kernels (all if none is named), and of the phases of the named workloads on real steps.

    Raises:
        KernbenchError: a name that is neither a kernel nor a workload, or a case or dtype that a kernel does not have.
    """
    subjects = _subjects(request, names, case)
    run = _start(record.ParityRecord, request, "parity", subjects.group, subjects.device, progress)
    result = run.record
    for spec, cases in subjects.kernels:
        with run.stage(spec.name):
            result.results.extend(
                parity.check_kernel(
                    spec,
                    device=subjects.device,
                    dtypes=subjects.dtypes,
                    cases=cases,
                    seed=request.seed,
                    progress=progress,
                )
            )
    for settings in subjects.workloads:
        plans = [asked.plan(settings.workload, {})]
        for phase in settings.workload.phases:
            plans.append(asked.plan(settings.workload, dict.fromkeys([*plans[-1].numbers, phase.number], "triton")))
        for before, after in zip(plans, plans[1:], strict=False):
            with run.stage(f"{settings.workload.name} phases {after.numbers}"):
                result.results.extend(experiment.check_phase(settings, before, after, progress))
    return publish(run, registry.current())


def time(request: Request, names: Sequence[str], case: str | None, progress: Progress) -> Outcome:
    """Time kernels (all if none is named) on the measured roofline, or one workload: baseline, phases, and peers.

    Raises:
        KernbenchError: as for :func:`check`, or kernels and workloads, or several workloads, at once.
    """
    subjects = _subjects(request, names, case)
    if len(subjects.workloads) + bool(subjects.kernels) > 1:
        raise KernbenchError("bench times either kernels or one workload; name them in separate commands")
    run = _start(record.BenchRecord, request, "bench", subjects.group, subjects.device, progress)
    result = run.record
    for spec, cases in subjects.kernels:
        with run.stage(spec.name):
            for row in bench.bench_kernel(
                spec,
                device=subjects.device,
                dtypes=subjects.dtypes,
                cases=cases,
                rounds=request.rounds,
                ceilings=result.environment.ceilings,
                progress=progress,
            ):
                result.results.append(row)
                run.write()
    for settings in subjects.workloads:
        race.bench_workload(run, settings, _variants(settings, request.use), request.rounds)
    return publish(run, registry.current())


def doctor(name: str, progress: Progress) -> dict[str, Any]:
    """Device, versions, what works here, and the measured ceilings."""
    chosen = device.resolve(name)
    with progress.stage("measuring ceilings"):
        environment = device.fingerprint(chosen, ceilings=_ceilings(chosen))
    with progress.stage("trying what works here"):
        capabilities = device.capabilities(chosen)
    return {
        "kernbench": kernbench.__version__,
        "environment": record.to_builtins(environment),
        "capabilities": [{"name": name, "works": works, "detail": detail} for name, works, detail in capabilities],
        "workspaces": [str(workspace.root) for workspace in registry.workspaces()],
    }


@dataclass(frozen=True)
class _Subjects:
    """What parity and bench were asked to look at, all of it checked before anything is written."""

    device: torch.device
    kernels: list[tuple[KernelSpec, list[Case] | None]]
    workloads: list[measure.Settings]
    dtypes: list[str] | None

    @property
    def group(self) -> str:
        """The folder under reports/ for a run over them."""
        return "kernels" if self.kernels else self.workloads[0].workload.name


def _subjects(request: Request, names: Sequence[str], case: str | None) -> _Subjects:
    """Kernels and workloads apart; no names means all kernels."""
    chosen = device.resolve(request.device)
    known = registry.kernels()
    kernels = [known[name].declaration for name in names or known if name in known]
    others = [name for name in names if name not in known]
    for name in others:
        if ".py" not in name:
            registry.nearest(name, [*known, *registry.workloads()], "kernel or workload")
    for spec in kernels:
        if request.dtype is not None:
            registry.nearest(request.dtype, spec.tolerance, f"dtype of {spec.name}")
    return _Subjects(
        device=chosen,
        kernels=[(spec, _one_case(spec, case)) for spec in kernels],
        workloads=[asked.settings(request, name) for name in others],
        dtypes=[request.dtype] if request.dtype else None,
    )


def _variants(settings: measure.Settings, use: str) -> list[race.Variant]:
    """Baseline, the plan's phases one on top of the other, and the workload's peers of the baseline."""
    phases = settings.workload.phases
    bare = asked.plan(settings.workload, {})
    found = [race.Variant("baseline", bare)]
    for count in range(1, len(phases) + 1):
        numbers = [phase.number for phase in phases[:count]]
        name = f"phase{'s' if count > 1 else ''} {'+'.join(map(str, numbers))}"
        plan = asked.plan(settings.workload, dict.fromkeys(numbers, use))
        if experiment.interpreted(settings, plan):
            continue
        found.append(race.Variant(name, plan))
    return found + [race.Variant(peer.name, bare, peer.prepare) for peer in settings.workload.peers]


def _one_case(spec: KernelSpec, name: str | None) -> list[Case] | None:
    if name is None:
        return None
    registry.nearest(name, [case.name for case in spec.cases], f"case of {spec.name}")
    return [case for case in spec.cases if case.name == name]


def _start(
    kind: type[AnyRecord],
    request: Request,
    what: str,
    group: str,
    chosen: torch.device,
    progress: Progress,
    **fields: Any,
) -> Run[AnyRecord]:
    """A run of this kind of record: its folder first, so that nothing is measured that cannot be written."""
    workspace = registry.current()
    run_id = runfolder.new_run_id(what)
    folder = runfolder.make_folder(workspace, group, run_id)
    with progress.stage("measuring this device's ceilings"):
        ceilings = _ceilings(chosen)
    result = kind(
        run_id=run_id,
        created_utc=runfolder.now_utc().isoformat(timespec="seconds"),
        command=request.command,
        environment=device.fingerprint(chosen, ceilings=ceilings),
        git=device.git(workspace.root),
        warnings=list(device.WARNINGS),
        **fields,
    )
    return Run(folder, result, progress)


@functools.cache
def _ceilings(chosen: torch.device) -> record.Ceilings:
    """Measured once per process: the phases of one walk share them."""
    return device.measure_ceilings(chosen)


def _remember_profile(workspace: Workspace, request: Request, settings: measure.Settings) -> None:
    reference = request.workload or settings.workload.name
    if reference.partition(":")[0].endswith(".py"):
        file, _, name = reference.partition(":")
        reference = f"{Path(file).resolve()}:{name}".rstrip(":")
    state.update(workspace.root, lambda now: now.profiled(reference, settings.preset, request.device))


def _keep(workspace: Workspace, result: record.SwapRecord) -> None:
    kept = state.KeptPhase(
        number=result.phase.number,
        implementation=result.phase.implementation,
        run_id=result.run_id,
        kept_utc=result.created_utc,
    )
    state.update(workspace.root, lambda now: now.keeping(result.workload.name, kept))
