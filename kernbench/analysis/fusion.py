"""Neighbouring kernels that one kernel could do, and what that would save.

Such kernels follow one another in a stream, compute element by element or row by row, and nothing between them stands
in the way: no wait of the host, no boundary between forward, backward and optimizer, no long pause of the host.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernbench.analysis import attribution, families, sequences, shapes
from kernbench.analysis.windows import on_main_device, step_windows
from kernbench.record import Ceilings, FusionCandidate, LineLog
from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import KERNEL, Trace

FUSABLE = (families.ELEMENTWISE, families.NORMALISATION, families.REDUCTION, families.COPIES)
# After a longer pause the host had other work than to launch the next kernel, and that work stays.
LONGEST_GAP_NS = 100_000
# What would save less than this share of the step is not worth a line.
NOTABLE_SHARE = 0.001

_Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Kernels:
    """Device rows by stream and start, with what is summed over neighbours.

    ``gap`` and ``linked`` belong to a kernel and the one after it: idle nanoseconds between them, and the bytes that
    the second reads of what the first wrote. ``work`` are the bytes that its shapes imply, 0 where not known.
    """

    row: Ints
    name: Ints
    length: Ints
    gap: Ints
    linked: Ints
    work: Ints


def fusion(trace: Trace, lines: LineLog | None, ceilings: Ceilings | None, limit: int = 20) -> list[FusionCandidate]:
    """Candidates by their high saving; empty without a device.

    Bytes count at the measured copy rate, without ``ceilings`` at the rate that these very kernels reach; however many
    they are, one kernel takes at least as long as the longest of those it replaces.
    """
    kernels, joined = _kernels(trace)
    if not joined.any():
        return []
    found = _instances(kernels, joined)
    where = attribution.places(trace, lines)
    step = step_windows(trace).mean_ns / 1e9
    candidates = [
        candidate
        for key, spans in found.items()
        if (candidate := _candidate(trace, where, kernels, key, np.array(spans, np.int64), ceilings)) is not None
    ]
    worth = [one for one in candidates if _high(one) >= NOTABLE_SHARE * step]
    return sorted(worth, key=lambda one: (-_high(one), -one.seconds_per_step))[:limit]


def _high(candidate: FusionCandidate) -> float:
    return candidate.saving_seconds_per_step[1] if candidate.saving_seconds_per_step else 0.0


def _kernels(trace: Trace) -> tuple[_Kernels, Bools]:
    """The main device's events, and for each whether it could be one kernel with the event after it."""
    device, host = trace.device, trace.host
    nothing = np.zeros(0, np.int64)
    if not trace.on_gpu:
        return _Kernels(nothing, nothing, nothing, nothing, nothing, nothing), np.zeros(0, bool)
    rows = np.flatnonzero(on_main_device(trace) & trace.in_counted(device.step))
    rows = rows[np.lexsort((device.start_ns[rows], device.stream[rows]))]
    call = device.call[rows]
    gap = np.append(np.maximum(device.start_ns[rows][1:] - device.end_ns[rows][:-1], 0), 0)
    joined = np.zeros(len(rows), bool)
    fusable = _fusable(trace, rows)
    joined[:-1] = fusable[:-1] & fusable[1:] & (gap[:-1] <= LONGEST_GAP_NS)
    linked = call >= 0
    known = linked & bool(len(host))
    waits = np.sort(host.start_ns[trace.sync_calls])
    waited = np.searchsorted(waits, host.start_ns[call]) if len(host) else call
    region = np.zeros(len(rows), np.int64)
    if len(host):
        backward = host.forward[call] >= 0
        region = 2 * families.in_optimizer(trace)[call].astype(np.int64) + backward
    for apart in (device.stream[rows], device.step[rows]):
        joined[:-1] &= apart[:-1] == apart[1:]
    # Where a launch is not recorded, nothing speaks against its neighbours.
    both = known[:-1] & known[1:]
    for apart in (waited, region):
        joined[:-1] &= ~both | (apart[:-1] == apart[1:])
    between, work = _bytes(trace, device.op[rows], joined)
    length = device.end_ns[rows] - device.start_ns[rows]
    return _Kernels(rows, device.name[rows], length, gap, between, work), joined


def _fusable(trace: Trace, rows: Ints) -> Bools:
    """Kernels of the kinds that can be one; not those that a compiler has fused already."""
    by_name = np.fromiter(
        (families.of_kernel(name) in FUSABLE and not name.startswith("triton_") for name in trace.names),
        bool,
        len(trace.names),
    )
    return np.asarray((trace.device.kind[rows] == KERNEL) & by_name[trace.device.name[rows]], np.bool_)


def _bytes(trace: Trace, op: Ints, joined: Bools) -> tuple[Ints, Ints]:
    """Bytes between each kernel and the next that would stay inside one kernel; bytes that each moves by its shapes.

    What the first operator writes and the second reads, if its inputs hold a tensor of that shape and type, is neither
    written nor read.
    """
    between, work = np.zeros(len(op), np.int64), np.zeros(len(op), np.int64)
    if not len(trace.shape_texts):
        return between, work
    owner = shapes.owners(trace, op)
    shaped = shapes.works(trace, np.unique(owner[owner >= 0]))
    if not shaped.works:
        return between, work
    kind = shaped.kind[owner]
    total = np.array([one.bytes if one else 0 for one in shaped.works] + [0], np.float64)
    # An operator of several kernels moves its bytes once.
    first = np.append(True, owner[1:] != owner[:-1])
    work = np.where(first, total[kind], 0).astype(np.int64)
    pairs = np.flatnonzero(joined[:-1] & (kind[:-1] >= 0) & (kind[1:] >= 0) & first[1:])
    if len(pairs):
        distinct, position = np.unique(np.stack([kind[pairs], kind[pairs + 1]]), axis=1, return_inverse=True)
        saved = np.array([shaped.passed(one, other) for one, other in distinct.T.tolist()], np.int64)
        between[pairs] = saved[position.ravel()]
    return between, work


def _instances(kernels: _Kernels, joined: Bools) -> dict[_Key, list[tuple[int, int]]]:
    """Where each sequence of names stands, as [begin, end) in ``kernels``; one of kernels all alike ends in -1."""
    starts = np.flatnonzero(joined & ~np.append(False, joined[:-1]))
    ends = np.flatnonzero(joined & ~np.append(joined[1:], False)) + 2
    names = kernels.name.tolist()
    cut: dict[_Key, list[sequences.Unit]] = {}
    found: dict[_Key, list[tuple[int, int]]] = defaultdict(list)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        run = tuple(names[start:end])
        if run not in cut:
            cut[run] = sequences.units(run)
        for unit in cut[run]:
            key = run[unit.begin : unit.end] + ((-1,) if unit.alike else ())
            found[key].append((start + unit.begin, start + unit.end))
    return found


def _candidate(
    trace: Trace,
    where: attribution.Places,
    kernels: _Kernels,
    key: _Key,
    spans: Ints,
    ceilings: Ceilings | None,
) -> FusionCandidate | None:
    steps = len(trace.counted)
    length, work = _sums(kernels.length, spans), _sums(kernels.work, spans)
    inner = np.stack([spans[:, 0], spans[:, 1] - 1], axis=1)
    gaps, saved = _sums(kernels.gap, inner), _sums(kernels.linked, inner)
    longest = np.maximum.reduceat(np.append(kernels.length, 0), spans.ravel())[::2]
    low = float(gaps.sum())
    extra, basis = _extra(saved, work, length, longest, ceilings)
    source, op = _origin(trace, where, kernels.row[spans[:, 0]])
    names = [trace.names[name] for name in key if name >= 0]
    if key[-1] < 0:
        names = [f"{names[0]} × {len(names)}"]
    known = bool(work.any())
    return FusionCandidate(
        kernels=names,
        repeats_per_step=len(spans) / steps,
        seconds_per_step=float(length.sum() + gaps.sum()) / steps / 1e9,
        saving_seconds_per_step=(low / steps / 1e9, (low + extra) / steps / 1e9) if low or known else None,
        bytes_saved_per_step=float(saved.sum()) / steps if saved.any() else None,
        source=where.source(source),
        op=op,
        basis=basis,
    )


def _extra(saved: Ints, work: Ints, length: Ints, longest: Ints, ceilings: Ceilings | None) -> tuple[float, str]:
    """Nanoseconds that the intermediate tensors cost, and what the saving rests on."""
    gaps = "the gaps between the kernels"
    if not work.any():
        return 0.0, f"{gaps} alone: their shapes are not recorded, or not understood"
    if not saved.any():
        return 0.0, f"{gaps} alone: none of them reads what the one before it wrote"
    roof = ceilings.copy_bytes_per_second if ceilings is not None else None
    rate = roof / 1e9 if roof else float(work.sum()) / max(float(length.sum()), 1.0)
    most = np.minimum(saved / rate, length - longest)
    at = "at the measured copy rate" if roof else "at the rate that these kernels reach"
    return float(most.sum()), f"{gaps}; at most also the tensors between them, {at}"


def _origin(trace: Trace, where: attribution.Places, rows: Ints) -> tuple[int, str]:
    """The line and the operator that most of the first kernels come from."""
    calls = trace.device.call[rows]
    calls = calls[calls >= 0]
    if not len(calls):
        return -1, ""
    line, op = Counter(zip(where.line[calls].tolist(), where.op[calls].tolist(), strict=True)).most_common(1)[0][0]
    return line, where.op_name(op)


def _sums(column: NDArray[np.int64], spans: Ints) -> Ints:
    before = np.concatenate([[0], np.cumsum(column)])
    return np.asarray(before[spans[:, 1]] - before[spans[:, 0]], np.int64)
