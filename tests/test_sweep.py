"""``bench --sweep``: what is asked for, what is timed, and the plot with its floor and its roof."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import report_records
import torch
from terminal import run

from kernbench import record, registry, sweep
from kernbench.errors import KernbenchError
from kernbench.record import BenchRecord, BenchResult
from kernbench.report import html, sweepplot
from kernbench.spec import Sweep

BLEND = registry.kernel("seed_blend").declaration
VALUES = [100, 1000, 10_000]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seeds", [100, 200, 500, 1000, 2000, 5000, 10_000]),
        ("seeds=100:1000", [100, 200, 500, 1000]),
        ("seeds=150:600", [150, 200, 500, 600]),
        ("seeds=1000,100", [100, 1000]),
    ],
)
def test_what_the_user_typed(text: str, values: list[int]) -> None:
    asked, cases = sweep.cases_of(BLEND, text)
    assert asked.values == values
    assert asked.cases == [f"seeds={value}" for value in values] == [case.name for case in cases]
    assert [case["seeds"] for case in cases] == values
    assert [BLEND.case(case.name).sizes for case in cases] == [case.sizes for case in cases]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds=", "a number missing or wrong"),
        ("seeds=100:", "a number missing or wrong"),
        ("seeds=1:2:3", "a number missing or wrong"),
        ("seeds=many", "a number missing or wrong"),
        ("seeds=200:100", "200 is more than 100"),
        ("seeds=10:1000", "from 100 to 10000, not to 10"),
        ("seeds=500", "one value is no sweep"),
        (f"seeds={','.join(str(100 + number) for number in range(60))}", "60 values are more than 50"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, says: str) -> None:
    with pytest.raises(KernbenchError, match=says):
        sweep.cases_of(BLEND, text)


def test_bytes_are_fixed_whatever_the_seeds() -> None:
    moved = [BLEND.cost(case, torch.float32).bytes_moved for case in sweep.cases_of(BLEND, "seeds=100:10000")[1]]
    assert 650e6 < min(moved) <= max(moved) < 1.001 * min(moved)


@pytest.mark.parametrize("values", [(), (3,), (3, 2), (2, 2)])
def test_a_sweep_of_nothing_is_no_declaration(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two or more ascending values"):
        Sweep(size="seeds", values=values, sizes=lambda seeds: {"seeds": seeds}, fixed="")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("toy_broken", "--sweep", "rows"), "toy_broken declares no sizes to sweep"),
        (("seed_blend", "fused_adamw", "--sweep", "seeds"), "fused_adamw declares no such sweep"),
        (("seed_blend", "--sweep", "sed"), "no size to sweep named 'sed'; did you mean 'seeds'"),
        (("seed_blend", "--sweep", ""), "names no size"),
        (("seed_blend", "--sweep", "seeds", "--case", "even"), "leave out --case"),
        (("titan-mac", "--sweep", "seeds"), "declares no sizes to sweep"),
        (("kasmina", "--sweep", "seeds", "--preset", "tiny"), "leave one of them out"),
        (("kasmina", "--case", "even"), "--case goes with kernels"),
        (("kasmina", "--dtype", "int8"), "no dtype of a workload named 'int8'"),
    ],
)
def test_wrong_input_is_one_sentence(toy_workspace: Path, typed: tuple[str, ...], says: str) -> None:
    result = run("bench", *typed, "--device", "cpu", "--quiet")
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(toy_workspace.glob("reports/kernels/*"))


def test_a_workload_is_swept_by_its_kernels_and_the_cpu_says_what_it_does_not_measure(toy_workspace: Path) -> None:
    result = run("bench", "kasmina", "--sweep", "seeds=100,1000", "--json", "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [one["kernel"] for one in found["sweeps"]] == [
        "seed_blend", "seed_state_update", "seed_telemetry", "seed_alpha", "seed_record",
    ]  # fmt: skip
    assert [(row["case"], row["dtype"], row["seconds"]) for row in found["results"]] == [
        ("seeds=100", "float32", None), ("seeds=1000", "float32", None),
    ] * 5  # fmt: skip
    assert all("meant for a GPU" in row["note"] for row in found["results"])


SWEPT_KERNEL = """
import torch
from kernbench.spec import Case, Cost, KernelSpec, Sweep, Tolerance

def make_inputs(case, dtype, device, seed):
    return {"x": torch.ones(case["rows"], case["columns"], device=device, dtype=dtype)}

SPEC = KernelSpec(
    name="swept", reference=lambda x: x.sum(1), optimized=lambda x: x.sum(1), make_inputs=make_inputs,
    cases=(Case("ragged", rows=3, columns=5),), tolerance={"float32": Tolerance(), "bfloat16": Tolerance()},
    cost=lambda case, dtype: Cost(flops=0.0, bytes_read=4.0 * 4096, bytes_written=4.0 * case["rows"]),
    sweeps=(
        Sweep(size="rows", values=(1, 4, 16), sizes=lambda rows: {"rows": rows, "columns": 4096 // rows},
              fixed="4096 numbers", large=False),
    ),
)
"""


def test_a_sweep_that_fits_the_cpu_is_timed_and_shown(toy_workspace: Path) -> None:
    (toy_workspace / "kernels" / "swept.py").write_text(SWEPT_KERNEL)
    result = run("bench", "swept", "--sweep", "rows", "--rounds", "3", "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "swept, float32 over rows" in result.stdout
    assert "eager takes" in result.stdout
    (path,) = toy_workspace.glob("reports/kernels/*/record.json")
    found = record.read(path)
    assert isinstance(found, BenchRecord)
    timed = [row.case for row in found.results if row.implementation == "eager" and row.seconds]
    assert timed == ["rows=1", "rows=4", "rows=16"]
    page = path.with_name("report.html").read_text()
    assert "4096 numbers" in page
    assert "launch floor" in page


def swept_record() -> BenchRecord:
    """Times of a GPU in which every implementation keeps its speed from 100 to 10,000 seeds, but for compile."""
    rows = [
        BenchResult(
            kernel="seed_blend", case=f"seeds={value}", dtype="float32", implementation=name, cache="cold",
            seconds=seconds * (1 + 0.02 * number if name == "triton" else 1), bytes=660e6, share_of_roof=0.96,
            label="launch-bound" if number == 2 else "",
        )
        for number, value in enumerate(VALUES)
        for name, seconds in (("eager", 2.1e-3), ("compile", 2.4e-4), ("triton", 1.7e-4))
    ]  # fmt: skip
    return BenchRecord(
        run_id="r", created_utc="2026-11-21T14:25:30+00:00", command="kernbench bench seed_blend --sweep seeds",
        environment=report_records.environment(), status="complete", results=rows,
        sweeps=[
            record.Sweep(
                kernel="seed_blend", size="seeds", values=VALUES, cases=[f"seeds={value}" for value in VALUES],
                fixed="128 rows",
            )
        ],
    )  # fmt: skip


def test_the_table_says_what_a_seed_costs() -> None:
    (table,), rest = sweepplot.apart(swept_record())
    assert rest == []
    assert table.headings == ["seeds", "eager", "compile", "triton", "at copy bandwidth", "triton of roof", "labels"]
    assert [row[0].raw for row in table.rows] == VALUES
    assert [row[3].raw for row in table.rows] == pytest.approx([1.7e-4, 1.7e-4 * 1.02, 1.7e-4 * 1.04])
    assert [row[4].raw for row in table.rows] == pytest.approx([660e6 / 3.98e12] * 3)
    assert table.rows[2][6].text == "eager: launch-bound; compile: launch-bound; triton: launch-bound"
    assert any("the slowest takes 4.0 % longer than the fastest" in text for text in table.said)
    assert "The launch floor measured beside it is 2.30 µs." in table.said


def test_what_could_not_be_timed_is_said_and_what_was_not_tried_takes_no_line() -> None:
    found = swept_record()
    found.results = [row for row in found.results if row.case != "seeds=10000" and row.implementation != "compile"]
    found.results.append(
        BenchResult(
            kernel="seed_blend", case="seeds=1000", dtype="float32", implementation="compile", cache="cold",
            seconds=None, label="failed", note="did not finish within 40 s",
        )
    )  # fmt: skip
    (table,), rest = sweepplot.apart(found)
    assert rest == []
    assert [row[0].raw for row in table.rows] == [100, 1000]
    assert "compile" not in table.headings
    assert table.rows[1][-1].text == "compile: failed: did not finish within 40 s"


def test_the_plot_has_every_point_the_floor_and_the_roof() -> None:
    page = html.render(swept_record())
    (table,), _ = sweepplot.apart(swept_record())
    (plot,) = table.plots
    for drawing in (plot.wide, plot.narrow):
        assert drawing.count("<svg") == 1
        for text in ("launch floor", "at copy bandwidth", "eager", "compile", "triton", "10k"):
            assert text in drawing, text
    assert plot.wide in page
    assert "stroke-dasharray" in plot.wide
    assert page.count('data-value="0.00017"') == 1


def test_memory_has_a_table_that_says_how_it_grows() -> None:
    found = swept_record()
    assert len(sweepplot.apart(found)[0]) == 1
    found.results = [
        msgspec.structs.replace(
            row, peak_bytes=(1 << 20) * int(row.case.split("=")[1]) ** (2 if row.implementation == "eager" else 1)
        )
        for row in found.results
    ]
    _, memory = sweepplot.apart(found)[0]
    assert memory.headings == ["seeds", "eager", "compile", "triton"]
    assert [cell.text for cell in memory.rows[1]] == ["1,000", "977 GiB", "1,000 MiB", "1,000 MiB"]
    assert "triton holds 100x as much with 10,000 as with 100 seeds, 100x as many." in memory.said
    assert any(told.startswith("eager holds 10,000x as much") for told in memory.said)
    assert memory.title in html.render(found)


def test_other_rows_stay_where_they_were() -> None:
    found = swept_record()
    found.results.append(
        BenchResult(kernel="seed_blend", case="even", dtype="float32", implementation="eager", seconds=1e-6)
    )
    _, rest = sweepplot.apart(found)
    assert [row.case for row in rest] == ["even"]
