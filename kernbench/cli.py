"""The command line: parse, call one pipeline function, print. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import _thread
import functools
import json
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kernbench import __version__
from kernbench.errors import KernbenchError

if TYPE_CHECKING:
    from kernbench.publish import Outcome

OK, NEGATIVE, INTERRUPTED = 0, 1, 130

app = typer.Typer(
    name="kernbench",
    help="Profile a PyTorch step, swap Triton kernels in with proof, and write the answer down.",
    epilog="Start with: kernbench list; then: kernbench profile titan-mac",
    no_args_is_help=True,
    # Rich help would cost 0.2 s at every start; results are printed with rich all the same.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

WorkloadArgument = Annotated[str, typer.Argument(help="A name from kernbench list, ./file.py, or ./file.py:name.")]
Preset = Annotated[str | None, typer.Option(help="Size to run, from kernbench list; the first one if left out.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="Working dtype, for example float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="Seed of parameters and data.")]
Data = Annotated[str | None, typer.Option(metavar="FILE", help="Text to train on instead of the built-in one.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Checkpoint to run instead of random weights, if the workload takes one."),
]
Steps = Annotated[int, typer.Option(min=1, help="Timed steps.")]
Rounds = Annotated[int, typer.Option(min=3, help="Interleaved rounds of before and after.")]
Nvtx = Annotated[bool, typer.Option("--nvtx", help="Emit NVTX ranges for steps, phases, modules and kernels.")]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        min=0.1,
        help="Limit of each unit of work in its child process; 120 for a kernel's, 600 for a workload's, if left out.",
    ),
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="Run everything in this process, without limits, for a debugger.")
]
Use = Annotated[str, typer.Option(help="Implementation of a kernel phase: triton, compile, eager, or auto (fastest).")]
Phases = Annotated[str | None, typer.Option(help="Phases in place, as in 0,2 or none; what was kept if left out.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the record as JSON on standard output and nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _reported(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's result or error into output and exit code: one sentence for the user's errors, no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            raise typer.Exit(command(*args, **options))
        except KernbenchError as error:
            _complain(str(error), error.traceback_text)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _complain("interrupted; the stages finished so far are on disk")
            raise typer.Exit(INTERRUPTED) from None

    return run


def _complain(message: str, details: str = "") -> None:
    if details:
        print(details.rstrip(), file=sys.stderr)
    print(f"kernbench: {message}", file=sys.stderr)


def _command() -> str:
    return shlex.join(["kernbench", *sys.argv[1:]])


def _measuring(device: str, in_process: bool) -> tuple[Any, Any]:
    """The pipeline, and the request it takes. Their imports take seconds; the children's are started beside them."""
    if not in_process:
        from kernbench import isolation

        isolation.prepare(device)
    # Triton's own functions are interpreted or not by how it is first imported, and the pipeline imports it.
    from kernbench.device import resolve

    resolve(device)
    from kernbench import pipeline
    from kernbench.request import Request

    return pipeline, Request


def _progress(quiet: bool) -> Any:
    from kernbench.report import console

    return console.progress(quiet=quiet)


def _show(outcome: Outcome, as_json: bool) -> None:
    from kernbench import record
    from kernbench.report import console

    if as_json:
        sys.stdout.write(record.encode(outcome.record).decode())
    else:
        console.show(outcome.record, outcome.report)


@app.command("list", epilog="Example: kernbench list --runs")
@_reported
def list_(
    runs: Annotated[bool, typer.Option("--runs", help="List finished runs instead.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show workloads with presets and phases, kernels with cases, and what is active."""
    from kernbench import catalogue
    from kernbench.report import console

    if runs:
        found = catalogue.runs()
        print(json.dumps(found, indent=1)) if as_json else console.show_runs(found)
    else:
        declared = catalogue.declarations()
        print(json.dumps(declared, indent=1)) if as_json else console.show_declarations(declared)
    return OK


@app.command(epilog="Example: kernbench profile titan-mac --preset tiny")
@_reported
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
    time_limit: TimeLimit = None,
    in_process: InProcess = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run steps of a workload, rank hotspots and stalls by source line, and write a report."""
    pipeline, Request = _measuring(device, in_process)
    request = Request(
        command=_command(), workload=workload, preset=preset, device=device, dtype=dtype, seed=seed, data=data,
        weights=weights, steps=steps, phases=phases, use=use, nvtx=nvtx, time_limit=time_limit, in_process=in_process,
    )  # fmt: skip
    _show(pipeline.profile(request, _progress(quiet)), as_json)
    return OK


@app.command(epilog="Example: kernbench swap --phase 0 titan-mac")
@_reported
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
    pipeline, Request = _measuring(device, in_process or revert)
    request = Request(
        command=_command(), workload=workload, preset=preset, device=device, dtype=dtype, seed=seed, data=data,
        weights=weights, steps=steps, rounds=rounds, phases=phases, use=use, time_limit=time_limit,
        in_process=in_process,
    )  # fmt: skip
    if revert:
        reverted = pipeline.revert(request)
        print(json.dumps(reverted) if as_json else reverted["sentence"])
        return OK
    code = OK
    for outcome in pipeline.swaps(request, phase, _progress(quiet)):
        _show(outcome, as_json)
        code = max(code, NEGATIVE if outcome.negative else OK)
    return code


@app.command(epilog="Example: kernbench parity fused_adamw")
@_reported
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
    pipeline, Request = _measuring(device, in_process)
    request = Request(
        command=_command(), preset=preset, device=device, dtype=dtype, seed=seed, data=data, weights=weights,
        time_limit=time_limit, in_process=in_process,
    )  # fmt: skip
    outcome = pipeline.check(request, names or [], case, _progress(quiet), sanitize=sanitize)
    _show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


@app.command(epilog="Example: kernbench bench fused_adamw --case 401-tensors")
@_reported
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
    pipeline, Request = _measuring(device, in_process)
    request = Request(
        command=_command(), preset=preset, device=device, dtype=dtype, seed=seed, data=data, weights=weights,
        rounds=rounds, use=use, direction=direction, time_limit=time_limit, in_process=in_process,
    )  # fmt: skip
    if compile_only:
        outcome = pipeline.build(request, names or [], case, arch, _progress(quiet))
    else:
        outcome = pipeline.time(request, names or [], case, _progress(quiet), over=sweep)
    _show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


@app.command(epilog="Example: kernbench analyze trace.json.gz")
@_reported
def analyze(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="A torch.profiler trace; several are the ranks of one run.")
    ],
    no_html: Annotated[bool, typer.Option("--no-html", help="Keep the record alone, without a page.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Explain any Kineto trace (.json or .json.gz): what costs time, at which line, and what is won without it.

    Results go to reports/analyze/ of the workspace that the current folder is in, else of the current folder.
    """
    from kernbench import analyze

    _show(analyze.analyze(traces, _command(), _progress(quiet), page=not no_html), as_json)
    return OK


@app.command(epilog="Example: kernbench compare 20261121-1015 20261121-1100")
@_reported
def compare(
    run_a: Annotated[
        str, typer.Argument(help="The run before: a folder, a record.json, part of a run id, or a trace file.")
    ],
    run_b: Annotated[str, typer.Argument(help="The run after; a trace, if the other is one.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Set two runs or two traces side by side, with a report; exit code 1 if the second one is slower."""
    from kernbench import comparison

    outcome = comparison.compare(run_a, run_b, _command())
    _show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


@app.command(epilog='Example: kernbench query 20261121-1015 "select op, sum(duration_ns) from kernels group by op"')
@_reported
def query(
    run: Annotated[str, typer.Argument(help="A run folder, a record.json, part of a run id, or a trace file.")],
    sql: Annotated[
        str | None, typer.Argument(help="One SELECT; tables and columns are shown if it is left out.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Ask a run's trace in SQL: tables events, kernels, stalls and steps, times in whole nanoseconds."""
    from kernbench import query

    answer = query.query(run, sql) if sql is not None else query.schema(run)
    print(json.dumps(query.plain(answer), indent=1) if as_json else query.in_words(answer))
    return OK


@app.command(epilog="Example: kernbench gate --baseline 20261121-1015 --max-slowdown 2% --no-new-syncs")
@_reported
def gate(
    baseline: Annotated[str, typer.Option(metavar="RUN", help="The run to hold against, named as for compare.")],
    run: Annotated[
        str | None, typer.Argument(help="The run to judge; the newest profile like the baseline if left out.")
    ] = None,
    max_slowdown: Annotated[str | None, typer.Option(metavar="SHARE", help="Longest step allowed, as in 2%.")] = None,
    no_new_syncs: Annotated[bool, typer.Option("--no-new-syncs", help="Allow no new host read.")] = False,
    max_launches: Annotated[
        str | None, typer.Option(metavar="MORE", help="Launches a step allowed beyond the baseline's, as in +0 or +5%.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """For CI: exit code 1 and the reason, if a run is worse than a baseline.

    Without any limit all three are judged: 2 % slower, no new host read, no more launches.
    """
    from kernbench import gate, record

    found = gate.gate(baseline, run, gate.limits(max_slowdown, no_new_syncs, max_launches))
    if as_json:
        print(json.dumps(record.to_builtins(found), indent=1))
    else:
        print(gate.in_words(found))
    return OK if found.passed else NEGATIVE


@app.command(epilog="Example: kernbench report 20261121-1015")
@_reported
def report(
    run: Annotated[str, typer.Argument(help="A run folder, a record.json, or part of a run id.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Render a run's report again from its record, and the index over all runs."""
    from kernbench import reading

    _show(reading.render_again(run), as_json)
    return OK


@app.command(epilog="Example: kernbench journal --rebuild")
@_reported
def journal(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Add the entries that JOURNAL.md misses from the runs.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show the journal's entries, or rebuild them from the records."""
    from kernbench import reading
    from kernbench.report import console

    entries, left_out = reading.journal_entries(rebuild=rebuild)
    for reason in left_out:
        _complain(reason)
    if as_json:
        print(json.dumps(entries, indent=1))
    else:
        console.show_journal(entries)
    return OK


@app.command(epilog="Example: kernbench doctor --device cpu")
@_reported
def doctor(device: Device = "auto", as_json: Json = False, quiet: Quiet = False) -> int:
    """Show the device, versions, what works here, and the measured ceilings."""
    from kernbench import pipeline
    from kernbench.report import console

    findings = pipeline.doctor(device, _progress(quiet))
    if as_json:
        print(json.dumps(findings, indent=1))
    else:
        console.show_doctor(findings)
    return OK


@app.command(epilog="Example: kernbench init my_bench")
@_reported
def init(
    folder: Annotated[Path, typer.Argument(help="Where to start a workspace.")] = Path(),
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Start a workspace: a workload, a kernel and a journal of your own, ready to run."""
    from kernbench import initialize

    created = [str(path) for path in initialize.init(folder, note=_complain)]
    if as_json:
        print(json.dumps({"created": created}))
    else:
        print("\n".join(f"created {path}" for path in created) or "nothing to create: everything is there already")
        print(f"next: cd {folder} && kernbench profile ./workloads/my_model.py")
    return OK


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kernbench {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    return None


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that arrives while a finalizer runs; send it again once that has ended."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def main() -> NoReturn:
    """Entry point of the console script."""
    # Kineto prints two lines of its own at every trace; what it could not record shows in the trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    sys.unraisablehook = _unraisable
    try:
        app()
    except Exception:  # noqa: BLE001 - a bug of ours is shown whole, apart from the user's errors
        traceback.print_exc()
        _complain("this is a bug in kernbench; please report it with the lines above")
        raise SystemExit(70) from None
    raise SystemExit(OK)
