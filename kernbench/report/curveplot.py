"""Training curves of a bench: what every implementation ends with, and whether it stays where rounding may lead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernbench import band
from kernbench.record import BenchRecord, Curve
from kernbench.report import phrases, units
from kernbench.report.drawing import ACCENT, HEIGHT, INK, MUTED, WIDE, Plot, chart_of, draw
from kernbench.report.sweepplot import Cell, Table


def curves(record: BenchRecord) -> Table | None:
    """Figures of a training run over its steps, of every implementation; None where there are none."""
    if not record.curves:
        return None
    names = list(dict.fromkeys(curve.name for curve in record.curves))
    implementations = list(dict.fromkeys(curve.implementation for curve in record.curves))
    last = {(curve.implementation, curve.name): curve for curve in record.curves}
    rows = []
    for implementation in implementations:
        ends = [last.get((implementation, name)) for name in names]
        rows.append([Cell(implementation), *(_end(curve) for curve in ends)])
    steps = max(curve.steps[-1] for curve in record.curves)
    return Table(
        title="Training curves",
        note=f"The same data and seed for all of them; the table shows what they end with, after {steps:,} steps.",
        headings=["implementation", *names],
        rows=rows,
        said=[
            sentence
            for name in names
            for sentence in _said(name, [curve for curve in record.curves if curve.name == name])
        ],
        plots=[_curves(name, [curve for curve in record.curves if curve.name == name]) for name in names],
    )


def _end(curve: Curve | None) -> Cell:
    return Cell("") if curve is None else Cell(units.figure(curve.values[-1], curve.unit), curve.values[-1])


def _said(name: str, lines: Sequence[Curve]) -> list[str]:
    return list(filter(None, (_spread(name, lines), _inside(name, lines))))


def _inside(name: str, lines: Sequence[Curve]) -> str:
    """Whether all implementations stay in the band, which ones do not, and what these do in other orders."""
    if band.around(lines) is None:
        return ""
    runs = sum(curve.moved for curve in lines)
    wide = f"{band.WIDTH:g} times as wide as they go"
    what = f"the band of {runs} baseline runs that differ from it by rounding alone, {wide}"
    left = band.left(lines)
    if not left:
        return f"{phrases.capitalized(name)} stays in {what}, with every phase."
    told = ", ".join(
        f"{implementation} at step {step}{_otherwise(lines, implementation)}" for implementation, step in left.items()
    )
    return f"{phrases.capitalized(name)} leaves {what}: {told}."


def _otherwise(lines: Sequence[Curve], implementation: str) -> str:
    stay, runs = band.in_other_orders(lines, implementation)
    if not runs:
        return ""
    return f" ({stay} of {runs} runs that sum in other orders {'stays' if stay == 1 else 'stay'})"


def _spread(name: str, lines: Sequence[Curve]) -> str:
    """How far apart the implementations end."""
    ends = [curve.values[-1] for curve in lines]
    if max(ends) == min(ends):
        return f"{phrases.capitalized(name)} ends at {units.figure(ends[0], lines[0].unit)} in all of them."
    low, high = (units.figure(value, lines[0].unit) for value in (min(ends), max(ends)))
    apart = units.figure(max(ends) - min(ends), lines[0].unit)
    if low == high:
        return f"{phrases.capitalized(name)} ends at {low} in all of them, {apart} apart."
    return f"{phrases.capitalized(name)} ends between {low} and {high}, {apart} apart."


def _curves(name: str, lines: Sequence[Curve]) -> Plot:
    points = [
        {"step": step, "value": value, "name": curve.implementation}
        for curve in lines
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    unit = lines[0].unit
    order = [curve.implementation for curve in lines]
    around = band.around(lines)
    label = f"{phrases.capitalized(name)} over the steps of training; equal implementations lie on each other."
    label += " Shaded: where rounding alone may lead the baseline." if around else ""

    def chart(alt: Any, width: int) -> Any:
        x = alt.X(
            "step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d", tickCount=6), scale=alt.Scale(nice=False)
        )
        y = alt.Y(
            "value:Q",
            title=f"{name}{f', {unit}' if unit else ''}",
            scale=alt.Scale(zero=False),
            axis=alt.Axis(tickCount=5),
        )
        legend = alt.Legend(orient="bottom", columns=1 if width < WIDE else 3, columnPadding=30, labelLimit=250)
        shape = alt.Shape("name:N", title=None, sort=order, legend=legend)
        drawn = (
            chart_of(alt, points).mark_line(color=ACCENT, strokeWidth=1, opacity=0.7).encode(x=x, y=y, detail="name:N")
        )
        marks = chart_of(alt, points).mark_point(size=42, color=INK, filled=False, strokeWidth=1.3)
        layers = [drawn, marks.encode(x=x, y=y, shape=shape)]
        if around is not None:
            area = [
                {"step": step, "low": low, "high": high}
                for step, low, high in zip(around.steps, around.low, around.high, strict=True)
            ]
            shade = chart_of(alt, area).mark_area(color=MUTED, opacity=0.25)
            layers.insert(0, shade.encode(x=x, y=alt.Y("low:Q"), y2="high:Q"))
        return alt.layer(*layers).properties(width=width, height=HEIGHT + 30)

    return draw(label, chart)
