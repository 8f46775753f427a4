"""Why the host waits: what kind of wait each synchronising call is, and what all waits of one place cost."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from kernbench.analysis.attribution import places
from kernbench.analysis.costs import IdleCosts, copies_of, exposed_copies
from kernbench.analysis.stalls import waiting
from kernbench.analysis.waits import Wait, waits
from kernbench.record import Cause, Change, Estimate, LineLog, SourceLine, WhatIf
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import Trace

# Below this a copy to the host is a read of a few values, whatever memory it goes to.
_LARGE_BYTES = 64 * 1024
# What a wait saves alone is told if it comes this close to what it saves among others.
_ALL_OF_IT = 0.9
# Operators whose result has a size that depends on values: they wait without having been asked for a value.
_SIZED_BY_VALUES = re.compile(
    r"aten::(nonzero|index|_unsafe_index|_?index_put_?(impl_)?|masked_select|masked_scatter|_?unique\w*|argwhere|"
    r"repeat_interleave|bincount|histc|linalg_\w+|_linalg_\w+|multinomial|randperm|segment_reduce)$"
)
_READS = re.compile(r"aten::(item|_local_scalar_dense|is_nonzero|equal|allclose)$")
_COPIES = re.compile(r"aten::(copy_|_to_copy|to|lift_fresh|pin_memory|_pin_memory)$")
_TO_DEVICE = re.compile(r".*(HtoD|HostToDevice)")


@dataclass(frozen=True)
class Place:
    """All waits of one line and operator. ``seconds`` is what they cost a step at most, ``count`` how often a step.

    ``low`` is the smaller end where a replay gave a range; ``replayed`` tells that one did, ``jointly`` that other
    waits must go first. ``copying`` is the part of ``seconds`` that copies take while no kernel runs, which from pinned
    memory they could run beside; ``memory`` is the host's side of them, "pageable" or "pinned", as the trace names it.
    """

    cause: Cause
    op: str
    source: SourceLine | None
    seconds: float
    low: float
    count: float
    copying: float = 0.0
    memory: str = ""
    replayed: bool = False
    jointly: bool = False
    deferred: bool = False


def read_places(trace: Trace, lines: LineLog | None, costs: IdleCosts, whatif: WhatIf | None) -> list[Place]:
    """Every place at which the host waits, in no order; its cost from the replay if that holds, else from idle time."""
    where = places(trace, lines)
    by_row = costs.by_host_row(len(trace.host))
    known_waits = waiting(trace, lines)
    stalls = [known.stall for known in known_waits]
    stall_of = {row: position for position, known in enumerate(known_waits) for row in known.rows.tolist()}
    groups: dict[tuple[int, str, int], list[Wait]] = defaultdict(list)
    for wait in waits(trace, where):
        stall = stall_of.get(wait.rows[0], -1)
        groups[(stall, "", -1) if stall >= 0 else (-1, wait.op, wait.line)].append(wait)
    estimates = _by_place(whatif, "without stall")
    found = []
    for (stall, op, line), group in groups.items():
        rows = np.array([row for wait in group for row in wait.rows], np.int64)
        source = where.source(line)
        if stall >= 0:
            known = stalls[stall]
            op = known.op
            source = (
                SourceLine(file=known.file, line=known.line, text=known.source, function=known.function)
                if known.file
                else None
            )
        estimate = estimates.get(_key(op, source))
        found.append(_place(trace, group, rows, op, source, float(by_row[rows].sum()), estimate))
    return _jointly(found, whatif)


def _jointly(found: list[Place], whatif: WhatIf | None) -> list[Place]:
    """The places with what each saves in the replay's best order, where that is more than what each saves alone.

    Of two reads in a row either alone saves nothing: the other one waits in its place.
    """
    in_order = _by_place(whatif, "stalls in best order")
    result = []
    for place in found:
        estimate = in_order.get(_key(place.op, place.source))
        alone = place.seconds - place.copying
        if estimate is None or alone >= _ALL_OF_IT * estimate.saving_seconds_per_step[1]:
            result.append(place)
            continue
        low, high = (saved + place.copying for saved in estimate.saving_seconds_per_step)
        result.append(replace(place, seconds=high, low=low, replayed=True, jointly=True))
    return result


def _place(
    trace: Trace,
    group: list[Wait],
    rows: Ints,
    op: str,
    source: SourceLine | None,
    idle_ns: float,
    estimate: Estimate | None,
) -> Place:
    steps = len(trace.counted)
    cause = _cause(trace, group[0], copies_of(trace, rows[:1]))
    low, high = estimate.saving_seconds_per_step if estimate else (idle_ns / steps / 1e9, idle_ns / steps / 1e9)
    copying, memory = 0.0, ""
    if cause == "pageable copy":
        copies = copies_of(trace, rows)
        copying = exposed_copies(trace, copies) / steps / 1e9
        names = " ".join({trace.names[name] for name in trace.device.name[copies].tolist()})
        memory = next((kind for kind in ("pageable", "pinned") if kind in names.lower()), "")
    return Place(
        cause=cause,
        op=op,
        source=source,
        seconds=max(high, 0.0) + copying,
        low=max(low, 0.0) + copying,
        count=len(group) / steps,
        copying=copying,
        memory=memory,
        replayed=estimate is not None,
        deferred=estimate is not None and estimate.deferred,
    )


def _by_place(whatif: WhatIf | None, change: Change) -> dict[tuple[str, str, int], Estimate]:
    return {_key(one.op, one.source): one for one in (whatif.estimates if whatif else ()) if one.change == change}


def _key(op: str, source: SourceLine | None) -> tuple[str, str, int]:
    return (op, source.file, source.line) if source else (op, "", 0)


def _cause(trace: Trace, wait: Wait, copies: Ints) -> Cause:
    device = trace.device
    if any(_SIZED_BY_VALUES.match(name) for name in wait.operators):
        return "implicit sync"
    if any(_READS.match(name) for name in wait.operators) or not wait.operators:
        return "host read"
    if len(copies):
        to_device = any(_TO_DEVICE.match(trace.names[name]) for name in device.name[copies].tolist())
        large = bool(np.any(device.bytes[copies] >= _LARGE_BYTES))
        return "pageable copy" if to_device or large else "host read"
    return "host read" if any(_COPIES.match(name) for name in wait.operators) else "implicit sync"
