"""Parity, ratio, prediction and verdict: what a swap has to show."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kernbench.record.origin import Seconds


class Errors(Struct, frozen=True, kw_only=True):
    """Error against the oracle, which is in float64 wherever that can be had, over all compared tensors.

    ``max`` is the largest difference, each over the larger of the tensor's RMS and the element itself; ``rms_ratio`` is
    RMS(difference) / RMS(oracle); ``mean`` is the signed mean difference over RMS(oracle).
    """

    max: float
    rms_ratio: float
    mean: float


class MutantResult(Struct, frozen=True, kw_only=True):
    """One wrong or hostile kernel before the gate. ``reason`` says how it was caught, or why it does not count.

    ``outcome`` "equivalent": it computes what the reference does, as far as the dtype can tell. "needs a GPU": only
    there can it be seen.
    """

    name: str
    kind: Literal["result", "altered", "hostile"]
    outcome: Literal["killed", "survived", "equivalent", "needs a GPU"]
    reason: str = ""


Oracle = Literal["float64", "float32", "the side before"]


class ParityResult(Struct, frozen=True, kw_only=True):
    """One comparison: a kernel case in one dtype and mode, or a phase on real steps (``kernel`` then names it).

    ``examples`` counts generated inputs, ``limits`` the bounds on ``errors``; ``bound`` is the one on the maximum.
    ``oracle`` is what stood for the truth.
    """

    kernel: str
    case: str
    dtype: str
    mode: str
    passed: bool
    oracle: Oracle = "float64"
    errors: Errors | None = None
    eager_errors: Errors | None = None
    bound: float | None = None
    tensor: str = ""
    limits: Errors | None = None
    mutants_killed: tuple[int, int] | None = None
    mutants: list[MutantResult] = []
    examples: int | None = None
    bitwise: bool | None = None
    seconds: Seconds = 0.0
    reason: str = ""


class Ratio(Struct, frozen=True, kw_only=True):
    """Step time before over step time after (above 1 is faster): paired median over rounds, bootstrap interval.

    ``noise_floor`` is the half-width around 1 that identical arms (A/A) showed in the same run.
    """

    median: float
    low: float
    high: float
    noise_floor: float
    rounds: int
    steps_per_round: int
    a_a: tuple[float, float] | None = None
    dropped_rounds: int = 0


class Prediction(Struct, frozen=True, kw_only=True):
    """What the phase promised before it was measured; absent figures are None. ``claim`` is the source document's.

    Syncs and launches are those taken out of a step. ``replayed`` is the range of the ratio that the replayed trace of
    the side before gives.
    """

    text: str
    claim: str = ""
    replayed: tuple[float, float] | None = None
    syncs_per_step: float | None = None
    launches_per_step: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    basis: str = ""


class SiteHit(Struct, frozen=True, kw_only=True):
    """One line of the receipt: the site that was replaced, by what, and how often the replacement ran in a step.

    ``every`` is the steps from call to call that the plan declares; ``steps`` is how many were counted.
    """

    site: str
    implementation: str
    calls: int
    calls_per_step: float
    kernel: str = ""
    every: int = 1
    steps: int = 0


class Verdict(Struct, frozen=True, kw_only=True):
    decision: Literal["keep", "reject", "inconclusive"]
    sentence: str
    reasons: list[str] = []


class PhaseInfo(Struct, frozen=True, kw_only=True):
    number: int
    title: str
    flag: str = ""
    implementation: str = ""


class Arm(Struct, frozen=True, kw_only=True):
    """Interleaved timings of one arm: seconds per step, one figure per round, in round order."""

    name: str
    seconds: list[Seconds]
