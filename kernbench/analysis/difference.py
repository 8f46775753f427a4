"""What changed between two traces of one program, step by step and operator by operator."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernbench.analysis import idle
from kernbench.record import Difference, OperatorChange, StepPair
from kernbench.traces.nesting import OP, Ints
from kernbench.traces.trace import Trace

# Times of one operator wander by this share between steps that do the same; below this share of a step nobody looks.
_NOISE = 0.05
_VISIBLE = 0.001


@dataclass
class _Sums:
    """One operator over the chosen steps of one trace, in nanoseconds."""

    calls: int = 0
    device_ns: float = 0.0
    host_ns: float = 0.0
    kernels: set[str] = field(default_factory=set)


_Key = tuple[str, bool]


def difference(before: Trace, after: Trace) -> Difference:
    """Both traces aligned: counted steps in pairs, and in them operators by name.

    Calls are compared by their number, since the n-th call of a name on one side is the n-th on the other as far as
    both have it. An operator has changed if its calls or kernels differ, or its time by more than noise.
    """
    pairs = _pairs(before, after)
    steps = _step_pairs(before, after, pairs)
    old, new = _operators(before, pairs[:, 0]), _operators(after, pairs[:, 1])
    visible = _VISIBLE * min(max(pair.before_seconds, pair.after_seconds) for pair in steps)
    changes = [
        _change(key, old.get(key, _Sums()), new.get(key, _Sums()), len(pairs)) for key in dict.fromkeys([*old, *new])
    ]
    changed = [change for change in changes if _has_changed(change, visible)]
    return Difference(
        steps=steps,
        operators=sorted(changed, key=lambda change: (-_largest(change), change.name)),
        same=len(changes) - len(changed),
        parting=_parting(before, after, pairs[0]),
        idle_seconds_per_step=_idle(before, after),
    )


def _pairs(before: Trace, after: Trace) -> Ints:
    """Positions of steps that belong together, one pair a row: those of one number, else in order."""
    one, other = (trace.steps.number[trace.counted] for trace in (before, after))
    common, first, second = np.intersect1d(one, other, return_indices=True)
    if not len(common):
        first = second = np.arange(min(len(one), len(other)))
    return np.stack([before.counted[first], after.counted[second]], axis=1)


def _step_pairs(before: Trace, after: Trace, pairs: Ints) -> list[StepPair]:
    seconds = []
    for trace in (before, after):
        windows = idle.step_windows(trace)
        length = np.zeros(len(trace.steps))
        length[trace.counted] = (windows.end - windows.start) / 1e9
        seconds.append(length)
    return [
        StepPair(
            before=int(before.steps.number[one]),
            after=int(after.steps.number[other]),
            before_seconds=float(seconds[0][one]),
            after_seconds=float(seconds[1][other]),
        )
        for one, other in pairs.tolist()
    ]


def _operators(trace: Trace, steps: Ints) -> dict[_Key, _Sums]:
    """Sums by operator; work that no operator launched is summed by its own name, with False beside it."""
    host, device, names = trace.host, trace.device, trace.names
    sums: dict[_Key, _Sums] = defaultdict(_Sums)
    rows = np.flatnonzero((host.kind == OP) & np.isin(host.step, steps))
    calls = np.bincount(host.name[rows], minlength=len(names))
    own = np.bincount(host.name[rows], weights=host.self_ns[rows], minlength=len(names))
    for name in np.flatnonzero(calls).tolist():
        found = sums[names[name], True]
        found.calls, found.host_ns = int(calls[name]), float(own[name])
    work = np.flatnonzero(np.isin(device.step, steps))
    op = np.append(host.name, -1)[device.op[work]]
    launcher = np.where(op >= 0, op, device.name[work])
    key = np.stack([launcher, (op >= 0).astype(np.int64), device.name[work]], axis=1)
    distinct, group = np.unique(key, axis=0, return_inverse=True)
    group = group.reshape(-1)
    spent = np.bincount(group, weights=(device.end_ns - device.start_ns)[work], minlength=len(distinct))
    count = np.bincount(group, minlength=len(distinct))
    for (name, by_operator, kernel), ns, times in zip(distinct.tolist(), spent.tolist(), count.tolist(), strict=True):
        found = sums[names[name], bool(by_operator)]
        found.device_ns += ns
        if by_operator:
            found.kernels.add(names[kernel])
        else:
            found.calls += times
    return sums


def _change(key: _Key, old: _Sums, new: _Sums, steps: int) -> OperatorChange:
    name, by_operator = key
    scale = 1e9 * steps
    both = bool(old.calls and new.calls)
    return OperatorChange(
        name=name,
        kind="op" if by_operator else "kernel",
        calls_per_step=(old.calls / steps, new.calls / steps),
        device_seconds_per_step=(old.device_ns / scale, new.device_ns / scale),
        host_seconds_per_step=(old.host_ns / scale, new.host_ns / scale),
        gone=sorted(old.kernels - new.kernels) if both else [],
        new=sorted(new.kernels - old.kernels) if both else [],
    )


def _has_changed(change: OperatorChange, visible: float) -> bool:
    if change.calls_per_step[0] != change.calls_per_step[1] or change.gone or change.new:
        return True
    return any(
        abs(new - old) > max(_NOISE * old, visible)
        for old, new in (change.device_seconds_per_step, change.host_seconds_per_step)
    )


def _largest(change: OperatorChange) -> float:
    device, host = change.device_seconds_per_step, change.host_seconds_per_step
    return max(abs(device[1] - device[0]), abs(host[1] - host[0]))


def _parting(before: Trace, after: Trace, pair: Ints) -> str:
    """Where the operators of the thread that runs the step cease to be the same, in one clause."""
    old, new = (_sequence(trace, step) for trace, step in zip((before, after), pair.tolist(), strict=True))
    length = min(len(old), len(new))
    unequal = np.flatnonzero(old[:length] != new[:length])
    if len(unequal):
        at = int(unequal[0])
        return f"operator {at + 1} of the step is {old[at]} before and {new[at]} after"
    if len(old) == len(new):
        return ""
    longer, side = (old, "before") if len(old) > len(new) else (new, "after")
    return f"{side} goes on after operator {length} of the step, with {longer[length]}"


def _sequence(trace: Trace, step: int) -> NDArray[np.object_]:
    host = trace.host
    mine = (host.kind == OP) & (host.step == step) & (host.thread == trace.steps.thread)
    sequence: NDArray[np.object_] = np.array(trace.names, dtype=object)[host.name[mine]]
    return sequence


def _idle(before: Trace, after: Trace) -> dict[str, tuple[float, float]]:
    """Idle seconds per step by cause, largest change first; empty unless both traces have device work."""
    old, new = idle.idle(before), idle.idle(after)
    if old is None or new is None:
        return {}
    causes = {
        cause: (old.causes.get(cause, 0.0), new.causes.get(cause, 0.0))
        for cause in dict.fromkeys([*old.causes, *new.causes])
    }
    return dict(sorted(causes.items(), key=lambda item: -abs(item[1][1] - item[1][0])))
