"""Verdict sentences and words, for every kind of record and for records that stopped half-way."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import report_records as samples

from kernbench.record import Arm, BenchResult, Overhead, ProfileRecord, Ratio, Stage, TraceAnalysis, Verdict
from kernbench.report import benchwords, html, page, paritywords, sentences


def test_profile_on_a_cpu_speaks_of_a_gpu() -> None:
    assert sentences.headline(samples.profile("cpu")) == (
        "A step takes 92.1 ms (median of 20 steps, 95 % interval 91.2–93.1 ms); "
        "6 host reads a step would make a GPU wait, 3 of them at optimizer.py:88."
    )


def test_a_step_that_tracing_makes_much_longer_is_said_to_be_another_one() -> None:
    analysis = TraceAnalysis(headline="Host-bound: the device waits.")
    assert sentences.lede(samples.profile(analysis=analysis)) == analysis.headline
    slowed = samples.profile(analysis=analysis, overhead=Overhead(trace_ratio=2.96))
    assert sentences.lede(slowed) == (
        "Tracing makes this step 2.96x as long, so what follows is true of the traced step and may not be of the step "
        "itself. Host-bound: the device waits."
    )


def test_profile_on_a_gpu_speaks_of_the_host() -> None:
    assert "; 6 host reads a step make the host wait, 3 of them at" in sentences.headline(samples.profile())


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"stalls": [], "syncs_per_step": 0.0}, "no host reads: nothing makes the host wait."),
        (
            {"stalls": samples.stalls()[1:2], "syncs_per_step": 1.0},
            "1 host read a step makes the host wait, at memory.py:141.",
        ),
        ({"stalls": [], "syncs_per_step": None, "stages": []}, "host reads were not watched."),
    ],
)
def test_stall_clause(changes: dict[str, Any], clause: str) -> None:
    assert sentences.headline(samples.profile(**changes)).endswith(f"; {clause}")


def test_reads_of_host_tensors_are_no_stalls() -> None:
    only_host = [stall for stall in samples.stalls() if stall.klass == "cpu-tensor"]
    assert "nothing makes the host wait" in sentences.headline(samples.profile(stalls=only_host, syncs_per_step=0.0))


def test_swap_names_both_sides_interval_rounds_and_floor() -> None:
    sentence = sentences.headline(samples.swap())
    assert sentence.startswith("Kept: phase 0, no host syncs. A step goes from 92.")
    assert sentence.endswith("1.23x faster (95 % interval 1.22–1.24, n = 30, A/A floor ±0.4 %).")


def test_swap_takes_the_arm_of_its_implementation() -> None:
    seconds = {"before": 2.0, "after compile": 9.0, "after python": 1.0}
    record = samples.swap(arms=[Arm(name=name, seconds=[value]) for name, value in seconds.items()])
    assert sentences.before_after_seconds(record) == (2.0, 1.0)


def test_swap_without_speed_says_why() -> None:
    verdict = Verdict(decision="inconclusive", sentence="inconclusive: a Triton kernel has no speed here", reasons=[])
    record = samples.swap(verdict=verdict, ratio=None, arms=[])
    assert sentences.headline(record) == "Inconclusive: phase 0, no host syncs. A Triton kernel has no speed here."


@pytest.mark.parametrize(
    ("figures", "words", "tone"),
    [
        ((1.23, 1.22, 1.24, 0.004), "1.23x faster", "good"),
        ((0.80, 0.78, 0.82, 0.004), "1.25x slower", "bad"),
        ((1.05, 0.99, 1.10, 0.004), "no change shown", "neutral"),
        ((1.05, 1.04, 1.06, 0.08), "no change shown", "neutral"),
    ],
)
def test_a_change_needs_interval_and_floor(figures: tuple[float, ...], words: str, tone: str) -> None:
    median, low, high, floor = figures
    ratio = Ratio(median=median, low=low, high=high, noise_floor=floor, rounds=30, steps_per_round=1)
    assert (sentences.change(ratio), sentences.ratio_tone(ratio)) == (words, tone)


def test_an_unshown_change_still_names_its_ratio() -> None:
    ratio = Ratio(median=1.01, low=0.99, high=1.03, noise_floor=0.02, rounds=30, steps_per_round=1)
    assert sentences.ratio_evidence(ratio, 0.95).startswith("before/after 1.01x, 95 % interval 0.990–1.03")


def test_parity_counts_failures_and_planted_errors() -> None:
    assert sentences.headline(samples.parity()) == (
        "All 28 comparisons agree with the float64 oracle; 83 of 83 planted errors were caught."
    )
    mixed = samples.parity()
    mixed.results = [msgspec.structs.replace(row, oracle="float32") for row in mixed.results[:2]] + mixed.results[2:]
    assert sentences.headline(mixed) == (
        "All 28 comparisons agree with a float32 oracle (2) and the float64 oracle (26); 83 of 83 planted errors were "
        "caught."
    )
    mixed.results = [msgspec.structs.replace(row, oracle="the side before") for row in mixed.results]
    assert "All 28 comparisons agree with the side before; " in sentences.headline(mixed)
    assert sentences.headline(samples.parity(failing=True)).startswith(
        "2 of 28 comparisons failed, the first one fused_adamw, ragged, bfloat16, 10 updates: max error"
    )


def test_impossible_figures_do_not_win() -> None:
    record = samples.bench()
    rows = benchwords.bench_groups(record.results)["fused_adamw, seed, float32: cold"]
    impossible = next(row for row in rows if row.label == "impossible")
    best = benchwords.fastest([impossible, *rows])
    assert best is not None
    assert best.label != "impossible"


def test_what_eager_against_itself_shows_too_is_no_lead() -> None:
    record = samples.bench()
    rows = [row for row in record.results if row.case == "401-tensors"]
    close = msgspec.structs.replace(rows[2], implementation="other", seconds=(rows[2].seconds or 0) * 1.003)
    lead = msgspec.structs.replace(record, results=[rows[0], rows[2], close])
    assert sentences.headline(lead) == "Fastest: triton."
    quiet = [msgspec.structs.replace(row, noise_floor=0.001) for row in lead.results]
    assert "as fast as the next best" in sentences.headline(msgspec.structs.replace(lead, results=quiet))


def test_builds_and_sanitizer_have_their_sentence() -> None:
    assert sentences.headline(samples.built()).startswith(
        "1 of 3 builds of 1 kernel for sm_90, sm_80, sm_100 failed, the first one fused_adamw, _update_kernel for sm_80"
    )
    good = [build for build in samples.built().builds if build.passed]
    assert benchwords.builds_headline(good) == "2 builds of 1 kernel for sm_90, sm_100: all fit."
    assert sentences.headline(samples.sanitized()).startswith("racecheck and memcheck: 1 of 2 runs failed")
    clean = samples.sanitized().sanitizer[:1]
    assert paritywords.sanitizer_clause(clean) == "racecheck: no findings in 1 run."


def test_bench_on_a_cpu_says_what_was_not_measured() -> None:
    assert sentences.headline(samples.bench("cpu")).endswith("; triton not measured here.")


@pytest.mark.parametrize(
    ("status", "stages", "how"),
    [
        ("running", [], "the run is not finished."),
        (
            "failed",
            [Stage(name="time", status="failed", seconds=1, message="CUDA out of memory")],
            "the run failed in stage time: CUDA out of memory.",
        ),
        (
            "interrupted",
            [Stage(name="time", status="interrupted", seconds=1)],
            "the run was interrupted in stage time.",
        ),
    ],
)
def test_runs_without_a_result_say_how_they_ended(status: str, stages: list[Stage], how: str) -> None:
    record = samples.profile(status=status, stages=stages, steps=None, throughput=None)
    assert sentences.headline(record) == f"No step was timed; {how}"


def test_every_kind_has_a_sentence() -> None:
    for name, record in samples.all_kinds().items():
        sentence = sentences.headline(record)
        assert sentence.endswith("."), name
        assert "None" not in sentence, name


@pytest.mark.parametrize(
    ("before", "after", "unit", "words", "tone"),
    [
        (0.0921, 0.0749, "seconds", "▼ 17.2 ms less (19 %)", "good"),
        (6.0, 1.0, "count", "▼ 5 fewer (83 %)", "good"),
        (0.0, 2.0, "count", "▲ 2 more", "bad"),
        (100.0, 120.0, "tokens/s", "▲ 20.0 tokens/s more (20 %)", "good"),
        (100.0, 80.0, "tokens/s", "▼ 20.0 tokens/s less (20 %)", "bad"),
        (1.0, 1.0, "seconds", "the same", "neutral"),
        (1e-4, 44e-3, "seconds", "▲ 43.9 ms more (440x)", "bad"),
        (None, 1.0, "seconds", "", "neutral"),
    ],
)
def test_differences_in_words(before: float | None, after: float, unit: str, words: str, tone: str) -> None:
    assert sentences.difference(before, after, unit) == (words, tone)


def test_parts_keep_letter_and_look_on_both_sides() -> None:
    drawn = page.breakdown([("before", samples.breakdown()), ("after", samples.breakdown()[::-1][:-1])])
    assert drawn is not None
    assert [bar.label for bar in drawn.bars] == ["before", "after"]
    letters = [{segment.cause: (segment.letter, segment.look) for segment in bar.segments} for bar in drawn.bars]
    assert letters[1].items() <= letters[0].items()
    assert sum(segment.percent for segment in drawn.bars[0].segments) == pytest.approx(100, abs=0.1)
    assert sum(segment.percent for segment in drawn.bars[1].segments) < 100
    assert drawn.legend[0].seconds == [33.0e-3, None]


def test_stalls_pair_by_text_although_lines_move() -> None:
    before = samples.stalls()[:2]
    moved = [msgspec.structs.replace(samples.stalls()[1], line=999)]
    pairs = page.stall_pairs(before, moved)
    assert [(pair.words, pair.tone) for pair in pairs] == [("gone", "good"), ("the same", "neutral")]


def test_predictions_are_set_beside_outcomes() -> None:
    record = samples.swap()
    assert record.predicted is not None
    promises = page.promises(record.predicted, record.before, record.after, record.ratio)
    rows = {row.name: (row.predicted, row.measured, row.words) for row in promises}
    assert rows["host reads taken out of a step"] == ("5", "5", "as predicted")
    assert rows["launches taken out of a step"] == ("26", "23", "3 fewer than predicted")
    assert rows["step time before / after"] == ("1.05–1.25x", "1.23x (1.22–1.24)", "as predicted")
    unmeasured = page.promises(record.predicted, record.before, None, None)
    assert {row.measured for row in unmeasured} == {"not measured"}


def test_the_replay_has_a_row_of_its_own_unless_it_is_all_that_was_predicted() -> None:
    record = samples.swap()
    assert record.predicted is not None
    predicted = msgspec.structs.replace(record.predicted, replayed=(1.3, 1.4))
    rows = {row.name: row for row in page.promises(predicted, record.before, record.after, record.ratio)}
    assert rows["step time before / after"].predicted == "1.05–1.25x"
    by_replay = rows["step time before / after, by the replay"]
    assert (by_replay.predicted, by_replay.words) == ("1.30–1.40x", "less than predicted")
    alone = msgspec.structs.replace(predicted, ratio_low=1.3, ratio_high=1.4)
    names = [row.name for row in page.promises(alone, record.before, record.after, record.ratio)]
    assert names[-1] == "step time before / after, by the replay"
    assert "step time before / after" not in names


def test_step_time_without_throughput_is_the_median() -> None:
    record = samples.profile(throughput=None)
    assert isinstance(record, ProfileRecord)
    time = sentences.step_time(record)
    assert time is not None
    assert time.interval is None
    assert time.seconds == pytest.approx(92.1e-3, rel=0.01)


def test_what_was_not_shown_is_neither_better_nor_worse() -> None:
    record = samples.swap()
    assert record.before is not None
    assert record.after is not None
    sides = [("before", record.before.breakdown), ("after", record.after.breakdown)]
    for shown, expected in ((True, {"good", "neutral"}), (False, {"neutral"})):
        drawn = page.breakdown(sides, shown=shown)
        assert drawn is not None
        assert {row.tone for row in drawn.legend} == expected
    rows = {row.name: row for row in page.changes(record.before, record.after, race=(0.1, 0.101), shown=False)}
    assert rows["step time, interleaved"].words == "▲ 1.00 ms more (1.0 %)"
    assert rows["step time, interleaved"].tone == "neutral"
    assert rows["throughput, interleaved"].after == 2048 / 0.101
    assert rows["launches a step"].tone == "good", "counts need no interval"


def test_arms_that_were_raced_in_vain_are_named() -> None:
    arms = [Arm(name=name, seconds=[1.0, 2.0, 3.0]) for name in ("before", "again", "after python", "after compile")]
    assert sentences.other_arms(samples.swap(arms=arms)) == [("compile", 2.0)]
    assert "Also raced: compile" in " ".join(html.render(samples.swap(arms=arms)).replace("<", " <").split())


def test_what_was_not_timed_stands_with_what_was_and_large_cases_need_no_table() -> None:
    def row(case: str, implementation: str, seconds: float | None, **fields: Any) -> BenchResult:
        return BenchResult(
            kernel="swiglu", case=case, dtype="float32", implementation=implementation, seconds=seconds, **fields
        )

    missing: dict[str, Any] = {"label": "not measured here", "note": "a large case"}
    record = samples.bench()
    record.results = [
        row("large", "eager", None, **missing),
        row("small", "eager", 2e-6, cache="cold"),
        row("small", "triton", None, label="not measured here", note="interpreted"),
        row("small", "eager", 4e-6, cache="cold", direction="backward"),
        row("small", "compile", 1e-6, cache="cold", direction="backward"),
        row("small", "triton", None, label="failed", note="killed", direction="backward"),
    ]
    groups = benchwords.bench_groups(record.results)
    assert {title: [one.implementation for one in rows] for title, rows in groups.items()} == {
        "swiglu, large, float32": ["eager"],
        "swiglu, small, float32: cold": ["eager", "triton"],
        "swiglu, small, float32, backward: cold": ["eager", "compile", "triton"],
    }
    assert benchwords.not_measured(groups) == {"a large case": ["swiglu, large, float32"]}
    assert sentences.headline(record) == (
        "Fastest in 1 of 2 cases: eager. Fastest in 1 of 2 cases: compile, 4.00x as fast as the next best; "
        "triton not measured here."
    )
    page = html.render(record)
    assert page.count("<table") == 2
    assert "a large case" in page
