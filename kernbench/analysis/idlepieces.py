"""Gaps between device events, cut into pieces by cause.

A gap ends with the next device event. What lies before the host began to launch that event is the host's doing; what
lies after is the way from the launch to the device. Causes:

- "sync": a synchronising call kept the host from launching.
- "allocation": so did cudaMalloc, cudaFree and the like.
- "data loading": the host was waiting for the next batch.
- "communication": the host was in an operator of torch.distributed.
- "launch-bound": the host went from launch to launch and was still slower than the device.
- "host": the host had nothing queued: Python, dispatch, data preparation.
- "launch": the work was on its way, less than ``LAUNCH_NS`` after the launch began.
- "slow launch": the launch call itself took longer than that, as when it loads the kernel's module.
- "queued": the work had been handed over for longer than that; it waited for another stream or an event.
- "unknown": the trace does not hold the launch of the next event, or nothing of the host at all.

Where the device ran dry while the host stood in a synchronising call, that call is to blame for as much of the gap as
the host had waited since its last launch: without the wait the next launch comes so much earlier, and no earlier. The
rest of the gap is the host's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kernbench.analysis.families import COMMUNICATION, FAMILIES, of_host
from kernbench.analysis.intervals import Intervals, union
from kernbench.analysis.memo import once_per_trace
from kernbench.analysis.windows import Windows, busy_intervals, on_main_device, step_windows
from kernbench.traces.nesting import ANNOTATION, CALL, Bools, Ints
from kernbench.traces.trace import COPY, Trace

CAUSES = (
    "sync",
    "host",
    "allocation",
    "data loading",
    "communication",
    "launch-bound",
    "launch",
    "slow launch",
    "queued",
    "unknown",
)
SYNC, HOST, ALLOCATION, DATA, EXCHANGE, LAUNCH_BOUND, LAUNCH, SLOW_LAUNCH, QUEUED, UNKNOWN = range(len(CAUSES))
# Launch calls take 4.5 to 7 us on current machines; twice that is no longer the way of a launch.
LAUNCH_NS = 15_000
# An operator of PyTorch takes 5 to 60 us from launch to launch, profiled and with its module around it.
DISPATCH_NS = 100_000
# Device times are converted to the host's clock, which is good to about this much.
SKEW_NS = 2_000
# A call that copies from pageable memory returns sooner than this where the driver took the bytes along with it.
STAGED_NS = 20_000
_ALLOCATION = re.compile(r"(cuda|cu|hip)(Malloc|Free|MemAlloc|MemFree|HostAlloc|HostMalloc|HostFree|MemCreate|MemMap)")
_FREE = re.compile(r"(cuda|cu|hip)(Free|MemFree|MemUnmap)")
_LOADING = re.compile(r"enumerate\(DataLoader\)#|(?i:.*\b(data[ _]?load(ing|er)?|(next|get|load|fetch)_?batch)\b)")
_LOADER_FRAME = re.compile(r".*torch/utils/data/dataloader\.py\(\d+\): __next__")
_TO_HOST = re.compile(r".*(DtoH|DeviceToHost)")
_FROM_PAGEABLE = re.compile(r".*Pageable -> Device")
_NEVER = np.iinfo(np.int64).max
_NOT_TRACED = np.iinfo(np.int64).min
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Idle time in order; ``cause`` indexes ``CAUSES``.

    ``site`` is the host row that explains the piece: the call or loader that held the host up, else the launch that
    came next; -1 where the trace has none. ``after`` is set for the way of a launch that a wait alone had delayed: the
    host row of that wait, -1 elsewhere.
    """

    start: Ints
    end: Ints
    cause: Ints
    site: Ints
    after: Ints

    def per_step(self, windows: Windows) -> dict[str, float]:
        """Nanoseconds per step of each cause that occurs within the windows."""
        inside = np.bincount(self.cause, weights=windows.share_of(self.start, self.end), minlength=len(CAUSES)) / len(
            windows.start
        )
        return {name: float(ns) for name, ns in zip(CAUSES, inside, strict=True) if ns}


@dataclass(frozen=True, eq=False)
class _Gaps:
    """Idle stretches [start, end): ``begun`` is when the host began to launch what ends them, ``row`` that launch."""

    start: Ints
    begun: Ints
    end: Ints
    row: Ints
    returned: Ints


@once_per_trace
def pieces(trace: Trace) -> Pieces:
    """Idle time of the main device from the first step's begin to the last one's end, by cause."""
    gaps = _gaps(trace)
    late = np.where(gaps.end - gaps.returned < LAUNCH_NS, SLOW_LAUNCH, QUEUED)
    travel = np.where(gaps.end - gaps.begun < LAUNCH_NS, LAUNCH, late)
    travel[gaps.row == _NOT_TRACED] = UNKNOWN
    site = np.where(gaps.row == _NOT_TRACED, -1, gaps.row)
    before, after = _by_host_activity(trace, gaps)
    parts = [*before, (gaps.begun, gaps.end, travel, site)]
    start, end, cause, sites = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    following = np.concatenate([np.full(len(start) - len(after), -1, np.int64), after])
    kept = np.flatnonzero(end > start)
    kept = kept[np.argsort(start[kept], kind="stable")]
    return Pieces(start[kept], end[kept], cause[kept], sites[kept], following[kept])


def _gaps(trace: Trace) -> _Gaps:
    mine = np.flatnonzero(on_main_device(trace))
    windows = step_windows(trace)
    idle = busy_intervals(trace).gaps(int(windows.start.min()), int(windows.end.max()))
    call = np.append(trace.device.call[mine], -1)
    following = np.searchsorted(trace.device.start_ns[mine], idle.end, side="left")
    row = call[following]
    traced = row >= 0
    begin, finish = (
        np.where(traced, time[row], _NOT_TRACED) if len(trace.host) else np.full(len(row), _NOT_TRACED)
        for time in (trace.host.start_ns, trace.host.end_ns)
    )
    # After the last event nothing more was launched: the host is to blame to the end.
    last = following == len(mine)
    begin[last], finish[last] = _NEVER, _NEVER
    row = np.where(traced | last, row, _NOT_TRACED)
    return _Gaps(idle.start, np.clip(begin, idle.start, idle.end), idle.end, row, np.clip(finish, idle.start, idle.end))


_Part = tuple[Ints, Ints, Ints, Ints]  # start, end, cause, site


def _by_host_activity(trace: Trace, gaps: _Gaps) -> tuple[list[_Part], Ints]:
    """What the host did before each launch; and for each gap the wait that alone delayed its launch, or -1."""
    host = trace.host
    waiting, allocating = blocking_rows(trace)
    loading, exchanging = _loading_rows(trace), _exchange_rows(trace)
    syncs, allocations = (union(host.start_ns[rows], host.end_ns[rows]) for rows in (waiting, allocating))
    loads = loading_intervals(trace)
    exchanges = union(host.start_ns[exchanging], host.end_ns[exchanging])
    by_sync = syncs.contains(gaps.start) | syncs.contains(gaps.start - SKEW_NS)
    by_allocation = ~by_sync & (allocations.contains(gaps.start) | allocations.contains(gaps.start - SKEW_NS))
    drained = by_sync | by_allocation
    since, spacing = _since_last_launch(trace, gaps)
    credit = np.where(by_sync, syncs.covered(since, gaps.begun), 0)
    credit = np.where(by_allocation, allocations.covered(since, gaps.begun), credit)
    culprit = np.where(by_sync, _latest(host.start_ns, waiting, gaps.start), -1)
    culprit = np.where(by_allocation, _latest(host.start_ns, allocating, gaps.start), culprit)

    whole = union(gaps.start, gaps.begun)
    loaded, rest = whole.within(loads), whole.without(loads)
    gap = np.searchsorted(gaps.start, rest.start, side="right") - 1
    held = _spend(credit, gap, rest)
    free = _chosen(rest, ~drained[gap])
    late_sync, free = free.within(syncs), free.without(syncs)
    late_allocation, free = free.within(allocations), free.without(allocations)
    own = union(
        np.concatenate([(rest.start + held)[drained[gap]], free.start]),
        np.concatenate([rest.end[drained[gap]], free.end]),
    )
    exchanged, own = own.within(exchanges), own.without(exchanges)
    of_own = np.searchsorted(gaps.start, own.start, side="right") - 1
    busy_host = spacing - union(
        np.concatenate([syncs.start, allocations.start, loads.start]),
        np.concatenate([syncs.end, allocations.end, loads.end]),
    ).covered(since, np.maximum(gaps.begun, since))
    own_cause = np.where(busy_host < DISPATCH_NS, LAUNCH_BOUND, HOST)[of_own]
    next_launch = np.where(gaps.row == _NOT_TRACED, -1, gaps.row)

    parts: list[_Part] = [
        (rest.start, rest.start + held, np.where(by_sync, SYNC, ALLOCATION)[gap], culprit[gap]),
        _part(late_sync, SYNC, _latest(host.start_ns, waiting, late_sync.start)),
        _part(late_allocation, ALLOCATION, _latest(host.start_ns, allocating, late_allocation.start)),
        _part(loaded, DATA, _latest(host.start_ns, loading, loaded.start)),
        _part(exchanged, EXCHANGE, _latest(host.start_ns, exchanging, exchanged.start)),
        (own.start, own.end, own_cause, next_launch[of_own]),
    ]
    alone = drained & (credit >= gaps.begun - gaps.start - loads.covered(gaps.start, gaps.begun))
    return parts, np.where(alone, culprit, -1)


@once_per_trace
def blocking_rows(trace: Trace) -> tuple[Ints, Ints]:
    """Host rows that wait for the device on the program's behalf, and those in which the allocator holds it up.

    A copy from pageable memory waits too, unless it is small enough to be handed over at once. A synchronisation right
    before a release of memory is the allocator's: it waits before it gives blocks back.
    """
    host, device = trace.host, trace.device
    copies = device.call[trace.named(_FROM_PAGEABLE)[device.name] & (device.kind == COPY) & (device.call >= 0)]
    waiting = np.zeros(len(host), bool)
    waiting[trace.sync_calls] = True
    waiting[copies[(host.end_ns - host.start_ns)[copies] > STAGED_NS]] = True
    waits = np.flatnonzero(waiting)
    waits = waits[np.argsort(host.start_ns[waits], kind="stable")]
    allocating = (host.kind == CALL) & trace.named(_ALLOCATION)[host.name]
    calls = np.flatnonzero(host.kind == CALL)
    following = np.append(calls[1:], -1)[np.searchsorted(calls, waits)]
    releases = (following >= 0) & trace.named(_FREE)[host.name[following]]
    releases &= (host.thread[following] == host.thread[waits]) & (host.parent[following] == host.parent[waits])
    allocating[waits[releases]] = True
    rows = np.flatnonzero(allocating)
    return waits[~releases], rows[np.argsort(host.start_ns[rows], kind="stable")]


def _driving(trace: Trace) -> Bools:
    """Host rows of the threads that launch work or run the steps: nobody waits for the others."""
    call = trace.device.call
    threads = np.append(trace.host.thread[call[call >= 0]], trace.steps.thread)
    return np.isin(trace.host.thread, threads)


def _loading_rows(trace: Trace) -> Ints:
    host = trace.host
    rows = np.flatnonzero((host.kind != CALL) & trace.named(_LOADING)[host.name] & _driving(trace))
    return rows[np.argsort(host.start_ns[rows], kind="stable")]


def loading_intervals(trace: Trace) -> Intervals:
    """When the host stood in a data loader, by annotations and, where stacks were recorded, by Python frames."""
    host, frames, rows = trace.host, trace.frames, _loading_rows(trace)
    calls = np.flatnonzero(trace.named(_LOADER_FRAME)[frames.name]) if len(frames) else _NONE
    calls = calls[frames.thread[calls] == trace.steps.thread]
    return union(
        np.concatenate([host.start_ns[rows], frames.start_ns[calls]]),
        np.concatenate([host.end_ns[rows], frames.end_ns[calls]]),
    )


def _exchange_rows(trace: Trace) -> Ints:
    """Host rows of torch.distributed's operators and annotations ("nccl:all_reduce")."""
    host = trace.host
    named = trace.named(re.compile(r"(nccl|rccl|gloo|mpi|ucc):\w"))[host.name] & (host.kind == ANNOTATION)
    rows = np.flatnonzero((named | (of_host(trace) == FAMILIES.index(COMMUNICATION))) & _driving(trace))
    return rows[np.argsort(host.start_ns[rows], kind="stable")]


def _since_last_launch(trace: Trace, gaps: _Gaps) -> tuple[Ints, Ints]:
    """For each gap: when the host last gave the device work to compute, and how long from launch to launch.

    Copies to the host are no work in this sense: they belong to the read that waits for them. Without an earlier
    launch the gap's own begin stands in, and the spacing has no end.
    """
    host, device = trace.host, trace.device
    linked = device.call >= 0
    to_host = (device.kind == COPY) & trace.named(_TO_HOST)[device.name]
    working, every = (np.sort(host.start_ns[device.call[rows]]) for rows in (linked & ~to_host, linked))
    earlier = np.searchsorted(working, gaps.begun, side="left") - 1
    since = np.minimum(np.append(working, 0)[earlier], gaps.start)
    since = np.where(earlier >= 0, since, gaps.start)
    previous = np.searchsorted(every, gaps.begun, side="left") - 1
    spacing = np.where(previous >= 0, gaps.begun - np.append(every, 0)[previous], _NEVER)
    return since, np.where(gaps.row >= 0, spacing, _NEVER)


def _spend(credit: Ints, gap: Ints, rest: Intervals) -> Ints:
    """How much of each fragment the credit of its gap pays for, from the gap's first fragment on."""
    length = rest.end - rest.start
    before = np.cumsum(length) - length
    first = np.searchsorted(gap, gap, side="left")
    spent: Ints = np.clip(credit[gap] - (before - before[first]), 0, length)
    return spent


def _chosen(intervals: Intervals, chosen: Bools) -> Intervals:
    return Intervals(intervals.start[chosen], intervals.end[chosen])


def _part(intervals: Intervals, cause: int, site: Ints) -> _Part:
    return intervals.start, intervals.end, np.full(len(intervals.start), cause, np.int64), site


def _latest(start_ns: Ints, rows: Ints, time: Ints) -> Ints:
    """The last of ``rows`` (in order of start) to have begun at each time; -1 where none had."""
    if not len(rows):
        return np.full(len(time), -1, np.int64)
    position = np.searchsorted(start_ns[rows], time, side="right") - 1
    return np.where(position >= 0, rows[position], -1)
