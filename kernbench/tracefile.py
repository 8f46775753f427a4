"""Streams the events of a trace file, plain or gzipped, so that no more than a window of it is in memory."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct, field

from kernbench.errors import KernbenchError

WINDOW = 8 << 20
"""Bytes that are decoded at once."""
Number = int | float | str | None
T = TypeVar("T")

# Kineto prints a rate over zero time as inf or nan, which JSON does not have.
_NOT_A_NUMBER = re.compile(rb":\s*-?(?:inf|nan|Infinity|NaN)\b")
_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(rb"\}\s*,\s*\{")
_BYTE = re.compile(r" \(byte \d+\)")
_GZIP = b"\x1f\x8b"
_COMPRESSED_READ = 1 << 20


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
    pid: int | str | None = None
    tid: int | str | None = None
    ts: float = 0.0
    dur: float = 0.0
    id: Number = None
    args: Args | None = None


class Metadata(Struct, kw_only=True):
    """What a trace says of itself, before or after its events."""

    events: list[Event] = field(name="traceEvents")
    devices: Raw = field(name="deviceProperties", default=Raw(b""))
    distributed: Raw = field(name="distributedInfo", default=Raw(b""))


def read(path: Path, take: Callable[[list[Event]], None]) -> Metadata:
    """Give all events to ``take``, piece by piece in file order; returns the metadata, its list of events emptied.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, or no Kineto trace.
    """
    try:
        with ThreadPoolExecutor(1) as ahead:
            return _Pieces(_read_ahead(_windows(path), ahead), take).run(path)
    except (EOFError, zlib.error) as error:
        raise KernbenchError(f"{path} is cut off or damaged ({error}); record or copy the trace again") from None
    except OSError as error:
        raise KernbenchError(f"cannot read {path}: {error.strerror}; name a Kineto trace (.json or .json.gz)") from None
    except msgspec.ValidationError:
        raise KernbenchError(
            f"{path} is JSON but no Kineto trace; name a file that torch.profiler's export_chrome_trace wrote"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = _BYTE.sub("", str(error))
        raise KernbenchError(f"{path} is cut off or no JSON ({reason}); record or copy the trace again") from None


class _Pieces:
    """Cuts the text of a file between events and decodes piece by piece.

    A cut is right if the text before it decodes as a list of whole events. If it does not (the text looked like the
    boundary between two events, but was none), all that is left is decoded at once.
    """

    def __init__(self, windows: Iterator[bytes], take: Callable[[list[Event]], None]) -> None:
        self._windows = windows
        self._take = take
        self._text = b""
        self._ended = False

    def run(self, path: Path) -> Metadata:
        self._more()
        while not self._text.strip():
            if self._ended:
                raise KernbenchError(f"{path} is empty; name a Kineto trace (.json or .json.gz)")
            self._more()
        if self._text.lstrip()[:1] == b"[":
            self._text = b'{"traceEvents": ' + self._text
            return self._rest(self._events(Metadata(events=[])), closing=b"}")
        while (start := _EVENTS.search(self._text)) is None and not self._ended:
            self._more()
        if start is None:
            return self._rest(Metadata(events=[]))
        try:
            before = _decoded(self._text[: start.end()] + b"]}", Metadata)
        except msgspec.DecodeError:
            return self._rest(Metadata(events=[]))
        self._text = self._text[start.start() :]
        self._text = b"{" + self._text
        return self._rest(self._events(before))

    def _events(self, before: Metadata) -> Metadata:
        """Decode pieces as long as there is more in the file than is in memory."""
        head = self._text[: self._text.index(b"[") + 1]
        self._text = self._text[len(head) :]
        while not self._ended:
            cut = _last_boundary(self._text)
            if cut is None:
                self._more()
                continue
            try:
                events = _decoded(b"[" + self._text[: cut[0]] + b"]", list[Event])
            except msgspec.DecodeError:
                break
            self._take(events)
            self._text = self._text[cut[1] :]
            self._more()
        self._text = head + self._text
        return before

    def _rest(self, before: Metadata, closing: bytes = b"") -> Metadata:
        parts = [self._text, *self._windows, closing]
        self._text = b""
        after = _decoded(b"".join(parts), Metadata)
        self._take(after.events)
        devices = after.devices if bytes(after.devices) else before.devices
        distributed = after.distributed if bytes(after.distributed) else before.distributed
        return Metadata(events=[], devices=Raw(bytes(devices)), distributed=Raw(bytes(distributed)))

    def _more(self) -> None:
        """Append the next window. A text without any boundary grows by doubling, so that the scans stay linear."""
        size, parts = 0, [self._text]
        while size < max(WINDOW // 2, len(self._text)) and not self._ended:
            window = next(self._windows, b"")
            self._ended = not window
            size += len(window)
            parts.append(window)
        self._text = b"".join(parts)


def _last_boundary(text: bytes) -> tuple[int, int] | None:
    """Where the text's last whole event ends and the next one begins, as far as it looks like that."""
    end = len(text)
    while (comma := text.rfind(b"}", 0, end)) >= 0:
        if found := _BETWEEN.match(text, comma):
            return found.start() + 1, found.end() - 1
        end = comma
    return None


def _decoded(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.json.decode(_NOT_A_NUMBER.sub(b":null", text), type=kind)


def _windows(path: Path) -> Iterator[bytes]:
    """The file's text in windows, inflated where it is compressed."""
    with path.open("rb") as file:
        head = file.read(_COMPRESSED_READ)
        if head[:2] == _GZIP:
            yield from _inflated(head, lambda: file.read(_COMPRESSED_READ))
        elif head:
            yield head + file.read(WINDOW - len(head))
            while window := file.read(WINDOW):
                yield window


def _inflated(data: bytes, more: Callable[[], bytes]) -> Iterator[bytes]:
    """Members of a gzip file one after another; zeros may pad its end.

    Raises:
        EOFError: the file ends inside a member.
        zlib.error: damaged, or followed by something that is no gzip member.
    """
    inflater = zlib.decompressobj(wbits=31)
    while True:
        text = inflater.decompress(data, WINDOW)
        if text:
            yield text
        if inflater.eof:
            data = inflater.unused_data.lstrip(b"\0") or more().lstrip(b"\0")
            if not data:
                return
            inflater = zlib.decompressobj(wbits=31)
        elif len(text) == WINDOW:
            data = inflater.unconsumed_tail
        else:
            data = more()
            if not data:
                raise EOFError("the compressed data end early")


def _read_ahead(windows: Iterator[bytes], pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """The same windows, the next one being read and inflated (which needs no interpreter lock) meanwhile."""
    upcoming = pool.submit(next, windows, b"")
    while window := upcoming.result():
        upcoming = pool.submit(next, windows, b"")
        yield window
