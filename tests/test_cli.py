"""The commands as a user types them, on a toy workload in a workspace of the user's own."""

import json
import subprocess
import sys

import pytest
from terminal import run

from kernbench import record, state

QUICK = ["--steps", "5", "--quiet", "--device", "cpu"]
SWAP = [*QUICK, "--rounds", "12"]


def test_profile_writes_record_trace_and_report(toy_workspace):
    result = run("profile", "toy", *QUICK)
    assert result.exit_code == 0, result.stderr
    (folder,) = (toy_workspace / "reports" / "toy").iterdir()
    found = record.read(folder / "record.json")
    assert found.status == "complete"
    assert [stage.name for stage in found.stages if stage.status == "done"] == ["time", "trace", "lines", "what-if"]
    assert len(found.steps.seconds) == 5
    assert found.throughput.interval[0] <= found.throughput.units_per_second <= found.throughput.interval[1]
    assert found.overhead.trace_ratio > 0
    assert any("sin" in spot.name for spot in found.hotspots)
    assert (folder / "trace.json.gz").stat().st_size < 200_000
    assert (folder / "report.html").is_file()
    assert (toy_workspace / "reports" / "index.html").is_file()
    assert str(folder / "report.html") in result.stdout.replace("\n", "")


def test_profile_names_the_line_that_reads(toy_workspace):
    result = run("profile", "toy", "--json", *QUICK)
    found = json.loads(result.stdout)
    (stall,) = found["stalls"]
    assert stall["source"] == "if loss > 1e9:"
    assert stall["file"] == "workloads/toy.py"
    assert (stall["count_per_step"], stall["class"], stall["real"]) == (1, "would-sync", False)


def test_json_is_the_record_and_nothing_else(toy_workspace):
    result = run("profile", "toy", "--json", *QUICK)
    (path,) = toy_workspace.glob("reports/toy/*/record.json")
    assert result.stdout == path.read_text()


def test_swap_keeps_a_phase_that_is_right_and_faster(toy_workspace):
    assert run("profile", "toy", *QUICK).exit_code == 0
    result = run("swap", "--phase", 0, "--json", *SWAP)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["verdict"]["decision"] == "keep", found["verdict"]
    assert found["ratio"]["low"] > 1
    assert found["receipt"][0]["calls_per_step"] == 1
    assert [kept.number for kept in state.load(toy_workspace).kept["toy"]] == [0]
    assert found["run_id"] in (toy_workspace / "JOURNAL.md").read_text()
    # What is kept is in place from now on, until it is reverted.
    again = json.loads(run("profile", "toy", "--json", *QUICK).stdout)
    assert again["workload"]["phases"] == [0]
    assert not any("sin" in spot["name"] for spot in again["hotspots"])
    reverted = run("swap", "--revert")
    assert "phase 0 is out" in reverted.stdout
    assert state.load(toy_workspace).kept["toy"] == []
    assert run("swap", "--revert").exit_code == 2


def test_command_line_rules_over_environment_over_kept(toy_workspace, monkeypatch):
    state.update(
        toy_workspace,
        lambda now: now.keeping("toy", state.KeptPhase(number=0, implementation="python", run_id="r", kept_utc="t")),
    )
    assert json.loads(run("profile", "toy", "--json", *QUICK).stdout)["workload"]["phases"] == [0]
    monkeypatch.setenv("TOY_NO_PADDING", "0")
    assert json.loads(run("profile", "toy", "--json", *QUICK).stdout)["workload"]["phases"] == []
    chosen = run("profile", "toy", "--phases", "0", "--json", *QUICK)
    assert json.loads(chosen.stdout)["workload"]["phases"] == [0]
    monkeypatch.setenv("TOY_NO_PADDING", "yes")
    assert run("profile", "toy", *QUICK).exit_code == 2


def test_swap_names_the_workload_it_took(toy_workspace):
    run("profile", "toy", "--preset", "two", *QUICK)
    result = run("swap", "--phase", 4, "--json", *SWAP)
    assert json.loads(result.stdout)["workload"]["preset"] == "two"
    assert "toy" in run("swap", "--phase", 4, *SWAP).stdout


def test_compare_two_runs(toy_workspace, monkeypatch):
    # Ten times the rest of the step, so that no swing of the machine's speed between two runs hides it.
    monkeypatch.setenv("TOY_PADDING", "1200")
    steady = [*QUICK, "--steps", "40"]
    runs = toy_workspace / "reports" / "toy"
    run("profile", "toy", *steady)
    (slow,) = (path.name for path in runs.iterdir())
    # Names tell which run is older only as well as the machine's clock does, and some are set back now and then.
    run("profile", "toy", "--phases", "0", *steady)
    (fast,) = (path.name for path in runs.iterdir() if path.name != slow)
    faster = run("compare", slow, fast, "--json")
    assert faster.exit_code == 0, faster.output
    assert json.loads(faster.stdout)["ratio"]["median"] > 3
    assert run("compare", fast, slow).exit_code == 1
    assert run("compare", "absent", slow).exit_code == 2


def test_report_is_rendered_again_from_the_record(toy_workspace):
    run("profile", "toy", *QUICK)
    (page,) = toy_workspace.glob("reports/toy/*/report.html")
    before = page.read_text()
    page.unlink()
    assert run("report", page.parent.name).exit_code == 0
    assert page.read_text() == before


def test_journal_is_rebuilt_from_the_records(toy_workspace):
    run("swap", "--phase", 4, "toy", *SWAP)
    (toy_workspace / "JOURNAL.md").unlink()
    entries = json.loads(run("journal", "--rebuild", "--json").stdout)
    assert len(entries) == 1
    assert "never reached" in (toy_workspace / "JOURNAL.md").read_text()


def test_list_shows_workloads_phases_and_runs(toy_workspace):
    listing = json.loads(run("list", "--json").stdout)
    names = {workload["name"] for workload in listing["workloads"]}
    assert {"toy", "titan-mac"} <= names
    assert {kernel["name"] for kernel in listing["kernels"]} >= {"toy_broken", "fused_adamw"}
    assert run("list").exit_code == 0
    run("profile", "toy", *QUICK)
    assert "profile" in run("list", "--runs").stdout


def test_parity_of_a_broken_kernel_is_a_no(toy_workspace):
    result = run("parity", "toy_broken", "--json", "--device", "cpu", "--quiet")
    assert result.exit_code == 1
    assert "failed to compile" in json.loads(result.stdout)["results"][0]["reason"]
    assert run("parity", "toy_brokn", "--device", "cpu").exit_code == 2


def test_bench_of_a_kernel_on_the_cpu_says_what_it_cannot_measure(toy_workspace):
    result = run("bench", "toy_broken", "--rounds", "3", "--json", "--device", "cpu", "--quiet")
    rows = {row["implementation"]: row for row in json.loads(result.stdout)["results"]}
    assert rows["eager"]["seconds"] > 0
    assert rows["triton"]["seconds"] is None
    assert rows["triton"]["label"] == "not measured here"


def test_exclusive_options_of_swap(toy_workspace):
    assert run("swap", "toy").exit_code == 2
    assert run("swap", "toy", "--phase", "0", "--all").exit_code == 2


@pytest.mark.parametrize("command", [["--help"], ["list", "--runs"], ["journal"], ["report", "absent"]])
def test_no_torch_for_commands_that_only_read(toy_workspace, command):
    script = f"""
import sys
sys.argv = ["kernbench", *{command!r}]
from kernbench.cli import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules, "torch was imported"
assert "triton" not in sys.modules, "triton was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
