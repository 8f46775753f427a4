"""Drawings in a page as static SVG: Altair describes them, vl-convert draws them, the page's style sheet colours them.

Each is drawn twice, for a desk and for a phone, because text in a scaled picture would become unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDE, NARROW = 800, 290
HEIGHT = 190
# The style sheet resolves these, so one picture serves light, dark and print.
INK, MUTED, LINE, ACCENT, BAND = (f"var(--{name})" for name in ("ink", "muted", "line", "accent", "band"))


@dataclass(frozen=True)
class Plot:
    """One plot: what it shows in a sentence, and its two drawings; ``missing`` says why there are none."""

    label: str
    wide: str = ""
    narrow: str = ""
    missing: str = ""


def draw(label: str, chart: Callable[[Any, int], Any]) -> Plot:
    """Draw both widths; a missing library is said in the plot's place."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        return Plot(label, missing=f"This plot was not drawn, because {error.name} cannot be imported here ({error}).")
    drawings = []
    for width in (WIDE, NARROW):
        specification = _styled(chart(altair, width)).to_dict()
        drawings.append(_inlined(vl_convert.vegalite_to_svg(specification), label))
    return Plot(label, *drawings)


def _styled(chart: Any) -> Any:
    axis = {
        "labelColor": MUTED, "titleColor": MUTED, "domainColor": LINE, "tickColor": LINE, "gridColor": LINE,
        "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "gridOpacity": 0.7,
    }  # fmt: skip
    return (
        chart.properties(background="transparent", padding={"left": 8, "right": 8, "top": 6, "bottom": 0})
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .configure_axisX(grid=False)
        .configure_legend(labelColor=INK, titleColor=MUTED, labelFontSize=11, symbolStrokeColor=INK)
    )


def chart_of(alt: Any, rows: Sequence[Any]) -> Any:
    """A chart over these rows."""
    return alt.Chart(alt.Data(values=list(rows)))


def linear_axis(alt: Any, field: str, title: str) -> Any:
    """A vertical axis that need not begin at zero."""
    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))


def _inlined(svg: str, label: str) -> str:
    """The drawing as it stands inside a page: named, without namespaces (HTML needs none), sized by the style sheet."""
    opening = svg[: svg.index(">") + 1]
    view = re.search(r'viewBox="[^"]*"', opening)
    width = re.search(r' width="(\d+)"', opening)
    assert view is not None
    assert width is not None
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    body = re.sub(r' (?:role|aria-roledescription|aria-label|font-family)="[^"]*"', "", svg[len(opening) :])
    return f'<svg role="img" aria-label="{escaped}" {view[0]} style="max-width:{width[1]}px">{body}'
