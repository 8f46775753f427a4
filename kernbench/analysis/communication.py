"""Collectives: how much of them computing hides, and which rank keeps the others waiting.

A collective's kernel runs on a rank from when that rank arrives until the data is there, so the rank that arrives last
has the shortest one, and what another rank's takes longer is that rank's wait. This compares lengths only, so that the
clocks of the ranks need not agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kernbench.analysis.families import COMMUNICATION, FAMILIES, of_device
from kernbench.analysis.intervals import union
from kernbench.analysis.windows import on_main_device, step_windows
from kernbench.nesting import Bools, Ints
from kernbench.record import Communication, RankTime
from kernbench.trace import Trace

# Below this share of the step a rank's lag is noise.
NOTABLE_SHARE = 0.02
# Here a rank waits for one other, and not for all.
_POINT_TO_POINT = re.compile(r"send|recv", re.IGNORECASE)

_Key = tuple[int, str, int, int]


@dataclass(frozen=True, eq=False)
class _Rank:
    """What one rank's trace gives; ``length`` are the collectives of the counted steps by what they are."""

    time: RankTime
    by_name: dict[str, float]
    length: dict[_Key, int]


def communication(traces: Sequence[Trace]) -> Communication | None:
    """Collectives of one rank, or of several ranks of one run; None where no device ran any.

    Waiting needs the traces of several ranks, and the same collectives in them: the n-th of a name in a step is one
    collective on all ranks.
    """
    found = [_rank(one, number) for one, number in zip(traces, _numbers(traces), strict=True) if one.on_gpu]
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
    device, windows = trace.device, step_windows(trace)
    mine = on_main_device(trace)
    collective = mine & communicates(trace)
    talking = union(device.start_ns[collective], device.end_ns[collective])
    working = union(device.start_ns[mine & ~collective], device.end_ns[mine & ~collective])
    steps = len(windows.start)
    spent, computed, exposed = (
        float(part.covered(windows.start, windows.end).sum()) / steps / 1e9
        for part in (talking, working, talking.without(working))
    )
    rows = np.flatnonzero(collective & trace.in_counted(device.step))
    length = device.end_ns - device.start_ns
    by_name: dict[str, float] = defaultdict(float)
    for row in rows.tolist():
        by_name[_name(trace, row)] += int(length[row]) / steps / 1e9
    time = RankTime(
        rank=number,
        step_seconds=windows.mean_ns / 1e9,
        compute_seconds_per_step=computed,
        communication_seconds_per_step=spent,
        exposed_seconds_per_step=exposed,
    )
    return _Rank(time, dict(by_name), _lengths(trace, rows))


def communicates(trace: Trace) -> Bools:
    """Which device events are collectives or messages between ranks."""
    return np.asarray((trace.device.collective >= 0) | (of_device(trace) == FAMILIES.index(COMMUNICATION)), np.bool_)


def _name(trace: Trace, row: int) -> str:
    """The collective's own name, else its kernel's."""
    index = int(trace.device.collective[row])
    if index >= 0:
        return trace.names[index]
    return trace.names[int(trace.device.name[row])]


def _lengths(trace: Trace, rows: Ints) -> dict[_Key, int]:
    """Length in ns of each collective by step number, name, ranks in its group, and ordinal among such."""
    device, steps = trace.device, trace.steps
    group = np.full(len(device), -1, np.int64)
    group[trace.collectives.row] = trace.collectives.group
    count: dict[tuple[int, str, int], int] = defaultdict(int)
    found = {}
    for row in rows.tolist():
        name = _name(trace, row)
        if _POINT_TO_POINT.search(name):
            continue
        key = (int(steps.number[device.step[row]]), name, int(group[row]))
        found[(*key, count[key])] = int(device.end_ns[row] - device.start_ns[row])
        count[key] += 1
    return found


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
