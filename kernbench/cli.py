"""The command line: which commands there are. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from kernbench import __version__
from kernbench.commands import measuring, reading
from kernbench.commands.ending import OK, complain, reported

app = typer.Typer(
    name="kernbench",
    help="Profile a PyTorch step, swap Triton kernels in with proof, and write the answer down.",
    epilog="Start with: kernbench list; then: kernbench profile titan-mac",
    no_args_is_help=True,
    # Rich help would cost 0.2 s at every start; results are printed with rich all the same.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

COMMANDS = (
    ("list", reading.list_, "kernbench list --runs"),
    ("profile", measuring.profile, "kernbench profile titan-mac --preset tiny"),
    ("swap", measuring.swap, "kernbench swap --phase 0 titan-mac"),
    ("parity", measuring.parity, "kernbench parity fused_adamw"),
    ("bench", measuring.bench, "kernbench bench fused_adamw --case 401-tensors"),
    ("analyze", reading.analyze, "kernbench analyze trace.json.gz"),
    ("compare", reading.compare, "kernbench compare 20261121-1015 20261121-1100"),
    ("query", reading.query, 'kernbench query 20261121-1015 "select op, sum(duration_ns) from kernels group by op"'),
    ("gate", reading.gate, "kernbench gate --baseline 20261121-1015 --max-slowdown 2% --no-new-syncs"),
    ("report", reading.report, "kernbench report 20261121-1015"),
    ("journal", reading.journal, "kernbench journal --rebuild"),
    ("doctor", measuring.doctor, "kernbench doctor --device cpu"),
    ("init", reading.init, "kernbench init my_bench"),
)
"""Each with its name, and an example for its help."""

for _name, _command, _example in COMMANDS:
    app.command(_name, epilog=f"Example: {_example}")(reported(_command))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kernbench {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    return None


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that arrives while a finalizer runs; send it again once that has ended."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    """What a scheduler, ``timeout`` or torchrun ends a command with ends it as Ctrl-C does: finished stages stay."""
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the console script."""
    # Kineto prints two lines of its own at every trace; what it could not record shows in the trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGTERM, _ended)
    measuring.own_program()
    try:
        app()
    except Exception:  # noqa: BLE001 - a bug of ours is shown whole, apart from the user's errors
        traceback.print_exc()
        complain("this is a bug in kernbench; please report it with the lines above")
        raise SystemExit(70) from None
    raise SystemExit(OK)
