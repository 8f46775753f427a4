"""What hangs, crashes, exhausts memory or ends its process gives a result in words, and the rest of the run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
import torch
from deadly_kernel import Harm
from terminal import run

from kernbench import hostmemory, record, registry
from kernbench.children import isolation, jobs, kernelruns
from kernbench.errors import KernbenchError
from kernbench.progress import Silent
from kernbench.registry import Found
from kernbench.request import Request
from kernbench.spec import Case

HERE = Path(__file__).parent
KERNEL = ["--device", "cpu", "--quiet", "--json"]
WORDS = {
    "hang": r"did not finish within \d+ s, and was stopped, in hang \(.*deadly.*\.py:\d+\)",
    "sleep": r"did not finish within \d+ s, and was stopped, in sleep \(.*deadly.*\.py:\d+\)",
    "read": r"killed by signal 11 \(segmentation fault\), in read_nowhere \(.*deadly.*\.py:\d+\)",
    "memory": r"ran out of memory: it took [\d.]+ GB of the 1.0 GB that it may hold, and was stopped, "
    r"in take_all_memory \(.*deadly.*\.py:\d+\)",
    "exit": "ended the process with exit code 3",
    "quit": "ended the process with exit code 4",
    "kill": r"killed by signal 9 \(killed\)",
    "abort": r"killed by signal 6 \(aborted\), in run \(.*deadly.*\.py:\d+\)",
    "hang_up": "closed its connection to kernbench, and was stopped",
}


@pytest.fixture
def deadly(workspace, monkeypatch):
    """A workspace of deadly declarations, and a child that may hold 1 GB."""
    for folder in ("kernels", "workloads"):
        (workspace / folder).mkdir()
    shutil.copy(HERE / "deadly_kernel.py", workspace / "kernels" / "deadly.py")
    shutil.copy(HERE / "deadly_workload.py", workspace / "workloads" / "deadly.py")
    monkeypatch.setattr(hostmemory, "budget", lambda: 1_000_000_000)
    return workspace


def answered(result, code):
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def in_child(job, take=lambda found: None, seconds=20.0):
    return isolation.run(job, take, isolation.Terms(seconds), Silent())


@pytest.mark.parametrize("kind", WORDS)
def test_each_way_to_die_in_words(deadly, kind):
    found = []
    with pytest.raises(isolation.Died) as death:
        in_child(Harm(kind), found.append, 1.0 if kind in ("hang", "sleep") else 20.0)
    assert re.fullmatch(WORDS[kind], death.value.reason)
    assert death.value.unit == ("second", kind)
    assert found == ["hello"]
    assert in_child(jobs.Answers("cpu")) == 2.0


def test_deadly_kernels_are_one_red_row_each_and_the_rest_goes_on(deadly):
    kinds = "read", "memory", "exit"
    found = answered(run("parity", *kinds, "good", *KERNEL), 1)
    red = [row for row in found["results"] if not row["passed"]]
    assert [(row["kernel"], row["case"]) for row in red] == [(kind, "ragged") for kind in kinds]
    for row in red:
        assert re.fullmatch(WORDS[row["kernel"]], row["reason"])
    assert found["status"] == "complete"
    plain = {(row["kernel"], row["case"]) for row in found["results"] if row["passed"] and row["mode"] == "plain"}
    sound = {(kernel, case) for kernel in (*kinds, "good") for case in ("even", "large")}
    assert plain >= {*sound, ("good", "ragged")}


@pytest.mark.parametrize("kind", ["hang", "sleep"])
def test_a_kernel_that_does_not_end_is_one_red_row_and_the_rest_goes_on(deadly, kind):
    # One case, since what looks at the kernel as a whole may take some seconds by itself.
    found = answered(run("parity", kind, "good", "--case", "ragged", *KERNEL, "--time-limit", 4), 1)
    first, *others = [row for row in found["results"] if row["kernel"] == kind]
    assert not first["passed"]
    assert re.fullmatch(WORDS[kind], first["reason"])
    assert others
    assert all(row["passed"] for row in [*others, *(row for row in found["results"] if row["kernel"] == "good")])
    assert {row["kernel"] for row in found["results"]} == {kind, "good"}
    assert found["status"] == "complete"


def test_a_kernel_that_always_ends_the_process_is_given_up_row_by_row(deadly):
    found = answered(run("parity", "always", *KERNEL), 1)
    red = [row for row in found["results"] if not row["passed"]]
    assert len(red) > 1
    assert {row["reason"] for row in red if row["case"] == "ragged"} == {"ended the process with exit code 3"}
    generated = next(row["reason"] for row in red if row["mode"] == "generated")
    assert re.fullmatch(r"rows=17\b.*: ended the process with exit code 3", generated)
    rows = [(row["case"], row["dtype"], row["mode"]) for row in found["results"]]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("kind", ["sleep", "exit"])
def test_a_deadly_implementation_fails_alone_in_bench(deadly, kind):
    found = answered(run("bench", kind, "--rounds", 3, *KERNEL, "--time-limit", 8), 0)
    rows = {(row["case"], row["implementation"]): row for row in found["results"]}
    failed = rows.pop(("ragged", "deadly"))
    assert failed["label"] == "failed"
    assert re.fullmatch(WORDS[kind], failed["note"])
    assert len(rows) == 14
    # Compiling may take longer than the limit where it is done for the first time.
    assert all(row["seconds"] for (_, name), row in rows.items() if name not in ("triton", "compile"))


def test_the_parity_of_a_good_kernel_is_the_same_in_this_process(deadly):
    isolated, here = (
        answered(run("parity", "good", *KERNEL, *option), 0)["results"] for option in ([], ["--in-process"])
    )

    def told(row):
        # How many examples are tried depends on the time that there is, and what a thread leaves behind on chance.
        mutants = [(mutant["name"], mutant["outcome"]) for mutant in row["mutants"]]
        return {**row, "seconds": 0, "examples": 0, "mutants": mutants}

    assert [told(row) for row in isolated] == [told(row) for row in here]


def test_what_a_kernel_prints_stays_out_of_the_record(deadly):
    path = deadly / "kernels" / "deadly.py"
    said = "    print('hello from', Path(f'/proc/{os.getppid()}/cmdline').read_text())\n"
    path.write_text(path.read_text().replace("def good(x):\n", f"def good(x):\n{said}"))
    command = [sys.executable, "-m", "kernbench", "parity", "good", "--case", "even", *KERNEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert json.loads(done.stdout)["status"] == "complete"
    # What children are forked from is a copy of the command, which has done their imports already.
    assert f"hello from {chr(0).join(command)}" in done.stderr


def profiled(deadly, *options):
    result = run("profile", "deadly", "--device", "cpu", "--quiet", "--steps", 3, *options)
    (path,) = deadly.glob("reports/deadly/*/record.json")
    return result, record.read(path)


def test_a_step_that_crashes_ends_a_profile_with_one_sentence(deadly, monkeypatch):
    monkeypatch.setenv("DEADLY", "step 2:read")
    result, found = profiled(deadly)
    assert result.exit_code == 3
    last = result.stderr.splitlines()[-1]
    assert last.startswith("kernbench: deadly, time: killed by signal 11 (segmentation fault), in harm (workloads/dead")
    assert "in step" in result.stderr
    assert found.status == "failed"
    assert [(stage.name, stage.status) for stage in found.stages] == [("time", "failed")]


def test_a_step_that_hangs_later_leaves_the_stages_before_it(deadly, monkeypatch):
    monkeypatch.setenv("DEADLY", "traced step:hang")
    result, found = profiled(deadly, "--time-limit", 8)
    assert result.exit_code == 3
    assert "deadly, trace: did not finish within 8 s, and was stopped" in result.stderr
    assert [(stage.name, stage.status) for stage in found.stages] == [("time", "done"), ("trace", "failed")]
    assert len(found.steps.seconds) == 3


@pytest.mark.parametrize(("how", "words"), [("read", "killed by signal 11"), ("hang", "did not finish within 3 s")])
def test_a_phase_that_kills_its_process_is_rejected(deadly, monkeypatch, how, words):
    monkeypatch.setenv("DEADLY", f"phase:{how}")
    options = ["--device", "cpu", "--quiet", "--json", "--steps", 3, "--rounds", 3, "--time-limit", 3]
    found = answered(run("swap", "--phase", 0, "deadly", *options), 1)
    assert found["verdict"]["decision"] == "reject"
    (red,) = found["parity"]
    assert words in red["reason"]
    assert found["ratio"] is None


@pytest.mark.parametrize("fault", ["prepare first:read", "prepare first:raise", "first 1:read", "first 1:raise"])
def test_a_variant_that_fails_drops_out_of_the_race_aloud(deadly, monkeypatch, fault):
    monkeypatch.setenv("DEADLY", fault)
    found = answered(run("bench", "deadly", "--device", "cpu", "--quiet", "--json", "--rounds", 3), 0)
    rows = {row["implementation"]: row for row in found["results"]}
    assert list(rows) == ["baseline", "phase 0", "first", "second"]
    failed = rows.pop("first")
    assert (failed["label"], failed["seconds"]) == ("failed", None)
    reason = "not today" if "raise" in fault else "killed by signal 11 (segmentation fault)"
    assert reason in failed["note"]
    assert any(warning.startswith("first is out of the race: ") and reason in warning for warning in found["warnings"])
    assert all(row["seconds"] and row["launches_per_step"] for row in rows.values())
    assert found["status"] == "complete"


@pytest.mark.parametrize("how", ["read", "raise"])
def test_only_the_baseline_ends_the_race(deadly, monkeypatch, how):
    monkeypatch.setenv("DEADLY", f"step 1:{how}")
    result = run("bench", "deadly", "--device", "cpu", "--quiet", "--rounds", 3)
    assert result.exit_code == 3
    (path,) = deadly.glob("reports/deadly/*/record.json")
    assert record.read(path).status == "failed"


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_child_does_not_outlive_its_parent(deadly, ending):
    command = [sys.executable, "-m", "kernbench", "parity", "hang", "--device", "cpu", "--quiet"]
    parent = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        child = int(wait_for(lambda: (deadly / "hang.pid").is_file() and (deadly / "hang.pid").read_text()))
        parent.send_signal(ending)
        # Standard error ends when the last process ends that could write to it.
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert wait_for(lambda: not is_running(child), 10)
    if ending == signal.SIGINT:
        assert parent.returncode == 130
        (path,) = deadly.glob("reports/kernels/*/record.json")
        told = f"kernbench: interrupted; kernbench report {path.parent.name} shows what was finished"
        assert errors.splitlines() == [told]
        assert record.read(path).status == "interrupted"
        assert record.read(path).results[0].case == "even"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=150):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing in {seconds} s")


class Say(msgspec.Struct, frozen=True):
    """A job that says what a child sees of its surroundings."""

    imports: ClassVar = ()

    def run(self, tell):
        kernels = [name for name in sys.modules if name.startswith("kernbench_workspace")]
        threads = len(list(Path("/proc/self/task").iterdir()))
        seen = os.environ.get("SEEN"), os.environ.get("TRITON_INTERPRET"), str(Path.cwd()), list(sys.argv)
        return seen, torch.cuda.is_initialized(), kernels, threads


@pytest.mark.parametrize("interpreted", [None, "1"])
def test_a_child_sees_what_its_parent_sees_now_and_nothing_of_the_user(deadly, monkeypatch, interpreted):
    for value in ("one", "two"):
        monkeypatch.setenv("SEEN", value)
        monkeypatch.setattr(sys, "argv", ["kernbench", value])
        if interpreted is None:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        seen, cuda, kernels, threads = in_child(Say())
        assert seen == (value, interpreted, str(deadly), ["kernbench", value])
        assert (cuda, kernels, threads) == (False, [], 1)


def test_the_next_child_costs_milliseconds(deadly):
    job, seconds = jobs.Answers("cpu"), []
    for _ in range(8):
        started = time.perf_counter()
        in_child(job)
        seconds.append(time.perf_counter() - started)
    # A tenth of a second on a machine that does nothing else; importing torch alone takes more than this.
    assert min(seconds) < 0.5


@pytest.fixture
def lost_gpu(deadly, monkeypatch):
    """Every harm done makes the rest of its job run as on a GPU whose context is lost."""
    spec = registry.kernel("exit").declaration
    lost = []

    def lose():
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harmful = partial(spec.optimized.func, "exit", lose)
    spec = replace(spec, optimized=harmful, peers={"deadly": harmful, "good": lambda x: x * 3.0})
    monkeypatch.setattr(jobs, "_broken", lambda chosen, wait=True: "CUDA error" if lost else "")
    monkeypatch.setattr(registry, "kernel", lambda name: Found(spec, deadly, registry.current()))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    started = isolation.run

    def run_anew(*arguments):
        lost.clear()
        return started(*arguments)

    monkeypatch.setattr(isolation, "run", run_anew)
    return spec


def test_rows_after_a_lost_gpu_are_judged_in_a_new_process(lost_gpu):
    rows = []
    request = Request(command="", in_process=True)
    cpu = torch.device("cpu", 0)
    kernelruns.check_kernels(
        [(lost_gpu, None)], request, cpu, Silent(), lambda found: rows.__setitem__(slice(None), found)
    )
    assert [(row.case, row.mode) for row in rows if not row.passed] == [("ragged", "plain")]
    assert "illegal memory access" in next(row.reason for row in rows if not row.passed)
    assert {row.case for row in rows} >= {"even", "ragged", "large"}


def test_an_implementation_that_loses_the_gpu_fails_alone_in_bench(lost_gpu):
    rows = []
    request = Request(command="", rounds=3, in_process=True)
    ceilings = record.Ceilings(copy_bytes_per_second=1e12)
    kernelruns.bench_kernel(lost_gpu, request, torch.device("cpu", 0), Silent(), rows.append, ceilings=ceilings)
    failed = [row for row in rows if row.label == "failed"]
    assert [(row.case, row.implementation) for row in failed] == [("ragged", "deadly")]
    assert failed[0].note == "leaves the GPU unusable: CUDA error"
    assert len({(row.case, row.implementation) for row in rows}) == len(rows) == 15


GPU_WORDS = {
    "gpu_hang": r"did not finish within 20 s, and was stopped.*",
    "gpu_store": r".*illegal memory access.*",
    "gpu_memory": r".*out of memory.*",
    "gpu_exit": r"ended the process with exit code 3",
    "gpu_abort": r"killed by signal 6 \(aborted\).*",
}


@pytest.fixture
def deadly_gpu(workspace):
    (workspace / "kernels").mkdir()
    shutil.copy(HERE / "deadly_cuda_kernel.py", workspace / "kernels" / "deadly.py")
    return workspace


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_WORDS)
def test_a_deadly_kernel_leaves_the_gpu_to_the_others(deadly_gpu, kind):
    options = ["--device", "cuda", "--quiet", "--json", "--time-limit", 20]
    found = answered(run("parity", kind, "gpu_good", *options), 1)
    rows = {(row["kernel"], row["case"], row["mode"]): row for row in found["results"]}
    red = rows[kind, "ragged", "plain"]
    assert not red["passed"]
    assert re.fullmatch(GPU_WORDS[kind], red["reason"], re.DOTALL)
    for kernel, case in ((kind, "even"), (kind, "third"), ("gpu_good", "even"), ("gpu_good", "ragged")):
        assert rows[kernel, case, "plain"]["passed"], rows[kernel, case, "plain"]
    assert in_child(jobs.Answers("cuda"), seconds=60) == 2.0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_WORDS)
def test_a_deadly_kernel_fails_alone_in_bench_on_a_gpu(deadly_gpu, kind):
    options = ["--device", "cuda", "--quiet", "--json", "--rounds", 3, "--time-limit", 20]
    found = answered(run("bench", kind, *options), 0)
    failed = [row for row in found["results"] if row["case"] == "ragged" and row["implementation"] == "triton"]
    assert failed[0]["label"] == "failed"
    assert re.fullmatch(GPU_WORDS[kind], failed[0]["note"], re.DOTALL)
    others = [row for row in found["results"] if row["case"] != "ragged" and row["implementation"] == "triton"]
    assert {row["case"] for row in others if row["seconds"]} == {"even", "third"}
    assert in_child(jobs.Answers("cuda"), seconds=60) == 2.0


def test_memory_of_a_control_group_counts(tmp_path, monkeypatch):
    assert 0 < hostmemory.budget() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert hostmemory.resident(os.getpid()) > 10 << 20
    assert hostmemory.resident(1 << 30) == 0
    monkeypatch.setattr(hostmemory, "_groups", lambda: iter([3 << 30]))
    assert 1 << 30 < hostmemory.budget() < 3 << 30


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("import os; os.abort()", 3, r".*nasty.py, when it is imported, was killed by signal 6 \(aborted\).*"),
        (
            "import torch; torch.equal = len",
            2,
            r".*nasty.py is not used: .* it replaces torch.equal.*",
        ),
    ],
)
def test_a_file_that_is_harmful_to_import_harms_a_child(workspace, line, code, words):
    (workspace / "kernels").mkdir()
    (workspace / "kernels" / "nasty.py").write_text(line + "\n", encoding="utf-8")
    result = run("parity", "fused_adamw", "--quiet")
    assert result.exit_code == code
    assert re.match(words, result.stderr.splitlines()[-1].removeprefix("kernbench: "))
    assert torch.equal is not len
    assert not list((workspace / "reports").glob("*/*"))


def test_on_a_gpu_one_process_at_a_time_has_large_cases(lost_gpu, monkeypatch):
    spec = replace(lost_gpu, cases=(*lost_gpu.cases, Case("huge", large=True, size=2**12)))
    running, most, seen = [], [], []

    def run(job, take, terms, progress):
        running.append(job.parts)
        seen.append((job.parts, job.dtypes))
        time.sleep(0.05)
        most.append((len(running), running.count(("large",))))
        running.remove(job.parts)
        return True

    monkeypatch.setattr(isolation, "run", run)
    monkeypatch.setattr(kernelruns.os, "sched_getaffinity", lambda pid: range(16))
    request, gpu = Request(command=""), torch.device("cuda", 0)
    kernelruns.check_kernels([(spec, None)] * 3, request, gpu, Silent(), lambda rows: None)
    dtypes = list(spec.tolerance)
    shares = [((part,), (dtype,)) for part in ("inputs", "large") for dtype in dtypes] + [(("kernel",), tuple(dtypes))]
    assert sorted(seen) == sorted(shares * 3)
    assert max(at_once for at_once, _ in most) <= kernelruns.GPU_LANES
    assert max(large for _, large in most) == 1


def test_what_ends_one_share_of_the_rows_ends_the_others(lost_gpu, monkeypatch):
    ended = []

    def run(job, take, terms, progress):
        if job.parts == ("kernel",):
            raise KernbenchError("no more")
        ended.append(terms.stop.wait(60))
        raise isolation.Stopped

    monkeypatch.setattr(isolation, "run", run)
    monkeypatch.setattr(kernelruns.os, "sched_getaffinity", lambda pid: range(8))
    request, cpu = Request(command=""), torch.device("cpu", 0)
    with pytest.raises(KernbenchError, match="no more"):
        kernelruns.check_kernels([(lost_gpu, None)], request, cpu, Silent(), lambda rows: None)
    assert ended == [True] * len(lost_gpu.tolerance)
