"""What a bench shows beside its rows: sweeps over one size, and figures of others beside what exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernbench.claims import conclusion
from kernbench.record import BenchRecord, BenchResult, Ceilings, ClaimCheck, Sweep
from kernbench.report import benchwords, units
from kernbench.report.drawing import ACCENT, HEIGHT, INK, MUTED, WIDE, Plot, chart_of, draw

FLOOR, ROOF = "launch floor", "at copy bandwidth"
SAME_BYTES = 1.1
"""Up to this ratio of the most bytes to the least, a sweep is at fixed bytes."""

Rows = dict[str, dict[int, BenchResult]]
"""Timed rows of one way of timing: of each implementation by the value that is swept."""


@dataclass(frozen=True)
class Cell:
    """A figure as it is read, and as recorded; None where it is no figure."""

    text: str
    raw: float | None = None


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells; ``plots`` show the same, ``said`` is what follows from it."""

    title: str
    note: str
    headings: list[str]
    rows: list[list[Cell]]
    said: list[str]
    plots: list[Plot]


def apart(record: BenchRecord) -> tuple[list[Table], list[BenchResult]]:
    """The sweeps in which something was timed, and the rows that are in none of these."""
    tables, rest = [], list(record.results)
    for sweep in record.sweeps:
        found, untimed = _ways(sweep, record.results)
        for title, rows in found.items():
            ceilings = record.environment.ceilings or Ceilings()
            tables.append(_sweep(sweep, title, rows, untimed.get(title, {}), ceilings))
        tables += [_memory(sweep, title, rows) for title, rows in found.items() if _counts_memory(rows)]
        if found:
            rest = [row for row in rest if row.kernel != sweep.kernel or row.case not in sweep.cases]
    return tables, rest


def _ways(sweep: Sweep, results: Sequence[BenchResult]) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """The rows of a sweep by dtype, direction and state of the cache: what was timed, and what was not."""
    values = dict(zip(sweep.cases, sweep.values, strict=True))
    timed: dict[str, Rows] = {}
    untimed: dict[str, Rows] = {}
    for row in results:
        if row.kernel == sweep.kernel and row.case in values:
            backward = "backward" if row.direction == "backward" else ""
            what = ", ".join(filter(None, (sweep.kernel, row.dtype, backward)))
            title = f"{what} over {sweep.size}{f': {row.cache}' if row.cache else ''}"
            ways = untimed if row.seconds is None else timed
            ways.setdefault(title, {}).setdefault(row.implementation, {})[values[row.case]] = row
    return timed, untimed


def _sweep(sweep: Sweep, title: str, rows: Rows, untimed: Rows, ceilings: Ceilings) -> Table:
    """One line per value at which something was timed or went wrong."""
    roof = _roof(rows, ceilings)
    leader = _leader(rows)
    headings = [sweep.size, *rows, *([ROOF, f"{leader} of roof"] if roof else []), "labels"]
    lines = []
    for value in sweep.values:
        here = {name: timed[value] for name, timed in rows.items() if value in timed}
        wrong = {name: failed[value] for name, failed in untimed.items() if value in failed}
        if not here and not wrong:
            continue
        line = [Cell(f"{value:,}", value)]
        line += [_seconds(here[name].seconds) if name in here else Cell("") for name in rows]
        if roof:
            led = here.get(leader)
            share = led.share_of_roof if led else None
            line += [_seconds(roof.get(value)), Cell(units.share(share), share) if share is not None else Cell("")]
        labels = [f"{name}: {row.label}" for name, row in here.items() if row.label]
        labels += [f"{name}: {benchwords.remark(row)}" for name, row in wrong.items()]
        lines.append([*line, Cell("; ".join(labels))])
    said = [told for name, timed in rows.items() if (told := _evenness(sweep, name, timed))]
    if ceilings.launch_seconds is not None:
        said.append(f"The launch floor measured beside it is {units.seconds(ceilings.launch_seconds)}.")
    return Table(title, sweep.fixed, headings, lines, said, [_plot(sweep, rows, roof, ceilings.launch_seconds)])


def _counts_memory(rows: Rows) -> bool:
    return any(row.peak_bytes is not None for timed in rows.values() for row in timed.values())


def _memory(sweep: Sweep, title: str, rows: Rows) -> Table:
    """What a call holds at most beside what it is given, and how that grows from one end of the sweep to the other."""
    lines = [
        [Cell(f"{value:,}", value), *(_size(timed.get(value)) for timed in rows.values())] for value in sweep.values
    ]
    said = [told for name, timed in rows.items() if (told := _growth(sweep, name, timed))]
    return Table(f"Memory of {title}", benchwords.MEMORY_NOTE, [sweep.size, *rows], lines, said, [])


def _size(row: BenchResult | None) -> Cell:
    held = row.peak_bytes if row else None
    return Cell("") if held is None else Cell(units.size(held), held)


def _growth(sweep: Sweep, name: str, timed: dict[int, BenchResult]) -> str:
    held = {value: row.peak_bytes for value, row in sorted(timed.items()) if row.peak_bytes}
    if len(held) < 2:
        return ""
    (least, few), *_, (most, many) = held.items()
    return (
        f"{name} holds {units.times(many / few)} as much with {most:,} as with {least:,} {sweep.size}, "
        f"{units.times(most / least)} as many."
    )


def _leader(rows: Rows) -> str:
    """Our kernel where it was timed, else the first implementation."""
    return "triton" if "triton" in rows else next(iter(rows))


def _roof(rows: Rows, ceilings: Ceilings) -> dict[int, float]:
    """What the bytes of every value take at the measured copy bandwidth."""
    speed = ceilings.copy_bytes_per_second
    counted = {value: row.bytes for timed in rows.values() for value, row in timed.items() if row.bytes}
    return {value: size / speed for value, size in counted.items()} if speed else {}


def _evenness(sweep: Sweep, name: str, timed: dict[int, BenchResult]) -> str:
    """How the time changes from one end of the sweep to the other; per byte, where the bytes are the same."""
    if len(timed) < 2:
        return ""
    seconds = [row.seconds or 0.0 for row in timed.values()]
    span = f"{min(timed):,} to {max(timed):,} {sweep.size}"
    text = f"{name} takes {units.seconds_range(min(seconds), max(seconds))} from {span}"
    counted = [row.bytes for row in timed.values() if row.bytes]
    if len(counted) == len(seconds) and max(counted) <= SAME_BYTES * min(counted):
        rates = [took / size for took, size in zip(seconds, counted, strict=True)]
        text += (
            f": at fixed bytes, the slowest takes {units.share(max(rates) / min(rates) - 1)} longer than the fastest"
        )
    return f"{text}."


def _seconds(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(units.seconds(value), value)


def _plot(sweep: Sweep, rows: Rows, roof: dict[int, float], launch: float | None) -> Plot:
    """Time over the value that is swept, both on logarithmic axes, with what launches and bytes take at least."""
    largest = max(row.seconds or 0.0 for timed in rows.values() for row in timed.values())
    unit, unit_name = units.time_unit(largest)
    points = [
        {"value": value, "time": (row.seconds or 0.0) / unit, "name": name}
        for name, timed in rows.items()
        for value, row in sorted(timed.items())
    ]
    ends = [min(point["value"] for point in points), max(point["value"] for point in points)]  # type: ignore[type-var]
    limits = [{"value": value, "time": took / unit, "name": ROOF} for value, took in sorted(roof.items())]
    floor = [{"value": value, "time": launch / unit, "name": FLOOR} for value in ends] if launch else []
    drawn = ["dashed: the measured launch floor"] if floor else []
    drawn += ["solid: the bytes at the measured copy bandwidth"] if limits else []
    without = f" Lines without marks, {' and '.join(drawn)}." if drawn else ""
    label = f"Time of a call over {sweep.size}, {sweep.fixed}.{without}"

    def chart(alt: Any, width: int) -> Any:
        log = alt.Scale(type="log", nice=False)
        x = alt.X(
            "value:Q", title=sweep.size, scale=log, axis=alt.Axis(values=sweep.values, format="~s", labelOverlap=True)
        )
        y = alt.Y(
            "time:Q",
            title=f"{unit_name} per call",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(tickCount=5, format="~g"),
        )
        shape = alt.Shape(
            "name:N", title=None, sort=list(rows), legend=alt.Legend(orient="bottom", columns=2 if width < WIDE else 5)
        )
        layers = []
        # What is measured lies above the roof, and above the floor by far: names below the one and above the other.
        for line, dash, off in ((limits, [1, 0], 11), (floor, [5, 4], -7)):
            if line:
                base = chart_of(alt, line)
                layers.append(base.mark_line(color=MUTED, strokeWidth=1.5, strokeDash=dash).encode(x=x, y=y))
                written = chart_of(alt, line[-1:]).mark_text(align="right", dy=off, color=MUTED, fontSize=11)
                layers.append(written.encode(x=x, y=y, text="name:N"))
        lines = (
            chart_of(alt, points).mark_line(color=ACCENT, strokeWidth=1, opacity=0.7).encode(x=x, y=y, detail="name:N")
        )
        marks = chart_of(alt, points).mark_point(size=55, color=INK, filled=False, strokeWidth=1.6)
        return alt.layer(*layers, lines, marks.encode(x=x, y=y, shape=shape)).properties(
            width=width, height=HEIGHT + 80
        )

    return draw(label, chart)


def claims(record: BenchRecord) -> Table | None:
    """What documents state beside what exists and what was measured; None where nothing is claimed."""
    if not record.claims:
        return None
    timed = any(claim.seconds is not None for claim in record.claims)
    headings = ["stated", "bandwidth", "its time", "counted", "there are", "too many", "real bandwidth then"]
    headings += ["time here", "as called", "launch floor", "real bandwidth here", "counted its way"] if timed else []
    first = record.claims[0]
    return Table(
        title=f"What {first.source} states",
        note=f"On {first.device}. Its time is what its bytes and its bandwidth imply.",
        headings=headings,
        rows=[_claim(claim, timed=timed) for claim in record.claims],
        said=[conclusion(record.claims), *(claim.sentence for claim in record.claims if claim.sentence)],
        plots=[],
    )


def _claim(claim: ClaimCheck, *, timed: bool) -> list[Cell]:
    times = claim.counted_bytes / claim.real_bytes
    real = claim.real_bytes / claim.stated_seconds
    cells = [
        Cell(claim.title),
        Cell(units.bytes_rate(claim.bytes_per_second), claim.bytes_per_second),
        _seconds(claim.stated_seconds),
        Cell(units.moved(claim.counted_bytes), claim.counted_bytes),
        Cell(units.moved(claim.real_bytes), claim.real_bytes),
        Cell(units.times(times), times),
        Cell(units.bytes_rate(real), real),
    ]
    if claim.seconds is None:
        return cells + [Cell("")] * (5 if timed else 0)
    rates = (claim.real_bytes / claim.seconds, claim.counted_bytes / claim.seconds)
    return [
        *cells,
        _seconds(claim.seconds),
        _seconds(claim.called_seconds),
        _seconds(claim.launch_seconds),
        *(Cell(units.bytes_rate(rate), rate) for rate in rates),
    ]
