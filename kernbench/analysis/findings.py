"""What costs the steps of a trace their time, in the words of a person: causes, evidence, advice, and a headline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from kernbench.analysis import advice, idlepieces
from kernbench.analysis.advice import duration, percent
from kernbench.analysis.alignment import Unaligned, together, unaligned
from kernbench.analysis.attribution import places
from kernbench.analysis.costs import IdleCosts, Step, exposed_communication, idle_costs, taking_turns, true_step
from kernbench.analysis.hotspots import hotspots
from kernbench.analysis.idlepieces import loading_intervals
from kernbench.analysis.intervals import grouped
from kernbench.analysis.launches import launches
from kernbench.analysis.readcauses import Place, read_places
from kernbench.analysis.windows import step_windows
from kernbench.record import Cause, Change, Communication, Estimate, Finding, LineLog, SourceLine, WhatIf
from kernbench.traces.trace import Trace

NOTABLE_SHARE = 0.03
"""Below this share of the step nothing is worth a finding: runs of one program differ by as much."""
NAMEABLE_SHARE = 0.01
"""Where idle time has no notable cause, the largest one is named down to this share; below it none is."""
OUTWEIGHS = 3.0
"""A condition of the whole step comes before a single fault if it costs more than this many times as much."""
IDLE_SHARE = 0.1
"""A device that is idle for less than this is busy; above it something is to blame, however many small things."""

_CONDITIONS: tuple[Cause, ...] = ("launch-bound", "host-bound", "communication", "device-bound")
_REMEDIES: dict[Cause, Change] = {
    "data loading": "without data loading",
    "allocator": "without allocation",
    "serialised streams": "without stream waits",
    "launch-bound": "graph",
}


def findings(
    trace: Trace,
    whatif: WhatIf | None = None,
    *,
    lines: LineLog | None = None,
    communication: Communication | None = None,
    shaped: Trace | None = None,
    limit: int = 8,
) -> list[Finding]:
    """What costs step time; only "device-bound" for a healthy trace.

    The largest cost comes first, except that a fault with a place and a remedy of its own comes before what is true of
    the whole step, unless that costs ``OUTWEIGHS`` times as much. A cost is the most that a step would win. Two costs
    can overlap: what one hides, the other shows once the first is gone.

    Args:
        whatif: the replay, whose estimates for single stalls take the place of idle time where it has any.
        lines: the log of the line pass over the same steps.
        communication: of all ranks of the run, this trace's among them.
        shaped: a trace of the same step that holds shapes, if ``trace`` does not.
    """
    if step_windows(trace).mean_ns <= 0:
        return []
    if not trace.on_gpu:
        return [one for one in _loading_on_cpu(trace) if one.share >= NOTABLE_SHARE]
    whole = true_step(trace, whatif)
    step, costs = whole.seconds, idle_costs(trace, whole.idle_scale)
    found = [
        *_reads(read_places(trace, lines, costs, whatif), step),
        *_of_host(trace, costs, lines, step),
        *_streams(trace, step),
        *_products(unaligned(shaped if shaped is not None and shaped.on_gpu else trace, lines), step),
        *_exchange(trace, costs, communication, step),
    ]
    found = [_replayed(one, whatif, step) for one in found]
    found.sort(key=lambda one: -one.seconds_per_step * (1 if one.cause in _CONDITIONS else OUTWEIGHS))
    notable = [one for one in found if one.share >= NOTABLE_SHARE]
    if notable:
        return notable[:limit]
    if whole.idle_share < IDLE_SHARE:
        return [_device_bound(trace, whole)]
    return [one for one in found[:1] if one.share >= NAMEABLE_SHARE]


def headline(trace: Trace, found: Sequence[Finding], whatif: WhatIf | None = None) -> str:
    """The verdict on a trace in one or two sentences, the cause first; from the same replay as the findings."""
    if not trace.on_gpu:
        return _cpu_headline(trace, found)
    if step_windows(trace).mean_ns <= 0:
        return "The steps of this trace take no time, so there is nothing to tell of them."
    whole = true_step(trace, whatif)
    if not found:
        return (
            f"No cause stands out: the device is busy {percent(1 - whole.idle_share)} of a step of "
            f"{duration(whole.seconds)}, and the trace does not tell why it is idle for the rest."
        )
    first = found[0]
    if first.cause == "device-bound":
        return first.sentence
    more = f" {len(found) - 1} more finding{'s' * (len(found) > 2)} below." if len(found) > 1 else ""
    title = advice.TITLES[first.cause]
    return (
        f"{title}: {first.sentence} A step takes {duration(whole.seconds)}, the device is busy "
        f"{percent(1 - whole.idle_share)} of it.{more}"
    )


def _finding(
    cause: Cause, sentence: str, seconds: float, step: float, source: SourceLine | None = None, op: str = ""
) -> Finding:
    seconds = min(seconds, step)
    return Finding(
        cause=cause,
        sentence=sentence,
        seconds_per_step=seconds,
        share=seconds / step,
        advice=advice.ADVICE[cause],
        source=source,
        op=op,
    )


def _replayed(found: Finding, whatif: WhatIf | None, step: float) -> Finding:
    """The finding with the replay's figure in place of idle time, where the replay tried its remedy."""
    estimate = _estimate(whatif, _REMEDIES.get(found.cause))
    if estimate is None:
        return found
    if estimate.change == "graph":
        # A graph holds no waits, so they were taken out before it; what that wins is not what capturing wins.
        waits = _estimate(whatif, "without all stalls") or _estimate(whatif, "without stall")
        estimate = _beyond(estimate, waits) if waits is not None else estimate
    seconds = min(estimate.saving_seconds_per_step[1], step)
    if estimate.change == "graph":
        # A captured step runs no Python either; what that wins beside the launches is another finding's cost.
        seconds = min(seconds, found.seconds_per_step)
    sentence = advice.replayed_sentence(found.sentence, estimate, step)
    return msgspec.structs.replace(found, sentence=sentence, seconds_per_step=seconds, share=seconds / step)


def _estimate(whatif: WhatIf | None, change: Change | None) -> Estimate | None:
    return next((one for one in (whatif.estimates if whatif else ()) if one.change == change), None)


def _beyond(estimate: Estimate, before: Estimate) -> Estimate:
    """What a change saves once another one is made that it includes."""
    low, high = (
        max(whole - part, 0.0)
        for whole, part in zip(estimate.saving_seconds_per_step, before.saving_seconds_per_step, strict=True)
    )
    return msgspec.structs.replace(estimate, saving_seconds_per_step=(min(low, high), max(low, high)))


def _reads(found: Sequence[Place], step: float) -> list[Finding]:
    """One finding per place that matters; for places that only matter together, one per cause."""
    result = []
    causes: tuple[Cause, ...] = ("host read", "implicit sync", "pageable copy")
    for cause in causes:
        mine = sorted((place for place in found if place.cause == cause), key=lambda place: -place.seconds)
        large = [place for place in mine if place.seconds >= NOTABLE_SHARE * step]
        small = [place for place in mine if place.seconds < NOTABLE_SHARE * step]
        for place in large:
            sentence = advice.read_sentence(place, step)
            single = _finding(cause, sentence, place.seconds, step, place.source, place.op)
            result.append(msgspec.structs.replace(single, advice=advice.of_place(place)))
        if small:
            together = sum(place.seconds for place in small)
            result.append(
                _finding(cause, advice.reads_sentence(small, step), together, step, small[0].source, small[0].op)
            )
    return result


def _of_host(trace: Trace, costs: IdleCosts, lines: LineLog | None, step: float) -> list[Finding]:
    """The causes that lie in what the host was doing between its launches."""
    where, steps = places(trace, lines), len(trace.counted)
    result = []
    causes: tuple[tuple[Cause, int], ...] = (
        ("data loading", idlepieces.DATA),
        ("allocator", idlepieces.ALLOCATION),
        ("host-bound", idlepieces.HOST),
        ("host-bound", idlepieces.SLOW_LAUNCH),
        ("launch-bound", idlepieces.LAUNCH_BOUND),
    )
    for cause, number in causes:
        seconds = costs.of_cause(number) / steps / 1e9
        if not seconds:
            continue
        mine = (costs.cause == number) & (costs.pieces.cause == number) & (costs.pieces.site >= 0)
        row = costs.pieces.site[mine]
        keys, position = grouped(where.op[row], where.line[row])
        op, source, share = "", None, 0.0
        if len(keys):
            spent = np.bincount(position, weights=costs.ns[mine])
            largest = int(spent.argmax())
            op = where.op_name(keys[largest][0])
            source = where.source(keys[largest][1])
            share = float(spent[largest]) / 1e9 / steps / seconds
        if number == idlepieces.SLOW_LAUNCH:
            sentence = advice.slow_launch_sentence(seconds, step, op)
        elif cause == "launch-bound":
            sentence = advice.launch_sentence(launches(trace), seconds, step)
        else:
            sentence = advice.host_sentence(cause, seconds, step, op, source, share)
        result.append(_finding(cause, sentence, seconds, step, source, op))
    return result


def _streams(trace: Trace, step: float) -> list[Finding]:
    turns = taking_turns(trace)
    if turns is None:
        return []
    seconds = turns.ns / len(trace.counted) / 1e9
    return [_finding("serialised streams", advice.streams_sentence(turns.streams, seconds, step), seconds, step)]


def _products(found: Sequence[Unaligned], step: float) -> list[Finding]:
    """One finding for each set of sizes that matters; sizes that only matter together share one."""
    small: dict[tuple[int, bool, bool], list[Unaligned]] = defaultdict(list)
    groups = []
    for one in found:
        if one.seconds >= NOTABLE_SHARE * step:
            groups.append(one)
        else:
            small[one.full, one.compared, bool(one.sizes)].append(one)
    groups += map(together, small.values())
    result = []
    for group in groups:
        sentence = advice.products_sentence(group, step)
        single = _finding("unaligned product", sentence, group.seconds, step, group.source, group.op)
        result.append(msgspec.structs.replace(single, advice=advice.of_products(group)))
    return result


def _exchange(trace: Trace, costs: IdleCosts, known: Communication | None, step: float) -> list[Finding]:
    """Communication that nothing hides, less what is only waiting for a slow rank."""
    windows, steps = step_windows(trace), len(trace.counted)
    exposed = float(exposed_communication(trace).covered(windows.start, windows.end).sum()) / steps / 1e9
    seconds = exposed + costs.of_cause(idlepieces.EXCHANGE) / steps / 1e9
    result = []
    if known is not None and known.slowest_rank is not None and known.lag_seconds_per_step:
        lag = known.lag_seconds_per_step
        result.append(_finding("slow rank", advice.rank_sentence(known, step), lag, step))
        mine = next((rank for rank in known.ranks if rank.rank == trace.info.rank), None)
        seconds -= min(seconds, mine.wait_seconds_per_step or 0.0 if mine else lag)
    if seconds > 0:
        result.append(_finding("communication", advice.communication_sentence(seconds, step, known), seconds, step))
    return result


def _device_bound(trace: Trace, whole: Step) -> Finding:
    top = next(iter(hotspots(trace, None, limit=1)), None)
    busy = whole.seconds - whole.idle
    sentence = advice.healthy_sentence(whole.seconds, busy / whole.seconds, top)
    return _finding("device-bound", sentence, busy, whole.seconds)


def _loading_on_cpu(trace: Trace) -> list[Finding]:
    windows = step_windows(trace)
    step = windows.mean_ns / 1e9
    seconds = float(loading_intervals(trace).covered(windows.start, windows.end).mean()) / 1e9
    if not seconds:
        return []
    return [_finding("data loading", advice.host_sentence("data loading", seconds, step, "", None, 0.0), seconds, step)]


def _cpu_headline(trace: Trace, found: Sequence[Finding]) -> str:
    step = step_windows(trace).mean_ns / 1e9
    if found:
        return f"{advice.TITLES[found[0].cause]}: {found[0].sentence} A step takes {duration(step)} on the CPU."
    top = next(iter(hotspots(trace, None, limit=1)), None)
    most = f", most of it in {top.name} ({percent(top.share)})" if top is not None else ""
    return f"A step takes {duration(step)} on the CPU{most}; the trace holds no device work, so nothing waits for one."
