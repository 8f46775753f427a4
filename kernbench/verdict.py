"""The rules by which a phase is kept, rejected, or left open: pure, from recorded evidence only."""

from __future__ import annotations

from collections.abc import Sequence

from kernbench.measurement.statistics import CONFIDENCE
from kernbench.record import ParityResult, Ratio, SiteHit, Verdict

REASONS_SHOWN = 3


def decide(
    *,
    parity: Sequence[ParityResult],
    ratio: Ratio | None,
    receipt: Sequence[SiteHit],
    speed_measured: bool,
    not_measured_reason: str = "",
    syncs_before: float | None = None,
    syncs_after: float | None = None,
) -> Verdict:
    """Judge a phase; the first rule that applies decides.

    1. A failed parity row: reject. 2. No parity row, or a site that was due and never ran: inconclusive. 3. No speed:
    inconclusive. 4. The interval excludes 1 and the effect exceeds the A/A floor: keep, or reject. 5. Inconclusive.
    """
    failed = [row for row in parity if not row.passed]
    if failed:
        return Verdict(
            decision="reject",
            sentence=f"reject: {len(failed)} of {len(parity)} parity checks failed",
            reasons=[_describe(row) for row in failed[:REASONS_SHOWN]],
        )
    reasons = [f"{len(parity)} of {len(parity)} parity checks passed"] if parity else []
    if syncs_before is not None and syncs_after is not None:
        reasons.append(f"host syncs per step: {syncs_before:g} before, {syncs_after:g} after")
    missing = _missing_evidence(parity, receipt, ratio if speed_measured else None, not_measured_reason)
    if missing or ratio is None:
        return Verdict(decision="inconclusive", sentence=f"inconclusive: {missing}", reasons=reasons)
    return _on_speed(ratio, reasons)


def compare(ratio: Ratio) -> Verdict:
    """Judge two separate runs by the rule for speed alone; their drift is in the interval, as nothing pairs them."""
    judged = _on_speed(ratio, ["the steps are of two separate runs, so they are not paired"])
    return Verdict(decision=judged.decision, sentence=judged.sentence.partition(": ")[2], reasons=judged.reasons)


def _missing_evidence(
    parity: Sequence[ParityResult], receipt: Sequence[SiteHit], ratio: Ratio | None, not_measured_reason: str
) -> str:
    if not parity:
        return "no parity check ran"
    if not receipt:
        return "the phase replaced nothing"
    never = [hit.site for hit in receipt if hit.calls == 0 and (hit.every == 1 or hit.steps > hit.every)]
    if never:
        return f"the replacement at {', '.join(never)} never ran in these steps"
    if ratio is None:
        return not_measured_reason or "the speed was not measured"
    return ""


def _on_speed(ratio: Ratio, reasons: list[str]) -> Verdict:
    evidence = f"n = {ratio.rounds} rounds, A/A floor {ratio.noise_floor * 100:.1f} %"
    interval = f"{CONFIDENCE * 100:.0f} % interval {ratio.low:.2f} to {ratio.high:.2f}"
    effect = ratio.median - 1
    if ratio.low > 1 and effect > ratio.noise_floor:
        return Verdict(
            decision="keep", sentence=f"keep: {ratio.median:.2f}x faster ({interval}, {evidence})", reasons=reasons
        )
    if ratio.high < 1 and -effect > ratio.noise_floor:
        slower = f"{CONFIDENCE * 100:.0f} % interval {1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
        return Verdict(
            decision="reject",
            sentence=f"reject: {1 / ratio.median:.2f}x slower ({slower}, {evidence})",
            reasons=reasons,
        )
    why = "the interval contains 1" if ratio.low <= 1 <= ratio.high else "the effect is within the A/A floor"
    return Verdict(
        decision="inconclusive",
        sentence=f"inconclusive: no change shown, {ratio.median:.2f}x ({interval}, {evidence})",
        reasons=[*reasons, why],
    )


def _describe(row: ParityResult) -> str:
    return f"{row.kernel}, {row.case}, {row.dtype}, {row.mode}: {row.reason or 'failed'}"
