"""What the CUDA runtime itself reports of synchronisations, and how that meets the named reads of the watch.

Torch warns at every synchronising ATen call when asked to (``torch.cuda.set_sync_debug_mode``); the warning is raised
while the Python line is executing, which names the line. The explicit ``synchronize`` calls, which torch does not warn
of, are wrapped. Waiting times come from a trace of the same steps, matched by order.
"""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec
import torch

from kernbench.record import HostRead
from kernbench.watching.sourcelines import SourceTable
from kernbench.watching.syncwatch import current_phase

WARNING = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"
STREAM, DEVICE, EVENT = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"
_HIP = {"hipStreamSynchronize": STREAM, "hipMemcpyWithStream": STREAM}
_HIP |= {"hipDeviceSynchronize": DEVICE, "hipEventSynchronize": EVENT}
_ENGINE = "autograd::engine::"
_COPIES = ("cudaMemcpyAsync", "hipMemcpyAsync")


@dataclass(frozen=True)
class Report:
    """One synchronisation in program order. Reports with one ``group`` belong to one visible read, such as a print.

    ``thread`` names a thread that works beside the steps; "" stands for the one that runs them and for autograd's.
    """

    step: int
    line: int
    call: str
    group: int
    explicit: str = ""
    phase: int | None = None
    thread: str = ""


@dataclass(frozen=True)
class RuntimeCall:
    """One synchronising call in the trace. ``seconds`` includes the copy that it completes, in which the host waits."""

    step: int
    call: str
    seconds: float


@dataclass
class RuntimeWatch:
    """Collects reports between ``begin_step`` and ``end_step``, while entered through :meth:`watching`."""

    sources: SourceTable
    reports: list[Report] = field(default_factory=list)
    _step: int | None = None
    _inside_explicit: set[int] = field(default_factory=set)
    _groups: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _group: int = 0
    _print: FrameType | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Warn mode, the warning hook and the wrapped calls; all global state is as before afterwards."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            warnings.filterwarnings("ignore", message=_PROTOTYPE)
            warnings.filterwarnings("always", message=WARNING)
            passed_on = warnings.showwarning
            warnings.showwarning = self._hook(passed_on)
            for owner, name, call in _explicit_calls():
                stack.enter_context(_wrapped(owner, name, self._explicit(call, f"torch.{_label(owner)}.{name}")))
            torch.cuda.set_sync_debug_mode("warn")
            yield
            self._print = None

    def begin_step(self, index: int) -> None:
        """Record from here on, as step ``index``."""
        self._step = index

    def end_step(self) -> None:
        """Stop recording."""
        self._step = self._print = None

    def _hook(self, passed_on: Callable[..., Any]) -> Callable[..., Any]:
        def show(message: Warning | str, *rest: Any, **keywords: Any) -> None:
            if not str(message).startswith(WARNING):
                passed_on(message, *rest, **keywords)
            elif threading.get_ident() not in self._inside_explicit:
                self._report(STREAM, sys._getframe(1))

        return show

    def _explicit(self, call: str, label: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def synchronize(*args: Any, **kwargs: Any) -> Any:
                thread = threading.get_ident()
                if thread in self._inside_explicit:
                    return original(*args, **kwargs)
                self._report(call, sys._getframe(1), explicit=label)
                self._inside_explicit.add(thread)
                try:
                    return original(*args, **kwargs)
                finally:
                    self._inside_explicit.discard(thread)

            return synchronize

        return wrap

    def _report(self, call: str, frame: FrameType | None, explicit: str = "") -> None:
        step = self._step
        if step is None:
            return
        beside = threading.get_ident() != self.sources.owner and not _in_autograd(frame, self.sources.owner)
        line = self.sources.locate(frame, of_owner=not beside)
        if line is None:
            return
        place = self.sources.nowhere() if line == -1 else line
        if beside:
            name = threading.current_thread().name
            self.reports.append(Report(step, place, call, next(self._groups), explicit, thread=name))
            return
        printing = _print_frame(frame)
        if printing is None or printing is not self._print:
            self._group = next(self._groups)
        self._print = printing
        self.reports.append(Report(step, place, call, self._group, explicit, current_phase.get()))


def _explicit_calls() -> list[tuple[Any, str, str]]:
    return [
        (torch.cuda, "synchronize", DEVICE),
        (torch.accelerator, "synchronize", DEVICE),
        (torch.cuda.Stream, "synchronize", STREAM),
        (torch.cuda.Event, "synchronize", EVENT),
    ]


def _label(owner: Any) -> str:
    return f"cuda.{owner.__name__}" if isinstance(owner, type) else str(owner.__name__).removeprefix("torch.")


@contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute, and give back exactly what was there, an inherited one by deleting ours."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _in_autograd(frame: FrameType | None, owner: int) -> bool:
    """Whether this thread is the autograd engine's, in a custom ``backward`` or in a hook of the program.

    Python did not start the engine's threads, and they run while ``owner`` stands in ``backward``.
    """
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.endswith("torch/autograd/function.py"):
        return True
    waiting = sys._current_frames().get(owner)
    while waiting is not None and waiting.f_code.co_name != "_engine_run_backward":
        waiting = waiting.f_back
    return waiting is not None and threading.current_thread().name.startswith("Dummy-")


def _print_frame(frame: FrameType | None) -> FrameType | None:
    """The ``Tensor.__repr__`` or ``__format__`` call that is running: one print makes many synchronisations."""
    found = None
    while frame is not None:
        if frame.f_code.co_name in ("__repr__", "__format__") and frame.f_code.co_filename.endswith("torch/_tensor.py"):
            found = frame
        frame = frame.f_back
    return found


def runtime_calls(events: Sequence[Mapping[str, Any]]) -> list[RuntimeCall]:
    """The synchronising runtime calls of the steps and of the autograd engine's threads, which work for them, in order.

    Args:
        events: ``traceEvents`` of a Kineto trace; times in microseconds.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    steps = [
        (event["ts"], event["ts"] + event["dur"], int(event["name"].rpartition("#")[2]), event["tid"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"].startswith("kernbench.step#")
    ]
    threads = {thread for *_, thread in steps}
    threads |= {event["tid"] for event in complete if event["name"].startswith(_ENGINE)}
    runtime = sorted(
        (event for event in complete if event.get("cat") == "cuda_runtime" and event["tid"] in threads),
        key=lambda event: event["ts"],
    )
    found = []
    before: dict[int, Mapping[str, Any]] = {}
    for event in runtime:
        call, last = _HIP.get(event["name"], event["name"]), before.get(event["tid"], {"name": ""})
        step = next((index for start, end, index, _ in steps if start <= event["ts"] <= end), None)
        if step is not None and call in (STREAM, DEVICE, EVENT):
            copying = last["dur"] if last["name"] in _COPIES and call == STREAM else 0.0
            found.append(RuntimeCall(step, call, (copying + event["dur"]) * 1e-6))
        before[event["tid"]] = event
    return found


def match_waits(reports: Sequence[Report], calls: Sequence[RuntimeCall]) -> tuple[dict[int, float | None], list[str]]:
    """Waiting time of each group of reports, and what could not be matched.

    The n-th report of a kind of call in a step is the n-th such call in the trace. Where their numbers differ, no time
    is given for that kind in that step: a guess would put one line's wait on another. Threads beside the steps' own
    have no times here: the trace does not know them by name.
    """
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for call in calls:
        seconds[call.step, call.call].append(call.seconds)
    reports = [report for report in reports if not report.thread]
    reported = Counter((report.step, report.call) for report in reports)
    notes = [
        f"step {step}: {name} was reported {reported[step, name]} times but traced {len(seconds[step, name])} times; "
        "its waits are left out"
        for step, name in sorted({*reported, *seconds})
        if reported[step, name] != len(seconds[step, name])
    ]
    waits: dict[int, float | None] = {}
    taken: Counter[tuple[int, str]] = Counter()
    for report in reports:
        key = (report.step, report.call)
        if reported[key] != len(seconds[key]):
            waits[report.group] = None
            continue
        earlier = waits.get(report.group, 0.0)
        waits[report.group] = None if earlier is None else earlier + seconds[key][taken[key]]
        taken[key] += 1
    return waits, notes


def merge(
    reports: Sequence[Report], waits: Mapping[int, float | None], named: Sequence[HostRead], *, shift: int
) -> tuple[list[HostRead], dict[int, int]]:
    """Reads with the runtime's evidence, named by the watch; then the watch's reads of host tensors.

    Args:
        named: the watch's reads, from steps that are ``shift`` later than those of the reports.

    Returns:
        the reads in step order, and by line the reads that the watch expected but the runtime never saw.
    """
    by_line: dict[tuple[int, int], list[HostRead]] = defaultdict(list)
    for read in named:
        if not read.host_tensor:
            by_line[read.step - shift, read.line].append(read)
    groups: dict[int, Report] = {}
    for report in reports:
        groups.setdefault(report.group, report)
    per_line = Counter(
        (report.step, report.line) for report in groups.values() if not report.explicit and not report.thread
    )
    taken: Counter[tuple[int, int]] = Counter()
    merged = []
    for group, report in groups.items():
        key = (report.step, report.line)
        operator, form = report.explicit or report.call, "synchronize"
        # The watch names the reads of the steps' own thread only.
        if not report.explicit and not report.thread:
            candidates = by_line[key] or by_line[_any_step(by_line, report.line)]
            if candidates:
                exact = len(candidates) == per_line[key]
                chosen = candidates[taken[key]] if exact else _commonest(candidates)
                operator, form = chosen.op, chosen.form
            taken[key] += 1
        merged.append(
            HostRead(
                step=report.step,
                line=report.line,
                op=operator,
                form=form,
                host_tensor=False,
                real=True,
                wait_seconds=waits.get(group),
                phase=report.phase,
                thread=report.thread,
            )
        )
    merged += [msgspec.structs.replace(read, step=read.step - shift) for read in named if read.host_tensor]
    seen = {report.line for report in groups.values()}
    unseen = Counter(read.line for read in named if not read.host_tensor and read.line not in seen)
    return sorted(merged, key=lambda read: read.step), dict(unseen)


def _any_step(by_line: Mapping[tuple[int, int], list[HostRead]], line: int) -> tuple[int, int]:
    return next((key for key in by_line if key[1] == line and by_line[key]), (-1, line))


def _commonest(reads: Sequence[HostRead]) -> HostRead:
    operator = Counter(read.op for read in reads).most_common(1)[0][0]
    return next(read for read in reads if read.op == operator)
