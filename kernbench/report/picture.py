"""Where the bars of a timeline go: tracks, lanes and marks, in thousandths of the picture's width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernbench.record import Span
from kernbench.report import units

WIDTH = 1000.0
# A bar thinner than this is invisible on a page; such bars join their neighbours, which keeps the page small.
SLIVER = 0.6
LANE_HEIGHT = 18
MAX_LANES = 6

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


@dataclass(frozen=True)
class Mark:
    """A place where the host waits, in percent of the width."""

    left: float
    title: str


@dataclass(frozen=True)
class Tick:
    """A label of the time axis, in percent of the width."""

    left: float
    label: str


@dataclass(frozen=True)
class Picture:
    """Everything of one drawing; ``looks`` are the ones that occur in it."""

    tracks: list[Track]
    marks: list[Mark]
    ticks: list[Tick]
    seconds: float
    looks: set[str]


def layout(spans: Sequence[Span]) -> Picture | None:
    """Place the spans of one step; None where there are none."""
    end = max((span.start_seconds + span.duration_seconds for span in spans), default=0.0)
    if end <= 0:
        return None
    names = list(dict.fromkeys(span.track for span in spans))
    tracks = [_track(name, [span for span in spans if span.track == name], end) for name in names]
    waits = [span for span in spans if span.kind in WAITING_KINDS]
    marks = [Mark(round(100 * max(span.start_seconds, 0.0) / end, 2), _title(span)) for span in waits]
    return Picture(tracks, marks, _ticks(end), end, {_look(span) for span in spans})


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
        x, width = max(WIDTH * start / end, 0.0), WIDTH * span.duration_seconds / end
        look = _look(span)
        if width >= SLIVER:
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


def _look(span: Span) -> str:
    if span.kind in WAITING_KINDS:
        return "waits"
    return "works" if span.kind in DEVICE_KINDS else "hosts"


def _title(span: Span) -> str:
    return f"{span.name}: {units.seconds(span.duration_seconds)}, at {units.seconds(max(span.start_seconds, 0.0))}"


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
