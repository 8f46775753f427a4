"""What a step would take without a stall, without loading, in a graph: the trace replayed with that change.

The unchanged trace is replayed first, by the rules alone: with typical latencies, pauses and wake-up times in place of
those that the trace recorded for each event. Where that misses the trace by more than ``LIMIT``, nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from kernbench.analysis import hostcuts
from kernbench.analysis.idle import step_windows
from kernbench.analysis.replay import passes, replay, steady, with_host_time, without_nodes, without_waits
from kernbench.analysis.replaymodel import CannotReplayError, Program, model
from kernbench.analysis.replaysites import Site, read_nodes, sites
from kernbench.record import Ceilings, Estimate, LineLog, Stall, WhatIf
from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import Trace

LIMIT = 0.05
# Sites beyond these are in "all stalls" only.
MOST_SITES = 12
LEAST_SITES = 3
MOST_ORDERED = 6
# Node visits that the estimates may take together: about a second. Past it the best order and further sites stop.
MOST_VISITS = 1_000_000
# A change that wins less than this share of the step is not worth a line.
LEAST_SHARE = 0.002
# Profiled host time is up to this many times the unprofiled one.
LARGEST_OVERHEAD = 4.0

_DEFERRED = "the value steers the host, so its read can be deferred by a step or moved to a side stream, not deleted"
_SHAPES = "the size of a result waits for the device; write it with fixed shapes, such as torch.where"


def whatif(
    trace: Trace,
    stalls: Sequence[Stall] = (),
    ceilings: Ceilings | None = None,
    lines: LineLog | None = None,
    *,
    unprofiled_seconds: float | None = None,
) -> WhatIf | None:
    """Replay the trace unchanged, then with each change that could win time; None for a trace of a CPU.

    Args:
        stalls: rows of ``analysis.stalls`` to try alone and in order, all if none are given; every wait is in "all".
        lines: the log of the line pass over the same steps, which names the lines of the waits.
        unprofiled_seconds: a step's time without the profiler; host time is scaled until the replay takes that long.
    """
    if not trace.on_gpu:
        return None
    try:
        return WhatIfReplay(trace, stalls, lines, unprofiled_seconds).answer()
    except CannotReplayError as error:
        return WhatIf(step_seconds=step_windows(trace).mean_ns / 1e9, limit=LIMIT, refused=str(error))


def with_savings(stalls: Sequence[Stall], found: WhatIf | None) -> list[Stall]:
    """The stalls with what the replay saves without each: the middle of the range."""
    savings = {
        _key(estimate): sum(estimate.saving_seconds_per_step) / 2
        for estimate in (found.estimates if found else [])
        if estimate.change == "without stall"
    }
    keys = [(stall.file, stall.line, stall.op) if stall.real else None for stall in stalls]
    return [
        msgspec.structs.replace(stall, saving_seconds_per_step=savings[key]) if key in savings else stall
        for stall, key in zip(stalls, keys, strict=True)
    ]


def _key(estimate: Estimate) -> tuple[str, int, str] | None:
    source = estimate.source
    return (source.file if source else "", source.line if source else 0, estimate.op)


class WhatIfReplay:
    """One trace, its program, and changes to it; ``scale`` is the factor on host time that the estimates use.

    Raises:
        CannotReplayError: the trace does not hold what a replay needs.
    """

    def __init__(
        self, trace: Trace, stalls: Sequence[Stall], lines: LineLog | None, unprofiled_seconds: float | None
    ) -> None:
        self.trace = trace
        self.program = model(trace)
        self.sites = sites(trace, self.program, lines)
        self.wanted = {(stall.file, stall.line, stall.op) for stall in stalls}
        self.traced_ns = self.program.traced_ns / self.program.steps
        self.replayed_ns = replay(typical(self.program)).done_ns[-1] / self.program.steps
        self.scale = _host_scale(self.program, unprofiled_seconds)
        self.visits = 0
        self.baseline = [self._steady(self.program, latency) for latency in self.program.latency_ns]

    @property
    def error(self) -> float:
        return self.replayed_ns / self.traced_ns - 1

    def answer(self) -> WhatIf:
        """The error, and the estimates if it is small enough."""
        found = WhatIf(
            step_seconds=self.traced_ns / 1e9,
            baseline_seconds=self.baseline[0] / 1e9,
            host_scale=self.scale,
            replayed_seconds=self.replayed_ns / 1e9,
            error=self.error,
            limit=LIMIT,
            latency_seconds=(self.program.latency_ns[0] / 1e9, self.program.latency_ns[1] / 1e9),
        )
        if abs(self.error) > LIMIT:
            refused = (
                f"the replay of the unchanged trace misses it by {abs(self.error):.0%}, so what a change would save "
                "cannot be told from this trace"
            )
            return msgspec.structs.replace(found, refused=refused)
        return msgspec.structs.replace(found, estimates=self.estimates())

    def estimates(self) -> list[Estimate]:
        """Stalls alone, in the best order and all together, then the other changes."""
        together, others = self._all_stalls(), self._others()
        alone = list[Estimate]()
        for site in self._largest():
            if self.visits < MOST_VISITS or len(alone) < LEAST_SITES:
                alone.append(self._without_site(site))
        alone.sort(key=lambda row: -sum(row.saving_seconds_per_step))
        rows = [*alone, *self._best_order(), *together, *others]
        return [row for row in rows if row.change == "without stall" or row.share >= LEAST_SHARE]

    def estimate(self, changed: Program, **what: object) -> Estimate:
        """What a changed program saves, over the range of launch latencies."""
        saved = [
            before - self._steady(changed, latency)
            for before, latency in zip(self.baseline, self.program.latency_ns, strict=True)
        ]
        low, high = max(min(saved), 0.0), max(max(saved), 0.0)
        return Estimate(
            saving_seconds_per_step=(low / 1e9, high / 1e9),
            share=(low + high) / 2 / self.baseline[0] if self.baseline[0] else 0.0,
            **what,  # type: ignore[arg-type]
        )

    def without_sites(self, chosen: Sequence[Site]) -> Program:
        """The program without these reads: those that only report go whole, others just do not wait any more."""
        changed = self.program
        for site in chosen:
            changed = self._remove(changed, site)
        return changed

    def _remove(self, changed: Program, site: Site) -> Program:
        selected = self._mask(site.nodes)
        operators, inside = read_nodes(self.trace, self.program, site)
        if site.deferred or not len(operators):
            return without_waits(changed, selected)
        host = self.trace.host
        gone = without_nodes(changed, selected | self._mask(inside))
        work = gone.nodes.work_ns - hostcuts.overlap(
            self.program, host.start_ns[operators], host.end_ns[operators], host.thread[operators], self.trace
        )
        return with_host_time(gone, np.maximum(work, 0))

    def _mask(self, positions: Ints) -> Bools:
        mask = np.zeros(len(self.program.nodes), np.bool_)
        mask[positions] = True
        return mask

    def _steady(self, program: Program, latency: int) -> float:
        self.visits += passes(program)
        return steady(program, latency_ns=latency, host_scale=self.scale)

    def _largest(self) -> list[Site]:
        nodes = self.program.nodes
        waited = self.trace.host.end_ns - self.trace.host.start_ns
        tried = [site for site in self.sites if not self.wanted or site.key in self.wanted]
        ranked = sorted(tried or self.sites, key=lambda site: -int(waited[nodes.row[site.nodes]].sum()))
        return ranked[:MOST_SITES]

    def _without_site(self, site: Site) -> Estimate:
        return self.estimate(
            self.without_sites([site]),
            change="without stall",
            title=f"without {site.title}",
            source=site.source,
            op=site.op,
            phase=site.phase,
            deferred=site.deferred,
            note=_note(site),
        )

    def _best_order(self) -> list[Estimate]:
        """Greedy: the site that saves most, then the one that saves most with it, and so on."""
        left, chosen, rows = self._largest()[:MOST_ORDERED], list[Site](), list[Estimate]()
        if len(left) < 2:
            return []
        before = 0.0
        while left and self.visits < MOST_VISITS:
            totals = [
                self.baseline[0] - self._steady(self.without_sites([*chosen, site]), self.program.latency_ns[0])
                for site in left
            ]
            best = int(np.argmax(totals))
            site = left.pop(best)
            chosen.append(site)
            row = self.estimate(
                self.without_sites(chosen),
                change="stalls in best order",
                title=f"{len(chosen)}. without {site.title}",
                source=site.source,
                op=site.op,
                phase=site.phase,
                deferred=site.deferred,
            )
            low, high = row.saving_seconds_per_step
            together = (low + high) / 2
            step = max(together - before, 0.0)
            rows.append(
                msgspec.structs.replace(
                    row,
                    saving_seconds_per_step=(step, step),
                    share=step * 1e9 / self.baseline[0],
                    cumulative_seconds_per_step=together,
                )
            )
            before = together
        return rows

    def _all_stalls(self) -> list[Estimate]:
        if len(self.sites) < 2:
            return []
        row = self.estimate(
            self.without_sites(self.sites), change="without all stalls", title="without all stalls together"
        )
        together = sum(row.saving_seconds_per_step) / 2
        deferred = any(site.deferred for site in self.sites)
        return [msgspec.structs.replace(row, cumulative_seconds_per_step=together, deferred=deferred)]

    def _others(self) -> list[Estimate]:
        """Changes that are not about a read: loading ahead, no allocation, no stream waits, one graph per step."""
        free = self.without_sites(self.sites)
        tries: list[tuple[str, str, str, Callable[[], Program | None]]] = [
            (
                "without data loading",
                "with the next batch ready",
                "the batch is loaded while the device works on the one before",
                lambda: hostcuts.without_loading(self.trace, self.program),
            ),
            (
                "without allocation",
                "without device allocation",
                "memory comes from PyTorch's cache and is not given back between steps",
                lambda: hostcuts.without_allocation(self.trace, self.program),
            ),
            (
                "without stream waits",
                "side streams free to run ahead",
                "only if the waits are not needed: the side streams must not touch what the main one still uses",
                lambda: hostcuts.without_stream_waits(self.trace, self.program),
            ),
            (
                "graph",
                "launches captured in a CUDA graph",
                "without the stalls, which a graph cannot hold" if self.sites else "",
                lambda: hostcuts.in_a_graph(self.trace, free),
            ),
        ]
        rows = []
        for change, title, note, make in tries:
            changed = make()
            if changed is not None:
                rows.append(self.estimate(changed, change=change, title=title, note=note))
        return rows


def typical(program: Program) -> Program:
    """The program by rules alone: the usual latency, pause and wake-up in place of each event's own."""
    items, nodes = program.items, program.nodes
    usual = program.latency_ns[1]
    own = items.latency_ns
    latency = np.where((own >= 0) & (own < 3 * usual), usual, own)
    waiting = nodes.waits != -1
    wake = int(np.median(nodes.wake_ns[waiting])) if waiting.any() else 0
    gap = int(np.median(items.gap_ns)) if len(items) else 0
    return replace(
        program,
        items=replace(items, latency_ns=latency, gap_ns=np.full(len(items), gap)),
        nodes=replace(nodes, wake_ns=np.full(len(nodes), wake)),
    )


def _host_scale(program: Program, unprofiled_seconds: float | None) -> float:
    """The factor on host time with which a replayed step takes as long as an unprofiled one; 1 where none does."""
    if unprofiled_seconds is None:
        return 1.0
    wanted = unprofiled_seconds * 1e9
    low, high = 1 / LARGEST_OVERHEAD, 1.0
    if not steady(program, host_scale=low) < wanted < steady(program):
        return 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if steady(program, host_scale=middle) < wanted else (low, middle)
    return high


def _note(site: Site) -> str:
    if site.deferred:
        return _DEFERRED
    return _SHAPES if "nonzero" in site.op or site.op in ("aten::masked_select", "aten::index") else ""
