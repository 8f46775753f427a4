from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from kernbench import state
from kernbench.errors import KernbenchError
from kernbench.state import KeptPhase, State

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from kernbench import state
with state.swap_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def kept(number: int, implementation: str = "triton") -> KeptPhase:
    return KeptPhase(
        number=number, implementation=implementation, run_id=f"run{number}", kept_utc="2026-11-21T12:00:00Z"
    )


def keep_ten(root: Path, worker: int) -> None:
    for number in range(10):
        state.update(root, partial(State.keeping, workload=f"model{worker}", phase=kept(number)))


def test_a_fresh_workspace_has_an_empty_state(tmp_path: Path) -> None:
    assert state.load(tmp_path) == State()
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    state.update(tmp_path, lambda before: before.profiled("titan-mac", "tiny", "cpu"))
    written = state.update(tmp_path, lambda before: before.keeping("titan-mac", kept(0)))
    assert state.load(tmp_path) == written
    assert written.last_profiled is not None
    assert written.last_profiled.workload == "titan-mac"
    assert [phase.number for phase in written.kept["titan-mac"]] == [0]


def test_phases_stack_and_revert_in_the_order_they_were_kept() -> None:
    after = State().keeping("m", kept(2)).keeping("m", kept(0)).keeping("other", kept(5))
    assert [phase.number for phase in after.kept["m"]] == [2, 0]
    assert [phase.number for phase in after.reverting("m").kept["m"]] == [2]
    assert after.reverting("m").kept["other"] == [kept(5)]


def test_keeping_a_phase_again_replaces_it() -> None:
    after = State().keeping("m", kept(2, "triton")).keeping("m", kept(2, "compile"))
    assert after.kept["m"] == [kept(2, "compile")]


@pytest.mark.parametrize("before", [State(), State().keeping("m", kept(1)).reverting("m")])
def test_nothing_to_revert_is_an_error_that_says_so(before: State) -> None:
    with pytest.raises(KernbenchError, match="no phase of m is kept"):
        before.reverting("m")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"kept": {"m": [{"number": "zero"}]}}', b'{"schema": 1}\xff', b"\x00" * 64]
)
def test_a_damaged_state_is_named_and_left_as_it_is(tmp_path: Path, damage: bytes) -> None:
    path = state.path_of(tmp_path)
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(KernbenchError, match="damaged") as caught:
        state.update(tmp_path, lambda before: before.profiled("m", "tiny", "cpu"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damage


def test_a_state_of_a_newer_kernbench_is_refused(tmp_path: Path) -> None:
    path = state.path_of(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b'{"schema": 99}')
    with pytest.raises(KernbenchError, match="upgrade"):
        state.load(tmp_path)


def test_an_update_that_fails_changes_nothing(tmp_path: Path) -> None:
    state.update(tmp_path, lambda before: before.keeping("m", kept(0)))
    with pytest.raises(KernbenchError):
        state.update(tmp_path, lambda before: before.reverting("other"))
    assert state.load(tmp_path).kept == {"m": [kept(0)]}


def test_concurrent_updates_lose_nothing(tmp_path: Path) -> None:
    workers = [multiprocessing.get_context("spawn").Process(target=keep_ten, args=(tmp_path, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    counts = {workload: len(phases) for workload, phases in state.load(tmp_path).kept.items()}
    assert counts == {f"model{i}": 10 for i in range(4)}


def test_a_second_swap_is_refused_and_told_who_holds_the_workspace(tmp_path: Path) -> None:
    with (
        state.swap_lock(tmp_path),
        pytest.raises(KernbenchError, match=rf"process {os.getpid()}, since \d{{4}}-.* UTC\); wait for it or stop it"),
        state.swap_lock(tmp_path),
    ):
        pytest.fail("two swaps at once")
    with state.swap_lock(tmp_path):
        assert state.path_of(tmp_path).with_name("swap.pid").is_file()
    assert not state.path_of(tmp_path).with_name("swap.pid").exists()


def test_a_killed_swap_frees_the_workspace(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(KernbenchError, match=f"process {holder.pid}"), state.swap_lock(tmp_path):
            pytest.fail("two swaps at once")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with state.swap_lock(tmp_path):
        assert str(os.getpid()) in state.path_of(tmp_path).with_name("swap.pid").read_text()


def test_a_read_only_workspace_is_an_error_that_says_what_to_do(read_only_folder: Path) -> None:
    assert state.load(read_only_folder) == State()
    with pytest.raises(KernbenchError, match="make that folder writable"):
        state.update(read_only_folder, lambda before: before)
    with pytest.raises(KernbenchError, match="make that folder writable"), state.swap_lock(read_only_folder):
        pytest.fail("locked what cannot be written")


def test_a_file_where_the_state_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".kernbench").write_text("not a folder")
    with pytest.raises(KernbenchError, match="cannot read"):
        state.load(tmp_path)
    with pytest.raises(KernbenchError, match="cannot write"):
        state.update(tmp_path, lambda before: before)
