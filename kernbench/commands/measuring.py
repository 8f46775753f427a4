"""Commands that run code of workloads and kernels: profile, swap, parity, bench, doctor."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from kernbench import ranks as places
from kernbench.commands.ending import NEGATIVE, OK, progress, show, typed
from kernbench.commands.options import (
    Data,
    Device,
    Dtype,
    InProcess,
    Json,
    Nvtx,
    Phases,
    Preset,
    Quiet,
    Ranks,
    Rounds,
    Seed,
    Steps,
    TimeLimit,
    Use,
    Weights,
    WorkloadArgument,
)
from kernbench.errors import KernbenchError

_program = False


def own_program() -> None:
    """From now on this process runs one command and nothing else, so that it may be copied."""
    global _program
    _program = True


def prepared(device: str, in_process: bool) -> tuple[Any, Any]:
    """The pipeline, and the request it takes. Their imports take seconds, and the children need the same: those share
    this process's, or, where it may come to use a GPU, which no copy of it could, are started beside them."""
    from kernbench.children import childserver, servers

    copied = _program and servers.on_cpu(device) and not in_process
    if not in_process and not copied:
        servers.prepare(device)
    with childserver.imports() if _program else nullcontext():
        # Triton's own functions are interpreted or not by how it is first imported, and the pipeline imports it.
        from kernbench.device import resolve

        chosen = resolve(device)
        from kernbench import pipeline
        from kernbench.request import Request

        if copied and chosen.type == "cpu":
            servers.fork()
    return pipeline, Request


def profile(
    workload: WorkloadArgument,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Seed = 0,
    data: Data = None,
    weights: Weights = None,
    steps: Steps = 20,
    phases: Phases = None,
    use: Use = "triton",
    nvtx: Nvtx = False,
    ranks: Ranks = None,
    time_limit: TimeLimit = None,
    in_process: InProcess = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run steps of a workload, rank hotspots and stalls by source line, and write a report."""
    pipeline, Request = prepared(device, in_process)
    request = Request(
        command=typed(), workload=workload, preset=preset, device=device, dtype=dtype, seed=seed, data=data,
        weights=weights, steps=steps, phases=phases, use=use, nvtx=nvtx, time_limit=time_limit, in_process=in_process,
        ranks=ranks,
    )  # fmt: skip
    outcome = pipeline.profile(request, progress(quiet))
    if outcome is not None:
        show(outcome, as_json)
    return OK


def swap(
    workload: Annotated[str | None, typer.Argument(help="As for profile; the one profiled last if left out.")] = None,
    phase: Annotated[int | None, typer.Option(help="Number of the phase to try on top of the kept ones.")] = None,
    revert: Annotated[bool, typer.Option("--revert", help="Take the phase kept last out again.")] = False,
    walk: Annotated[bool, typer.Option("--all", help="Walk the plan to its end.")] = False,
    use: Use = "triton",
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Seed = 0,
    data: Data = None,
    weights: Weights = None,
    steps: Steps = 20,
    rounds: Rounds = 30,
    phases: Phases = None,
    time_limit: TimeLimit = None,
    in_process: InProcess = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Try a phase: parity first, then interleaved timing, then the verdict; it stays only if that says so."""
    if (phase is not None) + revert + walk != 1:
        raise KernbenchError("say which: --phase N, --all, or --revert")
    places.refuse("swap")
    pipeline, Request = prepared(device, in_process or revert)
    request = Request(
        command=typed(), workload=workload, preset=preset, device=device, dtype=dtype, seed=seed, data=data,
        weights=weights, steps=steps, rounds=rounds, phases=phases, use=use, time_limit=time_limit,
        in_process=in_process,
    )  # fmt: skip
    if revert:
        reverted = pipeline.revert(request)
        print(json.dumps(reverted) if as_json else reverted["sentence"])
        return OK
    code = OK
    for outcome in pipeline.swaps(request, phase, progress(quiet)):
        show(outcome, as_json)
        code = max(code, NEGATIVE if outcome.negative else OK)
    return code


def parity(
    names: Annotated[list[str] | None, typer.Argument(help="Kernels or workloads; all kernels if left out.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    case: Annotated[str | None, typer.Option(help="Only the case of this name.")] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Also run each kernel under compute-sanitizer: memcheck and racecheck.")
    ] = False,
    preset: Preset = None,
    seed: Seed = 0,
    data: Data = None,
    weights: Weights = None,
    time_limit: TimeLimit = None,
    in_process: InProcess = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check kernels against the float64 oracle, or a workload's phases on real steps."""
    places.refuse("parity")
    pipeline, Request = prepared(device, in_process)
    request = Request(
        command=typed(), preset=preset, device=device, dtype=dtype, seed=seed, data=data, weights=weights,
        time_limit=time_limit, in_process=in_process,
    )  # fmt: skip
    outcome = pipeline.check(request, names or [], case, progress(quiet), sanitize=sanitize)
    show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Kernels or one workload; all kernels if left out.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    case: Annotated[str | None, typer.Option(help="Only the case of this name; * stands for anything.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE[=FROM:TO|=A,B,C]",
            help="Walk through one size of kernels, or of a workload's: seeds=100:10000.",
        ),
    ] = None,
    preset: Preset = None,
    seed: Seed = 0,
    data: Data = None,
    weights: Weights = None,
    rounds: Rounds = 30,
    use: Use = "triton",
    direction: Annotated[str, typer.Option(help="What of a kernel to time: forward, backward, or both.")] = "both",
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Time nothing: build every kernel and case, without a GPU.")
    ] = False,
    arch: Annotated[
        list[str] | None, typer.Option(help="With --compile-only: sm_90, say; again for more. Default: sm_80, 90, 100.")
    ] = None,
    time_limit: TimeLimit = None,
    in_process: InProcess = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Time eager, torch.compile, Triton and library peers on the measured roofline, or a workload with its phases."""
    if arch and not compile_only:
        raise KernbenchError("--arch goes with --compile-only; a timed kernel is built for the device that runs it")
    if compile_only and direction != "both":
        raise KernbenchError("--direction chooses what is timed; --compile-only times nothing and builds both")
    if sweep is not None and (case is not None or compile_only):
        raise KernbenchError("--sweep makes its own cases and times them; leave out --case and --compile-only")
    places.refuse("bench")
    pipeline, Request = prepared(device, in_process)
    request = Request(
        command=typed(), preset=preset, device=device, dtype=dtype, seed=seed, data=data, weights=weights,
        rounds=rounds, use=use, direction=direction, time_limit=time_limit, in_process=in_process,
    )  # fmt: skip
    if compile_only:
        outcome = pipeline.build(request, names or [], case, arch, progress(quiet))
    else:
        outcome = pipeline.time(request, names or [], case, progress(quiet), over=sweep)
    show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


def doctor(device: Device = "auto", as_json: Json = False, quiet: Quiet = False) -> int:
    """Show the device, versions, what works here, and the measured ceilings."""
    from kernbench import pipeline
    from kernbench.report import console

    findings = pipeline.doctor(device, progress(quiet))
    if as_json:
        print(json.dumps(findings, indent=1))
    else:
        console.show_doctor(findings)
    return OK
