"""Measures one side: a workload with a plan of swaps in place, timed clean, then traced, then watched line by line."""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from kernbench import bench, capture, device, figures, ranges, record, swap
from kernbench.analysis import breakdown, fusion, hotspots, idle, launches, memory, shapes, stalls, timeline
from kernbench.analysis.phasewhatif import with_phases
from kernbench.analysis.whatif import with_savings
from kernbench.analysis.whole import enrich
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.measurement import statistics
from kernbench.measurement.lockstep import ALONE, Lockstep
from kernbench.runfolder import Run
from kernbench.traces import trace
from kernbench.workload import Built, Workload

TRACED_STEPS = 3
WATCHED_STEPS = 2
# On a GPU, a step that is captured has been captured by then: to capture waits for the device, to replay does not.
LINE_PASS_WARMUP = {"cpu": 2, "cuda": 5}


@dataclass(frozen=True)
class Settings:
    """What a measurement of a workload needs to know, all of it checked."""

    workload: Workload
    preset: str
    device: torch.device
    dtype: torch.dtype
    seed: int
    data: str | None
    steps: int
    nvtx: bool = False
    weights: str | None = None

    def build(self) -> Built:
        """Build the workload afresh.

        Raises:
            WorkloadFailed: its own code raised.
        """
        with workload_errors(f"{self.workload.name} could not be built"):
            return self.workload.make(self.preset, self.device, self.dtype, self.seed, self.data)

    def describe(self, plan: swap.Plan, built: Built | None = None) -> record.WorkloadInfo:
        """The record's description of what runs."""
        model = getattr(built, "model", None)
        return record.WorkloadInfo(
            name=self.workload.name,
            preset=self.preset,
            dtype=str(self.dtype).removeprefix("torch."),
            seed=self.seed,
            unit=self.workload.unit,
            phases=list(plan.numbers),
            implementations={str(number): name for number, name in plan.implementations.items()},
            data=self.data or "",
            weights=self.weights or "",
            parameters=sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0,
        )


class workload_errors:  # noqa: N801 - a context manager, used as one
    """Turns whatever the workload's own code raises into WorkloadFailed, its traceback kept."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, KernbenchError) or not isinstance(error, Exception):
            return
        text = "".join(traceback.format_exception(error))
        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
            raise WorkloadFailed(
                f"{self.what}: out of memory; take a smaller preset or free the device", text
            ) from error
        raise WorkloadFailed(f"{self.what}: {type(error).__name__}: {first}", text) from error


class Side:
    """A built workload, the plan whose swaps its steps run with, and the losses of those steps, unread."""

    def __init__(self, settings: Settings, plan: swap.Plan, prepare: Callable[[Built], None] | None = None) -> None:
        self.settings = settings
        self.plan = plan
        self.prepare = prepare
        self.built = settings.build()
        if prepare is not None:
            with workload_errors(f"a peer of {settings.workload.name} could not be prepared"):
                prepare(self.built)
        self.units_per_step = self.built.units_per_step
        self.losses: dict[int, Any] = {}

    @property
    def model(self) -> Any:
        return getattr(self.built, "model", None)

    def step(self, index: int) -> Any:
        """Run one step; the swaps must be in place already (see ``Plan.applied``)."""
        with workload_errors(f"step {index} of {self.settings.workload.name} failed"):
            loss = self.built.step(index)
        if loss is not None:
            self.losses[index] = loss
        return loss

    def state_dict(self) -> Mapping[str, Any]:
        return self.built.state_dict()

    def figures(self, seconds: float) -> list[record.Figure]:
        """What the workload makes of the time of a step."""
        name = self.settings.workload.name
        with workload_errors(f"figures of {name} failed"):
            return figures.figures_of(self.built, seconds, name)

    def floor(self, seconds: float, ceilings: record.Ceilings | None) -> record.Floor | None:
        """How close a step of that time is to moving its bytes and nothing else."""
        name = self.settings.workload.name
        with workload_errors(f"bytes_per_step of {name} failed"):
            return figures.floor_of(self.built, seconds, ceilings, self.settings.device, name)

    def check_losses(self) -> list[float]:
        """The losses so far, read now and not during the steps.

        Raises:
            WorkloadFailed: one of them is not finite.
        """
        losses = {index: float(loss) for index, loss in sorted(self.losses.items())}
        for index, loss in losses.items():
            if not math.isfinite(loss):
                raise WorkloadFailed(
                    f"the loss of {self.settings.workload.name} is {loss} at step {index}, so these are not the steps "
                    f"to measure; lower the learning rate, or try another --data or --seed than {self.settings.seed}"
                )
        self.losses.clear()
        return list(losses.values())


def measure(
    run: Run[Any],
    result: record.ProfileRecord,
    settings: Settings,
    plan: swap.Plan,
    *,
    label: str = "",
    others: Lockstep = ALONE,
) -> None:
    """Fill ``result`` stage by stage: clean times first, then what explains them.

    Args:
        others: the other ranks of the run, which take the same steps.

    Raises:
        WorkloadFailed: the workload raised, ran out of memory, or its loss is not finite.
    """
    name = f"{label} " if label else ""
    with run.stage(f"{name}time"):
        side = Side(settings, plan)
        result.workload = settings.describe(plan, side.built)
        with plan.applied(side.built), run.progress.stage(f"timing {name}steps", settings.steps) as advance:
            first = bench.warm_up(side.step, settings.device, agree=others.agree)
            others.wait()
            _reset_peak_memory(settings.device)
            seconds = bench.time_steps(side.step, first=first, count=settings.steps, device=settings.device)
            advance(settings.steps)
        result.ranks = others.sides(median(seconds), side.units_per_step)
        units = sum(one.units_per_step for one in result.ranks.sides) if result.ranks else side.units_per_step
        result.steps = record.Steps(seconds=seconds, units_per_step=units, warmup=first, losses=side.check_losses())
        result.throughput = _throughput(result.steps)
        step = units / result.throughput.units_per_second
        result.figures = side.figures(step)
        result.floor = side.floor(step, result.environment.ceilings)
        result.memory_peak_bytes = _peak_memory(settings.device)
        result.clocks = device.read_clocks(settings.device)
    first += settings.steps
    suffix = f".{label}" if label else ""
    with run.stage(f"{name}trace"), run.progress.stage(f"tracing {name}steps"):
        events, profiled = trace_side(side, first, run.folder / f"trace{suffix}.json.gz", others=others)
        between = others.communication(run.folder)
        if settings.device.type == "cuda" and not events.on_gpu:
            run.warn("the profiler recorded no device work; set KINETO_LOG_LEVEL=0 to see why")
        overhead = record.Overhead(trace_ratio=median(profiled) / median(seconds))
        result.overhead = overhead
        result.breakdown = breakdown.breakdown(events, median(seconds))
        result.hotspots = hotspots.hotspots(events, None)
        result.launches = launches.launches(events)
        result.launches_per_step = result.launches.per_step
        result.idle = idle.idle(events)
        result.timeline = timeline.timeline(events)
        # Shapes and memory come from a step of their own, so that the timed ones are not slowed down by recording them.
        detailed, _ = trace_side(side, first + TRACED_STEPS, None, details=True, others=others)
    # The traced instance goes before the watched one is built, so that only one of them takes memory.
    del side
    with run.stage(f"{name}lines"), run.progress.stage(f"watching {name}host reads"):
        log = watch(settings, plan)
        for note in log.notes:
            run.warn(note)
        result.hotspots = hotspots.hotspots(events, log)
        # Once more, now that waits can name their line.
        result.timeline = timeline.timeline(events, log)
        result.stalls = stalls.stalls(events, log)
        result.syncs_per_step = stalls.syncs_per_step(log)
        result.cpu_reads_per_step = stalls.cpu_reads_per_step(log)
        if log.step_seconds is not None:
            result.overhead = record.Overhead(
                trace_ratio=overhead.trace_ratio, lines_ratio=log.step_seconds / median(seconds)
            )
    if not others.leads:
        return
    with run.stage(f"{name}what-if"), run.progress.stage(f"replaying {name}steps"):
        ceilings = result.environment.ceilings
        found = enrich(
            events, log, ceilings, result.stalls, ranks=between, unprofiled_seconds=median(seconds), shaped=detailed
        )
        _add_details(found, detailed, log, ceilings)
        found.whatif = with_phases(
            found.whatif, events, log, ceilings, detailed, unprofiled_seconds=median(seconds),
            titles={phase.number: phase.title for phase in settings.workload.phases},
        )  # fmt: skip
        result.analysis = found
        result.stalls = with_savings(result.stalls, found.whatif)


def watch(settings: Settings, plan: swap.Plan, prepare: Callable[[Built], None] | None = None) -> record.LineLog:
    """The line pass: a fresh workload, every host read of a steady step with its line."""

    def make() -> Built:
        return _Toggled(Side(settings, plan, prepare))

    warmup = LINE_PASS_WARMUP[settings.device.type]
    return capture.line_pass(make, warmup=warmup, count=WATCHED_STEPS, device=settings.device)


def watch_side(side: Side, first: int) -> record.LineLog:
    """The line pass from step ``first`` on; on a GPU on ``side`` itself, which may have taken long to compile."""
    settings = side.settings
    if settings.device.type != "cuda":
        return watch(settings, side.plan, side.prepare)
    return capture.cuda_line_pass(_Toggled(side), first=first, count=WATCHED_STEPS, device=settings.device)


class _Toggled:
    """A side whose every step puts the swaps in and takes them out, for passes that call ``step`` on their own."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.model = side.model
        self.units_per_step = side.units_per_step

    def step(self, index: int) -> Any:
        with swap.annotated(self.side.settings.workload, self.side.built, self.side.plan):
            return self.side.step(index)

    def state_dict(self) -> Mapping[str, Any]:
        return self.side.state_dict()


def _add_details(
    found: record.TraceAnalysis, detailed: trace.Trace, log: record.LineLog, ceilings: record.Ceilings | None
) -> None:
    """What takes shapes or memory: roofline, fusion candidates with their bytes, hotspots by shape, memory in use."""
    # Work counted from shapes is whole numbers; a record read back holds floats, and must give the same report.
    found.roofline = [
        msgspec.structs.replace(point, flops=float(point.flops), bytes=float(point.bytes))
        for point in shapes.roofline(detailed, ceilings)
    ]
    found.fusion = fusion.fusion(detailed, log, ceilings) or found.fusion
    found.memory = memory.memory(detailed)
    by_shape = hotspots.views(detailed, log).get("shape")
    if by_shape:
        found.views["shape"] = by_shape


def trace_side(
    side: Side, first: int, keep: Path | None, *, details: bool = False, others: Lockstep = ALONE
) -> tuple[trace.Trace, list[float]]:
    """Trace a few steps; returns all of them read, and seconds per step under the profiler.

    Args:
        keep: where one traced step is left for the user, if anywhere.
        details: trace one step alone, with shapes and memory.
        others: the other ranks; a trace that is kept is handed to the one of them that leads.
    """
    settings = side.settings
    with tempfile.TemporaryDirectory(prefix="kernbench-") as scratch:
        full = Path(scratch) / "trace.json"
        with swap.annotated(settings.workload, side.built, side.plan):
            modules = ranges.annotate_modules(side.model) if settings.nvtx and side.model is not None else None
            try:
                profiled = capture.trace_steps(
                    side,
                    first=first,
                    count=1 if details else TRACED_STEPS,
                    device=settings.device,
                    path=full,
                    details=details,
                    ready=others.wait,
                )
            finally:
                if modules is not None:
                    modules.remove()
        if keep is not None:
            capture.trim(full, keep)
            others.deliver(full)
        return trace.load(full), profiled


def _throughput(steps: record.Steps) -> record.Throughput:
    middle, low, high = statistics.bootstrap_median(steps.seconds)
    return record.Throughput(
        units_per_second=steps.units_per_step / middle,
        interval=(steps.units_per_step / high, steps.units_per_step / low),
    )


def _reset_peak_memory(device_: torch.device) -> None:
    if device_.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_)


def _peak_memory(device_: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device_) if device_.type == "cuda" else None
