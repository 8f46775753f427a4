"""Runs steps under observation: a trace of where the time goes, and a log of which line reads which tensor."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from kernbench import ranges
from kernbench.measurement.timing import collector_off
from kernbench.record import LineLog, SourceLine
from kernbench.traces.trim import trim
from kernbench.watching.cudasync import Report, RuntimeWatch, match_waits, merge, runtime_calls
from kernbench.watching.sourcelines import SourceTable
from kernbench.watching.syncwatch import SyncWatch
from kernbench.workload import Built

__all__ = ["cuda_line_pass", "line_pass", "trace_steps", "trim"]
STEP = "kernbench.step#"


def trace_steps(
    built: Built,
    *,
    first: int,
    count: int,
    device: torch.device,
    path: Path,
    details: bool = False,
    ready: Callable[[], None] | None = None,
) -> list[float]:
    """Trace ``count`` steps from ``first`` on into a Kineto JSON file at ``path``, written atomically.

    It is gzipped if its name ends in .gz, which takes many times as long as to write it.

    The first one runs once before them, under the profiler but without a mark: what the profiler sets up meanwhile
    would lengthen it. No garbage is collected, as where steps are timed.

    Args:
        details: record the shapes of operands and the memory in use too, which makes the host slower; the steps are not
            meant to be timed then, and none runs before them.
        ready: called right before the first step; several ranks wait there for each other.

    Returns:
        seconds per step under the profiler. On a GPU the host runs ahead, so each is the mean over all steps, with the
        wait for the last kernel.

    Raises:
        whatever ``built.step`` raises; then no file is written.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    options = _ExperimentalConfig(enable_cuda_sync_events=True) if cuda else None
    marks = []
    gc.collect()
    with (
        collector_off(),
        _profiled(
            activities=activities, experimental_config=options, record_shapes=details, profile_memory=details
        ) as profiler,
    ):
        if not details:
            built.step(first)
        if cuda:
            torch.cuda.synchronize(device)
        if ready is not None:
            ready()
        marks.append(time.perf_counter())
        for index in range(first, first + count):
            with ranges.annotation(f"{STEP}{index}"):
                built.step(index)
            marks.append(time.perf_counter())
        if cuda:
            torch.cuda.synchronize(device)
            marks[-1] = time.perf_counter()
    _export(profiler, path)
    if cuda:
        return [(marks[-1] - marks[0]) / count] * count
    return [end - start for start, end in zip(marks, marks[1:], strict=False)]


@contextmanager
def _profiled(**options: Any) -> Iterator[profile]:
    """The profiler, which keeps what it recorded for an export alone.

    With ``acc_events`` it would make a Python object of every event when it stops, many times as long as steps take.
    """
    profiler = profile(**options)
    with warnings.catch_warnings():
        # PyTorch 2.10 to 2.12 warn of cycles where there are none. Source: pytorch/pytorch#180387.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events", UserWarning)
        profiler.start()
    try:
        yield profiler
    finally:
        profiler.stop()


def _export(profiler: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(path)


def line_pass(make: Callable[[], Built], *, warmup: int, count: int, device: torch.device) -> LineLog:
    """Build the workload afresh and name the line of every host read in ``count`` steps after ``warmup`` others.

    Without a GPU the build and all steps run under the watch, which plays the device, and no read is ``real``. On a
    GPU a first pass takes the runtime's own reports with their waiting times, a second one names operators and reads
    of host tensors; they run the same number of steps, one after the other.

    Raises:
        whatever ``make`` or a step raises; modes, warnings and the debug mode of torch are restored first.
    """
    if device.type == "cuda":
        built = make()
        for index in range(warmup):
            built.step(index)
        return cuda_line_pass(built, first=warmup, count=count, device=device)
    sources = SourceTable()
    with SyncWatch(sources, marker=device) as watch:
        built = make()
        for index in range(warmup):
            built.step(index)
        seconds = _watched_steps(watch, built, warmup, count)
    return LineLog(
        steps=count,
        lines=sources.lines,
        reads=watch.reads,
        op_lines=watch.op_lines,
        step_seconds=statistics.median(seconds),
    )


def _watched_steps(watch: SyncWatch, built: Built, first: int, count: int) -> list[float]:
    seconds = []
    for index in range(first, first + count):
        watch.begin_step(index, record_ops=index == first + count - 1)
        start = time.perf_counter()
        built.step(index)
        seconds.append(time.perf_counter() - start)
        watch.end_step()
    return seconds


def cuda_line_pass(built: Built, *, first: int, count: int, device: torch.device) -> LineLog:
    """:func:`line_pass` on a GPU for a workload that ran already; it takes twice ``count`` steps, from ``first`` on.

    Raises:
        whatever a step raises; modes, warnings and the debug mode of torch are restored first.
    """
    sources = SourceTable()
    reports, waits, notes, seconds = _runtime_pass(sources, built, first, count, device)
    with SyncWatch(sources, marker=None) as watch:
        _watched_steps(watch, built, first + count, count)
    torch.cuda.synchronize(device)
    reads, unseen = merge(reports, waits, watch.reads, shift=count)
    return LineLog(
        steps=count,
        lines=sources.lines,
        reads=reads,
        op_lines=watch.op_lines,
        step_seconds=seconds,
        notes=[*notes, *(_unseen(sources.lines[line], times) for line, times in unseen.items())],
    )


def _runtime_pass(
    sources: SourceTable, built: Built, first: int, count: int, device: torch.device
) -> tuple[list[Report], dict[int, float | None], list[str], float]:
    watch = RuntimeWatch(sources)
    torch.cuda.synchronize(device)
    with _profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        with watch.watching():
            for index in range(first, first + count):
                watch.begin_step(index)
                with ranges.annotation(f"{STEP}{index}"):
                    built.step(index)
                watch.end_step()
        torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - start) / count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = msgspec.json.decode(path.read_bytes())["traceEvents"]
    waits, notes = match_waits(watch.reports, runtime_calls(events))
    return watch.reports, waits, notes, seconds


def _unseen(line: SourceLine, times: int) -> str:
    return f"{line.file}:{line.line}: {times} reads were expected here, the runtime synchronised for none"
