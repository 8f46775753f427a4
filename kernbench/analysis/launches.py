"""How many pieces of work a step gives to the device."""

from __future__ import annotations

import re

import numpy as np

from kernbench.analysis.families import NO_LAUNCH
from kernbench.analysis.windows import busy_intervals, on_main_device, step_windows
from kernbench.record import Launches, LaunchGaps
from kernbench.traces.nesting import OP, Bools, Ints
from kernbench.traces.trace import COPY, KERNEL, MEMSET, Trace

# Kernels below this are as long as it takes to launch the next one.
SHORT_NS = 5_000

_OPERATOR = re.compile(r"(?!autograd::|torch::)\w+::")
_ONE_LAUNCH = re.compile(r"aten::_(foreach|fused)_")


def launches(trace: Trace) -> Launches:
    """Device work items per step, averaged over the counted steps.

    On a GPU these are kernels, copies and memsets. On a CPU they are estimated: the innermost calls of operators that
    compute something (views, allocations and metadata in ``families.NO_LAUNCH`` do not), with a ``_foreach_`` or
    ``_fused_`` operator as one. A GPU may need a few more or less: its kernels are fused differently, and the trace
    does not tell work on host tensors (an optimizer's step counters) from the rest.
    """
    steps = len(trace.counted)
    if not trace.on_gpu:
        return Launches(per_step=_computing_calls(trace) / steps)
    device = trace.device
    counted = trace.in_counted(device.step)
    count = np.bincount(device.kind[counted], minlength=3) / steps
    kernels = counted & (device.kind == KERNEL)
    length = (device.end_ns - device.start_ns)[kernels]
    return Launches(
        per_step=float(count.sum()),
        kernels_per_step=float(count[KERNEL]),
        copies_per_step=float(count[COPY]),
        memsets_per_step=float(count[MEMSET]),
        median_seconds=float(np.median(length)) / 1e9 if len(length) else None,
        short_share=float(np.mean(length < SHORT_NS)) if len(length) else None,
    )


def gaps(trace: Trace) -> LaunchGaps | None:
    """How far the host runs ahead of the main device; None where the trace holds no launch of its work.

    A latency counts where the stream had ended all earlier work before the launch began. A gap lies between two
    neighbours on one stream, both of the same step; what counts as idle in gaps is time in which no stream was busy,
    from the first work of a step to its last.
    """
    if not trace.on_gpu:
        return None
    host, device, steps = trace.host, trace.device, len(trace.counted)
    rows = np.flatnonzero(on_main_device(trace) & (device.call >= 0))
    rows = rows[trace.in_counted(device.step[rows])]
    if not len(rows):
        return None
    launched, start, end = host.start_ns[device.call[rows]], device.start_ns[rows], device.end_ns[rows]
    order = np.lexsort((start, device.stream[rows]))
    first, second = order[:-1], order[1:]
    neighbours = device.stream[rows[first]] == device.stream[rows[second]]
    first, second = first[neighbours], second[neighbours]
    same_step = device.step[rows[first]] == device.step[rows[second]]
    between = (start[second] - end[first])[same_step]
    between = between[between > 0]
    unqueued = (end[first] <= launched[second]) & (start[second] >= launched[second])
    latency = (start[second] - launched[second])[unqueued]
    ahead = _depth(np.sort(launched), np.sort(end))
    return LaunchGaps(
        latency_seconds=float(np.median(latency)) / 1e9 if len(latency) else None,
        gap_seconds=float(np.median(between)) / 1e9 if len(between) else None,
        gaps_per_step=len(between) / steps,
        idle_in_gaps_seconds_per_step=_idle_between(trace, rows) / steps / 1e9,
        depth=(float(np.median(ahead)), int(ahead.max())),
        graph_launches_per_step=len(np.unique(device.call[rows][device.graph[rows] > 0])) / steps,
    )


def _depth(launched: Ints, ended: Ints) -> Ints:
    """Work items given to the device and not yet done, right after each launch."""
    depth: Ints = np.arange(1, len(launched) + 1) - np.searchsorted(ended, launched, side="right")
    return depth


def _idle_between(trace: Trace, rows: Ints) -> float:
    """Nanoseconds in which the device was idle between the first and the last work (``rows``) of each step."""
    device, count = trace.device, len(trace.steps)
    first, last = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(first, device.step[rows], device.start_ns[rows])
    np.maximum.at(last, device.step[rows], device.end_ns[rows])
    windows = step_windows(trace)
    begin = np.maximum(first[trace.counted], windows.start)
    finish = np.maximum(np.minimum(last[trace.counted], windows.end), begin)
    return float((finish - begin - busy_intervals(trace).covered(begin, finish)).sum())


def _computing_calls(trace: Trace) -> int:
    """Innermost computing operator calls in the counted steps."""
    host = trace.host
    launching = np.fromiter(
        (_OPERATOR.match(name) is not None and name not in NO_LAUNCH for name in trace.names), bool, len(trace.names)
    )
    whole = trace.named(_ONE_LAUNCH)
    computes = (host.kind == OP) & launching[host.name] & ~_under(host.parent, (host.kind == OP) & whole[host.name])
    inner = _over(host.parent, computes)
    leaves = computes & ~inner
    return int(np.count_nonzero(leaves & trace.in_counted(host.step)))


def _under(parent: Ints, chosen: Bools) -> Bools:
    """Rows with a chosen row among their ancestors."""
    under, above = np.append(chosen, False)[parent], parent
    # Each round looks twice as far up as the one before.
    while np.any(above >= 0):
        under = under | np.append(under, False)[above]
        above = np.where(above >= 0, above[above], -1)
    return under


def _over(parent: Ints, chosen: Bools) -> Bools:
    """Rows with a chosen row among their descendants."""
    over = np.zeros(len(parent) + 1, bool)  # the last entry takes what has no parent
    rows = np.flatnonzero(chosen)
    while len(rows):
        above = parent[rows]
        rows = np.unique(above[(above >= 0) & ~over[above]])
        over[rows] = True
    return over[:-1]
