"""The pages in a real browser: no request, no error, phone, dark, print and keyboard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import report_records as samples

from kernbench.report import html, sentences

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pages")
    kinds = samples.all_kinds()
    for name, record in kinds.items():
        (target / f"{name}.html").write_text(html.render(record), encoding="utf-8")
    entries = [html.IndexEntry(f"{name}.html", record, "") for name, record in kinds.items()]
    entries.append(html.IndexEntry("broken/report.html", None, "damaged"))
    (target / "index.html").write_text(html.render_index(entries), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = os.environ.get("KERNBENCH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        pytest.skip("no chromium on the PATH; install it or set KERNBENCH_CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=binary, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def desk(browser: Any) -> Iterator[Any]:
    with browser.new_context(viewport=DESK, color_scheme="light") as context:
        yield context.new_page()


def address(folder: Path, name: str) -> str:
    return (folder / f"{name}.html").as_uri()


def test_pages_ask_for_nothing_and_complain_of_nothing(desk: Any, folder: Path) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    desk.on("request", lambda request: asked.append(request.url))
    desk.on("console", lambda message: complaints.append(message.text))
    desk.on("pageerror", lambda error: complaints.append(str(error)))
    desk.on("dialog", lambda dialog: complaints.append(dialog.message))
    for path in sorted(folder.glob("*.html")):
        asked.clear()
        desk.goto(path.as_uri())
        assert asked == [path.as_uri()], path.name
    assert complaints == []


def test_figures_in_the_page_are_the_records(desk: Any, folder: Path) -> None:
    profile = samples.profile()
    desk.goto(address(folder, "profile"))
    shown = desk.inner_text("#verdict").replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")
    assert shown == sentences.headline(profile)
    read = "nodes => nodes.map(node => Number(node.dataset.value))"
    hotspot_times = desk.eval_on_selector_all("#hotspots tbody td:nth-child(2) [data-value]", read)
    assert hotspot_times == [hotspot.self_seconds_per_step for hotspot in profile.hotspots]
    counts = desk.eval_on_selector_all("#stalls > ol > .stall strong [data-value]", read)
    assert counts == [stall.count_per_step for stall in sentences.waiting(profile.stalls)]
    parts = desk.eval_on_selector_all("#step .legend [data-value]", read)
    assert parts == [part.seconds_per_step for part in profile.breakdown]
    assert json.loads(desk.text_content("#raw"))["run_id"] == profile.run_id


def test_hostile_names_are_shown_as_text(desk: Any, folder: Path) -> None:
    desk.goto(address(folder, "profile"))
    names = desk.eval_on_selector_all("#hotspots tbody .mono", "nodes => nodes.map(node => node.textContent)")
    assert samples.HOSTILE in names
    kinds = desk.evaluate("[...document.scripts].map(script => script.type)")
    assert kinds == ["application/json", ""]
    titles = desk.eval_on_selector_all("#timeline title", "nodes => nodes.map(node => node.textContent)")
    assert any(samples.HOSTILE in title for title in titles)


def test_bars_before_and_after_share_a_scale(desk: Any, folder: Path) -> None:
    desk.goto(address(folder, "swap"))
    ends = "bar.lastElementChild.getBoundingClientRect().right - bar.getBoundingClientRect().left"
    widths = desk.eval_on_selector_all(".stack-bar", f"bars => bars.map(bar => {ends})")
    record = samples.swap()
    assert record.before is not None
    assert record.after is not None
    totals = [sum(part.seconds_per_step for part in side.breakdown) for side in (record.before, record.after)]
    assert widths[1] / widths[0] == pytest.approx(totals[1] / totals[0], rel=0.03)


def test_first_screen_answers(desk: Any, folder: Path) -> None:
    for name in ("profile", "swap"):
        desk.goto(address(folder, name))
        bottoms = [
            desk.eval_on_selector(selector, "node => node.getBoundingClientRect().bottom")
            for selector in ("#verdict", ".stack")
        ]
        assert max(bottoms) < DESK["height"], name


def test_phones_need_no_sideways_scrolling(browser: Any, folder: Path) -> None:
    with browser.new_context(viewport=PHONE) as context:
        phone = context.new_page()
        for path in sorted(folder.glob("*.html")):
            phone.goto(path.as_uri())
            phone.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
            assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path.name
        phone.goto(address(folder, "profile"))
        sizes = phone.eval_on_selector_all(
            ".plot .narrow text", "nodes => nodes.map(node => node.getBoundingClientRect().height)"
        )
        assert min(size for size in sizes if size) > 8, "plots stay readable"
        assert phone.is_hidden(".plot .wide")


def test_dark_and_print(browser: Any, folder: Path) -> None:
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    with browser.new_context(viewport=DESK, color_scheme="light") as context:
        page = context.new_page()
        page.goto(address(folder, "swap"))
        light = page.evaluate(colours)
        point = "getComputedStyle(document.querySelector('#speed .wide svg path[fill^=var]')).fill"
        light_point = page.evaluate(point)
        page.emulate_media(color_scheme="dark")
        dark, dark_point = page.evaluate(colours), page.evaluate(point)
        assert light[0] != dark[0]
        assert light[1] != dark[1]
        assert light_point != dark_point, "plots follow the colour scheme"
        page.emulate_media(color_scheme="dark", media="print")
        assert page.evaluate(colours) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        assert page.is_hidden("nav.contents")
        assert len(page.pdf()) > 10_000


def test_text_contrasts_with_its_ground(browser: Any, folder: Path) -> None:
    for scheme in ("light", "dark"):
        with browser.new_context(viewport=DESK, color_scheme=scheme) as context:
            page = context.new_page()
            page.goto(address(folder, "swap"))
            for ground, ink in (
                *(("--page", ink) for ink in ("--ink", "--muted", "--good", "--bad", "--warn", "--accent")),
                ("--good-soft", "--good"), ("--bad-soft", "--bad"), ("--warn-soft", "--warn"),
                *((f"--busy{index}", f"--on{index}") for index in range(6)),
            ):  # fmt: skip
                colours = [_hex(page, name) for name in (ground, ink)]
                assert _contrast(*colours) >= 4.5, (scheme, ground, ink)


def test_folds_open_by_keyboard(desk: Any, folder: Path) -> None:
    desk.goto(address(folder, "parity-failed"))
    desk.focus("#record summary")
    assert not desk.eval_on_selector("#record details", "node => node.open")
    desk.keyboard.press("Enter")
    assert desk.eval_on_selector("#record details", "node => node.open")
    desk.goto(address(folder, "profile"))
    desk.keyboard.press("Tab")
    assert desk.evaluate("document.activeElement.className") == "skip"
    desk.keyboard.press("Enter")
    assert desk.evaluate("location.hash") == "#content"


def test_long_names_of_kernels_take_three_lines_and_open_by_keyboard(desk: Any, tmp_path: Path) -> None:
    name = "void at::native::elementwise_kernel<128, 4, " + ", ".join(["at::native::gpu_kernel_impl"] * 30) + ">"
    record = samples.profile()
    record.hotspots = [msgspec.structs.replace(record.hotspots[0], name=name), *record.hotspots[1:]]
    path = tmp_path / "page.html"
    path.write_text(html.render(record), encoding="utf-8")
    desk.goto(path.as_uri())
    height = "node => node.getBoundingClientRect().height / parseFloat(getComputedStyle(node).lineHeight)"
    assert desk.eval_on_selector("#hotspots .mono.long", height) == pytest.approx(3, abs=0.2)
    desk.focus("#hotspots .mono.long")
    assert desk.eval_on_selector("#hotspots .mono.long", height) > 8
    assert desk.text_content("#hotspots .mono.long") == name


def test_pictures_have_names(desk: Any, folder: Path) -> None:
    for name in ("profile", "swap", "bench"):
        desk.goto(address(folder, name))
        unnamed = desk.eval_on_selector_all(
            "svg, [role=img], [role=region]",
            "nodes => nodes.filter(node => !node.getAttribute('aria-label')).length",
        )
        assert unnamed == 0


def test_the_index_leads_to_reports(desk: Any, folder: Path) -> None:
    desk.goto(address(folder, "index"))
    desk.click("main a[href='comparison.html']")
    assert desk.url == address(folder, "comparison")


def _hex(page: Any, name: str) -> tuple[int, ...]:
    text = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{name}')").strip().lstrip("#")
    return tuple(int(text[index : index + 2], 16) for index in (0, 2, 4))


def _contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Contrast ratio of WCAG 2, 1 to 21."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
