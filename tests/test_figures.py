"""What a workload says of its own step, and the weights it is given, from the command line to record and reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from terminal import run

from kernbench import figures, record, state
from kernbench.errors import WorkloadFailed
from kernbench.measurement import ceilings
from kernbench.record import Ceilings

CPU = torch.device("cpu", 0)
QUICK = ["--steps", "5", "--quiet", "--device", "cpu"]
ROOFS = Ceilings(copy_bytes_per_second=4e12)


@pytest.fixture
def figured(toy_workspace: Path) -> Path:
    shutil.copy(Path(__file__).with_name("figured_workload.py"), toy_workspace / "workloads" / "figured.py")
    (toy_workspace / "checkpoint").mkdir()
    (toy_workspace / "checkpoint" / "scale").write_text("0.25")
    return toy_workspace


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_floor_is_the_time_of_the_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "cache_bytes", lambda _: 50_000_000)

    def floor(moved: Any, seconds: float, roofs: Ceilings | None = ROOFS) -> record.Floor:
        found = figures.floor_of(SimpleNamespace(bytes_per_step=moved), seconds, roofs, CPU, "toy")
        assert found is not None
        return found

    assert floor(5.2e9, 2.6e-3) == record.Floor(bytes_per_step=5.2e9, seconds=1.3e-3, share=0.5)
    assert "faster than memory delivers" in floor(5.2e9, 1e-3).note
    cached = floor(4e7, 1e-3)
    assert (cached.seconds, cached.share) == (None, None)
    assert cached.note == "a cache of 50 MB holds them, so that memory does not bind"
    assert (
        floor(5.2e9, 1e-3, None).note == floor(5.2e9, 1e-3, Ceilings()).note == "copy bandwidth was not measured here"
    )
    assert figures.floor_of(SimpleNamespace(), 1.0, ROOFS, CPU, "toy") is None
    for wrong in (0, float("nan"), "8 GB", True):
        with pytest.raises(WorkloadFailed, match="bytes_per_step of toy"):
            floor(wrong, 1.0)


def test_profile_records_and_shows_figures(figured: Path) -> None:
    shown = run("profile", "figured", *QUICK)
    assert shown.exit_code == 0, shown.stderr
    (path,) = figured.glob("reports/figured/*/record.json")
    found = record.read(path)
    assert isinstance(found, record.ProfileRecord)
    assert found.throughput is not None
    seconds = 1 / found.throughput.units_per_second
    faster, slower = found.figures
    assert (faster.name, faster.unit) == ("audio seconds per wall second", "")
    assert faster.value == pytest.approx(0.08 / seconds)
    assert (slower.name, slower.unit) == ("wall seconds per audio second", "s/s")
    assert slower.value == pytest.approx(seconds / 0.08)
    roofs = found.environment.ceilings
    assert roofs is not None
    assert roofs.copy_bytes_per_second is not None
    assert found.floor is not None
    assert found.floor.share == pytest.approx(8e9 / roofs.copy_bytes_per_second / seconds)

    text = words(shown.stdout)
    assert "audio seconds per wall second" in text
    assert "bandwidth floor 8.00 GB a step, at least" in text
    assert "host reads a step, no phase in place" in text
    page = path.with_name("report.html").read_text()
    for told in ("wall seconds per audio second", "share of bandwidth floor", "host reads a step", "8.00 GB a step"):
        assert told in page


def test_bench_has_the_figures_of_every_variant(figured: Path) -> None:
    shown = run("bench", "figured", "--rounds", "3", "--quiet", "--device", "cpu")
    assert shown.exit_code == 0, shown.stderr
    (path,) = figured.glob("reports/figured/*/record.json")
    found = record.read(path)
    assert isinstance(found, record.BenchRecord)
    assert [row.implementation for row in found.results] == ["baseline", "phase 0"]
    for row in found.results:
        assert row.seconds is not None
        assert [figure.value for figure in row.figures] == [
            pytest.approx(0.08 / row.seconds),
            pytest.approx(row.seconds / 0.08),
        ]
        assert row.floor is not None
        assert row.floor.share is not None
        assert row.launches_per_step is not None, "what is said of the bytes must not keep launches from being counted"
    text = words(shown.stdout)
    assert "implementation audio seconds per wall second wall seconds per audio second of bandwidth floor" in text
    assert "bandwidth floor: 8.00 GB a step, at least" in text
    page = path.with_name("report.html").read_text()
    assert page.count("wall seconds per audio second") > 1
    assert "of bandwidth floor" in page


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "figures of figured failed: RuntimeError: no figures today"),
        (
            "shape",
            "figures of figured gives 3.0 for 'audio seconds per wall second'; give a finite number and its unit",
        ),
        ("value", "figures of figured gives (inf, '') for 'audio seconds per wall second'"),
        ("bytes", "bytes_per_step of figured is -1.0; give a number of bytes above 0"),
    ],
)
@pytest.mark.parametrize("command", ["profile", "bench"])
def test_wrong_figures_are_the_workloads_failure(
    figured: Path, monkeypatch: pytest.MonkeyPatch, command: str, fault: str, said: str
) -> None:
    monkeypatch.setenv("FIGURES", fault)
    few = ["--steps", "5"] if command == "profile" else ["--rounds", "3"]
    result = run(command, "figured", *few, "--in-process", "--quiet", "--device", "cpu")
    assert result.exit_code == 3
    assert said in result.stderr


def test_weights_reach_every_command_and_swap_remembers_them(figured: Path) -> None:
    profiled = json.loads(run("profile", "figured", "--weights", "checkpoint", "--json", *QUICK).stdout)
    assert profiled["workload"]["weights"] == "checkpoint"
    assert profiled["steps"]["losses"][0] == pytest.approx(64 * 0.25**2), "built from what the folder holds"
    last = state.load(figured).last_profiled
    assert last is not None
    assert last.weights == str(figured / "checkpoint")

    swapped = json.loads(run("swap", "--phase", "0", "--rounds", "6", "--json", *QUICK).stdout)
    assert swapped["workload"]["weights"] == str(figured / "checkpoint")
    assert swapped["before"]["steps"]["losses"][0] == pytest.approx(64 * 0.25**2)
    assert f"weights {figured / 'checkpoint'}" in (figured / "JOURNAL.md").read_text()

    arguments = ["--weights", "checkpoint", "--json", "--quiet", "--device", "cpu"]
    assert (
        json.loads(run("bench", "figured", "--rounds", "3", *arguments).stdout)["workload"]["weights"] == "checkpoint"
    )
    checked = run("parity", "figured", *arguments)
    assert checked.exit_code == 0, checked.stderr

    assert run("profile", "figured", *QUICK).exit_code == 0
    forgotten = state.load(figured).last_profiled
    assert forgotten is not None
    assert forgotten.weights == ""


def test_parity_is_of_the_weights_that_were_given(figured: Path) -> None:
    (figured / "checkpoint" / "scale").write_text("no number")
    result = run("parity", "figured", "--weights", "checkpoint", "--quiet", "--device", "cpu")
    assert result.exit_code == 3
    assert "could not convert string to float" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "figured", "--weights", "absent"], "--weights absent: there is no such folder"),
        (
            ["swap", "figured", "--phase", "0", "--weights", "JOURNAL.md"],
            "--weights JOURNAL.md: there is no such folder",
        ),
        (["bench", "toy", "--weights", "checkpoint"], "toy takes no --weights: its build has no argument of that name"),
        (["parity", "toy_broken", "--weights", "checkpoint"], "--weights goes with a workload"),
    ],
)
def test_weights_that_cannot_be_used_are_one_sentence(figured: Path, arguments: list[str], said: str) -> None:
    result = run(*arguments, "--device", "cpu", "--quiet")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(figured.glob("reports/*/*")), "nothing half-written"
