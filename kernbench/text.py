"""Real text for language workloads, as bytes: the file of ``--data``, or what every Python has."""

from __future__ import annotations

from pathlib import Path

from kernbench.errors import KernbenchError


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or Python's own documentation topics, about 0.7 MB of English.

    Raises:
        KernbenchError: the file cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)).encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise KernbenchError(f"cannot read {path}: {error.strerror or error}; --data takes a file of text") from None
