"""Streams the events of a trace file, plain or gzipped, so that no more than a window of it is in memory."""

from __future__ import annotations

import gc
import pickle
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

import msgspec
from msgspec import Raw, Struct, field

from kernbench.errors import KernbenchError
from kernbench.traces import decodehelper, kinetopiece
from kernbench.traces.decodehelper import GZIP, Helper, Part
from kernbench.traces.kinetopiece import Event, Piece, decoded

WINDOW = 1 << 19
"""Bytes that are decoded at once: few enough to stay in the caches, and for the allocator to reuse their memory."""
T = TypeVar("T")

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_BETWEEN = re.compile(rb'\}\s*,\s*(?=\{\s*"(?:ph|cat|name|pid|tid|ts|dur|args|id|s|bp)"\s*:)')
_BYTE = re.compile(r" \(byte \d+\)")
_COMPRESSED_READ = 1 << 20
# What a bare list of events lacks to be read as the end of an object that has one.
_BARE_CLOSING = b"}"


class Metadata(Struct, kw_only=True):
    """What a trace says of itself, before or after its events."""

    events: list[Event] = field(name="traceEvents")
    devices: Raw = field(name="deviceProperties", default=Raw(b""))
    distributed: Raw = field(name="distributedInfo", default=Raw(b""))


def read(path: Path, take: Callable[[T], None], decode: Callable[[list[Event]], T]) -> Metadata:
    """Give all events to ``take``, piece by piece in file order, each as what ``decode`` makes of it.

    A helper process decodes the latter part of a large file if ``decode`` is the ordinary one,
    :func:`kinetopiece.of_events`. The metadata that is returned has no events.

    Raises:
        KernbenchError: the file is absent, damaged, truncated, or no Kineto trace.
    """
    _keep_freed_memory()
    pieces = None
    try:
        with ThreadPoolExecutor(1) as ahead, path.open("rb") as file:
            helper = decodehelper.helper(path) if decode is kinetopiece.of_events else None
            pieces = _Pieces(_read_ahead(_windows(file), ahead), take, decode, helper)
            return pieces.run(path)
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
        if pieces is not None:
            pieces.close()


def latter_part(path: Path, split: int) -> Part:
    """Decode what follows the first boundary between two events from byte ``split`` of the text on.

    Raises:
        EOFError, OSError, zlib.error, msgspec.MsgspecError: no such part can be read.
    """
    _keep_freed_memory()
    decoded_pieces: list[Piece] = []
    with path.open("rb") as file:
        bare = next(_windows(file), b"").lstrip()[:1] == b"["
    with ThreadPoolExecutor(1) as ahead, path.open("rb") as file:
        windows = _read_ahead(_windows(file, split), ahead)
        latter = _Pieces(windows, decoded_pieces.append, kinetopiece.of_events)
        start, metadata = latter.run_latter(_BARE_CLOSING if bare else b"")
    part = [kinetopiece.narrowed(piece) for piece in decoded_pieces]
    return Part(split + start, part, bytes(metadata.devices), bytes(metadata.distributed))


def serve() -> None:
    """Be the helper process: hand over :func:`latter_part`. If that fails, it ends without a part."""
    # Ctrl-C is for the process that started it, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It lives for seconds, and what it makes has no cycles.
    gc.disable()
    path, split = sys.argv[1:]
    pickle.dump(latter_part(Path(path), int(split)), sys.stdout.buffer, protocol=5)


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
        helper: Helper | None = None,
    ) -> None:
        self._windows = windows
        self._take = take
        self._decode = decode
        self._helper = helper
        self._text = b""
        self._came = 0
        self._ended = False

    def run(self, path: Path) -> Metadata:
        """Decode the whole file, the latter part of it in the helper process if there is one."""
        self._more()
        while not self._text.strip():
            if self._ended:
                raise KernbenchError(f"{path} is empty; name a Kineto trace (.json or .json.gz)")
            self._more()
        if self._text.lstrip()[:1] == b"[":
            before, closing = Metadata(events=[]), _BARE_CLOSING
            self._text = self._text.lstrip()[1:]
        else:
            while (start := _EVENTS.search(self._text)) is None and not self._ended:
                self._more()
            if start is None:
                return self._rest()
            try:
                before, closing = decoded(self._text[: start.end()] + b"]}", Metadata), b""
            except msgspec.DecodeError:
                return self._rest()
            self._text = self._text[start.end() :]
        after = self._events(closing)
        return Metadata(
            events=[],
            devices=after.devices if bytes(after.devices) else before.devices,
            distributed=after.distributed if bytes(after.distributed) else before.distributed,
        )

    def run_latter(self, closing: bytes) -> tuple[int, Metadata]:
        """Decode from the first boundary between two events on; also returns the byte at which the second begins."""
        boundary = self._boundary(0)
        if boundary is None:
            raise EOFError("no two events are left")
        self._text = self._text[boundary[1] :]
        return boundary[1], self._events(closing)

    def close(self) -> None:
        """End the helper process, whatever it is doing."""
        if self._helper is not None:
            self._helper.close()

    def _events(self, closing: bytes) -> Metadata:
        """Decode all events that are left; what the file says after them."""
        if self._helper is not None:
            self._pieces(self._helper.split)
            if (metadata := self._helped()) is not None:
                return metadata
        self._pieces()
        return self._rest(b'{"traceEvents": [', closing)

    def _pieces(self, until: int | None = None) -> None:
        """Decode pieces as long as there is more in the file, or before byte ``until``, than is in memory."""
        while not self._ended and (until is None or self._came < until):
            cut = _last_boundary(self._text)
            if cut is not None and not self._decode_to(cut):
                return
            self._more()

    def _helped(self) -> Metadata | None:
        """Decode up to where the helper began and take what it decoded; None if there is nothing to take."""
        assert self._helper is not None
        cut = self._boundary(max(self._helper.split - self._position, 0))
        if cut is None or not self._decode_to(cut):
            return None
        part = self._helper.part()
        if part is None or part.start != self._position:
            return None
        for piece in part.pieces:
            self._take(cast(T, piece))
        return Metadata(events=[], devices=Raw(part.devices), distributed=Raw(part.distributed))

    @property
    def _position(self) -> int:
        """The byte of the file's text at which what is in memory begins."""
        return self._came - len(self._text)

    def _boundary(self, start: int) -> tuple[int, int] | None:
        """The first boundary between two events from position ``start`` of the text on, reading until there is one."""
        while (found := _BETWEEN.search(self._text, start)) is None:
            if self._ended:
                return None
            self._more()
        return found.start() + 1, found.end()

    def _decode_to(self, cut: tuple[int, int]) -> bool:
        """Take the events before the boundary ``cut`` out of the text, unless that is no list of events."""
        try:
            events = decoded(b"".join((b"[", memoryview(self._text)[: cut[0]], b"]")), list[Event])
        except msgspec.DecodeError:
            return False
        self._take(self._decode(events))
        self._text = self._text[cut[1] :]
        return True

    def _rest(self, opening: bytes = b"", closing: bytes = b"") -> Metadata:
        parts = [opening, self._text, *self._windows, closing]
        self._text = b""
        after = decoded(b"".join(parts), Metadata)
        self._take(self._decode(after.events))
        return Metadata(events=[], devices=Raw(bytes(after.devices)), distributed=Raw(bytes(after.distributed)))

    def _more(self) -> None:
        """Append the next window. A text without any boundary grows by doubling, so that the scans stay linear."""
        size, parts = 0, [self._text]
        while size < max(WINDOW // 2, len(self._text), 1) and not self._ended:
            window = next(self._windows, b"")
            self._ended = not window
            size += len(window)
            parts.append(window)
        self._came += size
        self._text = b"".join(parts)


def _last_boundary(text: bytes) -> tuple[int, int] | None:
    """Where the text's last whole event ends and the next one begins, as far as it looks like that."""
    end = len(text)
    while (comma := text.rfind(b"}", 0, end)) >= 0:
        if found := _BETWEEN.match(text, comma):
            return found.start() + 1, found.end()
        end = comma
    return None


def _windows(file: BinaryIO, skip: int = 0) -> Iterator[bytes]:
    """The file's text from byte ``skip`` on in windows, inflated where it is compressed."""
    compressed = file.read(2) == GZIP
    file.seek(0 if compressed else skip)
    if not compressed:
        while window := file.read(WINDOW):
            yield window
        return
    for window in _inflated(file.read(_COMPRESSED_READ), lambda: file.read(_COMPRESSED_READ)):
        if skip < len(window):
            yield window[skip:]
        skip = max(skip - len(window), 0)


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


def _keep_freed_memory() -> None:
    """Let windows use the same memory one after another.

    glibc hands blocks of more than 128 kB back to the system, which clears every page of the next one, until it has
    seen a larger one freed; then it keeps those up to that size.
    """
    bytes(4 << 20)


def _read_ahead(windows: Iterator[bytes], pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """The same windows, the next one being read and inflated (which needs no interpreter lock) meanwhile."""
    upcoming = pool.submit(next, windows, b"")
    while window := upcoming.result():
        upcoming = pool.submit(next, windows, b"")
        yield window
