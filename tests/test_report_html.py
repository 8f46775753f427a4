"""The pages as text: escaping, nothing from outside, sizes, figures equal to the record's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import msgspec
import pytest
import report_records as samples

from kernbench import record as records
from kernbench.record import Record, Span
from kernbench.report import html, page, picture

KINDS = list(samples.all_kinds())
PERFETTO = "https://ui.perfetto.dev"


class Page(HTMLParser):
    """What a browser would find: tags, attributes that load or link, texts by id, recorded values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.values: list[str] = []
        self.by_id: dict[str, str] = {}
        self._open_id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [found[name] or "" for name in ("src", "href", "xlink:href", "action", "data") if name in found]
        if found.get("id"):
            self.ids.append(found["id"] or "")
            self._open_id = found["id"]
            self.by_id.setdefault(self._open_id or "", "")
        if "data-value" in found:
            self.values.append(found["data-value"] or "")

    def handle_data(self, data: str) -> None:
        if self._open_id is not None:
            self.by_id[self._open_id] += data


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: html.render(record) for name, record in samples.all_kinds().items()}


@pytest.mark.parametrize("name", KINDS)
def test_hostile_names_stay_text_and_nothing_is_loaded(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    assert "<script>alert" not in text.lower()
    assert "javascript:" not in text.lower()
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    found = Page(text)
    assert not {"iframe", "object", "embed", "img", "base", "form"} & set(found.tags)
    assert all(link == "data:," or link.startswith("#") or link == PERFETTO for link in found.links)
    assert len(found.ids) == len(set(found.ids)), "ids are unique"


@pytest.mark.parametrize("name", KINDS)
def test_the_policy_allows_the_pages_own_script_and_no_other(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    run = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    data = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert text.count("<script") == len(run) + len(data), "no other kind of script"
    if not run:
        assert "script-src" not in policy[1]
        return
    (source,) = run
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'; connect-src 'self'" in policy[1]
    for block in data:
        assert json.loads(block)["tracks"]
        assert "<" not in block


@pytest.mark.parametrize("name", KINDS)
def test_pages_are_small(pages: dict[str, str], name: str) -> None:
    assert len(pages[name].encode()) < 400_000


def test_a_hostile_name_inside_a_plot_is_escaped() -> None:
    record = samples.bench()
    record.results[0] = msgspec.structs.replace(record.results[0], implementation=samples.HOSTILE)
    text = html.render(record)
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") > 3


@pytest.mark.parametrize("name", KINDS)
def test_the_fold_holds_the_whole_record(pages: dict[str, str], name: str) -> None:
    record = samples.all_kinds()[name]
    raw, shortened = page.raw_json(record)
    # The parser appends what follows the fold up to the next id; the JSON ends where the text of the fold ends.
    in_page = Page(pages[name]).by_id["raw"]
    shown = json.JSONDecoder().raw_decode(in_page)[0]
    assert shown == json.loads(raw)
    if not shortened:
        assert msgspec.json.decode(raw.encode(), type=Record) == record


def test_long_timelines_leave_the_fold_and_the_page_says_so() -> None:
    record = samples.profile(timeline=samples.timeline(kernels=6000))
    raw, shortened = page.raw_json(record)
    assert shortened
    assert "timeline" not in json.loads(raw)
    text = html.render(record)
    assert "they are in record.json" in text
    assert len(text.encode()) < 1_500_000


def test_figures_equal_the_records(pages: dict[str, str]) -> None:
    profile = samples.profile()
    values = set(Page(pages["profile"]).values)
    assert profile.throughput is not None
    expected = [profile.throughput.units_per_second, profile.launches_per_step, profile.memory_peak_bytes]
    expected += [part.seconds_per_step for part in profile.breakdown]
    expected += [stall.count_per_step for stall in profile.stalls]
    expected += [stall.wait_seconds_per_step for stall in profile.stalls if stall.wait_seconds_per_step is not None]
    expected += [hotspot.self_seconds_per_step for hotspot in profile.hotspots]
    assert {str(value) for value in expected} <= values
    swap = samples.swap()
    assert swap.ratio is not None
    assert {str(swap.ratio.median), str(swap.ratio.noise_floor)} <= set(Page(pages["swap"]).values)
    bench_values = set(Page(pages["bench"]).values)
    assert {str(row.seconds) for row in samples.bench().results if row.seconds is not None} <= bench_values


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("profile", ["drains the device", "if torch.isnan(norm) or torch.isinf(norm):", "312 reads of host tensors"]),
        ("profile-cpu", ["would sync on a GPU", "There is no GPU here"]),
        ("profile-interrupted", ["The run was interrupted in stage trace", "not watched", "No trace was read"]),
        ("swap", ["Prediction beside outcome", "as predicted", "gone", "1 throttled round", "83 of 83 planted errors"]),
        ("swap-unmeasured", ["Speed is not measured here", "Receipt"]),
        ("parity", ["before the gate: 3 of 3 rejected", "drops the second term of add", "needs a GPU", "37 examples"]),
        ("parity-failed", ["✕ failed", "max error 9 is over the bound", "gate: 2 of 3 rejected", "✕ let pass"]),
        ("parity-sanitized", ["compute-sanitizer", "reads 4 bytes past x", "1 of 2 runs failed"]),
        ("bench-builds", ["Compile matrix", "spills 64 bytes a thread", "1 of 3 builds", "does not build"]),
        ("bench", ["impossible", "launch-bound", "fastest", "data lives in the L2 cache", "Measured ceilings"]),
        ("bench-cpu", ["not measured here"]),
        ("comparison", ["not interleaved", "the presets differ: tiny and seed", "The two runs"]),
    ],
)  # fmt: skip
def test_pages_say_it_in_words(pages: dict[str, str], name: str, words: list[str]) -> None:
    for word in words:
        assert word in pages[name], word


def test_sections_with_nothing_to_say_take_one_line() -> None:
    record = samples.profile(stalls=[], syncs_per_step=0.0, cpu_reads_per_step=0.0, timeline=[], launches=None)
    text = html.render(record)
    assert "No host reads: nothing makes the host wait." in text
    assert "No timeline was recorded." in text
    assert "<ol" not in text


def test_plots_that_cannot_be_drawn_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    text = html.render(samples.profile())
    assert "This plot was not drawn, because vl_convert cannot be imported here" in text
    assert 'class="plot"' in text


def test_index_lists_groups_and_damage() -> None:
    entries = [
        html.IndexEntry(f"titan-mac/{name}/report.html", record, "") for name, record in samples.all_kinds().items()
    ]
    entries.append(
        html.IndexEntry("titan-mac/broken/report.html", None, "record.json is damaged (<b>x</b>); profile again")
    )
    text = html.render_index(entries)
    found = Page(text)
    assert len([link for link in found.links if link.endswith("report.html")]) == len(samples.all_kinds())
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<script" not in text
    positions = [text.index(date) for date in ("2026-11-21 19:00", "2026-11-21 15:10", "2026-11-21 14:25")]
    assert positions == sorted(positions), "newest first"


def test_an_empty_index_says_what_to_type() -> None:
    assert "type kernbench profile WORKLOAD" in html.render_index([])


def test_links_in_the_index_are_quoted() -> None:
    entry = html.IndexEntry('a b"><script>/report.html', samples.parity(), "")
    text = html.render_index([entry])
    assert "<script" not in text
    assert 'href="a%20b%22%3E%3Cscript%3E/report.html"' in text


def test_timeline_keeps_every_span_in_sight() -> None:
    spans = [
        Span(track="host", name="outer", start_seconds=0.0, duration_seconds=1.0, kind="op"),
        Span(track="host", name="inner", start_seconds=0.2, duration_seconds=0.3, kind="sync"),
        Span(track="host", name="short", start_seconds=0.6, duration_seconds=1e-6, kind="launch"),
        Span(track="stream 7", name="kernel", start_seconds=0.1, duration_seconds=0.4, kind="kernel"),
    ]
    drawn = picture.layout(spans)
    assert drawn is not None
    host, stream = drawn.tracks
    assert [(bar.x, bar.width, bar.look) for bar in host.bars] == [(0.0, 1000.0, "hosts"), (200.0, 300.0, "waits")]
    assert host.bars[0].y != host.bars[1].y, "nested spans do not cover each other"
    assert "M600.0" in host.slivers["hosts"]
    assert stream.bars[0].title == "kernel: 400 ms, at 100 ms"
    assert [mark.left for mark in drawn.marks] == [20.0]
    assert picture.layout([]) is None


@pytest.mark.parametrize("name", ["profile", "swap", "parity-failed", "bench-workload", "comparison"])
def test_pages_survive_a_round_trip_of_their_record(pages: dict[str, str], name: str) -> None:
    again: Record = msgspec.json.decode(records.encode(samples.all_kinds()[name]), type=Record)
    assert html.render(again) == pages[name]


def test_reports_need_neither_torch_nor_pandas_and_load_plots_late() -> None:
    code = (
        "import sys, kernbench.report.html as html, kernbench.report.console\n"
        "assert not {'altair', 'vl_convert'} & set(sys.modules), 'loaded before rendering'\n"
        "import report_records\n"
        "html.render(report_records.profile())\n"
        "assert 'altair' in sys.modules\n"
        "assert not {'torch', 'triton', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=samples.__file__.rsplit("/", 1)[0], timeout=60)
