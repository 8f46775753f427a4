"""Several ranks measure one workload and write one record; what ends one of them ends the run, and says so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bio_ranks import Differentiate, at_once
from ranked_workload import HANGS, LATE_SECONDS
from terminal import run

from kernbench import analyze, cli, device, group, pipeline, ranks, record
from kernbench.analysis import communication
from kernbench.children import rankruns
from kernbench.errors import KernbenchError
from kernbench.request import Request

WORKLOAD = Path(__file__).parent / "ranked_workload.py"
TOLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
LIMIT = 20
"""Seconds that a stage of this workload never takes, also where two processes share a core."""


@pytest.fixture
def ranked(workspace, monkeypatch):
    """A workspace with the workload, on a machine whose ceilings were measured before."""
    (workspace / "workloads").mkdir()
    shutil.copy(WORKLOAD, workspace / "workloads" / "ranked.py")
    monkeypatch.setitem(pipeline._surveyed, "cpu:0", (device.fingerprint(torch.device("cpu", 0)), []))
    monkeypatch.delenv("RANKED_FAULT", raising=False)
    return workspace


def profile(*arguments):
    return run("profile", "ranked", "--device", "cpu", "--steps", 3, "--quiet", *arguments)


def record_of(folder):
    [path] = folder.glob("reports/ranked/*/record.json")
    return record.read(path), path.parent


def children():
    """Processes that were forked for jobs and still run, by what the kernel calls their parents' children."""
    server = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [child for one in server for child in Path(f"/proc/{one}/task/{one}/children").read_text().split()]


def test_two_ranks_write_one_record_with_a_trace_of_each(ranked):
    result = profile("--ranks", 2, "--json")
    assert result.exit_code == 0, result.output
    found, folder = record_of(ranked)
    assert json.loads(result.stdout)["run_id"] == found.run_id
    assert found.status == "complete"
    assert [stage.name for stage in found.stages] == ["time", "trace", "lines", "what-if"]
    assert found.ranks.backend == "gloo"
    assert [side.rank for side in found.ranks.sides] == [0, 1]
    assert found.steps.units_per_step == 2 * 16.0
    traces = [folder / side.trace for side in found.ranks.sides]
    assert [path.name for path in traces] == ["trace-rank0.json.gz", "trace-rank1.json.gz"]
    exchange = found.analysis.communication
    assert [one.rank for one in exchange.ranks] == [0, 1]
    assert list(exchange.collectives) == ["all_reduce"]
    for one in exchange.ranks:
        assert 0 < one.compute_seconds_per_step < one.step_seconds
        assert one.communication_seconds_per_step > 0
        assert one.wait_seconds_per_step is not None
    # What the record says of the ranks is what analyze makes of their traces.
    _, loaded = analyze.load(traces)
    assert [(one.info.rank, one.info.world_size) for one in loaded] == [(0, 2), (1, 2)]
    assert communication.communication(loaded) == exchange
    page = (folder / "report.html").read_text()
    assert "Communication and ranks" in page
    assert "2 ranks with gloo" in page


def test_the_rank_that_comes_late_is_the_slowest(ranked, monkeypatch):
    monkeypatch.setenv("RANKED_FAULT", "slow:1")
    result = profile("--ranks", 2)
    assert result.exit_code == 0, result.output
    found, _ = record_of(ranked)
    exchange = found.analysis.communication
    assert exchange.slowest_rank == 1
    assert exchange.lag_seconds_per_step == pytest.approx(LATE_SECONDS, rel=0.5)
    assert "wait for rank 1" in result.output


ENDINGS = {
    "raise": (3, r"rank \d of 2: step \d of ranked failed: ValueError: this rank broke"),
    "kill": (3, r"ranked, time: rank \d was killed by signal 11 \(segmentation fault\), in misbehave \(.*:\d+\)"),
    "hang": (3, r"ranked, time: .*rank \d did not finish within 5 s, and was stopped, in misbehave \(.*:\d+\).*"),
    "interrupt": (130, r"interrupted; kernbench report \d{8}-\d{6}-profile-\w{4} shows what was finished"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ENDINGS)
def test_a_rank_that_fails_ends_the_run(ranked, monkeypatch, kind, rank):
    monkeypatch.setenv("RANKED_FAULT", f"{kind}:{rank}")
    result = profile("--ranks", 2, "--time-limit", 5 if kind == "hang" else LIMIT)
    code, sentence = ENDINGS[kind]
    assert result.exit_code == code, result.output
    *_, last = result.stderr.strip().splitlines()
    assert re.fullmatch(f"kernbench: {sentence}", last)
    if kind in ("raise", "kill"):
        assert f"rank {rank} " in last and f"rank {1 - rank} " not in last
    found, _ = record_of(ranked)
    assert found.status == ("interrupted" if code == 130 else "failed")
    [stage] = found.stages
    assert (stage.name, stage.status) == ("time", found.status)
    assert stage.message == ("" if code == 130 else last.removeprefix("kernbench: "))
    assert children() == []


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where a shell started the tests in the background, which it lets ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_rank_behind(ranked, interruptible, monkeypatch):
    monkeypatch.setenv("RANKED_FAULT", "hang:1")
    # As at the terminal: one that arrives while a finalizer runs is sent again.
    monkeypatch.setattr(sys, "unraisablehook", cli._unraisable)

    running = []

    def interrupt():
        while not HANGS.exists():
            time.sleep(0.05)
        running.extend(children())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = profile("--ranks", 2, "--time-limit", 60)
    assert result.exit_code == 130, result.output
    assert re.search(ENDINGS["interrupt"][1], result.stderr)
    assert len(running) == 2
    assert children() == []


@pytest.mark.parametrize(
    ("arguments", "told", "sentence"),
    [
        (["--ranks", 0], {}, "--ranks 0: there is at least one rank; try --ranks 2"),
        (["--ranks", 2, "--in-process"], {}, "--ranks starts a process for each rank; leave --in-process out"),
        (["--ranks", 2], TOLD, "--ranks 2 starts the ranks itself, and this is rank 1 of 2 already"),
        ([], {**TOLD, "MASTER_PORT": ""}, "but MASTER_PORT is ''; start with torchrun, or unset them"),
        ([], {**TOLD, "RANK": "2"}, "but RANK is 2 of 2; start with torchrun, or unset them"),
        ([], {**TOLD, "MASTER_ADDR": ""}, "but MASTER_ADDR is missing; start with torchrun, or unset them"),
    ],
)
def test_wrong_uses_are_told_in_one_sentence(ranked, monkeypatch, arguments, told, sentence):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    result = profile(*arguments)
    assert result.exit_code == 2
    [line] = result.stderr.strip().splitlines()
    assert sentence in line
    assert not list(ranked.glob("reports/*/*"))


@pytest.mark.parametrize("command", ["swap", "parity", "bench"])
def test_other_commands_refuse_to_run_on_several_ranks(ranked, monkeypatch, command):
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    result = run(command, *(["--all", "ranked"] if command == "swap" else ["ranked"]))
    assert result.exit_code == 2
    assert f"kernbench {command} runs in one process, and this is rank 1 of 2" in result.stderr


def test_a_launcher_of_one_process_changes_nothing_for_them(monkeypatch):
    for name, value in {**TOLD, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    ranks.refuse("swap")


def test_every_rank_takes_a_gpu_of_its_own_or_all_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    team = rankruns.team(Request(command="", ranks=2))
    assert team is not None
    assert (team.device, team.notes) == ("cuda", ())
    assert [team.device_of(place) for place in ranks.local_places(2, 1)] == ["cuda:0", "cuda:1"]
    more = rankruns.team(Request(command="", ranks=4))
    assert more is not None
    assert more.device == "cpu"
    assert more.notes == ("4 ranks and 2 GPUs: all ranks run on the CPU, with gloo; take at most 2 for a GPU each",)
    with pytest.raises(KernbenchError, match="--device cuda: 4 ranks need 4 GPUs, and there are 2 here"):
        rankruns.team(Request(command="", ranks=4, device="cuda"))
    with pytest.raises(KernbenchError, match="--device cuda:1 is one device"):
        rankruns.team(Request(command="", ranks=2, device="cuda:1"))


def test_the_place_that_a_launcher_tells():
    assert ranks.launched({}) is None
    place = ranks.launched({**TOLD, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert place == ranks.Place(
        rank=1, size=2, local_rank=1, local_size=2, address="127.0.0.1", port=29501, hosted=True
    )
    assert {**TOLD, **place.environment()} == {**TOLD, "LOCAL_WORLD_SIZE": "2"}


def torchrun(*arguments, **environment):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kernbench",
    ]
    return subprocess.run(
        [*command, "profile", "ranked", "--device", "cpu", "--steps", "3", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def test_torchrun_starts_the_ranks_and_one_of_them_writes(ranked):
    done = torchrun("--json", "--quiet")
    assert done.returncode == 0, done.stderr
    found, folder = record_of(ranked)
    assert json.loads(done.stdout)["run_id"] == found.run_id
    assert [side.rank for side in found.ranks.sides] == [0, 1]
    assert [one.rank for one in found.analysis.communication.ranks] == [0, 1]
    assert (folder / "trace-rank1.json.gz").is_file()


def test_under_torchrun_a_rank_that_fails_says_so_and_the_others_end(ranked):
    done = torchrun("--quiet", RANKED_FAULT="raise:1")
    assert done.returncode != 0
    assert "kernbench: rank 1 of 2: step 4 of ranked failed: ValueError: this rank broke" in done.stderr
    found, _ = record_of(ranked)
    assert found.status in ("failed", "interrupted")


def test_bio_nanochat_is_profiled_on_two_ranks(ranked):
    result = run(
        "profile", "bio-nanochat", "--preset", "tiny", "--device", "cpu", "--steps", 2, "--ranks", 2, "--quiet"
    )
    assert result.exit_code == 0, result.output
    [path] = ranked.glob("reports/bio-nanochat/*/record.json")
    found = record.read(path)
    assert [side.units_per_step for side in found.ranks.sides] == [4 * 64.0, 4 * 64.0]
    exchange = found.analysis.communication
    assert [one.rank for one in exchange.ranks] == [0, 1]
    assert list(exchange.collectives) == ["all_reduce"]
    assert (path.parent / "trace-rank1.json.gz").is_file()


def test_gradients_of_bio_nanochat_are_means_and_are_sent_while_backward_runs():
    store, port = group.host_store(60)
    for told in at_once([Differentiate(rank, 2, port) for rank in range(2)]):
        assert told["off"] < 1e-12 * told["largest"]
        assert told["own_off"] > 1e-3 * told["largest"]
        assert told["sent_in_backward"] == told["buckets"] > 3
    del store
