"""The steps of a trace: where they begin and end, and which of them the profiler recorded whole."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from kernbench.traces import kineto
from kernbench.traces.nesting import ANNOTATION, CALL, OP, Bools, Ints
from kernbench.traces.tracetables import Device, Host, Steps

MARKERS = ("kernbench.step#", "ProfilerStep#")
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch(?!HostFunc)")
_PROFILER_CALLS = ("cudaDeviceSynchronize", "hipDeviceSynchronize")
# The device may fall behind by a lost record or two; a step that lost more than this share was cut by the profiler.
_LOST_SHARE = 0.01


def marked(host: dict[str, Ints], names: list[str], device: kineto.Columns) -> Steps:
    """The annotated steps in order of time; the whole trace as one step where none is marked."""
    rows, marker = _step_annotations(host, names)
    if marker:
        numbers = [_leading_number(names[host["name"][row]][len(marker) :]) for row in rows]
        start, end = host["start_ns"][rows], host["end_ns"][rows]
        thread = int(host["thread"][rows[0]])
    else:
        numbers = [0]
        start = np.concatenate([host["start_ns"], device.start_ns]).min(keepdims=True)
        end = np.concatenate([host["end_ns"], device.end_ns]).max(keepdims=True)
        operators = host["thread"][host["kind"] == OP]
        thread = int(np.bincount(operators).argmax()) if len(operators) else -1
    return Steps(np.array(numbers, np.int64), start, end, np.ones(len(start), bool), marker, thread)


def _leading_number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0


def step_at(steps: Steps, time_ns: Ints) -> Ints:
    """Position in ``steps`` of the step that a host time falls in, whatever the thread; -1 between steps."""
    position = np.searchsorted(steps.start_ns, time_ns, side="right") - 1
    return np.where((position >= 0) & (time_ns < steps.end_ns[position]), position, -1)


def _step_annotations(host: dict[str, Ints], names: list[str]) -> tuple[Ints, str]:
    annotations = np.flatnonzero(host["kind"] == ANNOTATION)
    annotations = annotations[np.argsort(host["start_ns"][annotations], kind="stable")]
    for marker in MARKERS:
        rows: list[int] = []
        for row in annotations.tolist():
            after_last = not rows or host["start_ns"][row] >= host["end_ns"][rows[-1]]
            if names[host["name"][row]].startswith(marker) and after_last:
                rows.append(row)
        if rows:
            return np.array(rows, np.int64), marker
    return np.zeros(0, np.int64), ""


def profiler_calls(host: dict[str, Ints], names: list[str]) -> Ints:
    """Rows of the profiler's own synchronisation at its start and stop: the first and the last runtime call."""
    calls = np.flatnonzero(host["kind"] == CALL)
    calls = calls[np.argsort(host["start_ns"][calls], kind="stable")]
    own = [row for row in calls[[0, -1]].tolist() if names[host["name"][row]] in _PROFILER_CALLS] if len(calls) else []
    return np.array(own, np.int64)


def without_profiler(steps: Steps, host: dict[str, Ints], own: Ints) -> Steps:
    """Steps cut short where the profiler's synchronisation precedes their first or follows their last operator."""
    start, end = steps.start_ns.copy(), steps.end_ns.copy()
    operator_starts = host["start_ns"][host["kind"] == OP]
    for first, last in zip(host["start_ns"][own].tolist(), host["end_ns"][own].tolist(), strict=True):
        if (
            start[0] <= first
            and last < end[0]
            and not np.any((operator_starts >= start[0]) & (operator_starts < first))
        ):
            start[0] = last
        elif start[-1] < first and last <= end[-1] and not np.any(operator_starts >= last):
            end[-1] = first
    return replace(steps, start_ns=start, end_ns=end)


def launches(host: Host, names: list[str]) -> Bools:
    """Host rows of calls that launch kernels or graphs."""
    launch = np.fromiter((_LAUNCH.match(name) is not None for name in names), bool, len(names))
    launched: Bools = (host.kind == CALL) & launch[host.name]
    return launched


def complete(steps: Steps, host: Host, device: Device, launched: Bools, lost: Bools) -> Bools:
    """Which steps have something inside and kept the device work of their launches.

    ``launched`` marks host rows of launches, ``lost`` those among them without device work.
    """
    filled = np.zeros(len(steps), bool)
    filled |= np.bincount(host.step[(host.kind != ANNOTATION) & (host.step >= 0)], minlength=len(steps)) > 0
    filled |= np.bincount(device.step[device.step >= 0], minlength=len(steps)) > 0
    if np.any(device.call >= 0):
        issued = np.bincount(host.step[launched & (host.step >= 0)], minlength=len(steps))
        missing = np.bincount(host.step[lost & (host.step >= 0)], minlength=len(steps))
        filled &= missing <= _LOST_SHARE * issued
    return filled
