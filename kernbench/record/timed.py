"""Timed implementations, compiled builds and what the sanitizer found."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kernbench.record.measured import Clocks, Figure, Floor
from kernbench.record.origin import Seconds


class BenchResult(Struct, frozen=True, kw_only=True):
    """One timed implementation. ``label`` warns ("launch-bound", "impossible", "wrong", …) and ``note`` says why.

    ``direction`` is what of a kernel was timed; the time of its backward is without the forward before it.

    ``peak_bytes`` is the most memory that a call of a kernel holds at one time beside what it is given, its results
    included; for a backward, that of the forward pass before it too. The CPU does not count it.

    ``noise_floor`` is the half-width around 1 that eager against itself (A/A) showed in the same rounds. ``clocks`` are
    those of the rounds: medians, the highest temperature, and every throttle reason that was seen.
    """

    kernel: str
    case: str
    dtype: str
    implementation: str
    seconds: Seconds | None
    direction: Literal["forward", "backward"] = "forward"
    interval: tuple[Seconds, Seconds] | None = None
    bytes: float | None = None
    flops: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share_of_roof: float | None = None
    units_per_second: float | None = None
    speedup: tuple[float, float, float] | None = None
    peak_bytes: float | None = None
    noise_floor: float | None = None
    launches_per_step: float | None = None
    syncs_per_step: float | None = None
    figures: list[Figure] = []
    floor: Floor | None = None
    clocks: Clocks | None = None
    cache: str = ""
    label: str = ""
    note: str = ""


class Sweep(Struct, frozen=True, kw_only=True):
    """Cases of a kernel that differ in one size, in the order of its values; their rows stand among the results.

    ``fixed`` says what is the same for all of them.
    """

    kernel: str
    size: str
    values: list[int]
    cases: list[str]
    fixed: str = ""


class ClaimCheck(Struct, frozen=True, kw_only=True):
    """A figure that somebody states for a case, beside what exists and what was measured here.

    ``counted`` are the bytes that give ``bytes_per_second`` over ``stated_seconds``, ``real_bytes`` those that there
    are. ``seconds`` is our kernel's time on the device, ``called_seconds`` that of a call with nothing queued ahead,
    None where they were not measured; ``sentence`` says what follows.
    """

    kernel: str
    case: str
    source: str
    title: str
    bytes_per_second: float
    counted_bytes: float
    real_bytes: float
    stated_seconds: Seconds
    device: str = ""
    roof_bytes_per_second: float | None = None
    seconds: Seconds | None = None
    called_seconds: Seconds | None = None
    launch_seconds: Seconds | None = None
    copy_seconds: Seconds | None = None
    sentence: str = ""


class Curve(Struct, frozen=True, kw_only=True):
    """One figure of a training run over its steps, of one implementation: its ``values`` after so many ``steps``.

    ``moved``: a baseline that rounds otherwise, to show how far rounding drives a run apart. ``reorders``: the
    implementation whose sums it adds in another order; "" where it adds them as its implementation does.
    """

    name: str
    implementation: str
    steps: list[int]
    values: list[float]
    unit: str = ""
    moved: bool = False
    reorders: str = ""


class Build(Struct, frozen=True, kw_only=True):
    """One Triton function compiled for one architecture: what ptxas made of it, and whether that is allowed.

    ``cases`` are those whose launches this one binary serves. ``registers`` are per thread, ``spill_bytes`` too.
    """

    kernel: str
    function: str
    arch: str
    dtype: str
    cases: list[str]
    passed: bool
    warps: int = 0
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    instructions: int | None = None
    seconds: Seconds = 0.0
    reason: str = ""


class SanitizerResult(Struct, frozen=True, kw_only=True):
    """What one tool of compute-sanitizer found in one kernel; ``findings`` are its own words, shortened."""

    kernel: str
    tool: str
    passed: bool
    errors: int
    findings: list[str] = []
    seconds: Seconds = 0.0
    reason: str = ""
