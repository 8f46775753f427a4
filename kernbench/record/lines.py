"""What the line pass saw; saved beside the trace as lines.json."""

from __future__ import annotations

from msgspec import Struct

from kernbench.record.origin import Seconds, SourceLine


class HostRead(Struct, frozen=True, kw_only=True):
    """One read of a tensor by the host, in the order it happened.

    ``line`` indexes ``LineLog.lines``; ``form`` is how the source asks for it ("item", "if", "tolist", "index",
    "nonzero", "print", "copy", "synchronize", …). ``host_tensor`` marks a read that never waits for a device;
    ``real`` one for which the runtime itself reported a synchronisation. ``thread`` names the Python thread, "" for the
    one that runs the steps and the autograd engine's that works for it.
    """

    step: int
    line: int
    op: str
    form: str
    host_tensor: bool
    real: bool
    wait_seconds: Seconds | None = None
    phase: int | None = None
    thread: str = ""


class LineLog(Struct, frozen=True, kw_only=True):
    """Which source line did what, over ``steps`` watched steps.

    ``op_lines`` holds, for the last watched step, the line index of each call of an operator in call order
    (-1 where no Python line was executing it). ``notes`` says what could not be matched or was not seen.
    """

    steps: int
    lines: list[SourceLine] = []
    reads: list[HostRead] = []
    op_lines: dict[str, list[int]] = {}
    step_seconds: Seconds | None = None
    notes: list[str] = []
