"""Figures of a document beside what exists: the bytes it counts, the time it implies, and the entry in the journal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import report_records
from terminal import run

from kernbench import claims, journal, registry
from kernbench.record import BenchRecord, BenchResult, Ceilings, ClaimCheck
from kernbench.report import html, sweepplot
from kernbench.spec import Claims

BLEND = registry.kernel("seed_blend").declaration
ROOFS = Ceilings(copy_bytes_per_second=4.2e12, launch_seconds=2.1e-6)


def rows(*, cold: float | None, called: float | None) -> list[BenchResult]:
    """Rows of all documented cases, timed on the device and as called."""
    return [
        BenchResult(
            kernel="seed_blend", case=claim.case, dtype=dtype, implementation=name, seconds=seconds, cache=cache,
            direction=direction,  # type: ignore[arg-type]
        )
        for claim in claims_of().claims
        for dtype, name, direction, cache, seconds in (
            ("float32", "eager", "forward", "cold", 9e-5),
            ("bfloat16", "triton", "forward", "cold", 1e-3),
            ("float32", "triton", "backward", "cold", 1e-3),
            ("float32", "triton", "forward", "cold", cold),
            ("float32", "triton", "forward", "cold, as called", called),
            ("float32", "triton", "forward", "graph", 1e-6),
        )
        if seconds is not None
    ]  # fmt: skip


def claims_of() -> Claims:
    assert BLEND.claims is not None
    return BLEND.claims


def checked(**times: float | None) -> list[ClaimCheck]:
    return claims.check(BLEND, rows(**{"cold": 2.9e-6, "called": 1.1e-5, **times}), ROOFS)


COMMAND = "kernbench bench seed_blend --case 'document-*'"


def bench(found: list[ClaimCheck], run_id: str = "r1") -> BenchRecord:
    environment = msgspec.structs.replace(report_records.environment(), ceilings=ROOFS)
    return BenchRecord(
        run_id=run_id, created_utc="2026-11-21T14:25:30+00:00", command=COMMAND,
        environment=environment, status="complete", results=rows(cold=2.9e-6, called=1.1e-5), claims=found,
    )  # fmt: skip


def test_the_documents_table_follows_from_bytes_that_do_not_exist() -> None:
    """Times and factors as the specification's section 9 works them out."""
    small, medium, large, extreme = checked()
    assert [round(one.stated_seconds * 1e6, 1) for one in (small, medium, large, extreme)] == [15.1, 15.2, 14.0, 15.1]
    factors = [one.counted_bytes / one.real_bytes for one in (small, medium, large, extreme)]
    assert [round(factor) for factor in factors] == [14, 71, 139, 271]
    assert [round(one.real_bytes / 1e3) for one in (small, medium, large, extreme)] == [133, 266, 270, 279]
    assert [round(one.real_bytes / one.stated_seconds / 1e9) for one in (small, medium, large, extreme)] == [
        9, 18, 19, 18,
    ]  # fmt: skip


def test_real_bytes_are_those_of_the_cost_but_for_statistics_and_state() -> None:
    import torch

    for claim in claims_of().claims:
        moved = BLEND.cost(BLEND.case(claim.case), torch.float32).bytes_moved
        assert claim.real_bytes < moved < 1.01 * claim.real_bytes


def test_the_inputs_are_the_documents() -> None:
    import torch

    inputs = BLEND.make_inputs(BLEND.case("document-medium"), torch.float32, torch.device("cpu"), 0)
    assert inputs["x"].shape == (32, 1024)
    assert inputs["lifecycle"].tolist() == [3] * 150 + [0] * 350
    assert inputs["operator"].tolist() == [number % 3 for number in range(500)]


def test_the_sentence() -> None:
    extreme = checked()[-1]
    assert extreme.sentence == (
        "Extreme: its 4.99 TB/s count 1,024,000 columns of 2,000 seeds, where x has 4,096, those of 8: 271x the 279 kB "
        "that there are, which are 18.5 GB/s over its 15.1 µs. Here the device takes 2.90 µs and a call 11.0 µs; "
        "launching nothing takes 2.10 µs, 19 % of it, and copying what there is 66.3 ns. Counted that way this would "
        "be 26.0 TB/s, 6.19x what this device copies."
    )
    assert claims.conclusion(checked()) == (
        "The bandwidths of Phase 3 GPU Optimization report of 2025-01-24 count bytes that do not exist, 14.2 to 271 "
        "times too many; that, and no cache, is how 4.99 TB/s come out of an RTX 4060 Ti with 288 GB/s. From its "
        "smallest size to its largest it counts 40.0x the bytes, and its time stays at 14.0–15.2 µs (here "
        "11.0 µs): that is what launching takes, not what moving bytes does."
    )


def test_without_times_what_is_counted_is_told_all_the_same() -> None:
    found = claims.check(BLEND, rows(cold=None, called=None), None)
    assert [one.seconds for one in found] == [None] * 4
    assert found[-1].sentence.endswith("which are 18.5 GB/s over its 15.1 µs.")
    assert "(here" not in claims.conclusion(found)
    assert not journal.belongs(bench(found))


def test_only_the_cases_that_were_asked_for() -> None:
    assert claims.check(BLEND, [row for row in rows(cold=1e-6, called=None) if row.case == "document-large"], ROOFS)[
        0
    ].title == ("Large")
    assert claims.check(replace(BLEND, claims=None), rows(cold=1e-6, called=None), ROOFS) == []
    assert claims.check(BLEND, [], ROOFS) == []


def test_every_claim_is_on_a_case_that_there_is() -> None:
    for found in registry.kernels().values():
        spec = found.declaration
        assert (
            {claim.case for claim in spec.claims.claims} <= {case.name for case in spec.cases} if spec.claims else True
        )


def test_the_page_sets_both_side_by_side() -> None:
    found = bench(checked())
    table = sweepplot.claims(found)
    assert table is not None
    assert {len(row) for row in table.rows} == {len(table.headings)}
    page = html.render(found)
    assert "4.99 TB/s" in page
    assert "271x" in page
    assert table.said[0] == claims.conclusion(found.claims)
    assert html.render(bench([])).count("Phase 3 GPU") == 0


def test_the_journal_has_one_entry_for_a_bench_and_rebuilds_it(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    found = bench(checked())
    assert journal.belongs(found)
    assert journal.append(path, found, tmp_path / "reports" / "report.html")
    assert not journal.append(path, found, tmp_path / "reports" / "report.html")
    text = path.read_text()
    assert "## 2026-11-21 seed_blend beside the figures of Phase 3 GPU Optimization report of 2025-01-24\n" in text
    assert (
        "| Extreme | 4.99 TB/s | 15.1 µs | 75.4 MB | 279 kB | 271x | 18.5 GB/s | 2.90 µs | 11.0 µs | 96.0 GB/s |"
        in text
    )
    assert "- Command: `kernbench bench seed_blend --case 'document-*'`" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {11}
    (entry,) = journal.entries(path)
    assert (entry.run_id, entry.verdict) == ("r1", "")
    record_file = tmp_path / "record.json"
    record_file.write_bytes(msgspec.json.encode(found))
    runs, skipped = journal.collect([record_file])
    assert skipped == []
    assert journal.rebuild(tmp_path / "again.md", runs) == ["r1"]


def test_a_bench_on_the_cpu_shows_the_bytes_and_leaves_the_journal_alone(toy_workspace: Path) -> None:
    before = (toy_workspace / "JOURNAL.md").read_text()
    result = run(
        "bench", "seed_blend", "--case", "document-sm*", "--dtype", "float32", "--direction", "forward",
        "--rounds", "3", "--json", "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (claim,) = found["claims"]
    assert (claim["title"], claim["seconds"]) == ("Small", None)
    assert claim["sentence"].startswith(
        "Small: its 125 GB/s count 6,400 columns of 100 seeds, where x has 512, those of 8"
    )
    assert {row["case"] for row in found["results"]} == {"document-small"}
    assert (toy_workspace / "JOURNAL.md").read_text() == before


@pytest.mark.gpu
def test_a_bench_on_a_gpu_measures_and_enters_the_journal(toy_workspace: Path) -> None:
    result = run(
        "bench", "seed_blend", "--case", "document-small", "--dtype", "float32", "--direction", "forward",
        "--rounds", "3", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (claim,) = found["claims"]
    assert 0 < claim["seconds"] < 1e-3
    assert claim["launch_seconds"] > 0
    assert "Here the device takes" in claim["sentence"]
    assert found["run_id"] in (toy_workspace / "JOURNAL.md").read_text()
