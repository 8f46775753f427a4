"""Who measured, where, when and what: the parts that other results refer to."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Seconds = float


class Git(Struct, frozen=True, kw_only=True):
    """State of the repository that the measured code came from."""

    commit: str
    dirty: bool


class Device(Struct, frozen=True, kw_only=True):
    """The device that ran the steps. ``memory_bytes`` and ``l2_bytes`` are 0 where the device does not tell."""

    type: Literal["cpu", "cuda"]
    name: str
    count: int = 1
    capability: str = ""
    memory_bytes: int = 0
    l2_bytes: int = 0
    driver: str = ""
    runtime: str = ""


class Ceilings(Struct, frozen=True, kw_only=True):
    """Roofs measured on this device, never read from a table. Absent figures are None.

    ``copy`` counts bytes read plus bytes written; matrix products are keyed by dtype ("float32", "tf32").
    """

    copy_bytes_per_second: float | None = None
    triad_bytes_per_second: float | None = None
    matmul_flops_per_second: dict[str, float] = {}
    launch_seconds: Seconds | None = None


class Environment(Struct, frozen=True, kw_only=True):
    device: Device
    python: str
    torch: str
    triton: str
    kernbench: str
    platform: str
    cpu: str
    cpu_threads: int
    ceilings: Ceilings | None = None


class WorkloadInfo(Struct, frozen=True, kw_only=True):
    """What was run. ``phases`` are the active phase numbers, ``implementations`` names the one used per phase."""

    name: str
    preset: str
    dtype: str
    seed: int
    unit: str
    phases: list[int] = []
    implementations: dict[str, str] = {}
    data: str = ""
    parameters: int = 0
    weights: str = ""


class Stage(Struct, frozen=True, kw_only=True):
    """One finished part of a command; ``status`` is what became of it, ``message`` why when it is not "done"."""

    name: str
    status: Literal["done", "failed", "skipped", "interrupted"]
    seconds: Seconds
    message: str = ""


class SourceLine(Struct, frozen=True, kw_only=True):
    """A line of the user's program: ``file`` relative to the workspace where it lies inside it."""

    file: str
    line: int
    text: str
    function: str = ""
