"""Decoding of Kineto JSON into raw columns: only the fields that an analysis uses, nothing joined yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Raw
from numpy.typing import NDArray

from kernbench import flows, tracefile
from kernbench.errors import KernbenchError
from kernbench.tracefile import Args, Event, Number

Ints = NDArray[np.int64]
Place = int | str | None
T = TypeVar("T")

# The capitalised ones are those of PyTorch before 1.11.
_GROUPS = {
    "cpu_op": "ops",
    "Operator": "ops",
    "cuda_runtime": "calls",
    "cuda_driver": "calls",
    "Runtime": "calls",
    "user_annotation": "annotations",
    "kernel": "kernels",
    "Kernel": "kernels",
    "gpu_memcpy": "copies",
    "Memcpy": "copies",
    "gpu_memset": "memsets",
    "Memset": "memsets",
    "cuda_sync": "syncs",
    "python_function": "frames",
}
_DEVICE_GROUPS = ("kernels", "copies", "memsets")
_NUMBERS = {
    "ops": ("sequence", "forward_thread", "external"),
    "calls": ("correlation", "external", "size"),
    "annotations": (),
    "syncs": ("correlation", "device", "stream", "wait_on_stream", "wait_on_record"),
    "frames": (),
    "memory": ("memory_device", "memory_type", "memory_bytes", "allocated", "reserved"),
    **dict.fromkeys(_DEVICE_GROUPS, ("correlation", "external", "device", "stream", "bytes")),
}
_MEMORY_CATEGORY, _MEMORY = "cpu_instant_event", "[memory]"
_NOTHING = Args()
_NO_TEXT = _NOTHING.dims
# The types that collectives are recorded with.
_BYTES_OF = {
    "Byte": 1, "Char": 1, "Bool": 1, "Float8_e4m3fn": 1, "Float8_e5m2": 1, "Float8_e4m3fnuz": 1, "Float8_e5m2fnuz": 1,
    "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
# Integer nanoseconds are exact in a float64 up to here (104 days); a longer trace is a damaged one.
_LONGEST_NS = 2**53


@dataclass(frozen=True, eq=False)
class Columns:
    """One group of events in file order. ``numbers`` holds the arguments of the group; -1 where an event lacks one."""

    name: Ints
    thread: Ints
    start_ns: Ints
    end_ns: Ints
    numbers: dict[str, Ints]

    def __len__(self) -> int:
        return len(self.name)


@dataclass(frozen=True, eq=False)
class Tables:
    """Raw columns by group, with the names, threads and shapes that they index.

    ``op_shapes`` stands beside ``ops``. ``device`` holds kernels (kind 0), copies (1) and memsets (2);
    ``collectives`` maps a row of ``device`` to its collective's name, bytes and number of ranks.
    """

    names: list[str]
    threads: list[str]
    events: int
    ops: Columns
    op_shapes: Ints
    shape_texts: list[tuple[str, str]]
    calls: Columns
    annotations: Columns
    device: Columns
    device_kind: Ints
    collectives: dict[int, tuple[int, int, int]]
    syncs: Columns
    frames: Columns
    memory: Columns
    device_properties: list[Any]
    distributed: dict[str, Any]


def read(path: Path) -> Tables:
    """Read and decode one file.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, or no Kineto trace.
    """
    reader = _Reader()
    try:
        metadata = tracefile.read(path, reader.take)
        origin = reader.origin()
        groups = {group: part.columns(origin) for group, part in reader.groups.items()}
    except (ValueError, OverflowError) as error:
        raise KernbenchError(f"{path} is damaged ({error}); record the trace again") from None
    device_parts = [groups[group] for group in _DEVICE_GROUPS]
    device = _joined(device_parts)
    correlation = device.numbers["correlation"]
    if len(device) and not np.any(correlation >= 0):
        found = flows.numbers(path, _GROUPS, ("calls", *_DEVICE_GROUPS))
        correlation[:] = np.concatenate([found[group] for group in _DEVICE_GROUPS])
        groups["calls"].numbers["correlation"][:] = found["calls"]
    return Tables(
        names=list(reader.names),
        threads=[f"{process}/{thread}" for process, thread in reader.threads],
        events=reader.events,
        ops=groups["ops"],
        op_shapes=_concatenated(reader.op_shapes, np.int64),
        shape_texts=[(dims.decode(), types.decode()) for dims, types in reader.shapes],
        calls=groups["calls"],
        annotations=groups["annotations"],
        device=device,
        device_kind=np.repeat(np.arange(3), [len(part) for part in device_parts]),
        collectives=reader.collectives,
        syncs=groups["syncs"],
        frames=groups["frames"],
        memory=groups["memory"],
        device_properties=_plain(metadata.devices, list),
        distributed=_plain(metadata.distributed, dict),
    )


class _Part:
    """The columns of one group, piece by piece."""

    def __init__(self, numbers: Iterable[str]) -> None:
        self.pieces: dict[str, list[NDArray[Any]]] = {column: [] for column in ("name", "thread", "start", "duration")}
        self.numbers: dict[str, list[Ints]] = {column: [] for column in numbers}
        self.length = 0

    def columns(self, origin: float) -> Columns:
        """The whole group, times in nanoseconds from ``origin``, which is in microseconds.

        Raises:
            ValueError: an event lies too far from the others.
        """
        start_us = _concatenated(self.pieces["start"], np.float64) - origin
        duration_us = _concatenated(self.pieces["duration"], np.float64)
        if len(start_us) and not np.all(np.maximum(start_us, duration_us) < _LONGEST_NS / 1000):
            raise ValueError("an event lies days away from the first one")
        start_ns = np.rint(start_us * 1000).astype(np.int64)
        return Columns(
            name=_concatenated(self.pieces["name"], np.int64),
            thread=_concatenated(self.pieces["thread"], np.int64),
            start_ns=start_ns,
            end_ns=start_ns + np.rint(np.maximum(duration_us, 0) * 1000).astype(np.int64),
            numbers={column: _concatenated(pieces, np.int64) for column, pieces in self.numbers.items()},
        )


class _Reader:
    """Takes pieces of events and keeps their columns."""

    def __init__(self) -> None:
        self.groups = {group: _Part(numbers) for group, numbers in _NUMBERS.items()}
        self.names: dict[str, int] = {}
        self.threads: dict[tuple[Place, Place], int] = {}
        self.shapes: dict[tuple[bytes, bytes], int] = {}
        self.op_shapes: list[Ints] = []
        self.collectives: dict[int, tuple[int, int, int]] = {}
        self.events = 0

    def origin(self) -> float:
        """The first event's time in microseconds."""
        firsts = [piece.min() for part in self.groups.values() for piece in part.pieces["start"] if len(piece)]
        return float(min(firsts, default=0.0))

    def take(self, events: list[Event]) -> None:
        """Append the columns of these events, each group's in file order."""
        self.events += len(events)
        categories: defaultdict[str | None, list[Event]] = defaultdict(list)
        for event in events:
            categories[event.cat].append(event)
        for category, members in categories.items():
            group = _GROUPS.get(category or "")
            if group is not None:
                self._add(group, [event for event in members if event.ph == "X"])
            elif category == _MEMORY_CATEGORY:
                self._add("memory", [event for event in members if event.name == _MEMORY])

    def _add(self, group: str, events: list[Event]) -> None:
        part, count = self.groups[group], len(events)
        args = [event.args or _NOTHING for event in events]
        names = self.names
        part.pieces["name"].append(
            np.fromiter((names.setdefault(event.name, len(names)) for event in events), np.int64, count)
        )
        part.pieces["thread"].append(self._threads(events) if group not in _DEVICE_GROUPS else np.full(count, -1))
        part.pieces["start"].append(np.fromiter((event.ts for event in events), np.float64, count))
        part.pieces["duration"].append(np.fromiter((event.dur for event in events), np.float64, count))
        for column, pieces in part.numbers.items():
            pieces.append(_integers(list(map(attrgetter(column), args))))
        if group == "ops":
            self.op_shapes.append(self._shapes(args))
        elif group == "kernels":
            for row, arg in enumerate(args, part.length):
                if arg.collective is not None:
                    self.collectives[row] = self._collective(arg)
        part.length += count

    def _threads(self, events: list[Event]) -> Ints:
        threads = self.threads
        return np.fromiter(
            (threads.setdefault((event.pid, event.tid), len(threads)) for event in events), np.int64, len(events)
        )

    def _shapes(self, args: list[Args]) -> Ints:
        shapes = self.shapes
        return np.fromiter(
            (
                shapes.setdefault((bytes(arg.dims), bytes(arg.types)), len(shapes)) if arg.dims is not _NO_TEXT else -1
                for arg in args
            ),
            np.int64,
            len(args),
        )

    def _collective(self, arg: Args) -> tuple[int, int, int]:
        name = self.names.setdefault(str(arg.collective), len(self.names))
        elements = max(_integer(arg.elements_in), _integer(arg.elements_out))
        size = _BYTES_OF.get(str(arg.dtype), -1)
        return name, elements * size if min(elements, size) >= 0 else -1, _integer(arg.group_size)


def _joined(parts: list[Columns]) -> Columns:
    return Columns(
        **{
            column: np.concatenate([getattr(part, column) for part in parts])
            for column in ("name", "thread", "start_ns", "end_ns")
        },
        numbers={column: np.concatenate([part.numbers[column] for part in parts]) for column in parts[0].numbers},
    )


def _concatenated(pieces: list[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(pieces) if pieces else np.zeros(0, kind)


def _integers(values: list[Number]) -> Ints:
    """The numbers themselves, -1 for what is none (null, or ROCm's hexadecimal stream handles)."""
    try:
        return np.array(values, np.int64)
    except (TypeError, ValueError):
        return np.fromiter((_integer(value) for value in values), np.int64, len(values))


def _integer(value: Number) -> int:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else -1
    return -1 if value is None else int(value)


def _plain(text: Raw, kind: type[T]) -> T:
    """Metadata decoded; empty where it is absent or of another form, for nothing depends on it."""
    try:
        return msgspec.json.decode(text, type=kind) if bytes(text) else kind()
    except msgspec.MsgspecError:
        return kind()
