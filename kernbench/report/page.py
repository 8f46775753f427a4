"""Arranges a record for the page: what stands beside what, in which order and look. Figures stay as recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from kernbench.record import (
    Hotspot,
    ParityResult,
    Part,
    Prediction,
    ProfileRecord,
    Ratio,
    Record,
    Stall,
)
from kernbench.report import units
from kernbench.report.phrases import Tone
from kernbench.report.sentences import difference, step_time

BUSY_LOOKS, IDLE_LOOKS = 6, 3
NEUTRAL: Tone = "neutral"
COLOURED_SHARE = 0.01
RAW_LIMIT_BYTES = 100_000
# Lists of thousands of rows, which a page draws anyway.
BULKY = frozenset({"timeline", "flame", "memory"})


@dataclass(frozen=True)
class Segment:
    letter: str
    cause: str
    seconds: float
    percent: float
    look: str


@dataclass(frozen=True)
class StackedBar:
    """One step, by cause; ``percent`` of its segments is of the longest bar shown beside it."""

    label: str
    seconds: float
    segments: list[Segment]


@dataclass(frozen=True)
class LegendRow:
    letter: str
    cause: str
    description: str
    look: str
    seconds: list[float | None]
    change: str
    tone: Tone


@dataclass(frozen=True)
class Breakdown:
    """Bars with their legend; ``notes`` are remarks that several parts share, said once."""

    bars: list[StackedBar]
    legend: list[LegendRow]
    notes: list[str]


def breakdown(sides: Sequence[tuple[str, Sequence[Part]]], *, shown: bool = True) -> Breakdown | None:
    """Stacked bars on one scale, a cause in the same look in each of them; None where no side has parts.

    Args:
        shown: whether the steps were shown to differ; if not, no cause is called better or worse.
    """
    sides = [(label, parts) for label, parts in sides if parts]
    if not sides:
        return None
    first = {part.cause: part for _, parts in reversed(sides) for part in parts}
    causes = list(dict.fromkeys(part.cause for _, parts in sides for part in parts))
    causes.sort(key=lambda cause: not first[cause].busy)
    letters = {cause: chr(ord("A") + index % 26) for index, cause in enumerate(causes)}
    looks = _looks([first[cause] for cause in causes])
    longest = max(sum(part.seconds_per_step for part in parts) for _, parts in sides) or 1.0
    bars = []
    for label, parts in sides:
        ordered = sorted(parts, key=lambda part: causes.index(part.cause))
        segments = [
            Segment(
                letters[part.cause],
                part.cause,
                part.seconds_per_step,
                round(100 * part.seconds_per_step / longest, 3),
                looks[part.cause],
            )
            for part in ordered
            if part.seconds_per_step > 0
        ]
        bars.append(StackedBar(label, sum(part.seconds_per_step for part in parts), segments))
    own, shared = _remarks([first[cause] for cause in causes], letters)
    legend = []
    for cause in causes:
        seconds = [next((part.seconds_per_step for part in parts if part.cause == cause), None) for _, parts in sides]
        # A cause that is absent from one of two sides took no time there.
        change, tone = "", NEUTRAL
        if len(sides) == 2:
            was, now = seconds[0] or 0.0, seconds[1] or 0.0
            change, tone = difference(was, now, "seconds")
            # The sides are profiled one after the other: what is less than this of a step can be either one's chance.
            shown_here = shown and abs(now - was) >= COLOURED_SHARE * max(bar.seconds for bar in bars)
            tone = tone if shown_here else NEUTRAL
        legend.append(LegendRow(letters[cause], cause, own[cause], looks[cause], seconds, change, tone))
    return Breakdown(bars, legend, shared)


def _remarks(parts: Sequence[Part], letters: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Each part's own remarks by cause, and those that several parts share, said once with their letters."""
    holders: dict[str, list[str]] = {}
    for part in parts:
        for remark in filter(None, part.description.split("; ")):
            holders.setdefault(remark, []).append(part.cause)
    own = {part.cause: "" for part in parts}
    shared = []
    for remark, causes in holders.items():
        if len(causes) == 1:
            own[causes[0]] = f"{own[causes[0]]}; {remark}".removeprefix("; ")
        else:
            of = "All parts" if len(causes) == len(parts) else ", ".join(letters[cause] for cause in causes)
            shared.append(f"{of}: {remark}")
    return own, shared


def _looks(parts: Sequence[Part]) -> dict[str, str]:
    looks, busy, idle = {}, 0, 0
    for part in parts:
        if part.busy:
            looks[part.cause], busy = f"busy{busy % BUSY_LOOKS}", busy + 1
        else:
            looks[part.cause], idle = f"idle{idle % IDLE_LOOKS}", idle + 1
    return looks


@dataclass(frozen=True)
class Change:
    """One figure on both sides; ``before`` and ``after`` are raw for ``data-value``, ``show`` formats them."""

    name: str
    before: float | None
    after: float | None
    show: Callable[[float | None], str]
    words: str
    tone: Tone


def changes(
    before: ProfileRecord, after: ProfileRecord, *, race: tuple[float, float] | None = None, shown: bool = True
) -> list[Change]:
    """The figures that both sides may have; those that neither has are left out.

    Args:
        race: median steps of interleaved arms; they replace the times of the two profiles, which were taken apart.
        shown: whether the steps were shown to differ; if not, no time is called better or worse.
    """
    sides = [_figures(side, race[index] if race else None) for index, side in enumerate((before, after))]
    rows = []
    for (name, left, unit), (_, right, _) in zip(*sides, strict=True):
        row = _change(name, left, right, unit)
        timed = unit not in ("count", "bytes")
        rows.append(replace(row, tone=NEUTRAL) if timed and not shown else row)
    return [row for row in rows if row.before is not None or row.after is not None]


def _figures(record: ProfileRecord, raced: float | None) -> list[tuple[str, float | None, str]]:
    """Name, value and unit of every figure that one number tells."""
    time, rate, idle = step_time(record), record.throughput, record.idle
    seconds = None if time is None else time.seconds
    throughput = None if rate is None else rate.units_per_second
    if raced and record.steps is not None:
        seconds, throughput = raced, record.steps.units_per_step / raced
    interleaved = ", interleaved" if raced else ""
    return [
        (f"step time{interleaved}", seconds, "seconds"),
        (f"throughput{interleaved}", throughput, f"{record.workload.unit}/s"),
        ("host reads that wait, a step", record.syncs_per_step, "count"),
        ("launches a step", record.launches_per_step, "count"),
        ("device idle, a step", None if idle is None else idle.idle_seconds_per_step, "seconds"),
        ("peak memory", record.memory_peak_bytes, "bytes"),
    ]


def _change(name: str, before: float | None, after: float | None, unit: str) -> Change:
    shows: dict[str, Callable[[float | None], str]] = {
        "seconds": units.seconds,
        "bytes": units.size,
        "count": units.count,
    }
    show = shows.get(unit, lambda value: units.UNKNOWN if value is None else f"{units.number(value)} {unit}")
    words, tone = difference(before, after, unit)
    return Change(name, before, after, show, words, tone)


@dataclass(frozen=True)
class Pair:
    """One stall or hotspot on both sides; ``words`` says what became of it."""

    before: Any
    after: Any
    words: str
    tone: Tone

    @property
    def shown(self) -> Any:
        return self.after or self.before


def stall_pairs(before: Sequence[Stall], after: Sequence[Stall]) -> list[Pair]:
    """Stalls matched by file and source text, because line numbers move between runs; the removed ones first."""
    pairs = _pairs(before, after, lambda stall: (stall.file, stall.source.strip(), stall.op))
    rows = []
    for left, right in pairs:
        if right is None:
            rows.append(Pair(left, None, "gone", "good"))
        elif left is None:
            rows.append(Pair(None, right, "new", "bad"))
        else:
            words, tone = difference(left.count_per_step, right.count_per_step, "count")
            rows.append(Pair(left, right, words, tone))
    order = {"gone": 0, "new": 1}
    return sorted(rows, key=lambda pair: order.get(pair.words, 2 + (pair.words == "the same")))


def hotspot_pairs(before: Sequence[Hotspot], after: Sequence[Hotspot], *, shown: bool = True) -> list[Pair]:
    """Hotspots matched by name, the largest on either side first; none is better or worse unless ``shown``."""
    rows = []
    for left, right in _pairs(before, after, lambda hotspot: hotspot.name):
        words, tone = difference(
            left.self_seconds_per_step if left else 0.0, right.self_seconds_per_step if right else 0.0, "seconds"
        )
        words = "gone" if right is None else "new" if left is None else words
        rows.append(Pair(left, right, words, tone if shown else NEUTRAL))
    sides = [(pair.before, pair.after) for pair in rows]
    weights = [max(side.self_seconds_per_step for side in both if side) for both in sides]
    return [pair for _, pair in sorted(zip(weights, rows, strict=True), key=lambda item: -item[0])]


def _pairs(before: Sequence[Any], after: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """Items of both sides with one key, in order; several of one key pair up in turn."""
    rest = list(after)
    pairs: list[tuple[Any, Any]] = []
    for left in before:
        right = next((item for item in rest if key(item) == key(left)), None)
        if right is not None:
            # By identity: two equal items are two occurrences.
            rest = [item for item in rest if item is not right]
        pairs.append((left, right))
    return pairs + [(None, right) for right in rest]


@dataclass(frozen=True)
class Promise:
    """One predicted figure beside the measured one."""

    name: str
    predicted: str
    measured: str
    words: str


def promises(
    predicted: Prediction, before: ProfileRecord | None, after: ProfileRecord | None, ratio: Ratio | None
) -> list[Promise]:
    """The predicted figures, reads and launches as what goes from a step; unpredicted ones are left out."""
    rows = []
    syncs, launches = (
        (
            _removed(before.syncs_per_step, after.syncs_per_step),
            _removed(before.launches_per_step, after.launches_per_step),
        )
        if before is not None and after is not None
        else (None, None)
    )
    for name, promise, outcome in (
        ("host reads taken out of a step", predicted.syncs_per_step, syncs),
        ("launches taken out of a step", predicted.launches_per_step, launches),
    ):
        if promise is None:
            continue
        words = "" if outcome is None else "as predicted" if outcome == promise else _off(outcome, promise)
        rows.append(Promise(name, units.count(promise), _or_unmeasured(outcome, units.count), words))
    name = "step time before / after"
    own = (predicted.ratio_low, predicted.ratio_high)
    if own != (None, None) and own != predicted.replayed:
        rows.append(_promised_ratio(name, *own, ratio))
    if predicted.replayed is not None:
        rows.append(_promised_ratio(f"{name}, by the replay", *predicted.replayed, ratio))
    return rows


def _promised_ratio(name: str, low: float | None, high: float | None, ratio: Ratio | None) -> Promise:
    """A range of the ratio, open where an end is None, beside the one that was raced."""
    shown = units.times_range(low, high) if low is not None and high is not None else units.number(low or high or 0)
    if ratio is None:
        return Promise(name, f"{shown}x", "not measured", "")
    below, above = low is not None and ratio.median < low, high is not None and ratio.median > high
    words = "less than predicted" if below else "more than predicted" if above else "as predicted"
    measured = f"{units.times(ratio.median)} ({units.times_range(ratio.low, ratio.high)})"
    return Promise(name, f"{shown}x", measured, words)


def _removed(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _off(outcome: float, promise: float) -> str:
    return f"{units.count(abs(outcome - promise))} {'more' if outcome > promise else 'fewer'} than predicted"


def _or_unmeasured(value: float | None, show: Callable[[float | None], str]) -> str:
    return "not measured" if value is None else show(value)


@dataclass(frozen=True)
class ParityGroup:
    kernel: str
    rows: list[ParityResult]
    failed: int
    killed: int
    planted: int


def parity_groups(results: Sequence[ParityResult]) -> list[ParityGroup]:
    """Rows by kernel or phase; groups with failures first, failing rows first in them."""
    groups: dict[str, list[ParityResult]] = {}
    for result in results:
        groups.setdefault(result.kernel, []).append(result)
    arranged = []
    for kernel, rows in groups.items():
        mutants = [row.mutants_killed for row in rows if row.mutants_killed]
        arranged.append(
            ParityGroup(
                kernel,
                sorted(rows, key=lambda row: row.passed),
                sum(not row.passed for row in rows),
                sum(killed for killed, _ in mutants),
                sum(planted for _, planted in mutants),
            )
        )
    return sorted(arranged, key=lambda group: group.failed == 0)


def raw_json(record: Record) -> tuple[str, bool]:
    """The record as JSON, plain lists on one line; where it would be too long, its drawn lists are left out (True)."""
    encoded = msgspec.json.encode(record)
    plain = msgspec.json.decode(encoded)
    shortened = len(encoded) > RAW_LIMIT_BYTES
    return _json(_without_bulk(plain) if shortened else plain, ""), shortened


def _without_bulk(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    return {
        key: _without_bulk(value) for key, value in plain.items() if key not in BULKY or not isinstance(value, list)
    }


def _json(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(key)}: {_json(item, deeper)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [deeper + _json(item, deeper) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(items) + f"\n{indent}{closing}"
