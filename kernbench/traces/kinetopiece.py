"""Columns of a piece of a trace: what of its events an analysis uses, numbered within the piece."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from msgspec import Raw, Struct, field
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Number = int | float | str | None
Place = int | str | None
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Thread = tuple[Place, Place]
Shapes = tuple[bytes, bytes]

# The capitalised ones are those of PyTorch before 1.11.
GROUPS = {
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
    "cpu_instant_event": "memory",
}
DEVICE_GROUPS = ("kernels", "copies", "memsets")
# The numbers among the arguments of each group's events.
NUMBERS: dict[str, tuple[str, ...]] = {
    "ops": ("sequence", "forward_thread", "external"),
    "calls": ("correlation", "external", "size"),
    "annotations": (),
    "syncs": ("correlation", "device", "stream", "wait_on_stream", "wait_on_record"),
    "frames": (),
    "memory": ("memory_device", "memory_type", "memory_bytes", "allocated", "reserved"),
    **dict.fromkeys(DEVICE_GROUPS, ("correlation", "external", "device", "stream", "bytes")),
}
_MEMORY = "[memory]"
# Kineto prints a rate over zero time as inf or nan, which JSON does not have.
_NOT_A_NUMBER = re.compile(rb":\s*-?(?:inf|nan|Infinity|NaN)\b")
# The types that collectives are recorded with.
_BYTES_OF = {
    "Byte": 1, "Char": 1, "Bool": 1, "Float8_e4m3fn": 1, "Float8_e5m2": 1, "Float8_e4m3fnuz": 1, "Float8_e5m2fnuz": 1,
    "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


class Args(Struct, gc=False):
    """The arguments of events that analyses use; what an event lacks is -1 or empty."""

    correlation: Number = -1
    stream: Number = -1
    device: Number = -1
    bytes: Number = -1
    size: Number = -1
    sequence: Number = field(name="Sequence number", default=-1)
    forward_thread: Number = field(name="Fwd thread id", default=-1)
    external: Number = field(name="External id", default=-1)
    dims: Raw = field(name="Input Dims", default=Raw(b""))
    types: Raw = field(name="Input type", default=Raw(b""))
    collective: Number = field(name="Collective name", default=None)
    group_size: Number = field(name="Group size", default=-1)
    dtype: Number = None
    elements_in: Number = field(name="In msg nelems", default=-1)
    elements_out: Number = field(name="Out msg nelems", default=-1)
    wait_on_stream: Number = -1
    wait_on_record: Number = field(name="wait_on_cuda_event_record_corr_id", default=-1)
    memory_device: Number = field(name="Device Id", default=-1)
    memory_type: Number = field(name="Device Type", default=-1)
    memory_bytes: Number = field(name="Bytes", default=-1)
    allocated: Number = field(name="Total Allocated", default=-1)
    reserved: Number = field(name="Total Reserved", default=-1)


class Event(Struct, gc=False):
    """One event as the file has it; times in microseconds."""

    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: Place = None
    tid: Place = None
    ts: float = 0.0
    dur: float = 0.0
    id: Number = None
    args: Args | None = None


_NOTHING = Args()


@dataclass(frozen=True, eq=False)
class Piece:
    """Columns by group; ``name``, ``thread`` and ``shapes`` index the piece's own lists.

    ``collectives`` maps rows of the piece's kernels to name, bytes and number of ranks.
    """

    events: int
    columns: dict[str, dict[str, NDArray[Any]]]
    names: list[str]
    threads: list[Thread]
    shapes: list[Shapes]
    collectives: dict[int, tuple[str, int, int]]


def decoded(text: bytes, kind: type[T]) -> T:
    """JSON of Kineto, which may hold inf and nan, as ``kind``.

    Raises:
        msgspec.DecodeError: it is no JSON; msgspec.ValidationError: it is of another kind.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.json.decode(_NOT_A_NUMBER.sub(b":null", text), type=kind)


class Numbering(dict[K, int], Generic[K]):
    """Numbers its keys in the order of their first look-up."""

    def __missing__(self, key: K) -> int:
        number = self[key] = len(self)
        return number

    def of(self, keys: Iterable[K], count: int = -1) -> Ints:
        """The number of each key; ``count`` of them, if known beforehand."""
        return np.fromiter(map(self.__getitem__, keys), np.int64, count)


def of_events(events: list[Event]) -> Piece:
    """The columns of these events, each group's in file order."""
    names, threads, shapes = Numbering[str](), Numbering[Thread](), Numbering[Shapes]()
    collectives: dict[int, tuple[str, int, int]] = {}
    columns = {}
    for group, members in _grouped(events).items():
        count = len(members)
        args = [event.args or _NOTHING for event in members]
        found: dict[str, NDArray[Any]] = {
            "name": names.of(map(attrgetter("name"), members), count),
            "start": np.fromiter(map(attrgetter("ts"), members), np.float64, count),
            "duration": np.fromiter(map(attrgetter("dur"), members), np.float64, count),
        }
        if group not in DEVICE_GROUPS:
            found["thread"] = threads.of(map(attrgetter("pid", "tid"), members), count)
        for column in NUMBERS[group]:
            found[column] = integers(list(map(attrgetter(column), args)))
        if group == "ops":
            found["shapes"] = _shapes(args, shapes)
        elif group == "kernels":
            collectives = {row: _collective(arg) for row, arg in enumerate(args) if arg.collective is not None}
        columns[group] = found
    return Piece(len(events), columns, list(names), list(threads), list(shapes), collectives)


def narrowed(piece: Piece) -> Piece:
    """The same with int32 columns, where these hold all numbers of a column: half as much to hand over."""
    limit = np.iinfo(np.int32)
    columns = {
        group: {
            column: values.astype(np.int32)
            if values.dtype == np.int64 and np.all((values >= limit.min) & (values <= limit.max))
            else values
            for column, values in found.items()
        }
        for group, found in piece.columns.items()
    }
    return replace(piece, columns=columns)


def _shapes(args: list[Args], numbers: Numbering[Shapes]) -> Ints:
    dims = list(map(attrgetter("dims"), args))
    if dims.count(_NOTHING.dims) == len(dims):
        # Recorded without shapes, as most traces are: nothing to look at operator by operator.
        return np.full(len(dims), numbers[b"", b""])
    types = map(bytes, map(attrgetter("types"), args))
    return numbers.of(zip(map(bytes, dims), types, strict=True), len(dims))


def _grouped(events: list[Event]) -> dict[str, list[Event]]:
    categories: defaultdict[str | None, list[Event]] = defaultdict(list)
    for event in events:
        categories[event.cat].append(event)
    groups: defaultdict[str, list[Event]] = defaultdict(list)
    for category, members in categories.items():
        group = GROUPS.get(category or "")
        if group == "memory":
            groups[group] = [event for event in members if event.name == _MEMORY]
        elif group is not None:
            groups[group] += [event for event in members if event.ph == "X"]
    return groups


def _collective(arg: Args) -> tuple[str, int, int]:
    elements = max(integer(arg.elements_in), integer(arg.elements_out))
    size = _BYTES_OF.get(str(arg.dtype), -1)
    return str(arg.collective), elements * size if min(elements, size) >= 0 else -1, integer(arg.group_size)


def integers(values: Sequence[Number]) -> Ints:
    """The numbers themselves, -1 for what is none (null, or ROCm's hexadecimal stream handles)."""
    try:
        return np.array(values, np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.fromiter(map(integer, values), np.int64, len(values))


def integer(value: Number) -> int:
    """One number, -1 for what is none or fits no 64 bits."""
    if isinstance(value, str):
        value = int(value) if value.isdecimal() and len(value) < 20 else -1
    return int(value) if value is not None and abs(value) < 2**63 else -1
