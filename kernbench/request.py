"""From what the user typed to what will be measured: every check of an argument stands here."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kernbench import device, registry, state, swap
from kernbench.errors import KernbenchError
from kernbench.measurement.measure import Settings
from kernbench.registry import Workspace
from kernbench.spec import KernelSpec
from kernbench.workload import Phase, Workload

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What a workload may compute in."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, as typed; nothing in it is checked yet.

    ``phases`` None means "as kept". ``time_limit`` counts per unit of work in a child process, None is the default of
    each command; ``in_process`` does without children and without limits.
    """

    command: str
    workload: str | None = None
    preset: str | None = None
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    data: str | None = None
    weights: str | None = None
    steps: int = 20
    rounds: int = 30
    phases: str | None = None
    use: str = "triton"
    direction: str = "both"
    nvtx: bool = False
    time_limit: float | None = None
    in_process: bool = False
    ranks: int | None = None


def settings(request: Request, reference: str) -> Settings:
    """Everything a measurement needs, checked.

    Raises:
        KernbenchError: unknown workload, preset, dtype or device, no such data file or folder of weights, weights for a
            workload that takes none, or a senseless number of steps.
        WorkloadFailed: the workload's file raised.
    """
    chosen = device.resolve(request.device)
    workload = registry.workload(reference).declaration
    preset = request.preset or workload.default_preset
    registry.nearest(preset, workload.presets, f"preset of {workload.name}")
    dtype = request.dtype or workload.default_dtype(preset)
    registry.nearest(dtype, DTYPES, "dtype of a workload")
    if request.data is not None and not Path(request.data).is_file():
        raise KernbenchError(f"--data {request.data}: there is no such file")
    if request.weights is not None:
        workload = _with_weights(workload, request.weights)
    if request.steps < 1 or request.rounds < 3:
        raise KernbenchError("--steps must be at least 1 and --rounds at least 3")
    return Settings(
        workload=workload,
        preset=preset,
        device=chosen,
        dtype=getattr(torch, dtype),
        seed=request.seed,
        data=request.data,
        steps=request.steps,
        nvtx=request.nvtx,
        weights=request.weights,
    )


def _with_weights(workload: Workload, folder: str) -> Workload:
    """The workload built from the weights in a folder, wherever it is built."""
    parameters = inspect.signature(workload.build).parameters.values()
    if not any(one.name == "weights" or one.kind is one.VAR_KEYWORD for one in parameters):
        raise KernbenchError(
            f"{workload.name} takes no --weights: its build has no argument of that name; leave it out"
        )
    if not Path(folder).is_dir():
        raise KernbenchError(f"--weights {folder}: there is no such folder; name the one that holds the checkpoint")
    return replace(workload, build=partial(workload.build, weights=folder))


def phase(workload: Workload, number: int) -> Phase:
    """The phase of that number.

    Raises:
        KernbenchError: the plan has none; the message lists the plan.
    """
    for candidate in workload.phases:
        if candidate.number == number:
            return candidate
    known = ", ".join(f"{item.number} ({item.title})" for item in workload.phases) or "none"
    raise KernbenchError(f"{workload.name} has no phase {number}; its phases: {known}")


def active(workload: Workload, request: Request, workspace: Workspace) -> dict[int, str]:
    """The phases in place, each with its implementation: by the command line, else the environment, else what is kept.

    Raises:
        KernbenchError: ``--phases`` is no list of the plan's numbers, or a flag is neither 0 nor 1.
    """
    kept = {item.number: item.implementation for item in state.load(workspace.root).kept.get(workload.name, [])}
    if request.phases is not None:
        return {number: kept.get(number, request.use) for number in _numbers(workload, request.phases)}
    for planned in workload.phases:
        flag = os.environ.get(planned.flag, "") if planned.flag else ""
        if flag == "1":
            kept.setdefault(planned.number, request.use)
        elif flag == "0":
            kept.pop(planned.number, None)
        elif flag:
            raise KernbenchError(f"{planned.flag}={flag} is neither 0 nor 1; correct or unset it")
    known = {planned.number for planned in workload.phases}
    return {number: name for number, name in sorted(kept.items()) if number in known}


def _numbers(workload: Workload, text: str) -> list[int]:
    if text.strip() in ("", "none"):
        return []
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise KernbenchError(f"--phases {text}: give numbers with commas between, as in 0,2, or none") from None
    for number in numbers:
        phase(workload, number)
    return numbers


def plan(workload: Workload, phases: Mapping[int, str]) -> swap.Plan:
    """The plan of swaps for these phases, each with its implementation."""
    use = {number: name for number, name in phases.items() if name != swap.PYTHON}
    return swap.plan(workload, sorted(phases), use=use, kernels=_kernel)


def _kernel(name: str) -> KernelSpec:
    return registry.kernel(name).declaration


def candidates(chosen: Phase, use: str) -> tuple[str, ...]:
    """The implementations that a swap of this phase should try.

    Raises:
        KernbenchError: ``use`` is unknown.
    """
    registry.nearest(use, (*swap.IMPLEMENTATIONS, "auto"), "implementation")
    if not any(item.kernel for item in chosen.swaps):
        return (swap.PYTHON,)
    return ("triton", "compile") if use == "auto" else (use,)


def workload_or_last(request: Request, workspace: Workspace) -> tuple[str, Request]:
    """The workload named in the request, or the one profiled last, with its preset and weights, where none is named.

    Raises:
        KernbenchError: none is named and none was profiled yet.
    """
    if request.workload:
        return request.workload, request
    last = state.load(workspace.root).last_profiled
    if last is None:
        raise KernbenchError(
            "nothing was profiled here yet; type kernbench profile WORKLOAD first, or name a workload in this command"
        )
    preset, weights = request.preset or last.preset, request.weights or last.weights or None
    return last.workload, replace(request, workload=last.workload, preset=preset, weights=weights)
