"""What a step would take with a phase of the plan in: its reads gone, its kernels fused and at their roofline time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec
import numpy as np

from kernbench.analysis.hostcuts import launched_together
from kernbench.analysis.replay import without_items_time
from kernbench.analysis.replaymodel import CannotReplayError, Program
from kernbench.analysis.replaysites import Site
from kernbench.analysis.shapes import owners, works
from kernbench.analysis.whatif import LEAST_SHARE, WhatIfReplay
from kernbench.measurement.roofline import SAME_RATE
from kernbench.record import Ceilings, Estimate, LineLog, WhatIf
from kernbench.traces.nesting import Bools
from kernbench.traces.trace import KERNEL, Trace


def with_phases(
    found: WhatIf | None,
    trace: Trace,
    lines: LineLog | None,
    ceilings: Ceilings | None,
    shaped: Trace | None,
    *,
    unprofiled_seconds: float | None = None,
    titles: Mapping[int, str] | None = None,
) -> WhatIf | None:
    """The answer with an estimate for each phase whose site the trace shows.

    The range goes from the phase's reads gone and all else as it is, to each run of its launches as one, each operator
    at its roofline time as far as its shapes are known. A kernel that fuses several operators may win still more.

    Args:
        found: the answer of ``whatif``; one that refuses to estimate is returned as it is.
        shaped: a trace of the same step that holds shapes.
        titles: of the phases by number, where they are known.
    """
    if found is None or found.refused:
        return found
    try:
        replayed = WhatIfReplay(trace, (), lines, unprofiled_seconds)
    except CannotReplayError:
        return found
    device, program = trace.device, replayed.program
    of_sites = {site.phase for site in replayed.sites if site.phase is not None}
    phases = {number for number in device.phase[program.items.row].tolist() if number >= 0} | of_sites
    floors = roofline_shares(shaped, ceilings) if shaped is not None and ceilings is not None else {}
    named = {number: f"phase {number}, {title}" for number, title in (titles or {}).items()}
    rows = [
        _estimate(replayed, number, floors.get(number), named.get(number, f"phase {number}"))
        for number in sorted(phases)
    ]
    rows = [row for row in rows if row.share >= LEAST_SHARE]
    return msgspec.structs.replace(found, estimates=[*found.estimates, *rows])


def _estimate(replayed: WhatIfReplay, number: int, floor: float | None, title: str) -> Estimate:
    """The step with phase ``number`` in; ``floor`` is the share of its kernels' time that their rooflines leave."""
    mine = [part for site in replayed.sites if (part := _within_phase(replayed, site, number)) is not None]
    least = replayed.without_sites(mine)
    most = _fused(replayed.trace, least, number, floor)
    low, high = (replayed.estimate(program, change="phase", title="") for program in (least, most))
    saved = (low.saving_seconds_per_step[0], max(low.saving_seconds_per_step[1], high.saving_seconds_per_step[1]))
    reads = "its reads gone" if mine else "no read of its own"
    kernels = "its kernels at their roofline" if floor is not None else "its kernels as long as now"
    return Estimate(
        change="phase",
        title=title,
        saving_seconds_per_step=saved,
        share=sum(saved) / 2e-9 / replayed.baseline[0],
        phase=number,
        deferred=any(site.deferred for site in mine),
        note=f"from {reads} to one launch for each run of its launches, {kernels}",
    )


def _within_phase(replayed: WhatIfReplay, site: Site, number: int) -> Site | None:
    """The waits of a site that lie in the phase; all if the line pass saw the read there."""
    if site.phase == number:
        return site
    phase = replayed.trace.host.phase[replayed.program.nodes.row[site.nodes]]
    inside = site.nodes[phase == number]
    return dataclasses.replace(site, nodes=inside, phase=number) if len(inside) else None


def _fused(trace: Trace, program: Program, number: int, floor: float | None) -> Program:
    """Each run of launches of the phase as one launch."""
    nodes = program.nodes
    issuer = np.repeat(np.arange(len(nodes)), nodes.count)
    # A read that is gone has left its copy behind with no duration.
    spent = np.bincount(issuer, weights=program.items.duration_ns, minlength=len(nodes))
    launching = (spent > 0) & (trace.host.phase[nodes.row] == number)
    changed = launched_together(program, _followers(launching))
    if floor is None:
        return changed
    mine = trace.device.phase[program.items.row] == number
    return without_items_time(changed, np.where(mine, 1 - floor, 0.0))


def _followers(launching: Bools) -> Bools:
    """Nodes that launch right after a launching one."""
    return np.asarray(launching & np.concatenate([[False], launching[:-1]]), np.bool_)


def roofline_shares(shaped: Trace, ceilings: Ceilings) -> dict[int, float]:
    """Per phase, the time that its operators' rooflines allow over the time that its kernels take.

    An operator whose work is not known keeps its time; so does all of a phase of which no operator's is.
    """
    device = shaped.device
    rows = np.flatnonzero((device.kind == KERNEL) & (device.phase >= 0) & (device.op >= 0))
    if not len(rows):
        return {}
    owner = owners(shaped, device.op[rows])
    known = works(shaped, np.unique(owner[owner >= 0]))
    least = [_least_seconds(work.flops, work.bytes, work.dtype, ceilings) if work else None for work in known.works]
    spent = (device.end_ns - device.start_ns)[rows] / 1e9
    # Time by operator first: several kernels of one operator share its roofline.
    operators, position = np.unique(owner, return_inverse=True)
    took = np.bincount(position, weights=spent)
    phase = np.zeros(len(operators), np.int64)
    phase[position] = device.phase[rows]
    shares = {}
    for number in np.unique(device.phase[rows]).tolist():
        mine = np.flatnonzero((phase == number) & (operators >= 0))
        floors = [least[known.kind[row]] if known.kind[row] >= 0 else None for row in operators[mine].tolist()]
        saved = [
            max(float(took[place]) - floor, 0.0) for place, floor in zip(mine, floors, strict=True) if floor is not None
        ]
        total = float(spent[device.phase[rows] == number].sum())
        if saved and total > 0:
            shares[number] = 1 - sum(saved) / total
    return shares


def _least_seconds(flops: float, moved: float, dtype: str, ceilings: Ceilings) -> float | None:
    """Time at the nearer roof; None where the roof is not measured."""
    speed = ceilings.copy_bytes_per_second
    rates = ceilings.matmul_flops_per_second
    rate = rates.get(dtype) or rates.get(SAME_RATE.get(dtype, ""))
    if not speed:
        return None
    return max(moved / speed, flops / rate if rate else 0.0)
