"""Arranges what differs between two traces: operators by the change of their time, and idle time by cause."""

from __future__ import annotations

from dataclasses import dataclass

from kernbench.record import Difference, OperatorChange
from kernbench.report import units
from kernbench.report.phrases import Tone
from kernbench.report.sentences import difference


@dataclass(frozen=True)
class ChangedOperator:
    """One operator of both traces; ``words`` is the change of its device time, where that is none of its host time."""

    item: OperatorChange
    words: str
    tone: Tone
    calls: str


@dataclass(frozen=True)
class IdleChange:
    """Device idle time by one cause on both sides."""

    cause: str
    before: float
    after: float
    words: str
    tone: Tone


def operators(found: Difference, *, shown: bool = True) -> list[ChangedOperator]:
    """Every operator that changed, in the record's order; none is better or worse unless ``shown``."""
    rows = []
    for item in found.operators:
        device = item.device_seconds_per_step
        times = device if device[0] != device[1] else item.host_seconds_per_step
        words, tone = difference(*times, "seconds")
        if words != "the same" and times is not device:
            words = f"{words}, on the host"
        before, after = (units.count(calls) for calls in item.calls_per_step)
        calls = before if before == after else f"{before} → {after}"
        rows.append(ChangedOperator(item, words, tone if shown else "neutral", calls))
    return rows


def idle(found: Difference, *, shown: bool = True) -> list[IdleChange]:
    """Idle time by cause, the largest change first."""
    rows = []
    causes = sorted(found.idle_seconds_per_step.items(), key=lambda entry: -abs(entry[1][1] - entry[1][0]))
    for cause, (before, after) in causes:
        words, tone = difference(before, after, "seconds")
        rows.append(IdleChange(cause, before, after, words, tone if shown else "neutral"))
    return rows


def alike(found: Difference) -> str:
    """How far the two traces do the same, in whole sentences."""
    pairs = len(found.steps)
    text = f"{pairs:,} {'pair of steps is' if pairs == 1 else 'pairs of steps are'} set side by side" if pairs else ""
    same = f"{found.same:,} operator{'' if found.same == 1 else 's'} did not change" if found.same else ""
    told = "; ".join(filter(None, (text, same)))
    parting = found.parting if not found.parting or found.parting.endswith(".") else f"{found.parting}."
    return " ".join(filter(None, (f"{told}." if told else "", parting[:1].upper() + parting[1:])))
