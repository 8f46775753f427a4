"""bio-nanochat's log: written by a thread, in order, with its errors told; and TensorBoard's files where asked for."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from bio_parts import module, small, training

from kernbench.errors import KernbenchError


def summarize(step: int, values: torch.Tensor) -> dict[str, Any]:
    return {"step": step, "sum": float(values.sum()), "thread": threading.get_ident()}


def test_entries_come_in_order_from_another_thread() -> None:
    written: list[tuple[str, dict[str, Any]]] = []
    log = module("asynclog").AsyncLog(summarize, lambda tag, entry: written.append((tag, entry)))
    values = torch.zeros(3)
    for step in range(20):
        log.put("scores", step, values)
        values += 1
    log.flush()
    assert [entry["step"] for _, entry in written] == list(range(20))
    assert [entry["sum"] for _, entry in written] == [3.0 * step for step in range(20)]
    assert {entry["thread"] for _, entry in written}.isdisjoint({threading.get_ident()})


def test_a_program_that_ends_waits_for_its_log() -> None:
    daemons: list[bool] = []
    log = module("asynclog").AsyncLog(summarize, lambda tag, entry: daemons.append(threading.current_thread().daemon))
    log.put("scores", 1, torch.zeros(3))
    log.flush()
    assert daemons == [False]


def test_an_error_of_the_writer_is_told() -> None:
    def fail(tag: str, entry: dict[str, Any]) -> None:
        raise OSError("no space left")

    log = module("asynclog").AsyncLog(summarize, fail)
    log.put("scores", 1, torch.zeros(3))
    with pytest.raises(RuntimeError, match="could not be written"):
        log.flush()
    with pytest.raises(RuntimeError, match="could not be written"):
        log.put("scores", 2, torch.zeros(3))


class Writer:
    """Stands for TensorBoard's writer and keeps what it is given."""

    made: list[Writer] = []

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append(("scalar", name, step))

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.calls.append(("histogram", name, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.calls.append(("text", name, step))

    def flush(self) -> None:
        self.calls.append(("flush", "", 0))


def test_the_environment_asks_for_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = types.ModuleType("torch.utils.tensorboard")
    vars(fake)["SummaryWriter"] = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setenv("BIO_LOG_DIR", str(tmp_path))
    Writer.made.clear()
    built = training(small(experts=3, log_every=2))
    for index in range(2):
        built.step(index)
    assert [writer.folder for writer in Writer.made] == [str(tmp_path)] * 2
    calls = Writer.made[1].calls
    assert ("scalar", "layer 1/gini", 2) in calls
    assert ("histogram", "layer 1/efficiency", 2) in calls
    assert ("text", "layer 1/best", 2) in calls


def test_of_several_ranks_the_first_one_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = types.ModuleType("torch.utils.tensorboard")
    vars(fake)["SummaryWriter"] = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setenv("BIO_LOG_DIR", str(tmp_path))
    found = []
    for rank in range(2):
        monkeypatch.setattr(module("parallel"), "world", lambda rank=rank: (rank, 2))
        found.append(module("asynclog").writer())
    assert found[0] is not None
    assert found[1] is None


def test_without_tensorboard_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setenv("BIO_LOG_DIR", str(tmp_path))
    with pytest.raises(KernbenchError, match="there is no tensorboard"):
        training(small(experts=3))


@pytest.mark.gpu
def test_the_loop_does_not_wait_for_the_device() -> None:
    """A log of values that the device computes for long is put before they are there."""
    written: list[float] = []
    log = module("asynclog").AsyncLog(summarize, lambda tag, entry: written.append(entry["sum"]))
    values = torch.zeros(3, device="cuda")
    log.put("warm", 0, values)
    log.flush()
    torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]
    values += 1
    log.put("scores", 1, values)
    assert not torch.cuda.current_stream().query()
    log.flush()
    assert written[-1] == 3.0
