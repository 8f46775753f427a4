"""Plots of a record's own figures: step times, paired ratios, implementations, the roofline of a bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernbench.record import BenchResult, Ceilings, Ratio
from kernbench.report import units
from kernbench.report.drawing import ACCENT, BAND, HEIGHT, INK, LINE, MUTED, WIDE, Plot, chart_of, draw, linear_axis
from kernbench.report.sentences import StepTime


def step_times(seconds: Sequence[float], time: StepTime) -> Plot:
    """Time of every step in order, with the median and its interval."""
    rows = [{"step": index + 1, "ms": units.milliseconds(value)} for index, value in enumerate(seconds)]
    label = f"Time of each of {len(rows)} steps in the order they ran; the line is the median, the band its interval."

    def chart(alt: Any, width: int) -> Any:
        y = linear_axis(alt, "ms", "ms per step")
        layers = []
        if time.interval:
            band = [{"low": units.milliseconds(time.interval[0]), "high": units.milliseconds(time.interval[1])}]
            layers.append(chart_of(alt, band).mark_rect(fill=BAND).encode(y=alt.Y("low:Q"), y2="high:Q"))
        middle = [{"ms": units.milliseconds(time.seconds)}]
        layers.append(chart_of(alt, middle).mark_rule(color=ACCENT, strokeWidth=1.5).encode(y=y))
        x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(nice=False))
        points = chart_of(alt, rows).mark_circle(size=34, color=INK, opacity=0.75).encode(x=x, y=y)
        return alt.layer(*layers, points).properties(width=width, height=HEIGHT)

    return draw(label, chart)


def paired_ratios(before: Sequence[float], after: Sequence[float], again: Sequence[float], ratio: Ratio) -> Plot:
    """Before over after in every interleaved round, with the interval and the A/A floor around 1."""
    rounds = [
        {"round": index + 1, "ratio": left / right, "arm": "before/after"}
        for index, (left, right) in enumerate(zip(before, after, strict=False))
        if right > 0
    ]
    identical = [
        {"round": index + 1, "ratio": left / right, "arm": "A/A"}
        for index, (left, right) in enumerate(zip(before, again, strict=False))
        if right > 0
    ]
    label = (
        "Step time before over after in each round, filled; the line is the median, the band its interval. "
        "Hollow: the same arm against itself, with the A/A floor around 1."
    )

    def chart(alt: Any, width: int) -> Any:
        y = linear_axis(alt, "ratio", "before / after")
        x = alt.X("round:Q", title="round", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(nice=False))
        floor = [{"low": 1 - ratio.noise_floor, "high": 1 + ratio.noise_floor}]
        interval = [{"low": ratio.low, "high": ratio.high}]
        layers = [
            chart_of(alt, floor).mark_rect(fill=LINE).encode(y=alt.Y("low:Q"), y2="high:Q"),
            chart_of(alt, interval).mark_rect(fill=BAND).encode(y=alt.Y("low:Q"), y2="high:Q"),
            chart_of(alt, [{"ratio": 1}]).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y=y),
            chart_of(alt, [{"ratio": ratio.median}]).mark_rule(color=ACCENT, strokeWidth=1.5).encode(y=y),
            chart_of(alt, identical).mark_point(size=26, color=MUTED, opacity=0.8).encode(x=x, y=y),
            chart_of(alt, rounds).mark_circle(size=34, color=INK, opacity=0.8).encode(x=x, y=y),
        ]
        return alt.layer(*layers).properties(width=width, height=HEIGHT)

    return draw(label, chart)


def implementations(rows: Sequence[BenchResult], name: str) -> Plot:
    """Time of each implementation of one case, with its interval, from zero."""
    timed = [row for row in rows if row.seconds is not None]
    unit, unit_name = units.time_unit(max((row.seconds or 0.0 for row in timed), default=1.0))
    bars = [
        {
            "name": row.implementation,
            "time": (row.seconds or 0.0) / unit,
            "low": (row.interval or (row.seconds, row.seconds))[0] / unit,  # type: ignore[operator]
            "high": (row.interval or (row.seconds, row.seconds))[1] / unit,  # type: ignore[operator]
        }
        for row in timed
    ]
    label = f"Time of each implementation of {name}, in {unit_name}; bars start at zero, the line is the interval."

    def chart(alt: Any, width: int) -> Any:
        y = alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=130, domain=False, ticks=False))
        x = alt.X(
            "time:Q", title=f"{unit_name}, less is better", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)
        )
        drawn = chart_of(alt, bars).mark_bar(color=ACCENT, height=11, opacity=0.85).encode(x=x, y=y)
        whiskers = chart_of(alt, bars).mark_rule(color=INK, strokeWidth=1.5).encode(x=alt.X("low:Q"), x2="high:Q", y=y)
        return alt.layer(drawn, whiskers).properties(width=width - 130, height=alt.Step(24))

    return draw(label, chart)


def roofline(rows: Sequence[BenchResult], ceilings: Ceilings) -> Plot | None:
    """Achieved arithmetic rate over arithmetic intensity below the measured roofs; None where figures are missing."""
    bandwidth = ceilings.triad_bytes_per_second or ceilings.copy_bytes_per_second
    points = [
        {"intensity": row.flops / row.bytes, "rate": row.flops_per_second, "name": row.implementation}
        for row in rows
        if row.flops and row.bytes and row.flops_per_second
    ]
    if not points or not bandwidth:
        return None
    intensities = [point["intensity"] for point in points if isinstance(point["intensity"], float)]
    low, high = min(intensities) / 4, max(intensities) * 16
    roofs = [{"intensity": edge, "rate": edge * bandwidth, "roof": "memory"} for edge in (low, high)]
    for dtype, rate in ceilings.matmul_flops_per_second.items():
        roofs += [{"intensity": edge, "rate": rate, "roof": dtype} for edge in (low, high)]
    label = "Arithmetic rate over arithmetic intensity of every timed implementation, below the roofs of this device."

    def chart(alt: Any, width: int) -> Any:
        log = alt.Scale(type="log", nice=False)
        sparse = {"tickCount": 5, "format": "~s"}
        x = alt.X("intensity:Q", title="flops per byte", scale=log, axis=alt.Axis(tickCount=5, format="~g"))
        y = alt.Y("rate:Q", title="FLOP/s", scale=alt.Scale(type="log"), axis=alt.Axis(**sparse))
        lines = chart_of(alt, roofs).mark_line(color=MUTED, strokeWidth=1.5).encode(x=x, y=y, detail="roof:N")
        written = {"dy": -7, "color": MUTED, "fontSize": 11}
        flat = chart_of(alt, [roof for roof in roofs[2:] if roof["intensity"] == high]).mark_text(
            align="right", **written
        )
        sloped = chart_of(alt, roofs[:1]).mark_text(align="left", **written)
        shape = alt.Shape("name:N", title=None, legend=alt.Legend(orient="bottom", columns=2 if width < WIDE else 5))
        dots = chart_of(alt, points).mark_point(size=55, color=ACCENT, filled=False, strokeWidth=1.8)
        names = [text.encode(x=x, y=y, text="roof:N") for text in (flat, sloped)]
        return alt.layer(lines, *names, dots.encode(x=x, y=y, shape=shape)).properties(width=width, height=HEIGHT + 60)

    return draw(label, chart)
