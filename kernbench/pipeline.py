"""The product in order: each measuring command of the terminal is one function here, from request to record on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import kernbench
from kernbench import claims, device, experiment, journal, ranges, record, registry, runfolder, state, sweep
from kernbench import request as asked
from kernbench.bench import directions_of
from kernbench.children import kernelruns, rankruns, supervised, workloadruns
from kernbench.children.jobs import interpreted
from kernbench.compilation import builds
from kernbench.errors import KernbenchError
from kernbench.measurement import measure, statistics
from kernbench.measurement.backward import BACKWARD, BOTH, FORWARD
from kernbench.parity import sanitizer
from kernbench.progress import Progress
from kernbench.publish import Outcome, publish
from kernbench.registry import Workspace
from kernbench.request import Request
from kernbench.runfolder import AnyRecord, Run
from kernbench.spec import Case, KernelSpec


def profile(request: Request, progress: Progress) -> Outcome | None:
    """Run steps of a workload, rank hotspots and stalls, and write record, trace and report; on one rank or several.

    Returns:
        None in a process that a launcher made another rank than 0: that one writes.

    Raises:
        KernbenchError: bad input. WorkloadFailed: the workload's own code failed.
    """
    team = rankruns.team(request)
    wanted, reference = request, request.workload
    assert reference is not None
    if team is not None:
        request = replace(request, device=team.home)
    workspace = registry.current()
    settings = asked.settings(request, reference)
    plan = asked.plan(settings.workload, asked.active(settings.workload, request, workspace))
    ranges.enable(request.nvtx)
    if team is not None and team.follows:
        rankruns.follow(request, settings, plan, team)
        return None
    run = _start(
        record.ProfileRecord, request, "profile", settings.workload.name, settings.device, progress,
        workload=settings.describe(plan),
    )  # fmt: skip
    if interpreted(settings, plan):
        run.warn(
            "a Triton kernel in place runs in the interpreter here: its step times say nothing of its speed on a GPU"
        )
    if team is None:
        workloadruns.measure_side(run, run.record, request, settings, plan)
    else:
        rankruns.lead(run, request, settings, plan, team)
    _remember_profile(workspace, wanted, settings)
    return publish(run, workspace)


def swaps(request: Request, number: int | None, progress: Progress) -> Iterator[Outcome]:
    """Try one phase, or with ``number`` None every phase of the plan that is not kept yet, one outcome after the other.

    Raises:
        KernbenchError: bad input, or another swap is running in this workspace.
        WorkloadFailed: the workload's own code failed.
    """
    workspace = registry.current()
    reference, request = asked.workload_or_last(request, workspace)
    supervised.check_declarations(request, progress)
    with state.swap_lock(workspace.root):
        settings = asked.settings(request, reference)
        if number is not None:
            yield _swap(request, settings, number, workspace, progress)
            return
        for phase in settings.workload.phases:
            active = asked.active(settings.workload, request, workspace)
            if lacking := phase.lacks(active):
                names = " and ".join(map(str, lacking))
                progress.note(f"phase {phase.number} ({phase.title}) is left out: it needs phase {names}, not kept")
            elif phase.number not in active:
                yield _swap(request, settings, phase.number, workspace, progress)


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
    experiment.judge(run, request, settings, phase, before, candidates)
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


def check(
    request: Request, names: Sequence[str], case: str | None, progress: Progress, *, sanitize: bool = False
) -> Outcome:
    """Parity of the named kernels (all if none is named), and of the phases of the named workloads on real steps.

    Args:
        sanitize: run the kernels under compute-sanitizer, too.

    Raises:
        KernbenchError: a name that is neither a kernel nor a workload, a case or dtype that a kernel does not have, or
            no kernel, GPU or compute-sanitizer to sanitize with.
    """
    supervised.check_declarations(request, progress)
    subjects = _subjects(request, names, case)
    if sanitize:
        _check_sanitizable(subjects)
    run = _start(record.ParityRecord, request, "parity", subjects.group, subjects.device, progress)
    result = run.record

    def keep(rows: list[record.ParityResult]) -> None:
        result.results[:] = rows
        run.write()

    if subjects.kernels:
        with run.stage("kernels"):
            kernelruns.check_kernels(subjects.kernels, request, subjects.device, progress, keep, dtypes=subjects.dtypes)
    if sanitize:
        with run.stage("compute-sanitizer"):
            for spec, cases in subjects.kernels:
                for one in [None] if cases is None else [chosen.name for chosen in cases]:
                    for found in sanitizer.sanitize([spec.name], dtype=request.dtype, case=one, progress=progress):
                        result.sanitizer.append(found)
                        run.write()
    for named, settings in subjects.workloads:
        plans = [asked.plan(settings.workload, {})]
        for phase in settings.workload.phases:
            plans.append(asked.plan(settings.workload, dict.fromkeys([*plans[-1].numbers, phase.number], "triton")))
        for before, after in zip(plans, plans[1:], strict=False):
            with run.stage(f"{settings.workload.name} phases {after.numbers}"):
                result.results.extend(workloadruns.check_phase(named, settings, before, after, progress))
    return publish(run, registry.current())


def time(
    request: Request, names: Sequence[str], case: str | None, progress: Progress, *, over: str | None = None
) -> Outcome:
    """Time kernels (all if none is named) on the measured roofline, or one workload: baseline, phases, and peers.

    Args:
        over: the sweep to time instead of the cases, as typed; of a workload, its kernels are swept.

    Raises:
        KernbenchError: as for :func:`check`, or kernels and workloads, or several workloads, at once, or a direction
            that none of the kernels has, or no such sweep.
    """
    supervised.check_declarations(request, progress)
    subjects = _subjects(request, names, case)
    sweeps: list[record.Sweep] = []
    if over is not None:
        if request.preset is not None:
            raise KernbenchError("--preset chooses the size of a step; --sweep times kernels, so leave one of them out")
        known = {name: found.declaration for name, found in registry.kernels().items()}
        plans = [settings.workload for _, settings in subjects.workloads]
        specs = [spec for spec, _ in subjects.kernels] + sweep.kernels_of(plans, known, sweep.size_of(over))
        kernels, sweeps = sweep.cases_of_all(specs, over, named=bool(names))
        subjects = replace(subjects, kernels=kernels, workloads=[])
    if len(subjects.workloads) + bool(subjects.kernels) > 1:
        raise KernbenchError("bench times either kernels or one workload; name them in separate commands")
    _check_direction(request, subjects)
    run = _start(record.BenchRecord, request, "bench", subjects.group, subjects.device, progress)
    result = run.record
    result.sweeps = sweeps

    def take(row: record.BenchResult) -> None:
        result.results.append(row)
        run.write()

    for spec, cases in subjects.kernels:
        if not directions_of(spec, request.direction):
            continue
        with run.stage(spec.name):
            kernelruns.bench_kernel(
                spec,
                request,
                subjects.device,
                progress,
                take,
                dtypes=subjects.dtypes or ([next(iter(spec.tolerance))] if sweeps else None),
                cases=cases,
                ceilings=result.environment.ceilings,
                swept=bool(sweeps),
            )
        result.claims += claims.check(spec, result.results, result.environment.ceilings)
    for named, settings in subjects.workloads:
        workloadruns.bench_workload(run, named, settings)
    workspace = registry.current()
    outcome = publish(run, workspace)
    if journal.belongs(result):
        journal.append(workspace.journal, result, run.report_path)
    return outcome


def build(
    request: Request, names: Sequence[str], case: str | None, archs: Sequence[str] | None, progress: Progress
) -> Outcome:
    """Compile the named kernels (all if none is named) for every architecture, without a GPU.

    Raises:
        KernbenchError: as for :func:`check`, a workload, or an unknown architecture.
        WorkloadFailed: a kernel's file cannot be imported without Triton's interpreter.
    """
    supervised.check_declarations(request, progress)
    subjects = _subjects(request, names, case)
    if subjects.workloads:
        raise KernbenchError("--compile-only builds kernels; name kernels, or nothing for all of them")
    chosen = archs or builds.ARCHS
    specs = [spec for spec, _ in subjects.kernels]
    cases = {spec.name: found for spec, found in subjects.kernels if found is not None}
    built = builds.compile_kernels(specs, archs=chosen, dtypes=subjects.dtypes, cases=cases, progress=progress)
    run = _start(record.BenchRecord, request, "builds", subjects.group, subjects.device, progress)
    with run.stage("compile"):
        run.record.builds.extend(built)
    return publish(run, registry.current())


def doctor(name: str, progress: Progress) -> dict[str, Any]:
    """Device, versions, what works here, and the measured ceilings."""
    chosen = device.resolve(name)
    with progress.stage("measuring ceilings"):
        environment = device.fingerprint(chosen, ceilings=device.measure_ceilings(chosen))
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
    kernels: Sequence[tuple[KernelSpec, list[Case] | None]]
    workloads: list[tuple[Request, measure.Settings]]
    """Each with the request that names it."""
    dtypes: list[str] | None

    @property
    def group(self) -> str:
        """The folder under reports/ for a run over them."""
        return "kernels" if self.kernels else self.workloads[0][1].workload.name


def _subjects(request: Request, names: Sequence[str], case: str | None) -> _Subjects:
    """Kernels and workloads apart; no names means all kernels."""
    chosen = device.resolve(request.device)
    known = registry.kernels()
    kernels = [known[name].declaration for name in names or known if name in known]
    others = [name for name in names if name not in known]
    if request.weights is not None and not others:
        raise KernbenchError("--weights goes with a workload; kernels are checked and timed on inputs of their own")
    if case is not None and others:
        raise KernbenchError(f"--case goes with kernels; a step of {others[0]} has none, so leave it out")
    for name in others:
        if ".py" not in name:
            registry.nearest(name, [*known, *registry.workloads()], "kernel or workload")
    for spec in kernels:
        if request.dtype is not None:
            registry.nearest(request.dtype, spec.tolerance, f"dtype of {spec.name}")
    return _Subjects(
        device=chosen,
        kernels=[(spec, _cases(spec, case)) for spec in kernels],
        workloads=[(replace(request, workload=name), asked.settings(request, name)) for name in others],
        dtypes=[request.dtype] if request.dtype else None,
    )


def _check_direction(request: Request, subjects: _Subjects) -> None:
    registry.nearest(request.direction, (FORWARD, BACKWARD, BOTH), "direction")
    if subjects.workloads and request.direction != BOTH:
        raise KernbenchError("--direction goes with kernels; a step of a workload is timed as a whole")
    if subjects.kernels and not any(directions_of(spec, request.direction) for spec, _ in subjects.kernels):
        names = ", ".join(spec.name for spec, _ in subjects.kernels)
        raise KernbenchError(f"there is no backward to time, as no kernel named is differentiable: {names}")


def _check_sanitizable(subjects: _Subjects) -> None:
    if not subjects.kernels:
        raise KernbenchError("--sanitize runs kernels; name at least one, or nothing for all of them")
    if subjects.device.type != "cuda":
        raise KernbenchError("--sanitize needs a CUDA device: compute-sanitizer watches what a GPU executes")
    sanitizer.find()


def _cases(spec: KernelSpec, name: str | None) -> list[Case] | None:
    """The cases of a name or pattern, None for all."""
    if name is None:
        return None
    found = [case for case in spec.cases if fnmatchcase(case.name, name)]
    if found:
        return found
    registry.nearest(name, [case.name for case in spec.cases], f"case of {spec.name}")
    return None


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
    environment, doubts = _survey(request, chosen, progress)
    result = kind(
        run_id=run_id,
        created_utc=runfolder.now_utc().isoformat(timespec="seconds"),
        command=request.command,
        environment=environment,
        git=device.git(workspace.root),
        confidence=statistics.CONFIDENCE,
        warnings=doubts,
        **fields,
    )
    return Run(folder, result, progress)


_surveyed: dict[str, tuple[record.Environment, list[str]]] = {}


def _survey(request: Request, chosen: torch.device, progress: Progress) -> tuple[record.Environment, list[str]]:
    """Asked once per process: the phases of one walk share the ceilings."""
    if str(chosen) not in _surveyed:
        _surveyed[str(chosen)] = supervised.survey(request, chosen, progress)
    environment, doubts = _surveyed[str(chosen)]
    return environment, list(doubts)


def _remember_profile(workspace: Workspace, request: Request, settings: measure.Settings) -> None:
    reference = request.workload or settings.workload.name
    if reference.partition(":")[0].endswith(".py"):
        file, _, name = reference.partition(":")
        reference = f"{Path(file).resolve()}:{name}".rstrip(":")
    weights = str(Path(settings.weights).resolve()) if settings.weights else ""
    state.update(workspace.root, lambda now: now.profiled(reference, settings.preset, request.device, weights))


def _keep(workspace: Workspace, result: record.SwapRecord) -> None:
    kept = state.KeptPhase(
        number=result.phase.number,
        implementation=result.phase.implementation,
        run_id=result.run_id,
        kept_utc=result.created_utc,
    )
    state.update(workspace.root, lambda now: now.keeping(result.workload.name, kept))
