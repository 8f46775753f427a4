"""Training curves of a bench: what every implementation ends with, and whether it stays where rounding may lead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernbench import band
from kernbench.record import BenchRecord, Curve
from kernbench.report import phrases, units
from kernbench.report.drawing import ACCENT, HEIGHT, INK, MUTED, WIDE, Plot, chart_of, draw, linear_axis
from kernbench.report.sweepplot import Cell, Table

BASELINES, PHASES, OTHERWISE = "baseline, rounded otherwise", "phases", "phases that left, in other orders"


def curves(record: BenchRecord) -> Table | None:
    """Figures of a training run over its steps, of every implementation; None where there are none.

    Runs of a phase in other orders have no row of their own: what they do is told beside the phase.
    """
    if not record.curves:
        return None
    figures = [(name, lines, band.around(lines)) for name, lines in band.by_figure(record.curves).items()]
    shown = dict.fromkeys(curve.implementation for curve in record.curves if curve.moved or not curve.reorders)
    steps = max(curve.steps[-1] for curve in record.curves)
    headings = (heading for name, _, around in figures for heading in _headings(name, around))
    return Table(
        title="Training curves",
        note=f"The same data and seed for all of them; the table shows what they end with, after {steps:,} steps.",
        headings=["implementation", *headings],
        rows=[
            [Cell(name), *(cell for _, lines, around in figures for cell in _cells(lines, name, around))]
            for name in shown
        ],
        said=[sentence for name, lines, around in figures for sentence in _said(name, lines, around)],
        plots=[plot for name, lines, around in figures for plot in _plots(name, lines, around)],
    )


def _headings(name: str, around: band.Band | None) -> list[str]:
    return [name] if around is None else [name, "most apart", "band"]


def _cells(lines: Sequence[Curve], implementation: str, around: band.Band | None) -> list[Cell]:
    """What a curve ends with; where there is a band, how far it goes from the baseline at most, and if it leaves."""
    curve = next((line for line in reversed(lines) if line.implementation == implementation), None)
    if curve is None:
        return [Cell("")] * len(_headings("", around))
    end = Cell(units.figure(curve.values[-1], curve.unit), curve.values[-1])
    if around is None:
        return [end]
    if curve is lines[0]:
        return [end, Cell(""), Cell("")]
    apart = max(abs(value - middle) for value, middle in zip(curve.values, lines[0].values, strict=True))
    return [end, Cell(units.figure(apart, curve.unit), apart), Cell(_place(curve, around))]


def _place(curve: Curve, around: band.Band) -> str:
    if curve.moved:
        return "part of it"
    step = around.left_by(curve)
    if step is None:
        return "inside"
    stay, runs = around.in_other_orders(curve.implementation)
    return f"left at step {step}" + (f"; in other orders {stay} of {runs} stay" if runs else "")


def _said(name: str, lines: Sequence[Curve], around: band.Band | None) -> list[str]:
    return [_spread(name, lines), *([] if around is None else [_inside(name, around)])]


def _inside(name: str, around: band.Band) -> str:
    """Whether all implementations stay in the band, which ones do not, and what these do in other orders."""
    runs = sum(curve.moved for curve in around.lines)
    wide = f"{band.WIDTH:g} times as wide as they go"
    what = f"the band of {runs} baseline runs that differ from it by rounding alone, {wide}"
    left = around.left()
    if not left:
        return f"{phrases.capitalized(name)} stays in {what}, with every phase."
    told = ", ".join(f"{implementation} at step {step}" for implementation, step in left.items())
    others = [around.in_other_orders(implementation) for implementation in left]
    stay, again = (sum(counts) for counts in zip(*others, strict=True))
    otherwise = f" With their sums in other orders {stay} of {again} runs of these stay in it." if again else ""
    return f"{phrases.capitalized(name)} leaves {what}: {told}.{otherwise}"


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


def _plots(name: str, lines: Sequence[Curve], around: band.Band | None) -> list[Plot]:
    return [_curves(name, lines, around), *([] if around is None else [_distances(name, around)])]


def _curves(name: str, lines: Sequence[Curve], around: band.Band | None) -> Plot:
    plain = [curve for curve in lines if not curve.moved and not curve.reorders]
    points = [
        {"step": step, "value": value, "name": curve.implementation}
        for curve in plain
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    unit = lines[0].unit
    order = [curve.implementation for curve in plain]
    label = f"{phrases.capitalized(name)} over the steps of training; equal implementations lie on each other."
    label += " Shaded: where rounding alone may lead the baseline." if around else ""

    def chart(alt: Any, width: int) -> Any:
        x = _steps(alt)
        y = linear_axis(alt, "value", f"{name}{f', {unit}' if unit else ''}")
        shape = alt.Shape("name:N", title=None, sort=order, legend=_legend(alt, width))
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


def _distances(name: str, around: band.Band) -> Plot:
    """How far each curve is from the baseline, as a share of it, beside the edge of the band."""
    baseline, *lines = around.lines
    points: list[dict[str, Any]] = [
        {"step": step, "share": abs(value - middle) / abs(middle), "name": curve.implementation, "kind": _kind(curve)}
        for curve in lines
        for step, value, middle in zip(curve.steps, curve.values, baseline.values, strict=True)
        if value != middle and middle  # a share of 0 has no place on a logarithmic axis
    ]
    edges = [
        (step, (high - middle) / abs(middle))
        for step, high, middle in zip(around.steps, around.high, baseline.values, strict=True)
        if middle
    ]
    least = min([point["share"] for point in points] + [edge for _, edge in edges], default=band.ROUNDING)
    inside = [{"step": step, "share": edge, "low": least} for step, edge in edges]
    label = f"How far {name} is from the baseline's, as a share of it, on a logarithmic axis. Shaded: inside the band."

    def chart(alt: Any, width: int) -> Any:
        x = _steps(alt)
        scale = alt.Scale(type="log", nice=False)
        axis = alt.Axis(tickCount=5, format=".0e")
        y = alt.Y("share:Q", title=f"share of the baseline's {name}", scale=scale, axis=axis)
        present = {_kind(curve) for curve in lines}
        shown = [kind for kind in (BASELINES, PHASES, OTHERWISE) if kind in present]
        styles = {BASELINES: (MUTED, [1, 0]), PHASES: (ACCENT, [1, 0]), OTHERWISE: (ACCENT, [4, 3])}
        colours = alt.Scale(domain=shown, range=[styles[kind][0] for kind in shown])
        dashes = alt.Scale(domain=shown, range=[styles[kind][1] for kind in shown])
        drawn = chart_of(alt, points).mark_line(strokeWidth=1.2).encode(
            x=x, y=y, detail="name:N",
            color=alt.Color("kind:N", title=None, scale=colours, legend=_legend(alt, width)),
            strokeDash=alt.StrokeDash("kind:N", title=None, scale=dashes),
        )  # fmt: skip
        shade = chart_of(alt, inside).mark_area(color=MUTED, opacity=0.25)
        return alt.layer(shade.encode(x=x, y=y, y2="low:Q"), drawn).properties(width=width, height=HEIGHT + 30)

    return draw(label, chart)


def _kind(curve: Curve) -> str:
    return BASELINES if curve.moved else OTHERWISE if curve.reorders else PHASES


def _steps(alt: Any) -> Any:
    axis = alt.Axis(tickMinStep=1, format="d", tickCount=6)
    return alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(nice=False))


def _legend(alt: Any, width: int) -> Any:
    return alt.Legend(orient="bottom", columns=1 if width < WIDE else 3, columnPadding=30, labelLimit=250)
