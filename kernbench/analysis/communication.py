"""Collectives: how much of them computing hides, and which rank keeps the others waiting.

A collective's kernel runs on a rank from when that rank arrives until the data is there, so the rank that arrives last
has the shortest one, and what another rank's takes longer is that rank's wait. This compares lengths only, so that the
clocks of the ranks need not agree.

Without a device the collectives are those that gloo's threads run, and operators are what computes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kernbench.analysis.families import COMMUNICATION, ENGINE, FAMILIES, of_device, of_host
from kernbench.analysis.intervals import Intervals, union
from kernbench.analysis.windows import on_main_device, step_windows
from kernbench.record import Communication, RankTime
from kernbench.traces.nesting import ANNOTATION, OP, Bools, Ints
from kernbench.traces.trace import Trace
from kernbench.traces.tracesteps import step_at

# Below this share of the step a rank's lag is noise.
NOTABLE_SHARE = 0.02
# Here a rank waits for one other, and not for all.
_POINT_TO_POINT = re.compile(r"send|recv", re.IGNORECASE)
# What gloo's threads mark while they run a collective.
_ON_HOST = re.compile(r"gloo:(\w+)$")

_Key = tuple[int, str, int, int]


@dataclass(frozen=True, eq=False)
class _Rank:
    """What one rank's trace gives; ``length`` are the collectives of the counted steps by what they are."""

    time: RankTime
    by_name: dict[str, float]
    length: dict[_Key, int]


@dataclass(frozen=True, eq=False)
class _Collectives:
    """The collectives of the counted steps in order of time, and when the rank was in any, or did anything else."""

    name: list[str]
    group: Ints
    step: Ints
    nanoseconds: Ints
    talking: Intervals
    working: Intervals


def communication(traces: Sequence[Trace]) -> Communication | None:
    """Collectives of one rank, or of several ranks of one run; None where there are none.

    Waiting needs the traces of several ranks, and the same collectives in them: the n-th of a name in a step is one
    collective on all ranks.
    """
    found = [_rank(one, number) for one, number in zip(traces, _numbers(traces), strict=True)]
    if not any(rank.time.communication_seconds_per_step for rank in found):
        return None
    waits = _waits(found)
    ranks = [
        msgspec.structs.replace(rank.time, wait_seconds_per_step=waits.get(rank.time.rank))
        for rank in sorted(found, key=lambda rank: rank.time.rank)
    ]
    slowest, lag = _slowest(ranks)
    spent = sum(rank.communication_seconds_per_step for rank in ranks)
    exposed = sum(rank.exposed_seconds_per_step for rank in ranks)
    names: dict[str, float] = defaultdict(float)
    for rank in found:
        for name, seconds in rank.by_name.items():
            names[name] += seconds / len(found)
    return Communication(
        ranks=ranks,
        overlap_share=1 - exposed / spent,
        slowest_rank=slowest,
        lag_seconds_per_step=lag,
        collectives=dict(sorted(names.items(), key=lambda item: -item[1])),
    )


def _numbers(traces: Sequence[Trace]) -> list[int]:
    """The ranks' numbers, or positions where a trace does not tell its own or two tell the same."""
    told = [one.info.rank for one in traces]
    if None in told or len(set(told)) < len(told):
        return list(range(len(traces)))
    return [rank for rank in told if rank is not None]


def _rank(trace: Trace, number: int) -> _Rank:
    windows = step_windows(trace)
    found = _on_device(trace) if trace.on_gpu else _on_host(trace)
    steps = len(windows.start)
    spent, computed, exposed = (
        float(part.covered(windows.start, windows.end).sum()) / steps / 1e9
        for part in (found.talking, found.working, found.talking.without(found.working))
    )
    by_name: dict[str, float] = defaultdict(float)
    for name, length in zip(found.name, found.nanoseconds.tolist(), strict=True):
        by_name[name] += length / steps / 1e9
    time = RankTime(
        rank=number,
        step_seconds=windows.mean_ns / 1e9,
        compute_seconds_per_step=computed,
        communication_seconds_per_step=spent,
        exposed_seconds_per_step=exposed,
    )
    return _Rank(time, dict(by_name), _lengths(trace, found))


def _on_device(trace: Trace) -> _Collectives:
    device = trace.device
    mine = on_main_device(trace)
    collective = mine & communicates(trace)
    rows = np.flatnonzero(collective & trace.in_counted(device.step))
    group = np.full(len(device), -1, np.int64)
    group[trace.collectives.row] = trace.collectives.group
    return _Collectives(
        name=[_name(trace, row) for row in rows.tolist()],
        group=group[rows],
        step=device.step[rows],
        nanoseconds=device.end_ns[rows] - device.start_ns[rows],
        talking=union(device.start_ns[collective], device.end_ns[collective]),
        working=union(device.start_ns[mine & ~collective], device.end_ns[mine & ~collective]),
    )


def _on_host(trace: Trace) -> _Collectives:
    """What gloo marks, in the step in which it begins, and operators; the engine's frames may wait in a hook."""
    host = trace.host
    collective = (host.kind == ANNOTATION) & trace.named(_ON_HOST)[host.name]
    idle = [FAMILIES.index(COMMUNICATION), FAMILIES.index(ENGINE)]
    work = (host.kind == OP) & ~np.isin(of_host(trace), idle)
    step = np.where(collective, step_at(trace.steps, host.start_ns), -1)
    rows = np.flatnonzero(collective & trace.in_counted(step))
    rows = rows[np.argsort(host.start_ns[rows], kind="stable")]
    return _Collectives(
        name=[trace.names[index].partition(":")[2] for index in host.name[rows].tolist()],
        group=np.full(len(rows), -1, np.int64),
        step=step[rows],
        nanoseconds=host.end_ns[rows] - host.start_ns[rows],
        talking=union(host.start_ns[collective], host.end_ns[collective]),
        working=union(host.start_ns[work], host.end_ns[work]),
    )


def communicates(trace: Trace) -> Bools:
    """Which device events are collectives or messages between ranks."""
    return np.asarray((trace.device.collective >= 0) | (of_device(trace) == FAMILIES.index(COMMUNICATION)), np.bool_)


def _name(trace: Trace, row: int) -> str:
    """The collective's own name, else its kernel's."""
    index = int(trace.device.collective[row])
    if index >= 0:
        return trace.names[index]
    return trace.names[int(trace.device.name[row])]


def _lengths(trace: Trace, found: _Collectives) -> dict[_Key, int]:
    """Length in ns of each collective by step number, name, ranks in its group, and ordinal among such."""
    count: dict[tuple[int, str, int], int] = defaultdict(int)
    length = {}
    columns = (found.name, found.group.tolist(), trace.steps.number[found.step].tolist(), found.nanoseconds.tolist())
    for name, group, step, nanoseconds in zip(*columns, strict=True):
        if _POINT_TO_POINT.search(name):
            continue
        key = (step, name, group)
        length[(*key, count[key])] = nanoseconds
        count[key] += 1
    return length


def _waits(ranks: Sequence[_Rank]) -> dict[int, float]:
    """Seconds per step that each rank stands in collectives before the last rank arrives; empty if none match.

    Names of which a step holds different numbers on different ranks are left out: their ordinals would not agree. So
    are those of a group smaller than all ranks here, since the trace does not tell who is in it.
    """
    if len(ranks) < 2:
        return {}
    common = set.intersection(*(set(rank.length) for rank in ranks))
    counts = [_counts(rank.length) for rank in ranks]
    matched = [
        key for key in common if len({count[key[:3]] for count in counts}) == 1 and (key[2] < 0 or key[2] >= len(ranks))
    ]
    if not matched:
        return {}
    steps = len({key[0] for key in matched})
    shortest = {key: min(rank.length[key] for rank in ranks) for key in matched}
    return {rank.time.rank: sum(rank.length[key] - shortest[key] for key in matched) / steps / 1e9 for rank in ranks}


def _counts(length: dict[_Key, int]) -> dict[tuple[int, str, int], int]:
    count: dict[tuple[int, str, int], int] = defaultdict(int)
    for key in length:
        count[key[:3]] += 1
    return count


def _slowest(ranks: Sequence[RankTime]) -> tuple[int | None, float | None]:
    """The rank that waits least, if all others wait notably longer, and how much longer they do on average."""
    waits = sorted((rank.wait_seconds_per_step, rank.rank) for rank in ranks if rank.wait_seconds_per_step is not None)
    if len(waits) < 2:
        return None, None
    (least, slowest), (second, _) = waits[:2]
    step = max(rank.step_seconds for rank in ranks)
    if second - least < NOTABLE_SHARE * step:
        return None, None
    return slowest, sum(wait - least for wait, _ in waits[1:]) / (len(waits) - 1)
