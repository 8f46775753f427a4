"""The device side of a trace, joined to the host rows that issued it: work, waits, collectives, memory."""

from __future__ import annotations

import re

import numpy as np

from kernbench.traces.kineto import Tables
from kernbench.traces.nesting import CALL, OP, Bools, Ints
from kernbench.traces.tracesteps import step_at
from kernbench.traces.tracetables import Collectives, Device, DeviceSyncs, Host, Memory, Steps, Waits

_GRAPH_LAUNCH = re.compile(r"(cuda|cu|hip)GraphLaunch")
_STREAM_WAIT = "Stream Wait Event"
# A collective's kernel as NCCL and RCCL name it; which one it is stands in the name only for some.
_COLLECTIVE = re.compile(r"(?:nccl|rccl)(?:Dev)?Kernel_?([A-Za-z]*)")
_COLLECTIVE_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgatherbase": "all_gather",
    "reducescatter": "reduce_scatter",
    "reducescatterbase": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoallbase": "all_to_all",
    "alltoallv": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "sendrecv": "send_recv",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}
_ANNOTATED_COLLECTIVE = re.compile(r"(?:nccl|rccl|c10d):+(\w+)")
_NO_STREAM = 2**32 - 1
_HOST_MEMORY = 0


def work(table: Tables, host: Host, steps: Steps, external: Ints, size: Ints) -> tuple[Device, Collectives]:
    """Device events by start, and the collectives among them.

    ``external`` numbers host rows: it tells the operator where no launch is recorded. ``size`` is the bytes of copying
    calls, which ROCm records there and not with the copy.

    Names of collectives are added to the names of ``table``.
    """
    raw = table.device
    order = np.argsort(raw.start_ns, kind="stable")
    number = {column: values[order] for column, values in raw.numbers.items()}
    name, start = raw.name[order], raw.start_ns[order]
    call = by_number(host.kind == CALL, host.correlation, number["correlation"])
    linked = call >= 0
    op = np.where(linked, at(host.parent, call), by_number(host.kind == OP, external, number["external"]))
    issuer = np.where(linked, call, op)
    step = at(host.step, issuer)
    if len(order) and not np.any(issuer >= 0):
        # Recorded without runtime calls: device time is all there is to go by.
        step = step_at(steps, start)
    collectives = _collectives(table, host, order, call)
    collective = np.full(len(order), -1, np.int64)
    collective[collectives.row] = collectives.name
    graph = np.fromiter((_GRAPH_LAUNCH.match(text) is not None for text in table.names), bool, len(table.names))
    device = Device(
        kind=table.device_kind[order],
        name=name,
        device=number["device"],
        stream=number["stream"],
        start_ns=start,
        end_ns=raw.end_ns[order],
        bytes=np.where((number["bytes"] < 0) & (table.device_kind[order] != 0), at(size, call), number["bytes"]),
        call=call,
        op=op,
        phase=at(host.phase, issuer),
        step=step,
        graph=(linked & graph[at(host.name, call)]).astype(np.int64),
        collective=collective,
    )
    return device, collectives


def syncs(table: Tables, host: Host) -> tuple[DeviceSyncs, Waits]:
    """Synchronisation as the device saw it, and among it the waits of streams for each other."""
    raw = table.syncs
    order = np.argsort(raw.start_ns, kind="stable")
    number = {column: values[order] for column, values in raw.numbers.items()}
    name, start, end = (column[order] for column in (raw.name, raw.start_ns, raw.end_ns))
    call = by_number(host.kind == CALL, host.correlation, number["correlation"])
    waits = np.flatnonzero([table.names[index] == _STREAM_WAIT for index in name.tolist()])
    on_stream = number["wait_on_stream"][waits]
    return (
        DeviceSyncs(name=name, device=number["device"], stream=number["stream"], start_ns=start, end_ns=end, call=call),
        Waits(
            time_ns=start[waits],
            device=number["device"][waits],
            stream=number["stream"][waits],
            on_stream=np.where(on_stream >= _NO_STREAM, -1, on_stream),
            call=call[waits],
            record=by_number(host.kind == CALL, host.correlation, number["wait_on_record"][waits]),
        ),
    )


def memory(table: Tables) -> Memory:
    """Allocations and releases in order of time."""
    raw = table.memory
    order = np.argsort(raw.start_ns, kind="stable")
    number = {column: values[order] for column, values in raw.numbers.items()}
    return Memory(
        time_ns=raw.start_ns[order],
        device=np.where(number["memory_type"] == _HOST_MEMORY, -1, number["memory_device"]),
        allocated=number["allocated"],
        reserved=number["reserved"],
        delta=number["memory_bytes"],
    )


def _collectives(table: Tables, host: Host, order: Ints, call: Ints) -> Collectives:
    """By what the kernel's record says, else by its name, else by the annotation around its launch."""
    named = np.full(len(table.names), -1, np.int64)
    known = {text: index for index, text in enumerate(table.names)}

    def number(text: str) -> int:
        plain = text.lower().replace("_", "")
        return known.setdefault(_COLLECTIVE_NAMES.get(plain, text.lower()), len(known))

    is_collective = np.zeros(len(table.names), bool)
    for index, text in enumerate(table.names):
        if found := _COLLECTIVE.match(text):
            is_collective[index] = True
            named[index] = number(found[1]) if found[1].lower() in _COLLECTIVE_NAMES else -1
    rows, names, sizes, groups = [], [], [], []
    kernel = table.device.name[order]
    recorded = np.zeros(len(order), bool)
    recorded[list(table.collectives)] = True
    for row in np.flatnonzero((is_collective[kernel] & (table.device_kind[order] == 0)) | recorded[order]).tolist():
        record = table.collectives.get(int(order[row]))
        name = number(table.names[record[0]]) if record else int(named[kernel[row]])
        if name < 0 and call[row] >= 0 and (scope := host.annotation[call[row]]) >= 0:
            found = _ANNOTATED_COLLECTIVE.match(table.names[host.name[scope]])
            name = number(found[1]) if found else -1
        rows.append(row)
        names.append(name if name >= 0 else int(kernel[row]))
        sizes.append(record[1] if record else -1)
        groups.append(record[2] if record else -1)
    table.names.extend(list(known)[len(table.names) :])
    return Collectives(*(np.array(column, np.int64) for column in (rows, names, sizes, groups)))


def by_number(candidates: Bools, numbers: Ints, wanted: Ints) -> Ints:
    """Row among ``candidates`` with each wanted number (above 0); -1 where there is none."""
    rows = np.flatnonzero(candidates & (numbers > 0))
    if not len(rows) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    rows = rows[np.argsort(numbers[rows], kind="stable")]
    position = np.minimum(np.searchsorted(numbers[rows], wanted), len(rows) - 1)
    return np.where(numbers[rows[position]] == wanted, rows[position], -1)


def at(column: Ints, row: Ints) -> Ints:
    """``column`` at each row; -1 for row -1."""
    return np.where(row >= 0, column[row], -1) if len(column) else np.full(len(row), -1, np.int64)
