"""Pictures of a trace's roofline and memory as static SVG, drawn here: a plotting library takes longer to load than a
trace takes to be analysed.

Each is drawn twice, for a desk and for a phone, because text in a scaled picture would become unreadable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

from kernbench.record import Ceilings, MemoryPoint, RooflinePoint
from kernbench.report import units
from kernbench.report.drawing import NARROW, WIDE, Plot

HEIGHT = 230
LEFT, RIGHT, TOP, BOTTOM = 84, 14, 14, 34
MOST_POINTS = 60
SHAPES = {"compute": "square", "memory": "circle", "launch": "triangle", "unknown": "cross"}


def memory(points: Sequence[MemoryPoint]) -> Plot | None:
    """Allocated and reserved memory over time; None where fewer than two moments are known."""
    if len(points) < 2:
        return None
    ordered = sorted(points, key=lambda point: point.seconds)
    first, last = ordered[0].seconds, ordered[-1].seconds
    most = max(max(point.allocated_bytes, point.reserved_bytes) for point in ordered)
    if last <= first or most <= 0:
        return None
    reserved = any(point.reserved_bytes > 0 for point in ordered)
    label = "Device memory over the traced time: allocated, filled" + (
        "; reserved, the dashed line." if reserved else "."
    )

    def draw(width: int) -> str:
        across, down = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

        def at(point: MemoryPoint, value: int) -> tuple[float, float]:
            return LEFT + across * (point.seconds - first) / (last - first), TOP + down * (1 - value / most)

        filled = _steps([at(point, point.allocated_bytes) for point in ordered])
        base = TOP + down
        parts = [f'<path class="area" d="{filled}V{base}H{LEFT}Z"/>', f'<path class="edge" d="{filled}"/>']
        if reserved:
            parts.append(f'<path class="dashed" d="{_steps([at(point, point.reserved_bytes) for point in ordered])}"/>')
        marks = [(TOP + down * (1 - share), units.size(share * most)) for share in (0.0, 0.5, 1.0)]
        rows = "".join(_row(y, text, width) for y, text in marks)
        unit, name = units.time_unit(last - first)
        count = 5 if width >= WIDE else 3
        columns = "".join(
            _column(LEFT + across * index / count, f"{units.number((last - first) * index / count / unit)} {name}")
            for index in range(count)
        )
        return rows + columns + "".join(parts)

    return _plot(label, draw)


def roofline(points: Sequence[RooflinePoint], ceilings: Ceilings | None) -> Plot | None:
    """Achieved rate over arithmetic intensity of the operators whose shapes are known; roofs only where measured."""
    known = [
        (point.flops / point.bytes, point.flops * point.calls_per_step / point.seconds_per_step, point)
        for point in points
        if point.flops > 0 and point.bytes > 0 and point.seconds_per_step > 0 and point.calls_per_step > 0
    ][:MOST_POINTS]
    if not known:
        return None
    bandwidth = None if ceilings is None else ceilings.triad_bytes_per_second or ceilings.copy_bytes_per_second
    rates = {} if ceilings is None else ceilings.matmul_flops_per_second
    low, high = min(x for x, _, _ in known) / 3, max(x for x, _, _ in known) * 3
    bottom, top = min(y for _, y, _ in known) / 3, max([y for _, y, _ in known] + list(rates.values())) * 2
    roofs = "below the measured roofs" if bandwidth else "no roof was measured for this device"
    label = (
        f"Arithmetic rate over arithmetic intensity of {len(known)} operators by shape, {roofs}. "
        "Circle: bound by memory; square: by arithmetic; triangle: by launches; cross: not told."
    )

    def draw(width: int) -> str:
        across, down = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

        def x(value: float) -> float:
            return LEFT + across * math.log(value / low) / math.log(high / low)

        def y(value: float) -> float:
            return TOP + down * (1 - math.log(value / bottom) / math.log(top / bottom))

        parts = [
            _row(y(10.0**power), units.flops_rate(10.0**power).replace(".00", "").replace(".0", ""), width)
            for power in _decades(bottom, top)
        ]
        parts += [_column(x(10.0**power), f"{10.0**power:g}") for power in _decades(low, high)]
        for name, rate in rates.items():
            if bottom < rate < top:
                parts.append(f'<path class="roof" d="M{LEFT} {y(rate):.1f}h{across}"/>')
                parts.append(f'<text x="{width - RIGHT}" y="{y(rate) - 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if bandwidth:
            begin, end = max(low, bottom / bandwidth), min(high, top / bandwidth)
            if begin < end:
                ends = (x(begin), y(begin * bandwidth), x(end), y(end * bandwidth))
                parts.append('<path class="roof" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'.format(*ends))
        parts += [_dot(x(across_), y(up), point) for across_, up, point in known]
        return "".join(parts)

    return _plot(f"{label} Across: flops per byte.", draw)


def _dot(x: float, y: float, point: RooflinePoint) -> str:
    title = escape(f"{point.op} {point.shapes} {point.dtype}: {units.seconds(point.seconds_per_step)} a step")
    shape = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"',
        "square": f'<path d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"',
        "triangle": f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"',
        "cross": f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"',
    }[SHAPES[point.bound]]
    return f'{shape} class="dot"><title>{title}</title></{"circle" if shape.startswith("<circle") else "path"}>'


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A line that keeps its height until the next point; of the points of one column the highest stays."""
    columns: dict[int, tuple[float, float]] = {}
    for x, y in points:
        column = round(x)
        columns[column] = (x, min(y, columns[column][1])) if column in columns else (x, y)
    found = list(columns.values())
    return f"M{found[0][0]:.1f} {found[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in found[1:])


def _decades(low: float, high: float) -> list[int]:
    """Powers of ten between two values, at most about six of them."""
    powers = list(range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1))
    return powers[:: max(1, len(powers) // 5)]


def _row(y: float, text: str, width: int) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _column(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(text)}</text>'


def _plot(label: str, draw: Callable[[int], str]) -> Plot:
    wide, narrow = (
        f'<svg role="img" class="own" aria-label={quoteattr(label)} viewBox="0 0 {width} {HEIGHT}" '
        f'style="max-width:{width}px">{draw(width)}</svg>'
        for width in (WIDE, NARROW)
    )
    return Plot(label, wide, narrow)
