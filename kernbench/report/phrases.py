"""Small pieces of sentences that every kind of record needs: tones, capitals and stops, how a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from kernbench.record import Header

Tone = Literal["good", "bad", "neutral", "warn"]

STATUSES: Mapping[str, tuple[str, Tone]] = {
    "complete": ("complete", "neutral"),
    "running": ("not finished", "warn"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
}


def ending(record: Header) -> str:
    """How a run that is not complete ended: "the run was interrupted in stage trace"; empty for a complete one."""
    if record.status == "complete":
        return ""
    ended = next((stage for stage in record.stages if stage.status in ("failed", "interrupted")), None)
    if ended is None:
        return f"the run is {STATUSES.get(record.status, (record.status, 'neutral'))[0]}"
    outcome = "failed" if ended.status == "failed" else "was interrupted"
    return f"the run {outcome} in stage {ended.name}{f': {ended.message}' if ended.message else ''}"


def unfinished(record: Header, what: str) -> str:
    """A sentence for a run without its result: what is missing, and how the run ended."""
    how = ending(record)
    return sentence(f"{what}; {how}" if how else what)


def sentence(text: str) -> str:
    """The text with a stop at its end, unless it has one or is empty."""
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def capitalized(text: str) -> str:
    """The text with its first letter capital, the rest as it stands."""
    return text[:1].upper() + text[1:]
