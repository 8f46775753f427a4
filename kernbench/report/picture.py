"""Where the bars of a timeline go: tracks, lanes and marks, in thousandths of the picture's width."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kernbench.record import SourceLine, Span
from kernbench.report import tracewords, units

WIDTH = 1000.0
# A bar thinner than this is invisible on a page; such bars join their neighbours, which keeps the page small.
SLIVER = 0.6
# From this width on a bar is drawn alone and can be pointed at; the script takes thinner ones apart.
ALONE = 2.0
LANE_HEIGHT = 18
MAX_LANES = 6
# A number beside a mark needs this much room, in percent of the width.
NUMBER_ROOM = 2.2
# Names of template functions run to thousands of letters; a title stands beside every bar.
TITLE_LETTERS, NAME_LETTERS = 100, 300

WAITING_KINDS = frozenset({"sync", "stall", "wait"})
DEVICE_KINDS = frozenset({"kernel", "copy", "memset"})


@dataclass(frozen=True)
class Bar:
    """One drawn span; ``title`` is what a pointer over it shows."""

    x: float
    y: int
    width: float
    look: str
    title: str


@dataclass
class Track:
    """A host thread or a device stream; ``slivers`` holds SVG path data per look."""

    name: str
    height: int = LANE_HEIGHT
    bars: list[Bar] = field(default_factory=list)
    slivers: dict[str, str] = field(default_factory=dict)
    hidden: int = 0
    drawn: list[tuple[int, Span]] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A place where the host waits, in percent of the width; ``number`` is its line's, "" where it has no room."""

    left: float
    title: str
    number: str = ""


@dataclass(frozen=True)
class WaitingLine:
    """A source line that marks of a drawing stand for."""

    number: int
    source: SourceLine
    count: int
    seconds: float


@dataclass(frozen=True)
class Tick:
    """A label of the time axis, in percent of the width."""

    left: float
    label: str


@dataclass(frozen=True)
class Picture:
    """Everything of one drawing; ``looks`` are the ones that occur in it, ``data`` is what a script zooms into."""

    tracks: list[Track]
    marks: list[Mark]
    ticks: list[Tick]
    seconds: float
    looks: set[str]
    lines: list[WaitingLine]
    data: str


def layout(spans: Sequence[Span]) -> Picture | None:
    """Place the spans of one step; None where there are none."""
    end = max((span.start_seconds + span.duration_seconds for span in spans), default=0.0)
    if end <= 0:
        return None
    by_track: dict[str, list[Span]] = {}
    for span in spans:
        by_track.setdefault(span.track, []).append(span)
    tracks = [_track(name, found, end) for name, found in by_track.items()]
    waits = sorted(filter(_waits, spans), key=lambda span: span.start_seconds)
    lines = _lines(waits)
    return Picture(
        tracks,
        _marks(waits, lines, end),
        _ticks(end),
        end,
        {_look(span) for span in spans},
        lines,
        _data(tracks, lines, end),
    )


def _lines(waits: Sequence[Span]) -> list[WaitingLine]:
    """The lines that waits name, numbered by the time spent at them."""
    found: dict[tuple[str, int], list[Span]] = {}
    for span in waits:
        if span.source is not None:
            found.setdefault((span.source.file, span.source.line), []).append(span)
    groups = sorted(found.values(), key=lambda group: -sum(span.duration_seconds for span in group))
    return [
        WaitingLine(number, group[0].source, len(group), sum(span.duration_seconds for span in group))
        for number, group in enumerate(groups, 1)
        if group[0].source is not None
    ]


def _marks(waits: Sequence[Span], lines: Sequence[WaitingLine], end: float) -> list[Mark]:
    numbers = {(line.source.file, line.source.line): line.number for line in lines}
    marks: list[Mark] = []
    free_from = 0.0
    for span in waits:
        left = round(100 * max(span.start_seconds, 0.0) / end, 2)
        number = numbers.get((span.source.file, span.source.line)) if span.source is not None else None
        shown = number is not None and left >= free_from
        if shown:
            free_from = left + NUMBER_ROOM
        marks.append(Mark(left, _title(span), str(number) if shown else ""))
    return marks


def _data(tracks: Sequence[Track], lines: Sequence[WaitingLine], end: float) -> str:
    """The spans as JSON that may stand inside a script element.

    A span is its lane, look, begin and length in ns, name and number of its line; names are positions in one list, so
    that a kernel's long name stands there once.
    """
    names: dict[str, int] = {}
    numbers = {(line.source.file, line.source.line): line.number for line in lines}

    def row(lane: int, span: Span) -> list[Any]:
        number = numbers[span.source.file, span.source.line] if span.source is not None and _waits(span) else 0
        begin, length = round(max(span.start_seconds, 0.0) * 1e9), round(span.duration_seconds * 1e9)
        return [lane, _look(span), begin, length, names.setdefault(span.name, len(names)), number]

    rows = [[row(lane, span) for lane, span in track.drawn] for track in tracks]
    plain = {
        "end": round(end * 1e9),
        "tracks": rows,
        "names": [_cut(name, NAME_LETTERS) for name in names],
        "lines": [tracewords.place(line.source) for line in lines],
    }
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _track(name: str, spans: Sequence[Span], end: float) -> Track:
    track = Track(name)
    lane_ends: list[float] = []
    slivers: dict[tuple[int, str], list[list[float]]] = {}
    for span in sorted(spans, key=lambda span: (span.start_seconds, -span.duration_seconds)):
        start, stop = span.start_seconds, span.start_seconds + span.duration_seconds
        lane = next(
            (index for index, busy_until in enumerate(lane_ends) if start >= busy_until - 1e-12), len(lane_ends)
        )
        if lane >= MAX_LANES:
            track.hidden += 1
            continue
        lane_ends[lane : lane + 1] = [stop]
        track.drawn.append((lane, span))
        x, width = max(WIDTH * start / end, 0.0), WIDTH * span.duration_seconds / end
        look = _look(span)
        if width >= ALONE:
            track.bars.append(Bar(round(x, 2), lane * LANE_HEIGHT, round(width, 2), look, _title(span)))
        else:
            _join(slivers.setdefault((lane, look), []), x, width)
    track.height = LANE_HEIGHT * max(len(lane_ends), 1)
    for (lane, look), runs in slivers.items():
        path = "".join(
            f"M{x:.1f} {lane * LANE_HEIGHT}h{stop - x:.1f}v{LANE_HEIGHT - 2}h-{stop - x:.1f}z" for x, stop in runs
        )
        track.slivers[look] = track.slivers.get(look, "") + path
    return track


def _join(runs: list[list[float]], x: float, width: float) -> None:
    """Add a sliver to the runs of its lane: it lengthens the last one where no gap would be seen between them."""
    stop = x + max(width, SLIVER / 2)
    if runs and x - runs[-1][1] < SLIVER / 2:
        runs[-1][1] = stop
    else:
        runs.append([x, stop])


def _waits(span: Span) -> bool:
    return span.kind in WAITING_KINDS


def _look(span: Span) -> str:
    if _waits(span):
        return "waits"
    return "works" if span.kind in DEVICE_KINDS else "hosts"


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _title(span: Span) -> str:
    at = f"{tracewords.place(span.source)}: " if span.source is not None else ""
    times = f"{units.seconds(span.duration_seconds)}, at {units.seconds(max(span.start_seconds, 0.0))}"
    return f"{at}{_cut(span.name, TITLE_LETTERS)}: {times}"


def _ticks(end: float) -> list[Tick]:
    """Four to eight labels at round times."""
    power = 10.0 ** math.floor(math.log10(end / 4))
    spacing = max(power * factor for factor in (1, 2, 5) if power * factor <= end / 4)
    unit, name = units.time_unit(end)
    # A label in the last tenth would stick out on a phone.
    last = int(0.9 * end / spacing)
    return [
        Tick(round(100 * index * spacing / end, 2), f"{index * spacing / unit:g} {name}" if index else "0")
        for index in range(last + 1)
    ]
