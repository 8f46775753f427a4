"""What a step's time consists of, as parts that add up to the step."""

from __future__ import annotations

import numpy as np

from kernbench.analysis import idle
from kernbench.analysis.families import FAMILIES, of_device, of_host
from kernbench.analysis.intervals import Intervals, union
from kernbench.record import Part
from kernbench.traces.nesting import OP
from kernbench.traces.trace import Trace

OVERHEAD = "Python and framework overhead"

_IDLE_DESCRIPTIONS = {
    "sync": "device idle because the host waited in a synchronising call, and for its next launch, late for that",
    "host": "device idle because the host had nothing queued",
    "allocation": "device idle while the host allocated or freed device memory",
    "data loading": "device idle while the host waited for its next batch",
    "communication": "device idle while the host was in an operator of torch.distributed",
    "launch-bound": "device idle because the host launches short work more slowly than the device does it",
    "launch": "device idle while the next piece of work was on its way",
    "slow launch": "device idle while a launch call took long, as when it loads a kernel",
    "queued": "device idle though work was queued: it waited for another stream or event",
    "unknown": "device idle, and the trace does not hold the launch of what came next",
}


def breakdown(trace: Trace, step_seconds: float | None = None) -> list[Part]:
    """The parts of a step, largest first, busy ones before idle ones.

    Parts are taken from the profiled steps, which profiling slows down, and scaled to the unprofiled step of
    ``step_seconds``; each description says by how much. On a GPU busy parts stay as measured and idle parts are scaled,
    since profiling costs time on the host. On a CPU all parts are scaled alike.

    Args:
        step_seconds: None where nobody measured a step without the profiler; then all parts stay as recorded.
    """
    return _on_gpu(trace, step_seconds) if trace.on_gpu else _on_cpu(trace, step_seconds)


def _on_gpu(trace: Trace, step_seconds: float | None) -> list[Part]:
    windows = idle.step_windows(trace)
    busy = _device_families(trace, windows)
    gaps = idle.pieces(trace).per_step(windows)
    profiled = windows.mean_ns / 1e9
    busy_total, idle_total = sum(busy.values()) / 1e9, sum(gaps.values()) / 1e9
    if step_seconds is None:
        busy_scale = idle_scale = 1.0
    elif step_seconds >= busy_total and idle_total > 0:
        busy_scale, idle_scale = 1.0, (step_seconds - busy_total) / idle_total
    else:
        # The device was busier than the whole unprofiled step, or never idle: one factor is all that can be said.
        busy_scale = idle_scale = step_seconds / profiled if profiled else 0.0
    note = _ratio(profiled, step_seconds)
    parts = [
        Part(cause=name, seconds_per_step=ns / 1e9 * busy_scale, description=_scaled("device busy", busy_scale, note))
        for name, ns in _descending(busy)
    ]
    return parts + [
        Part(
            cause=f"idle: {name}",
            seconds_per_step=ns / 1e9 * idle_scale,
            description=_scaled(_IDLE_DESCRIPTIONS[name], idle_scale, note),
            busy=False,
        )
        for name, ns in _descending(gaps)
    ]


def _device_families(trace: Trace, windows: idle.Windows) -> dict[str, float]:
    """Nanoseconds per step by family. Where streams overlap, the first in ``FAMILIES`` has the time."""
    device = trace.device
    mine = idle.on_main_device(trace)
    family = of_device(trace)
    taken = Intervals(np.zeros(0, np.int64), np.zeros(0, np.int64))
    before, found = 0, {}
    for number, name in enumerate(FAMILIES):
        rows = mine & (family == number)
        if not rows.any():
            continue
        start, end = device.start_ns[rows], device.end_ns[rows]
        taken = union(np.concatenate([taken.start, start]), np.concatenate([taken.end, end]))
        covered = int(taken.covered(windows.start, windows.end).sum())
        if covered > before:
            found[name] = (covered - before) / len(windows.start)
        before = covered
    return found


def _on_cpu(trace: Trace, step_seconds: float | None) -> list[Part]:
    host, windows = trace.host, idle.step_windows(trace)
    # The thread that runs the step; on a CPU its backward runs there too.
    rows = (host.kind == OP) & trace.in_counted(host.step) & (host.thread == trace.steps.thread)
    family = of_host(trace)[rows]
    spent = np.bincount(family, weights=host.self_ns[rows], minlength=len(FAMILIES)) / len(windows.start)
    found = {name: float(spent[number]) for number, name in enumerate(FAMILIES) if spent[number] > 0}
    total = sum(found.values())
    # Operators that outlast their step by a clock tick must not make the remainder negative.
    whole = max(windows.mean_ns, total)
    scale = 1.0 if step_seconds is None else step_seconds / (whole / 1e9) if whole else 0.0
    note = _ratio(whole / 1e9, step_seconds)
    parts = [
        Part(cause=name, seconds_per_step=ns / 1e9 * scale, description=_scaled("inside operators", scale, note))
        for name, ns in _descending(found)
    ]
    rest = Part(
        cause=OVERHEAD,
        seconds_per_step=(whole - total) / 1e9 * scale,
        description=_scaled("step time outside operators, also that of profiling itself", scale, note),
        busy=False,
    )
    return [*parts, rest]


def _descending(found: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(found.items(), key=lambda item: -item[1])


def _ratio(profiled: float, unprofiled: float | None) -> str:
    """How much profiling lengthened the step; empty where nothing tells."""
    if unprofiled is None:
        return ""
    return f"profiled step {profiled / unprofiled:.2f} x the unprofiled one" if unprofiled > 0 else "not comparable"


def _scaled(what: str, scale: float, note: str) -> str:
    if not note:
        return what
    if scale == 1.0:
        return f"{what}; as measured in the profiled step ({note})"
    return f"{what}; profiled time x {scale:.2f} ({note})"
