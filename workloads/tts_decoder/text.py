"""The text to speak as token ids: by the checkpoint's own tokenizer, or byte by byte where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kernbench.errors import KernbenchError
from kernbench.text import read_text

BYTES = "bytes (a stand-in: there is no tokenizer.json beside the weights)"


class TextIds(NamedTuple):
    """Token ids, and the name of what made them."""

    ids: list[int]
    tokenizer: str


def text_to_speak(path: str | None) -> bytes:
    """The file of ``--data``, or Python's documentation topics.

    Raises:
        KernbenchError: the file cannot be read, or is empty.
    """
    text = read_text(path)
    if not text:
        raise KernbenchError(f"{path} is empty; --data takes a file with the text to speak")
    return text


def tokenize(text: bytes, weights: Path | None, *, vocabulary: int, most: int) -> TextIds:
    """The first ``most`` ids of ``text``.

    Raises:
        KernbenchError: a tokenizer.json lies beside the weights but cannot be used, or gives ids that the model lacks.
    """
    file = None if weights is None else weights / "tokenizer.json"
    if file is None or not file.is_file():
        return TextIds(list(text[:most]), BYTES)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise KernbenchError(
            f"{file} needs the tokenizers library; pip install tokenizers, or move the file away to speak bytes"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file that it cannot parse
        raise KernbenchError(f"{file} is no tokenizer ({error}); replace it, or move it away to speak bytes") from None
    # A token is at least a byte, so that many bytes are enough, and a character cut at the end is left out.
    ids = tokenizer.encode(text[: 16 * most].decode("utf-8", "ignore"), add_special_tokens=False).ids[:most]
    if any(number >= vocabulary for number in ids):
        raise KernbenchError(
            f"{file} gives id {max(ids)}, and the text embedding has {vocabulary} rows; it belongs to another model"
        )
    return TextIds(ids, "tokenizer.json")
