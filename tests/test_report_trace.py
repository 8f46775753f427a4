"""What the page says of a trace: in reading order, silent where nothing was found, figures equal to the record's."""

from __future__ import annotations

import re
from typing import get_args

import msgspec
import pytest
import report_records as samples
import report_traces as traces

from kernbench.record import FlameFrame, Span, TraceAnalysis, WhatIf
from kernbench.record.traced import Change
from kernbench.report import differences, flameview, html, picture, traceplots, traceview, tracewords

SECTIONS = re.compile(r'<section id="(\w+)"')


def text_of(page: str) -> str:
    shown = page[: page.index('<section id="record"')]
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", "", shown, flags=re.DOTALL))


def test_the_verdict_stands_first_and_every_section_is_linked() -> None:
    page = html.render(traces.analyze())
    found = SECTIONS.findall(page)
    assert page.index('id="verdict"') < page.index('<section id="step"')
    assert found == [
        "step", "findings", "stalls", "whatif", "timeline", "idle", "hotspots", "launches", "fusion", "roofline",
        "path", "flame", "memory", "traces", "environment", "record",
    ]  # fmt: skip
    assert re.findall(r'<li><a href="#(\w+)">', page) == found
    assert re.findall(r'<li><a href="#(\w+)">', html.render(traces.ranks()))[-4:-3] == ["ranks"]


@pytest.mark.parametrize("name", list(traces.all_kinds()))
def test_the_table_of_contents_is_that_of_the_page(name: str) -> None:
    page = html.render(traces.all_kinds()[name])
    assert re.findall(r'<li><a href="#(\w+)">', page) == SECTIONS.findall(page)


def test_nothing_is_said_of_what_was_not_found() -> None:
    page = html.render(traces.healthy())
    assert SECTIONS.findall(page) == [
        "step", "findings", "whatif", "timeline", "hotspots", "launches", "traces", "environment", "record",
    ]  # fmt: skip
    bare = traces.analyze(
        breakdown=[], hotspots=[], stalls=[], launches=None, idle=None, timeline=[], analysis=TraceAnalysis()
    )
    page = html.render(bare)
    assert SECTIONS.findall(page) == ["traces", "environment", "record"]
    assert "No " not in text_of(page).replace("No step", "")
    assert "A step takes 92.1 ms (mean of 3 steps)" in text_of(page).replace("\N{NO-BREAK SPACE}", " ")


def test_a_healthy_trace_is_called_so_once() -> None:
    sentence = "Healthy: the device works for 99 % of a step of 92.1 ms."
    finding = msgspec.structs.replace(traces.findings()[-1], sentence=sentence)
    analysis = TraceAnalysis(headline=sentence, findings=[finding])
    page = html.render(traces.analyze(stalls=[], analysis=analysis))
    assert "findings" not in SECTIONS.findall(page)
    assert text_of(page).replace("\N{NO-BREAK SPACE}", " ").count("99 %") == 1
    assert '<div class="verdict good">' in page
    assert '<div class="verdict warn">' in html.render(traces.analyze())


def test_the_replays_error_comes_before_its_estimates() -> None:
    page = text_of(html.render(traces.analyze()))
    error = page.index(
        "Replayed unchanged, a step takes 91.2 ms; the trace says 92.1 ms: −1.0 % off, the limit is 5.0 %."
    )
    assert (
        error < page.index("All waits gone" if "All waits gone" in page else "all waits") < page.index("3.10–3.30 ms")
    )
    assert "the read can be put off, not deleted" in page
    assert "3.30 ms" in page
    assert "5.40 ms" in page, "what is won together"


def test_a_replay_that_misses_gives_no_estimate() -> None:
    record = traces.analyze(analysis=traces.analysis(whatif=traces.refused()))
    page = text_of(html.render(record))
    assert "+32 % off" in page
    assert "so it cannot say what would be won." in page
    assert "won a step" not in page
    kept = msgspec.structs.replace(traces.refused(), estimates=traces.whatif().estimates)
    assert traceview.estimates(kept) == [], "a refusal outweighs whatever was left in the record"
    assert tracewords.replay_error(WhatIf(step_seconds=1.0, refused="there is nothing to replay")) == (
        "There is nothing to replay."
    )


def test_every_change_that_the_replay_tries_is_on_the_page() -> None:
    """A kind of change that no group holds would be estimated and never shown."""
    grouped = {change for changes, _ in traceview.ESTIMATES for change in changes}
    assert grouped == set(get_args(Change))
    page = text_of(html.render(traces.analyze()))
    assert "4.00–6.00 ms" in page, "the phase"


def test_savings_name_the_step_that_they_are_of() -> None:
    scaled = traces.whatif(baseline_seconds=70e-3, host_scale=0.71)
    words = "Savings are of the unprofiled step of 70.0 ms, for which host time is taken times 0.71."
    assert tracewords.replay_error(scaled).endswith(words)
    assert "unprofiled" not in tracewords.replay_error(traces.whatif(baseline_seconds=70e-3))
    assert "unprofiled" not in tracewords.replay_error(msgspec.structs.replace(scaled, refused="it misses"))


def test_an_error_that_rounds_to_nothing_has_no_sign() -> None:
    assert ": under 0.1 % off" in tracewords.replay_error(traces.whatif(error=-0.0004))
    assert ": 0 % off" in tracewords.replay_error(traces.whatif(error=0.0))


def test_figures_are_the_records() -> None:
    page = html.render(traces.analyze())
    shown = set(re.findall(r'data-value="([^"]*)"', page))
    found = traces.analysis()
    assert found.whatif is not None
    expected = [item.seconds_per_step for item in found.findings if item.seconds_per_step]
    expected += [item.saving_seconds_per_step[0] for item in found.whatif.estimates]
    for rows in (found.idle_sites, found.fusion, found.roofline, found.critical_path):
        expected += [row.seconds_per_step for row in rows]
    assert {str(value) for value in expected} <= shown


def test_only_the_first_sentence_is_the_headline() -> None:
    text = "Launch-bound: 60 kernels of 4.64 µs a step. A step takes 4.32 ms. 1 more finding below."
    page = html.render(traces.analyze(analysis=traces.analysis(headline=text)))
    assert re.search(r'<h1 id="verdict">Launch-bound: 60 kernels of 4.64.µs a step\.</h1>', page)
    assert '<p class="lede">A step takes 4.32 ms. 1 more finding below.</p>' in page
    assert tracewords.first_sentence("One") == ("One", "")


def test_a_profile_keeps_its_own_verdict_and_adds_the_traces() -> None:
    record = traces.profile()
    page = text_of(html.render(record)).replace("\N{NO-BREAK SPACE}", " ")
    assert record.analysis is not None
    assert page.index("A step takes 92.1 ms") < page.index(record.analysis.headline)
    assert "5 of 6 waits a step have their line (83 %)." in page


def test_marks_carry_their_line_and_the_picture_lists_the_lines() -> None:
    drawn = picture.layout(traces.timeline())
    assert drawn is not None
    assert [(line.number, tracewords.place(line.source), line.count) for line in drawn.lines] == [
        (1, "optimizer.py:88", 3), (2, "memory.py:141", 1), (3, "train.py:52", 1),
    ]  # fmt: skip
    assert [mark.number for mark in drawn.marks] == ["1", "1", "2", "3", "", "1"]
    assert drawn.marks[0].title.startswith("optimizer.py:88: cudaStreamSynchronize: ")
    data = msgspec.json.decode(drawn.data)
    rows = [row for track in data["tracks"] for row in track]
    assert sorted(row[5] for row in rows if row[1] == "waits") == [0, 1, 1, 1, 2, 3]
    assert len(rows) == len(traces.timeline()), "the script has every span that is drawn"
    assert samples.HOSTILE in data["names"]


def test_marks_without_room_have_no_number() -> None:
    spans = [
        Span(track="host", name="sync", start_seconds=at, duration_seconds=1e-4, kind="sync", source=traces.NORM)
        for at in (0.0, 0.001, 0.1)
    ] + [Span(track="stream 7", name="kernel", start_seconds=0.0, duration_seconds=1.0, kind="kernel")]
    drawn = picture.layout(spans)
    assert drawn is not None
    assert [mark.number for mark in drawn.marks] == ["1", "", "1"]


def test_frames_lie_below_their_parents_and_beside_their_siblings() -> None:
    view = flameview.layout(traces.flame(frames=0))
    assert view is not None
    boxes = {box.label: box for box in view.boxes}
    assert (boxes["train.py: train_step"].left, boxes["train.py: train_step"].depth) == (0, 0)
    assert boxes["model.py: forward"].width == pytest.approx(100 * 30 / 92, abs=0.001)
    assert boxes["optimizer.py: step"].left == pytest.approx(100 * 30 / 92, abs=0.001), "siblings in their order"
    assert boxes["torch (+14)"].depth == 2
    assert boxes[samples.HOSTILE].left == pytest.approx(100 * 80 / 92, abs=0.001)
    forward = view.roots[0].children[0]
    assert forward.open
    assert not forward.children[0].open, "library frames are folded"
    assert flameview.layout([]) is None


def test_frames_too_thin_to_see_stay_in_the_tree() -> None:
    frames = [
        FlameFrame(name="step", parent=-1, seconds_per_step=1.0, self_seconds_per_step=1.0, kind="python"),
        FlameFrame(name="thin", parent=0, seconds_per_step=1e-5, self_seconds_per_step=1e-5, kind="op"),
    ]
    view = flameview.layout(frames)
    assert view is not None
    assert [box.label for box in view.boxes] == ["step"]
    assert [node.label for node in view.roots[0].children] == ["thin"]


def test_a_deep_stack_is_cut_and_the_page_still_renders() -> None:
    deep = [
        FlameFrame(name=f"f{index}", parent=index - 1, seconds_per_step=1.0, self_seconds_per_step=0.0, kind="python")
        for index in range(900)
    ]
    page = html.render(traces.analyze(analysis=TraceAnalysis(headline="Deep.", flame=deep)))
    assert f">f{flameview.DEEPEST - 1}<" in page
    assert f">f{flameview.DEEPEST}<" not in page


def test_pictures_of_memory_and_roofline() -> None:
    plot = traceplots.memory(traces.memory())
    assert plot is not None
    assert "4.00 GiB" in plot.wide
    assert "dashed" in plot.wide
    assert traceplots.memory(traces.memory(1)) is None
    points = traces.roofline()
    with_roofs = traceplots.roofline(points, samples.environment().ceilings)
    without = traceplots.roofline(points, None)
    assert with_roofs is not None
    assert without is not None
    assert "bfloat16" in with_roofs.wide
    assert "no roof was measured" in without.label
    assert 'class="roof"' not in without.wide
    assert with_roofs.wide.count('class="dot"') == len(points)
    assert "<script>alert" not in with_roofs.wide
    assert traceplots.roofline([msgspec.structs.replace(points[0], flops=0.0)], None) is None


def test_memory_keeps_its_peak_however_many_points() -> None:
    points = traces.memory(20_000)
    peak = msgspec.structs.replace(points[777], allocated_bytes=4 * 2**30)
    plot = traceplots.memory([*points[:777], peak, *points[778:]])
    assert plot is not None
    assert f"V{traceplots.TOP:.1f}" in plot.wide
    assert len(plot.wide) < 30_000


@pytest.mark.parametrize("beside", [(), ("trace.json.gz",)])
def test_the_trace_beside_the_page_opens_in_perfetto(beside: tuple[str, ...]) -> None:
    page = html.render(traces.profile(), beside)
    assert ('data-trace="trace.json.gz" data-beside' in page) is bool(beside)
    assert page.count("data-trace=") == len(beside), "no link to what is not there"


def test_an_analyzed_trace_is_named_where_it_does_not_lie_beside_the_page() -> None:
    assert 'data-trace="h100-train.json.gz">' in html.render(traces.analyze())
    assert 'data-trace="h100-train.json.gz" data-beside>' in html.render(traces.analyze(), ["h100-train.json.gz"])


def test_a_swap_opens_the_trace_of_each_side() -> None:
    page = html.render(samples.swap(), ["trace.after.json.gz", "trace.before.json.gz"])
    assert re.findall(r'data-trace="([^"]*)"', page) == ["trace.before.json.gz", "trace.after.json.gz"]


def test_two_traces_differ_operator_by_operator() -> None:
    page = html.render(traces.comparison())
    assert SECTIONS.findall(page)[:4] == ["step", "changes", "operators", "stalls"]
    text = text_of(page)
    for words in (
        "1 pair of steps is set side by side; 41 operators did not change.",
        "Operator 17 of the step is aten::item before and aten::add after.",
        "▼ 3.00 ms less (25 %)",
        "▼ 3.00 ms less (75 %), on the host",
        "gone: gemm_old",
        "0 → 4",
        "11 more",
    ):
        assert words in text, words
    rows = differences.operators(traces.difference())
    assert [row.tone for row in rows[:3]] == ["good", "bad", "good"]
    assert {row.tone for row in differences.operators(traces.difference(), shown=False)} == {"neutral"}
    assert [row.cause for row in differences.idle(traces.difference())] == ["host reads", "launch"]
    assert "operators" not in SECTIONS.findall(html.render(samples.comparison()))
