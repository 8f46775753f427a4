"""What every output on a terminal is made of: text that nothing in it can command, tables without lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Output that goes to a file or a pipe has no width of its own.
FILE_WIDTH = 120

STYLES: Mapping[str, str] = {"good": "green", "bad": "red", "warn": "yellow", "neutral": ""}


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Rows of a name and what is known under it."""
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, words in rows:
        grid.add_row(text(name, "dim"), text(words))
    return grid


def table(*headings: str) -> Table:
    """A table without lines; a heading that begins with ">" aligns its column to the right."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        grid.add_column(text(heading.removeprefix(">")), justify="right" if heading.startswith(">") else "left")
    return grid


def output() -> Console:
    """Standard output, as wide as its terminal."""
    # A terminal that cannot show a sign shows a question mark instead of a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    on_terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if on_terminal else FILE_WIDTH)


def text(words: Any, style: str = "") -> Text:
    """Text that rich does not read as markup, without control characters that a terminal would obey."""
    return Text(printable(str(words)), style=style)


def line(words: Any, style: str = "") -> Text:
    """Text that is cut off where the terminal ends."""
    found = text(words, style)
    found.no_wrap, found.overflow = True, "ellipsis"
    return found


def printable(words: str) -> str:
    """The text with a replacement for every sign that is no printable one."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in words)
