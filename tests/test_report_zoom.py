"""The page's own script in a real browser: zooming by keyboard and pointer, frames, Perfetto, and a page without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_traces as traces
from test_report_browser import DESK, browser

from kernbench.report import html, picture

__all__ = ["browser"]

pytestmark = pytest.mark.browser

PERFETTO = "https://ui.perfetto.dev"
RANGE = "#timeline .range"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoom")
    (folder / "h100-train.json.gz").write_bytes(b"a trace")
    (folder / "report.html").write_text(html.render(traces.analyze(), ["h100-train.json.gz"]), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def desk(browser: Any, page_file: Path) -> Iterator[Any]:  # noqa: F811 - the fixture of the other browser tests
    with browser.new_context(viewport=DESK) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        yield page


def ends(page: Any) -> list[float]:
    """Begin and end of what the timeline shows, in ms."""
    scale = {"s": 1e3, "ms": 1.0, "µs": 1e-3, "ns": 1e-6}
    shown = []
    for text in page.inner_text(RANGE).split(" to "):
        number, _, unit = text.partition(" ")
        shown.append(float(number) * scale.get(unit, 1.0))
    return shown


def test_keys_zoom_move_and_come_back(desk: Any) -> None:
    desk.focus("figure.timeline")
    whole = ends(desk)
    desk.keyboard.press("+")
    zoomed = ends(desk)
    assert zoomed[1] - zoomed[0] == pytest.approx((whole[1] - whole[0]) / 2, rel=0.02)
    desk.keyboard.press("ArrowRight")
    assert ends(desk)[0] > zoomed[0]
    for _ in range(20):
        desk.keyboard.press("ArrowRight")
    assert ends(desk)[1] == whole[1], "not beyond the step"
    desk.keyboard.press("0")
    assert ends(desk) == whole


def test_zooming_is_bounded(desk: Any) -> None:
    whole = ends(desk)
    desk.focus("figure.timeline")
    for _ in range(60):
        desk.keyboard.press("+")
    begin, end = ends(desk)
    assert end - begin == pytest.approx(50e-6, rel=0.03), "50 ns, and the figures tell the two ends apart"
    ticks = desk.locator("#timeline .ticks span").all_inner_texts()
    assert len(ticks) == len(set(ticks)) >= 3
    for _ in range(80):
        desk.keyboard.press("-")
    assert ends(desk) == [0, whole[1]]


def test_the_next_wait_is_shown_with_its_line(desk: Any) -> None:
    desk.focus("figure.timeline")
    waits = [span for span in traces.timeline() if span.kind == "sync"]
    desk.keyboard.press("n")
    begin, end = ends(desk)
    assert begin <= 1e3 * waits[0].start_seconds <= end
    assert desk.inner_text("#timeline .readout").startswith("optimizer.py:88: cudaStreamSynchronize: ")
    assert desk.inner_text("#timeline .marks").startswith("▼1")
    for _ in range(len(waits) - 1):
        desk.keyboard.press("n")
    assert ends(desk)[0] <= 1e3 * waits[-1].start_seconds <= ends(desk)[1]
    desk.keyboard.press("n")
    assert ends(desk)[0] <= 1e3 * waits[0].start_seconds, "round again"


def test_dragging_over_a_part_zooms_into_it(desk: Any) -> None:
    whole = ends(desk)
    desk.locator("#timeline svg.bars").last.scroll_into_view_if_needed()
    box = desk.locator("#timeline svg.bars").last.bounding_box()
    middle = box["y"] + box["height"] / 2
    desk.mouse.move(box["x"] + 0.25 * box["width"], middle)
    desk.mouse.down()
    desk.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=5)
    assert desk.is_visible("#timeline .brush")
    desk.mouse.up()
    assert ends(desk) == pytest.approx([0.25 * whole[1], 0.5 * whole[1]], rel=0.03)
    assert desk.is_hidden("#timeline .brush")
    assert desk.locator("#timeline svg.bars rect").count() > 0


def test_a_zoomed_picture_shows_single_kernels(desk: Any) -> None:
    drawn = picture.layout(traces.timeline())
    assert drawn is not None
    desk.focus("figure.timeline")
    for _ in range(6):
        desk.keyboard.press("+")
    begin, end = ends(desk)
    kernels = [span for span in traces.timeline() if span.kind == "kernel"]
    inside = [
        span
        for span in kernels
        if 1e3 * span.start_seconds < end and 1e3 * (span.start_seconds + span.duration_seconds) > begin
    ]
    assert desk.locator("#timeline svg.bars >> nth=-1").locator("rect.works").count() == pytest.approx(
        len(inside), abs=1
    )


def test_bars_that_are_wide_enough_bear_their_names(desk: Any) -> None:
    assert desk.locator("#timeline .name").count() == 0, "the whole step is drawn without"
    desk.focus("figure.timeline")
    for _ in range(9):
        desk.keyboard.press("+")
    named = "nodes => nodes.map(node => [node.textContent, node.getBoundingClientRect().width])"
    found = desk.eval_on_selector_all("#timeline .name", named)
    assert found
    assert all(name and width >= 0.05 * DESK["width"] for name, width in found)
    known = {span.name.removeprefix("void ") for span in traces.analyze().timeline}
    assert {name for name, _ in found} <= known
    desk.keyboard.press("0")
    assert desk.locator("#timeline .name").count() <= len(found)


def test_pointing_at_a_bar_names_it(desk: Any) -> None:
    bars = desk.locator("#timeline svg.bars").last
    bars.scroll_into_view_if_needed()
    box = bars.bounding_box()
    desk.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 8)
    assert desk.inner_text("#timeline .readout").startswith("gemm_")


def test_a_frame_takes_the_full_width_and_gives_it_back(desk: Any) -> None:
    frame = desk.locator(".frame", has_text="optimizer.py: step")
    whole = desk.locator(".frames").bounding_box()["width"]
    before = frame.bounding_box()["width"]
    frame.focus()
    desk.keyboard.press("Enter")
    assert frame.bounding_box()["width"] == pytest.approx(whole, abs=1)
    assert "40.0 ms" in desk.inner_text("#flame .readout")
    assert desk.locator(".frame", has_text="model.py: forward").is_hidden()
    assert desk.locator(".frame", has_text="train.py: train_step").is_visible(), "its parent stays"
    desk.keyboard.press("Enter")
    assert frame.bounding_box()["width"] == pytest.approx(before, abs=1)


def test_library_frames_open_by_keyboard(desk: Any) -> None:
    desk.click("#flame > details > summary")
    library = desk.locator("#flame .tree summary", has_text="torch (+14)")
    assert desk.locator("#flame .tree", has_text="cudaLaunchKernel").count()
    assert desk.locator("#flame .tree .leaf", has_text="cudaLaunchKernel").is_hidden()
    library.focus()
    desk.keyboard.press("Enter")
    desk.locator("#flame .tree summary", has_text="aten::mm").click()
    assert desk.locator("#flame .tree .leaf", has_text="cudaLaunchKernel").is_visible()


def test_perfetto_gets_the_chosen_trace_and_nothing_is_asked_for_before(desk: Any, page_file: Path) -> None:
    asked: list[str] = []
    desk.context.on("request", lambda request: asked.append(request.url))
    desk.context.route(
        f"{PERFETTO}/**",
        lambda route: route.fulfill(
            content_type="text/html",
            body="""<script>
            window.addEventListener("message", (event) => {
              if (event.data === "PING") event.source.postMessage("PONG", "*");
              else if (event.data.perfetto) document.title = event.data.perfetto.fileName + " " +
                new TextDecoder().decode(event.data.perfetto.buffer);
            });
            </script>""",
        ),
    )
    with desk.expect_file_chooser() as chooser:
        desk.click("text=Open in Perfetto")
    assert asked == []
    with desk.context.expect_page() as opened:
        chooser.value.set_files(str(page_file.parent / "h100-train.json.gz"))
    opened.value.wait_for_function("document.title.endsWith('a trace')", timeout=20_000)
    assert opened.value.title() == "h100-train.json.gz a trace"


def test_a_page_without_its_script_reads_whole(browser: Any, page_file: Path) -> None:  # noqa: F811
    with browser.new_context(viewport=DESK, java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        assert page.locator("#timeline svg.bars rect").count() > 0
        assert page.locator("#timeline svg.bars path").count() > 0
        assert "optimizer.py:88" in page.inner_text("#timeline .wait-lines")
        assert page.is_visible("text=train.py: train_step >> nth=0")
        assert page.locator("button").count() == 0, "no control that does nothing"
        assert "h100-train.json.gz opens in ui.perfetto.dev" in page.inner_text("#timeline")


def test_print_shows_the_pictures_and_no_controls(desk: Any) -> None:
    desk.emulate_media(media="print")
    assert desk.is_hidden("#timeline .controls")
    assert desk.is_hidden("#flame .controls")
    assert desk.is_visible("#timeline svg.bars >> nth=0")
    assert desk.is_visible("#timeline .wait-lines")
    assert desk.is_visible(".frame >> nth=0")
