"""Streams the events of a trace file, plain or gzipped, so that no more than a window of it is in memory."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

import msgspec
from msgspec import Raw, Struct, field

from kernbench import kinetopiece
from kernbench.decodehelper import Helper
from kernbench.errors import KernbenchError
from kernbench.kinetopiece import Event, decoded

WINDOW = 1 << 20
"""Bytes that are decoded at once: few enough to stay in the caches, and for the allocator to reuse their memory."""
T = TypeVar("T")

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(rb'\}\s*,\s*(?=\{\s*"(?:ph|cat|name|pid|tid|ts|dur|args|id|s|bp)"\s*:)')
_BYTE = re.compile(r" \(byte \d+\)")
_GZIP = b"\x1f\x8b"
_COMPRESSED_READ = 1 << 20
# From these sizes of file on (some 200,000 events) a helper process saves more than it costs.
_HELPED, _HELPED_GZIP = 64 << 20, 4 << 20


class Metadata(Struct, kw_only=True):
    """What a trace says of itself, before or after its events."""

    events: list[Event] = field(name="traceEvents")
    devices: Raw = field(name="deviceProperties", default=Raw(b""))
    distributed: Raw = field(name="distributedInfo", default=Raw(b""))


def read(path: Path, take: Callable[[T], None], decode: Callable[[list[Event]], T]) -> Metadata:
    """Give all events to ``take``, piece by piece in file order, each as what ``decode`` makes of it.

    A helper process decodes half of a large file if ``decode`` is the ordinary one, :func:`kinetopiece.of_events`.
    The metadata that is returned has no events.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, or no Kineto trace.
    """
    helper = None
    try:
        with ThreadPoolExecutor(1) as ahead, path.open("rb") as file:
            if decode is kinetopiece.of_events and _worth_a_helper(file):
                helper = Helper()
            return _Pieces(_read_ahead(_windows(file), ahead), take, decode, helper).run(path)
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
    finally:
        if helper is not None:
            helper.close()


class _Pieces(Generic[T]):
    """Cuts the text of a file between events and decodes piece by piece.

    A cut is right if the text before it decodes as a list of whole events. If it does not (the text looked like the
    boundary between two events, but was none), all that is left is decoded at once.
    """

    def __init__(
        self,
        windows: Iterator[bytes],
        take: Callable[[T], None],
        decode: Callable[[list[Event]], T],
        helper: Helper | None,
    ) -> None:
        self._windows = windows
        self._take = take
        self._decode = decode
        self._helper = helper
        self._text = b""
        self._helped = b""  # what the helper is decoding, up to the next event
        self._ended = False

    def run(self, path: Path) -> Metadata:
        self._more()
        while not self._text.strip():
            if self._ended:
                raise KernbenchError(f"{path} is empty; name a Kineto trace (.json or .json.gz)")
            self._more()
        if self._text.lstrip()[:1] == b"[":
            self._text = self._text.lstrip()[1:]
            self._pieces()
            return self._rest(Metadata(events=[]), b'{"traceEvents": [', b"}")
        while (start := _EVENTS.search(self._text)) is None and not self._ended:
            self._more()
        if start is None:
            return self._rest(Metadata(events=[]))
        try:
            before = decoded(self._text[: start.end()] + b"]}", Metadata)
        except msgspec.DecodeError:
            return self._rest(Metadata(events=[]))
        self._text = self._text[start.end() :]
        self._pieces()
        return self._rest(before, b'{"traceEvents": [')

    def _pieces(self) -> None:
        """Decode pieces as long as there is more in the file than is in memory."""
        while not self._ended:
            cut = _last_boundary(self._text)
            if cut is None:
                self._more()
            elif self._helper is not None and not self._helped:
                if self._helper.send(memoryview(self._text)[: cut[0]]):
                    self._advance(cut[1], helped=True)
                else:
                    self._helper = None
            else:
                try:
                    events = decoded(b"".join((b"[", memoryview(self._text)[: cut[0]], b"]")), list[Event])
                except msgspec.DecodeError:
                    break
                piece = self._decode(events)
                # Their memory is free again before the next piece needs as much.
                del events
                if not self._fetch_helped():
                    return
                self._take(piece)
                self._advance(cut[1])
        self._fetch_helped()

    def _advance(self, to: int, *, helped: bool = False) -> None:
        """Go on with the event at position ``to``; what lies before it is taken, or given to the helper."""
        self._helped = self._text[:to] if helped else b""
        self._text = self._text[to:]
        self._more()

    def _fetch_helped(self) -> bool:
        """Take what the helper decoded. False: it could not, and the text is put back before the rest."""
        if self._helper is None or not self._helped:
            return True
        piece = self._helper.receive()
        if piece is None:
            self._text = self._helped + self._text
        else:
            self._take(cast(T, piece))
        self._helped = b""
        return piece is not None

    def _rest(self, before: Metadata, opening: bytes = b"", closing: bytes = b"") -> Metadata:
        parts = [opening, self._text, *self._windows, closing]
        self._text = b""
        after = decoded(b"".join(parts), Metadata)
        self._take(self._decode(after.events))
        devices = after.devices if bytes(after.devices) else before.devices
        distributed = after.distributed if bytes(after.distributed) else before.distributed
        return Metadata(events=[], devices=Raw(bytes(devices)), distributed=Raw(bytes(distributed)))

    def _more(self) -> None:
        """Append the next window. A text without any boundary grows by doubling, so that the scans stay linear."""
        size, parts = 0, [self._text]
        while size < max(WINDOW // 2, len(self._text), 1) and not self._ended:
            window = next(self._windows, b"")
            self._ended = not window
            size += len(window)
            parts.append(window)
        self._text = b"".join(parts)


def _worth_a_helper(file: BinaryIO) -> bool:
    """Whether decoding takes much longer than starting a process, and there is a core for it."""
    size, head = os.fstat(file.fileno()).st_size, file.read(2)
    file.seek(0)
    return size > (_HELPED_GZIP if head == _GZIP else _HELPED) and (os.cpu_count() or 1) > 1 and bool(sys.executable)


def _last_boundary(text: bytes) -> tuple[int, int] | None:
    """Where the text's last whole event ends and the next one begins, as far as it looks like that."""
    end = len(text)
    while (comma := text.rfind(b"}", 0, end)) >= 0:
        if found := _BETWEEN.match(text, comma):
            return found.start() + 1, found.end()
        end = comma
    return None


def _windows(file: BinaryIO) -> Iterator[bytes]:
    """The file's text in windows, inflated where it is compressed."""
    head = file.read(_COMPRESSED_READ)
    if head[:2] == _GZIP:
        yield from _inflated(head, lambda: file.read(_COMPRESSED_READ))
    elif head:
        yield head + file.read(max(WINDOW - len(head), 0))
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
