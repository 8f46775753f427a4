"""Options that several commands take, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

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
Ranks = Annotated[
    int | None,
    typer.Option(metavar="N", help="Run on N ranks, each in its process: on a GPU each, or with gloo on the CPU."),
]
