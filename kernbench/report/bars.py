"""Progress of a long command on standard error: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from kernbench.progress import Advance, Progress, Silent
from kernbench.report import terminal

REFRESH_SECONDS = 0.1


def progress(*, quiet: bool = False) -> Progress:
    """Progress on standard error: bars on a terminal, one line per stage elsewhere, nothing with ``quiet``."""
    if quiet:
        return Silent()
    console = Console(stderr=True, highlight=False)
    return _Bars(console) if console.is_terminal else _Lines()


class _Lines:
    """One plain line per stage, for logs."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        print(f"{terminal.printable(title)} ...", file=sys.stderr, flush=True)
        yield lambda finished: None

    def note(self, text: str) -> None:
        print(f"note: {terminal.printable(text)}", file=sys.stderr, flush=True)


class _Bars:
    """Bars that vanish when their stage ends. They are drawn by the caller's own thread only: a drawing thread would
    run beside the steps that are being timed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.open_stages = 0
        self.drawn_at = 0.0

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        if not self.open_stages:
            self.bars.start()
        self.open_stages += 1
        task = self.bars.add_task(terminal.printable(title), total=total)
        self._draw(at_once=True)

        def advance(finished: int) -> None:
            self.bars.advance(task, finished)
            self._draw()

        try:
            yield advance
        finally:
            self.bars.remove_task(task)
            self.open_stages -= 1
            if self.open_stages:
                self._draw(at_once=True)
            else:
                self.bars.stop()

    def note(self, text: str) -> None:
        self.console.print(terminal.text(f"note: {text}", "yellow"))

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self.drawn_at >= REFRESH_SECONDS:
            self.drawn_at = now
            self.bars.refresh()
