"""The gate over records whose figures are known: what passes, what fails with which reason, and wrong questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from kineto_builder import KinetoBuilder
from terminal import run

from kernbench import gate, record
from kernbench.errors import KernbenchError

STEADY = [1.0, 1.001, 0.999, 1.0, 1.002, 0.998, 1.0, 1.001, 0.999, 1.0]
"""Milliseconds of a step that varies by one in a thousand."""


def profiled(
    workspace: Path,
    name: str,
    *,
    milliseconds: list[float] | None = None,
    stalls: list[record.Stall] | None = None,
    launches: float | None = 700.0,
    watched: bool = True,
    preset: str = "tiny",
    torch: str = "2.13",
    created: str = "2026-11-21T12:00:00+00:00",
    device: str = "NVIDIA H200",
    status: Any = "complete",
) -> str:
    """A profile run on disk; returns its id."""
    found = record.ProfileRecord(
        run_id=name,
        created_utc=created,
        command="kernbench profile toy",
        environment=record.Environment(
            device=record.Device(type="cuda", name=device),
            python="3.12",
            torch=torch,
            triton="3.9",
            kernbench="0",
            platform="Linux",
            cpu="",
            cpu_threads=2,
        ),
        workload=record.WorkloadInfo(name="toy", preset=preset, dtype="float32", seed=0, unit="rows"),
        status=status,
        steps=record.Steps(seconds=[value / 1e3 for value in milliseconds or STEADY], units_per_step=1),
        stalls=stalls or [],
        syncs_per_step=sum(row.count_per_step for row in stalls or []) if watched else None,
        launches_per_step=launches,
    )
    record.write(found, workspace / "reports" / "toy" / name / "record.json")
    return name


def read_at(
    line: int, *, count: float = 1.0, function: str = "step", text: str = "loss.item()", klass: Any = "drain"
) -> record.Stall:
    return record.Stall(
        file="model.py", line=line, source=text, op="aten::item", count_per_step=count, klass=klass,
        real=klass != "cpu-tensor", function=function,
    )  # fmt: skip


def judged(workspace: Path, *options: str, **after: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and answer for a run like the baseline but for ``after``."""
    profiled(workspace, "20260101-before", stalls=[read_at(12)])
    profiled(workspace, "20260102-after", **{"stalls": [read_at(12)], **after})
    done = run("gate", "--baseline", "before", "after", "--json", *options)
    assert done.stderr == ""
    return done.exit_code, json.loads(done.stdout)


def test_the_same_again_passes_all_three(workspace: Path) -> None:
    code, found = judged(workspace)
    assert code == 0
    assert found["passed"]
    assert [check["name"] for check in found["checks"]] == ["slowdown", "new syncs", "launches"]
    assert (found["baseline"], found["run"]) == ("20260101-before", "20260102-after")


@pytest.mark.parametrize(
    ("percent", "limit", "code"), [(3.0, "2%", 1), (3.0, "5 %", 0), (1.5, "2%", 0), (-20.0, "2%", 0), (0.5, "0%", 1)]
)
def test_slowdown_is_held_against_its_limit(workspace: Path, percent: float, limit: str, code: int) -> None:
    slower = [value * (1 + percent / 100) for value in STEADY]
    found_code, found = judged(workspace, "--max-slowdown", limit, milliseconds=slower)
    assert found_code == code
    (check,) = found["checks"]
    assert f"{percent:+.1f} %".replace("-", "−") in check["sentence"]
    assert "1.00 ms → " in check["sentence"]


def test_a_slowdown_within_the_noise_is_said_and_passes(workspace: Path) -> None:
    profiled(workspace, "20260101-before", milliseconds=[1.0, 2.0, 1.1, 1.9, 1.0, 2.0])
    profiled(workspace, "20260102-after", milliseconds=[1.2, 2.1, 1.3, 2.0, 1.2, 2.0])
    done = run("gate", "--baseline", "before", "after", "--max-slowdown", "2%")
    assert done.exit_code == 0
    assert "no slowdown is shown; time more steps to tell" in done.stdout


@pytest.mark.parametrize(
    ("stalls", "named"),
    [
        ([read_at(12), read_at(40, function="log", text="x.item()")], "model.py:40 x.item() (1 more a step)"),
        ([read_at(12, count=3)], "model.py:12 loss.item() (2 more a step)"),
        ([read_at(12), read_at(13, text="x.item()")], "model.py:13 x.item() (1 more a step)"),
    ],
)
def test_a_new_host_read_fails_by_its_line(workspace: Path, stalls: list[record.Stall], named: str) -> None:
    code, found = judged(workspace, "--no-new-syncs", stalls=stalls)
    assert code == 1
    (check,) = found["checks"]
    assert named in check["sentence"]


@pytest.mark.parametrize(
    "stalls",
    [
        [read_at(99, text="loss . item()")],
        [],
        [read_at(12), read_at(80, function="log", klass="cpu-tensor")],
    ],
)
def test_reads_that_moved_vanished_or_wait_for_nothing_pass(workspace: Path, stalls: list[record.Stall]) -> None:
    assert judged(workspace, "--no-new-syncs", stalls=stalls)[0] == 0


@pytest.mark.parametrize(
    ("launches", "limit", "code"),
    [(700, "+0", 0), (701, "+0", 1), (701, "+1", 0), (707, "+1%", 0), (708, "1 %", 1), (600, "0", 0)],
)
def test_launches_are_held_against_their_limit(workspace: Path, launches: float, limit: str, code: int) -> None:
    found_code, found = judged(workspace, "--max-launches", limit, launches=launches)
    assert found_code == code
    assert f"700 → {launches}" in found["checks"][0]["sentence"]


def test_all_reasons_are_shown_and_versions_noted(workspace: Path) -> None:
    profiled(workspace, "20260101-before")
    slower = [value * 2 for value in STEADY]
    profiled(workspace, "20260102-after", milliseconds=slower, stalls=[read_at(5)], launches=900, torch="2.14")
    done = run("gate", "--baseline", "before", "after")
    assert done.exit_code == 1
    first, *checks, note = done.stdout.splitlines()
    assert first == "gate failed (slowdown, new syncs, launches): 20260102-after against the baseline 20260101-before"
    assert [line.partition(":")[0] for line in checks] == ["failed"] * 3
    assert note == "note: torch was 2.13 and is 2.14"


def test_without_a_run_the_newest_like_the_baseline_is_judged(workspace: Path) -> None:
    profiled(workspace, "20260101-old", created="2026-01-01T00:00:00+00:00")
    profiled(workspace, "20260102-base", created="2026-01-02T00:00:00+00:00")
    none = run("gate", "--baseline", "base")
    assert none.exit_code == 2
    assert "there is no later profile toy tiny float32 NVIDIA H200" in none.stderr
    profiled(workspace, "20260103-wanted", launches=701, created="2026-01-03T00:00:00+00:00")
    profiled(workspace, "20260104-preset", preset="large", created="2026-01-04T00:00:00+00:00")
    profiled(workspace, "20260105-failed", status="failed", created="2026-01-05T00:00:00+00:00")
    (workspace / "reports" / "toy" / "20260106-damaged").mkdir()
    (workspace / "reports" / "toy" / "20260106-damaged" / "record.json").write_text("{")
    done = run("gate", "--baseline", "base")
    assert (done.exit_code, done.stdout.partition(" against")[0]) == (1, "gate failed (launches): 20260103-wanted")


def test_two_trace_files_are_judged(workspace: Path, tmp_path: Path) -> None:
    def written(name: str, launches: int, *, read: bool) -> Path:
        builder = KinetoBuilder()
        for step in range(6):
            start = step * 1000
            builder.step(step, start, start + 900)
            builder.op("aten::mm", start + 5, start + 890)
            for number in range(launches):
                builder.launch("gemm", start + 10 + 20 * number, start + 20 + 20 * number, start + 35 + 20 * number)
            if read:
                builder.call("cudaStreamSynchronize", start + 850, start + 860)
        return builder.write(tmp_path / name)

    before, after = written("before.json", 3, read=False), written("after.json", 4, read=True)
    assert run("gate", "--baseline", before, before).exit_code == 0
    done = run("gate", "--baseline", before, after)
    assert done.exit_code == 1
    assert "gate failed (new syncs, launches)" in done.stdout
    assert run("gate", "--baseline", before).exit_code == 2, "nothing tells which other trace is meant"
    assert run("gate", "--baseline", profiled(workspace, "20260101-run"), after).exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--max-slowdown", "2"],
        ["--max-slowdown", "0.02"],
        ["--max-slowdown", "-2%"],
        ["--max-slowdown", "two%"],
        ["--max-slowdown", ""],
        ["--max-launches", "-1"],
        ["--max-launches", "many"],
        ["--max-launches", "1e9x"],
    ],
)
def test_limits_that_are_none_are_refused(workspace: Path, options: list[str]) -> None:
    profiled(workspace, "20260101-before")
    done = run("gate", "--baseline", "before", "before", *options)
    assert done.exit_code == 2
    assert options[0] in done.stderr


@pytest.mark.parametrize(
    ("after", "options", "said"),
    [
        ({"preset": "large"}, [], "preset"),
        ({"device": "NVIDIA A100"}, [], "device"),
        ({"watched": False}, ["--no-new-syncs"], "host reads"),
        ({"launches": None}, ["--max-launches", "+0"], "launches"),
    ],
)
def test_what_cannot_be_judged_is_no_pass(workspace: Path, after: Any, options: list[str], said: str) -> None:
    profiled(workspace, "20260101-before")
    profiled(workspace, "20260102-after", **after)
    done = run("gate", "--baseline", "before", "after", *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_runs_without_steps_are_refused(workspace: Path) -> None:
    profiled(workspace, "20260101-before")
    empty = record.read(workspace / "reports" / "toy" / "20260101-before" / "record.json")
    assert isinstance(empty, record.ProfileRecord)
    empty.steps = None
    record.write(empty, workspace / "reports" / "toy" / "20260102-empty" / "record.json")
    assert "no timed steps" in run("gate", "--baseline", "before", "empty").stderr
    assert run("gate", "--baseline", "absent", "before").exit_code == 2
    assert run("gate", "before").exit_code == 2, "without a baseline"


def test_limits_left_out_ask_nothing() -> None:
    assert gate.limits("3%", False, None) == gate.Limits(slowdown=0.03)
    assert gate.limits(None, True, None) == gate.Limits(new_syncs=True)
    assert gate.limits(None, False, "+5%") == gate.Limits(launches=0.05, relative=True)
    assert gate.limits(None, False, None) == gate.Limits(slowdown=0.02, new_syncs=True, launches=0.0)
    with pytest.raises(KernbenchError, match="percentage"):
        gate.limits("+0", False, None)
