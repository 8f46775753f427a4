"""Decoding of Kineto JSON into raw columns: only the fields that an analysis uses, nothing joined yet."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from kernbench.errors import KernbenchError

Ints = NDArray[np.int64]
Number = int | float | str | None

_HOST_CATEGORIES = {"cpu_op": "ops", "cuda_runtime": "calls", "cuda_driver": "calls", "user_annotation": "annotations"}
_DEVICE_KINDS = {"kernel": 0, "gpu_memcpy": 1, "gpu_memset": 2}
# Kineto prints a rate over zero time as inf or nan, which JSON does not have.
_NOT_A_NUMBER = re.compile(rb":\s*-?(?:inf|nan|Infinity|NaN)\b")
# Integer nanoseconds are exact in a float64 up to here (104 days); a longer trace is a damaged one.
_LONGEST_NS = 2**53


class _Args(Struct, gc=False):
    correlation: Number = -1
    stream: Number = -1
    device: Number = -1
    bytes: Number = -1
    sequence: Number = field(name="Sequence number", default=-1)
    forward_thread: Number = field(name="Fwd thread id", default=-1)


class _Event(Struct, gc=False):
    ph: str = ""
    cat: str | None = None
    name: str = ""
    pid: int | str | None = None
    tid: int | str | None = None
    ts: float = 0.0
    dur: float = 0.0
    args: _Args | None = None


class _Document(Struct):
    events: list[_Event] = field(name="traceEvents")


@dataclass(frozen=True, eq=False)
class Columns:
    """One category of events in file order; numbers that an event lacks are -1. Only host events have a thread."""

    name: Ints
    thread: Ints
    start_ns: Ints
    end_ns: Ints
    correlation: Ints
    stream: Ints
    device: Ints
    bytes: Ints
    sequence: Ints
    forward_thread: Ints


@dataclass(frozen=True, eq=False)
class Tables:
    """Raw columns by category, with the names and threads that they index."""

    names: list[str]
    threads: list[str]
    ops: Columns
    calls: Columns
    annotations: Columns
    device: Columns
    device_kind: Ints
    syncs: Columns


def read(path: Path) -> Tables:
    """Read and decode one file.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, or no Kineto trace.
    """
    groups: dict[str, list[_Event]] = {name: [] for name in ("ops", "calls", "annotations", "device", "syncs")}
    kinds: list[int] = []
    for event in _events(path):
        if event.ph != "X" or event.cat is None:
            continue
        if (group := _HOST_CATEGORIES.get(event.cat)) is not None:
            groups[group].append(event)
        elif (kind := _DEVICE_KINDS.get(event.cat)) is not None:
            groups["device"].append(event)
            kinds.append(kind)
        elif event.cat == "cuda_sync":
            groups["syncs"].append(event)
    origin = min((event.ts for events in groups.values() for event in events), default=0.0)
    names: dict[str, int] = {}
    threads: dict[str, int] = {}
    try:
        columns = {group: _columns(events, origin, names, threads) for group, events in groups.items()}
    except (ValueError, OverflowError) as error:
        raise KernbenchError(f"{path} is damaged ({error}); record the trace again") from None
    return Tables(names=list(names), threads=list(threads), device_kind=np.array(kinds, np.int64), **columns)


def _events(path: Path) -> list[_Event]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise KernbenchError(f"{path} is cut off or damaged ({error}); record or copy the trace again") from None
    except OSError as error:
        raise KernbenchError(f"cannot read {path}: {error.strerror}; name a Kineto trace (.json or .json.gz)") from None
    if not data.strip():
        raise KernbenchError(f"{path} is empty; name a Kineto trace (.json or .json.gz)")
    try:
        return _decode(data)
    except msgspec.ValidationError:
        raise KernbenchError(
            f"{path} is JSON but no Kineto trace; name a file that torch.profiler's export_chrome_trace wrote"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KernbenchError(f"{path} is cut off or no JSON ({error}); record or copy the trace again") from None


def _decode(data: bytes) -> list[_Event]:
    """The events of a trace object, or of a bare array of events (Chrome's other form)."""
    as_array = data.lstrip()[:1] == b"["
    try:
        return _decode_as(data, as_array)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return _decode_as(_NOT_A_NUMBER.sub(b":null", data), as_array)


def _decode_as(data: bytes, as_array: bool) -> list[_Event]:
    if as_array:
        return msgspec.json.decode(data, type=list[_Event])
    return msgspec.json.decode(data, type=_Document).events


def _columns(events: list[_Event], origin: float, names: dict[str, int], threads: dict[str, int]) -> Columns:
    count = len(events)
    start_us = np.fromiter((event.ts for event in events), float, count) - origin
    duration_us = np.fromiter((event.dur for event in events), float, count)
    if count and not np.all(np.maximum(start_us, duration_us) < _LONGEST_NS / 1000):
        raise ValueError("an event lies days away from the first one")
    start_ns = np.rint(start_us * 1000).astype(np.int64)
    nothing = _Args()
    args = [event.args or nothing for event in events]

    return Columns(
        name=np.fromiter((names.setdefault(event.name, len(names)) for event in events), np.int64, count),
        thread=np.fromiter(
            (threads.setdefault(f"{event.pid}/{event.tid}", len(threads)) for event in events), np.int64, count
        ),
        start_ns=start_ns,
        end_ns=start_ns + np.rint(np.maximum(duration_us, 0) * 1000).astype(np.int64),
        correlation=_integers([arg.correlation for arg in args]),
        stream=_integers([arg.stream for arg in args]),
        device=_integers([arg.device for arg in args]),
        bytes=_integers([arg.bytes for arg in args]),
        sequence=_integers([arg.sequence for arg in args]),
        forward_thread=_integers([arg.forward_thread for arg in args]),
    )


def _integers(values: list[Number]) -> Ints:
    """The numbers themselves, -1 for what is none (null, or ROCm's hexadecimal stream handles)."""
    try:
        return np.fromiter(values, np.int64, len(values))
    except (TypeError, ValueError):
        return np.fromiter((_integer(value) for value in values), np.int64, len(values))


def _integer(value: Number) -> int:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else -1
    return -1 if value is None else int(value)
