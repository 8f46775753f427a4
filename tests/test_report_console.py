"""Terminal output: what stands where, nothing of the data read as markup, progress on standard error only."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import msgspec
import pytest
import report_records as samples
import report_traces as traces
from rich.console import Console

from kernbench import record as records
from kernbench.record import Hotspot
from kernbench.report import bars, console, sentences

REPORT = Path("reports/titan-mac/20261121-142530-profile-3fa9/report.html")


def test_profile_summary(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(samples.profile(), REPORT)
    output = capsys.readouterr()
    lines = output.out.splitlines()
    text = " ".join(output.out.split())
    assert output.err == ""
    assert len(lines) <= 35
    assert text.startswith("A step takes 92.1 ms (median of 20 steps, 95 % interval 91.2–93.1 ms); 6 host reads a step")
    assert "22,200 tokens/s, 1,421 launches a step, no phase in place" in lines
    assert "E idle: host reads 17.0 ms 18 %" in text
    assert any(line.startswith("A━━━━") and "E╌╌╌╌" in line for line in lines), "bars are legible without colour"
    assert "workloads/titan_mac/optimizer.py:88  3 a step, drains the device, waits 4.10 ms a step" in lines
    assert "    if torch.isnan(norm) or torch.isinf(norm):" in lines
    assert lines[-1] == f"report: {REPORT}"


@pytest.mark.parametrize("name", list(samples.all_kinds()))
def test_every_kind_prints_and_keeps_names_as_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = samples.all_kinds()[name]
    console.show(record, REPORT)
    output = capsys.readouterr().out
    assert output.rstrip().endswith(str(REPORT))
    assert "None" not in output
    assert "\x1b" not in output
    if samples.HOSTILE in records.encode(record).decode() and name.startswith("profile-cpu"):
        assert "[red]" in output


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "evil\x1b]0;title\x07\x1b[31m[bold]kernel[/bold]"
    hotspots = [Hotspot(name=name, self_seconds_per_step=1e-3, share=0.5, calls_per_step=1)]
    console.show(samples.profile(hotspots=hotspots, warnings=["\x1b[2J"]), None)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "[bold]kernel[/bold]" in output


def test_warnings_and_endings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(samples.interrupted_profile(), None)
    assert "warning: the run was interrupted in stage trace" in capsys.readouterr().out
    console.show(samples.comparison(), None)
    assert "warning: the presets differ: tiny and seed" in capsys.readouterr().out


def test_swap_shows_change_prediction_parity_and_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(samples.swap(), REPORT)
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Kept: phase 0, no host syncs. A step goes from",
        "step time, interleaved 92.8 ms 75.7 ms ▼ 17.1 ms less (18 %)",
        "launches taken out of a step 26 23 3 fewer than predicted",
        "parity: All 28 comparisons agree",
        "receipt: titan_mac.memory:NeuralMemory.update by python, 1 call a step",
        "drains the device, waits 4.10 ms a step gone",
    ):
        assert words in text


def test_bench_and_parity_tables(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(samples.bench("cpu"), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "triton - not measured here: Triton's interpreter has no speed of its own" in text
    console.show(samples.workload_bench(), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "phase 0 75.0 ms 74.2–75.8 ms 1.23x faster 27,300 tokens/s 1,398 1" in text
    console.show(samples.parity(failing=True), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "fused_adamw 24 2 82 of 83" in text
    assert "failed: fused_adamw, ragged, bfloat16, 10 updates: max error 9" in text
    console.show(samples.sanitized(), None)
    assert "memcheck 2 reads 4 bytes past x; <script>" in " ".join(capsys.readouterr().out.split())
    console.show(samples.built(), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "fused_adamw _update_kernel sm_90 float32 255 0 B 2.00 KiB 1,204 ragged" in text
    assert "failed: spills 64 bytes a thread (ragged" in text


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_runs([])
    assert "start with: kernbench profile" in capsys.readouterr().out
    run = {"run": "20261121-1-profile-aa", "group": "titan-mac", "folder": "x"}
    console.show_runs(
        [
            {**run, "kind": "profile", "status": "complete", "created_utc": "2026-11-21T14:25:30+00:00"},
            {**run, "kind": "damaged", "status": "record.json is damaged ([red]x)"},
        ]
    )
    output = capsys.readouterr().out
    assert "2026-11-21 14:25 UTC" in output
    assert "record.json is damaged ([red]x)" in output
    phases = [{"number": 0, "title": "no host syncs", "flag": "TITAN_SYNC_FREE", "kept": "python"}]
    console.show_declarations(
        {
            "workspace": "/somewhere",
            "workloads": [
                {
                    "name": "titan-mac",
                    "summary": "one step",
                    "unit": "tokens",
                    "presets": ["tiny", "seed"],
                    "phases": phases,
                }
            ],
            "kernels": [{"name": "fused_adamw", "cases": ["ragged"], "dtypes": ["float32"]}],
        }
    )
    output = capsys.readouterr().out
    assert "phase 0: no host syncs  TITAN_SYNC_FREE=1  kept (python)" in output
    assert "presets: tiny, seed; counts tokens" in output
    console.show_journal([{"date": "2026-11-21", "title": "phase 0", "verdict": "keep", "run_id": "x"}])
    assert "keep" in capsys.readouterr().out
    console.show_journal([])
    assert "kernbench swap --phase N" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_doctor(
        {
            "environment": msgspec.to_builtins(samples.environment("cpu")),
            "capabilities": [
                {"name": "Triton", "works": True, "detail": "interpreter"},
                {"name": "NVML", "works": False, "detail": "no device"},
            ],
            "workspaces": ["/somewhere"],
        }
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "Triton yes interpreter" in text
    assert "NVML no no device" in text
    assert "copy 21.4 GB/s" in text


def test_progress_off_a_terminal_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = bars.progress()
    with progress.stage("timing steps", 20) as advance:
        advance(20)
    progress.note("clocks cannot be read")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "timing steps ...\nnote: clocks cannot be read\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = bars.progress(quiet=True)
    with progress.stage("timing steps") as advance:
        advance(1)
    progress.note("nothing")
    assert capsys.readouterr() == ("", "")


def test_bars_nest_and_end_with_their_stage() -> None:
    screen = io.StringIO()
    shown = bars._Bars(Console(file=screen, force_terminal=True, width=80))
    with pytest.raises(RuntimeError), shown.stage("[red]outer", 2) as advance:
        advance(1)
        with shown.stage("inner"):
            shown.note("[bold]said")
        raise RuntimeError
    assert shown.open_stages == 0
    assert not shown.bars.live.is_started
    assert "[red]outer" in screen.getvalue()
    assert "[bold]said" in screen.getvalue()
    with shown.stage("again"):
        assert shown.bars.live.is_started


def test_bars_run_no_thread_beside_timed_steps() -> None:
    import threading

    shown = bars._Bars(Console(file=io.StringIO(), force_terminal=True))
    before = threading.active_count()
    with shown.stage("timing", 3):
        assert threading.active_count() == before


def test_a_terminal_without_these_signs_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.show(samples.profile(), None)
    sys.stdout.flush()
    assert b"A step takes 92.1 ms" in raw.getvalue()


@pytest.mark.parametrize("name", ["analyze", "analyze-healthy", "analyze-ranks", "profile-traced"])
def test_a_trace_takes_thirty_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = traces.all_kinds()[name]
    console.show(record, REPORT)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith(sentences.headline(record)[:60]), "the verdict comes first"
    assert lines[-1] == f"report: {REPORT}"


def test_a_profile_says_what_watching_cost_and_how_many_waits_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(traces.all_kinds()["profile-traced"], REPORT)
    text = " ".join(capsys.readouterr().out.split())
    costs = "tracing takes 1.31x the time, watching lines 4.20x, neither is in the above"
    assert f"{costs}; 5 of 6 waits a step have their line (83 %)" in text


def test_a_trace_says_on_the_terminal_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(traces.analyze(), REPORT)
    output = capsys.readouterr().out
    text = " ".join(output.split())
    for words in (
        "h100-train.json.gz, NVIDIA H100 80GB HBM3, 130,211 events, 3 steps counted, 1,421 launches a step",
        "host read, up to 4.10 ms a step, 4.5 %, optimizer.py:88",
        "if torch.isnan(norm) or torch.isinf(norm):",
        "Three reads a step at optimizer.py:88 drain the device for 4.10 ms.",
        "Replayed unchanged, a step takes 91.2 ms; the trace says 92.1 ms: −1.0 % off, the limit is 5.0 %.",
        "all waits 5.00–5.60 ms a step (6.1 %)",
        "the step as one graph 9.00–11.0 ms a step (12 %)",
        "phase 3 4.00–6.00 ms a step (6.5 %)",
    ):
        assert words in text, words
    assert "device-bound" not in output, "a busy device is no fault"
    assert text.index("host read,") < text.index("Replayed unchanged") < text.index("hotspot own time")


def test_a_healthy_trace_names_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(traces.healthy(), None)
    text = capsys.readouterr().out
    assert text.startswith("Healthy: the device works for 99 % of a step of 92.1 ms.\n")
    assert "up to" not in text


def test_a_refused_replay_and_ranks_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(traces.ranks(), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "The others wait for rank 1 for 12.0 ms a step; 30 % of the communication runs beside other work." in text
    assert "so it cannot say what would be won." in text
    assert "defer" not in text


def test_a_finding_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    (first, *_) = traces.findings()
    record = traces.analyze(
        analysis=traces.analysis(headline=f"{first.sentence} A step takes 92.1 ms.", findings=[first])
    )
    console.show(record, None)
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("drain the device for 4.10 ms") == 1
    assert "host read, up to 4.10 ms a step" in text


def test_a_trace_without_steps_marked_or_analysis_still_prints(capsys: pytest.CaptureFixture[str]) -> None:
    bare = traces.analyze(
        traces=[traces.info(marker="", device="", vendor="amd", counted_steps=0)],
        breakdown=[], hotspots=[], stalls=[], launches=None, idle=None, timeline=[], analysis=None,
    )  # fmt: skip
    console.show(bare, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == ["A step takes 92.1 ms (mean of 3 steps).", "h100-train.json.gz, AMD, 130,211 events"]


def test_two_traces_show_the_operators_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(traces.comparison(), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "aten::mm 12.0 ms 9.00 ms 96 ▼ 3.00 ms less (25 %)" in text
    assert "aten::item 4.00 ms 1.00 ms 6 → 1 ▼ 3.00 ms less (75 %), on the host" in text
    assert "Operator 17 of the step is aten::item before and aten::add after." in text
