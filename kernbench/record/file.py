"""Records as JSON in files: read, checked, written atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from kernbench.record.records import SCHEMA, Record


class RecordError(ValueError):
    """A record file cannot be read; the message says which file, why, and what to do."""


def encode(record: Record) -> bytes:
    """The record as indented JSON with a trailing newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def kind(record: Record) -> str:
    """The record's kind as it stands in the file: "profile", "swap", "parity", "bench", "compare" or "analyze"."""
    return str(type(record).__struct_config__.tag)


def to_builtins(value: Struct) -> dict[str, object]:
    """A result as plain dictionaries and lists."""
    plain: dict[str, object] = msgspec.to_builtins(value)
    return plain


def write(record: Record, path: Path) -> None:
    """Write atomically: a reader sees the old record or the new one, never half of one.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomically(path, encode(record))


def read(path: Path) -> Record:
    """Read one record.

    Raises:
        RecordError: the file is absent, is no record, is damaged, or has a newer schema.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"cannot read {path}: {error.strerror or error}; name a run folder or its record.json"
        ) from None
    try:
        schema = msgspec.json.decode(data, type=_SchemaOnly).schema
        if schema > SCHEMA:
            raise RecordError(f"{path} has schema {schema}, this kernbench reads up to {SCHEMA}; upgrade kernbench")
        record: Record = msgspec.json.decode(data, type=Record)
        return record
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path} is damaged ({error}); profile again, or delete that run folder") from None


class _SchemaOnly(Struct):
    schema: int


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then rename it over ``path``.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        # An interrupt may come when the file is in its place already.
        scratch.unlink(missing_ok=True)
        raise
