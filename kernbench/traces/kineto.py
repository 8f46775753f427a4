"""Decoding of Kineto JSON into raw columns: only the fields that an analysis uses, nothing joined yet."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Raw
from numpy.typing import NDArray

from kernbench.errors import KernbenchError
from kernbench.traces import flows, kinetopiece, tracefile
from kernbench.traces.kinetopiece import DEVICE_GROUPS, NUMBERS, Numbering, Piece, Shapes, Thread

Ints = NDArray[np.int64]
T = TypeVar("T")

_NO_TIMES = np.zeros(0)
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
    gathered = _Gathered()
    metadata = tracefile.read(path, gathered.add, kinetopiece.of_events)
    try:
        origin = gathered.origin()
        groups = {group: gathered.columns(group, origin) for group in NUMBERS}
    except ValueError as error:
        raise KernbenchError(f"{path} is damaged ({error}); record the trace again") from None
    device_parts = [groups[group] for group in DEVICE_GROUPS]
    device = _joined(device_parts)
    correlation = device.numbers["correlation"]
    if len(device) and not np.any(correlation >= 0):
        found = flows.numbers(path, ("calls", *DEVICE_GROUPS))
        correlation[:] = np.concatenate([found[group] for group in DEVICE_GROUPS])
        groups["calls"].numbers["correlation"][:] = found["calls"]
    return Tables(
        names=list(gathered.names),
        threads=[f"{process}/{thread}" for process, thread in gathered.threads],
        events=gathered.events,
        ops=groups["ops"],
        op_shapes=gathered.column("ops", "shapes"),
        shape_texts=[(dims.decode(), types.decode()) for dims, types in gathered.shapes],
        calls=groups["calls"],
        annotations=groups["annotations"],
        device=device,
        device_kind=np.repeat(np.arange(3), [len(part) for part in device_parts]),
        collectives=gathered.collectives,
        syncs=groups["syncs"],
        frames=groups["frames"],
        memory=groups["memory"],
        device_properties=_plain(metadata.devices, list),
        distributed=_plain(metadata.distributed, dict),
    )


class _Gathered:
    """The columns of all pieces, with one numbering for the whole file."""

    def __init__(self) -> None:
        self.names = Numbering[str]()
        self.threads = Numbering[Thread]()
        self.shapes = Numbering[Shapes]()
        self.collectives: dict[int, tuple[int, int, int]] = {}
        self.events = 0
        self._columns: defaultdict[tuple[str, str], list[NDArray[Any]]] = defaultdict(list)
        self._kernels = 0

    def add(self, piece: Piece) -> None:
        """Append the rows of the next piece."""
        self.events += piece.events
        numberings = {
            "name": self.names.of(piece.names),
            "thread": self.threads.of(piece.threads),
            "shapes": np.array([self.shapes[texts] if texts[0] else -1 for texts in piece.shapes], np.int64),
        }
        for group, columns in piece.columns.items():
            for column, values in columns.items():
                numbering = numberings.get(column)
                self._columns[group, column].append(values if numbering is None else numbering[values])
        for row, (name, size, ranks) in piece.collectives.items():
            self.collectives[self._kernels + row] = (self.names[name], size, ranks)
        self._kernels += len(piece.columns.get("kernels", {}).get("name", ()))

    def origin(self) -> float:
        """The first event's time in microseconds."""
        starts = [self._columns[group, "start"] for group in NUMBERS]
        return float(min((piece.min() for pieces in starts for piece in pieces if len(piece)), default=0.0))

    def column(self, group: str, column: str) -> Ints:
        """One column of a group; -1 throughout for one that the group's events do not have."""
        pieces = self._columns[group, column]
        return np.concatenate(pieces, dtype=np.int64) if pieces else np.full(self._rows(group), -1, np.int64)

    def columns(self, group: str, origin: float) -> Columns:
        """One group whole, times in nanoseconds from ``origin``, which is in microseconds.

        Raises:
            ValueError: an event lies too far from the others.
        """
        start_us = np.concatenate([*self._columns[group, "start"], _NO_TIMES])
        duration_us = np.concatenate([*self._columns[group, "duration"], _NO_TIMES])
        if len(start_us) and not np.all(np.maximum(start_us - origin, duration_us) < _LONGEST_NS / 1000):
            raise ValueError("an event lies days away from the first one")
        # Kineto counts in nanoseconds and prints three decimals: whole and fraction apart, they come back exactly.
        whole = np.floor(start_us)
        start_ns = ((whole - np.floor(origin)) * 1000 + np.rint((start_us - whole) * 1000)).astype(np.int64)
        start_ns -= round((origin - np.floor(origin)) * 1000)
        return Columns(
            name=self.column(group, "name"),
            thread=self.column(group, "thread"),
            start_ns=start_ns,
            end_ns=start_ns + np.rint(np.maximum(duration_us, 0) * 1000).astype(np.int64),
            numbers={column: self.column(group, column) for column in NUMBERS[group]},
        )

    def _rows(self, group: str) -> int:
        return sum(map(len, self._columns[group, "name"]))


def _joined(parts: list[Columns]) -> Columns:
    return Columns(
        **{
            column: np.concatenate([getattr(part, column) for part in parts])
            for column in ("name", "thread", "start_ns", "end_ns")
        },
        numbers={column: np.concatenate([part.numbers[column] for part in parts]) for column in parts[0].numbers},
    )


def _plain(text: Raw, kind: type[T]) -> T:
    """Metadata decoded; empty where it is absent or of another form, for nothing depends on it."""
    try:
        return msgspec.json.decode(text, type=kind) if bytes(text) else kind()
    except msgspec.MsgspecError:
        return kind()
