"""What differs between two traces of one program."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kernbench.record.origin import Seconds


class StepPair(Struct, frozen=True, kw_only=True):
    """One step of the trace before beside one of the trace after, by number where both have it, else by order."""

    before: int
    after: int
    before_seconds: Seconds
    after_seconds: Seconds


class OperatorChange(Struct, frozen=True, kw_only=True):
    """One operator in both traces, (before, after), per step; a kernel that no operator launched stands for itself.

    ``device`` is the time of what it launched, ``host`` its own on the host without child operators. Kernels named in
    ``gone`` or ``new`` ran for it on one side alone.
    """

    name: str
    kind: Literal["op", "kernel"]
    calls_per_step: tuple[float, float]
    device_seconds_per_step: tuple[Seconds, Seconds]
    host_seconds_per_step: tuple[Seconds, Seconds]
    gone: list[str] = []
    new: list[str] = []


class Difference(Struct, frozen=True, kw_only=True):
    """Two traces aligned by step and operator.

    ``operators`` are those that changed, the largest change of time first; ``same`` counts the others. ``parting``
    says where the sequences of operators part in the first pair of steps, "" if they do not.
    """

    steps: list[StepPair]
    operators: list[OperatorChange]
    same: int = 0
    parting: str = ""
    idle_seconds_per_step: dict[str, tuple[Seconds, Seconds]] = {}
