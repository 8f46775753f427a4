"""How every command ends: its result on standard output, its code, and one sentence for the user's errors."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from kernbench.errors import KernbenchError

if TYPE_CHECKING:
    from kernbench.publish import Outcome

OK, NEGATIVE, INTERRUPTED = 0, 1, 130


def reported(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's result or error into output and exit code: one sentence for the user's errors, no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            raise typer.Exit(command(*args, **options))
        except KernbenchError as error:
            complain(str(error), error.traceback_text)
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            if (error.name or "kernbench").startswith("kernbench"):
                raise
            complain(f"there is no package {error.name!r}; pip install it, or kernbench again, which brings it")
            raise typer.Exit(KernbenchError.exit_code) from None
        except KeyboardInterrupt as interrupt:
            complain("; ".join(["interrupted", *dict.fromkeys(getattr(interrupt, "__notes__", []))]))
            raise typer.Exit(INTERRUPTED) from None

    return run


def complain(message: str, details: str = "") -> None:
    """One sentence on standard error, after the traceback of the user's own code if there is one."""
    if details:
        print(details.rstrip(), file=sys.stderr)
    print(f"kernbench: {message}", file=sys.stderr)


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["kernbench", *sys.argv[1:]])


def progress(quiet: bool) -> Any:
    """Where stages are announced."""
    # Not through report.console, which loads all that a result may be shown with: work begins 0.1 s earlier.
    from kernbench.report import bars

    return bars.progress(quiet=quiet)


def show(outcome: Outcome, as_json: bool) -> None:
    """The record in words or as JSON."""
    from kernbench import record
    from kernbench.report import console

    if as_json:
        sys.stdout.write(record.encode(outcome.record).decode())
    else:
        console.show(outcome.record, outcome.report)
