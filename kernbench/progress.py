"""What long work tells its caller while it runs. The terminal's version lives in ``report/bars.py``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]
"""Call with the number of units finished since the last call."""


class Progress(Protocol):
    """Stages follow each other or nest; a note is one line that stays on the screen."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Announce work of ``total`` units (unknown: None); leaving the context ends it, also by an exception."""

    def note(self, text: str) -> None:
        """Say one thing that the user should still see when the work is done."""


class Silent:
    """Progress that shows nothing: for tests, for ``--quiet``, and for callers that do not care."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        return nullcontext(_ignore)

    def note(self, text: str) -> None:
        return None


def _ignore(units: int) -> None:
    return None
