"""What can go wrong at the terminal: each gives one clear sentence, the right exit code, and loses nothing."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import run

from kernbench import record, state

HERE = Path(__file__).parent
QUICK = ["--steps", "3", "--quiet", "--device", "cpu"]
SWAP = [*QUICK, "--rounds", "5"]


def only_sentence(result, *words):
    """The error is one line on standard error, without a traceback, and says these words."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("kernbench: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


def runs(root, pattern="*/*/record.json"):
    return sorted((root / "reports").glob(pattern))


def test_unknown_workload_suggests_the_nearest(toy_workspace):
    result = run("profile", "tory", *QUICK)
    assert result.exit_code == 2
    only_sentence(result, "did you mean 'toy'")
    assert not runs(toy_workspace)


def test_unknown_phase_lists_the_plan(toy_workspace):
    result = run("swap", "--phase", 9, "toy", *SWAP)
    assert result.exit_code == 2
    only_sentence(result, "no phase 9", "0 (no padding)")


def test_unknown_preset_and_dtype(toy_workspace):
    assert run("profile", "toy", "--preset", "twoo", *QUICK).exit_code == 2
    result = run("profile", "toy", "--dtype", "float31", *QUICK)
    assert result.exit_code == 2
    only_sentence(result, "float31")


def test_unknown_case_or_dtype_of_a_kernel_leaves_no_folder(toy_workspace):
    for command in ("parity", "bench"):
        only_sentence(run(command, "toy_broken", "--case", "raged", "--device", "cpu"), "did you mean 'ragged'")
        only_sentence(run(command, "toy_broken", "--dtype", "float23", "--device", "cpu"), "did you mean 'float32'")
    assert not list((toy_workspace / "reports").iterdir())


def test_missing_data_file(toy_workspace):
    result = run("profile", "toy", "--data", "absent.txt", *QUICK)
    assert result.exit_code == 2
    only_sentence(result, "absent.txt")


def test_swap_with_nothing_profiled_says_what_to_type(toy_workspace):
    result = run("swap", "--phase", 0, *SWAP)
    assert result.exit_code == 2
    only_sentence(result, "kernbench profile")


def test_workload_file_that_raises_shows_its_traceback(toy_workspace):
    Path("broken.py").write_text("undefined_name\n")
    result = run("profile", "./broken.py", *QUICK)
    assert result.exit_code == 3
    assert "NameError" in result.stderr
    assert "undefined_name" in result.stderr


def test_workload_file_with_no_or_two_declarations(toy_workspace):
    Path("none.py").write_text("x = 1\n")
    only_sentence(run("profile", "./none.py", *QUICK), "declares no workload")
    text = (HERE / "toy_workload.py").read_text()
    Path("two.py").write_text(text + "\nimport dataclasses\nSECOND = dataclasses.replace(WORKLOAD, name='toy2')\n")
    result = run("profile", "./two.py", *QUICK)
    assert result.exit_code == 2
    only_sentence(result, "two.py:toy", "two.py:toy2")


def test_step_that_raises(toy_workspace, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "raise:2")
    result = run("profile", "toy", *QUICK)
    assert result.exit_code == 3
    assert "the toy broke" in result.stderr
    assert "toy.py" in result.stderr
    (path,) = runs(toy_workspace)
    assert record.read(path).status == "failed"


def test_out_of_memory(toy_workspace, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "oom:2")
    result = run("profile", "toy", *QUICK)
    assert result.exit_code == 3
    assert "out of memory; take a smaller preset" in result.stderr


def test_nan_loss(toy_workspace, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "nan:2")
    result = run("profile", "toy", *QUICK)
    assert result.exit_code == 3
    assert "the loss of toy is nan" in result.stderr


def test_kernel_that_fails_to_compile_is_rejected_with_the_reason(toy_workspace):
    result = run("swap", "--phase", 3, "toy", "--json", *SWAP)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["verdict"]["decision"] == "reject"
    assert "failed to compile" in " ".join(found["verdict"]["reasons"])
    assert found["ratio"] is None
    assert state.load(toy_workspace).kept == {}


def test_wrong_phase_is_rejected_on_real_steps(toy_workspace):
    result = run("swap", "--phase", 1, "toy", "--json", *SWAP)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["verdict"]["decision"] == "reject"
    assert any(not row["passed"] for row in found["parity"])


def test_site_that_matches_nothing(toy_workspace):
    result = run("swap", "--phase", 2, "toy", *SWAP)
    assert result.exit_code == 2
    only_sentence(result, "Layer.backward")


def test_replacement_that_never_runs_is_inconclusive(toy_workspace):
    result = run("swap", "--phase", 4, "toy", "--json", *SWAP)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["verdict"]["decision"] == "inconclusive"
    assert "never ran" in found["verdict"]["sentence"]
    assert state.load(toy_workspace).kept == {}


def test_cuda_without_cuda(toy_workspace):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so asking for it is no fault")
    result = run("profile", "toy", "--device", "cuda")
    assert result.exit_code == 2
    only_sentence(result, "--device cpu")


def test_unwritable_reports_folder(toy_workspace):
    (toy_workspace / "reports").rmdir()
    (toy_workspace / "reports").write_text("a file where the folder should be")
    result = run("profile", "toy", *QUICK)
    assert result.exit_code == 2
    only_sentence(result, "cannot write results to")


def test_corrupted_record(toy_workspace):
    folder = toy_workspace / "reports" / "toy" / "20260101-000000-profile-dead"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema": 1, "kind": "profile", ')
    for command in (["report", "dead"], ["compare", "dead", "dead"]):
        result = run(*command)
        assert result.exit_code == 2
        only_sentence(result, "damaged")
    assert "damaged" in run("list", "--runs").stdout
    assert run("profile", "toy", *QUICK).exit_code == 0
    assert "damaged" in (toy_workspace / "reports" / "index.html").read_text()


def test_corrupted_workspace_state(toy_workspace):
    (toy_workspace / ".kernbench").mkdir()
    (toy_workspace / ".kernbench" / "state.json").write_text("{not json")
    result = run("swap", "--phase", 0, "toy", *SWAP)
    assert result.exit_code == 2
    only_sentence(result, "state.json", "damaged")
    assert (toy_workspace / ".kernbench" / "state.json").read_text() == "{not json"


def hold_lock(root, ready, release):
    with state.swap_lock(Path(root)):
        ready.set()
        release.wait(60)


def test_two_swaps_at_once(toy_workspace):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(str(toy_workspace), ready, release))
    holder.start()
    try:
        assert ready.wait(60)
        result = run("swap", "--phase", 0, "toy", *SWAP)
    finally:
        release.set()
        holder.join()
    assert result.exit_code == 2
    only_sentence(result, "another swap is running", str(holder.pid))


def test_interrupt_in_the_middle_of_a_swap_keeps_finished_stages(toy_workspace, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "interrupt:40")
    result = run("swap", "--phase", 0, "toy", "--steps", "3", "--quiet", "--device", "cpu", "--rounds", "200")
    assert result.exit_code == 130
    (path,) = runs(toy_workspace)
    found = record.read(path)
    assert found.status == "interrupted"
    done = {stage.name for stage in found.stages if stage.status == "done"}
    assert {"before time", "before trace", "before lines", "parity"} <= done
    assert found.before.steps.seconds
    assert state.load(toy_workspace).kept == {}
    module = next(module for name, module in sys.modules.items() if name.endswith("workloads.toy"))
    assert module.Training.padding.__name__ == "padding"
    monkeypatch.delenv("TOY_FAULT")
    assert run("swap", "--phase", 0, "toy", *SWAP).exit_code == 0


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_control_c_at_the_terminal_and_what_a_scheduler_sends(toy_workspace, ending):
    command = [
        sys.executable,
        "-m",
        "kernbench",
        "swap",
        "--phase",
        "0",
        "toy",
        "--rounds",
        "100000",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and the tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(
            '"name": "parity"' in path.read_text() for path in runs(toy_workspace)
        ):
            time.sleep(0.1)
        process.send_signal(ending)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert record.read(runs(toy_workspace)[0]).status == "interrupted"
