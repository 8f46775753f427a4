"""The text to speak as token ids: by the checkpoint's own tokenizer, or byte by byte where there is none."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import NamedTuple

from kernbench.errors import KernbenchError
from kernbench.text import read_text

BYTES = "bytes (a stand-in: there is no tokenizer.json beside the weights)"

BYTES_A_TOKEN = 16
"""Of text that a tokenizer is given for each token that is wanted: longer than words are on average."""


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
        KernbenchError: a tokenizer.json lies beside the weights but cannot be used, or gives no ids, or some that the
            model lacks; or the text is not UTF-8, which a tokenizer reads.
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
    ids = tokenizer.encode(_characters(text, BYTES_A_TOKEN * most), add_special_tokens=False).ids[:most]
    if not ids:
        raise KernbenchError(f"{file} finds no token in the text; --data takes a file with the text to speak")
    if any(number >= vocabulary for number in ids):
        raise KernbenchError(
            f"{file} gives id {max(ids)}, and the text embedding has {vocabulary} rows; it belongs to another model"
        )
    return TextIds(ids, "tokenizer.json")


def _characters(text: bytes, most: int) -> str:
    """The first ``most`` bytes as characters; one that is cut in two there is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return decoder.decode(text[:most], final=len(text) <= most)
    except UnicodeDecodeError as error:
        raise KernbenchError(
            f"the text is not UTF-8 (byte {error.start}), and a tokenizer reads nothing else; --data takes such a file"
        ) from None
