"""bio-nanochat on a GPU: the phases train as the baseline does, and a step makes the host wait for nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bio_nccl import RANKS
from bio_parts import module

from kernbench import registry, swap

pytestmark = pytest.mark.gpu


def built(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    training = module("training").Training(config, device=torch.device("cuda:0"), dtype=dtype, seed=0, data=None)
    training.model.counted_noise = True
    return training


def plan(*numbers: int) -> Any:
    kernels = registry.kernels()
    return swap.plan(
        registry.workload("bio-nanochat").declaration,
        numbers,
        use=dict.fromkeys(numbers, "triton"),
        kernels=lambda name: kernels[name].declaration,
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def config(**changes: Any) -> Any:
    return dataclasses.replace(module("config").PRESETS["small-moe"], layers=2, batch=2, **changes)


def test_the_phases_train_as_the_baseline_does() -> None:
    losses = []
    for numbers in ((), (0, 1, 2)):
        training = built(config())
        with plan(*numbers).applied(training):
            losses.append([float(training.step(index)) for index in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < losses[1][0]


def test_with_its_phases_a_step_waits_for_nothing() -> None:
    training = built(config(log_every=2))
    with plan(0, 1, 2).applied(training):
        for index in range(4):
            training.step(index)
        torch.cuda.synchronize()
        with no_waiting():
            for index in range(4, 8):
                training.step(index)
    for score in training.scores:
        score.log.flush()
        assert [entry["step"] for entry in score.log_entries] == [2, 4, 6, 8]


@pytest.mark.parametrize("step", ["train", "forward"])
def test_without_reads_profile_k_waits_for_nothing_but_its_scores(step: str) -> None:
    changes = {"synapses": module("synapses").TopKConfig(), "step": step, "experts": 0, "hidden_multiple": 2}
    training = built(config(**changes), torch.float32)
    with plan(0).applied(training):
        training.step(0)
        torch.cuda.synchronize()
        with no_waiting():
            training.step(1)


def test_the_unswapped_step_waits() -> None:
    training = built(config())
    training.step(0)
    with pytest.raises(RuntimeError, match="synchron"), no_waiting():
        training.step(1)


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs, one for each rank")
@pytest.mark.parametrize("phases", ["0,1,2", "0,1,2,3,4"])
def test_two_gpus_agree_on_weights_and_moves_and_keep_their_own_state(tmp_path: Path, phases: str) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    commands = [
        [sys.executable, str(here / "bio_nccl.py"), str(rank), str(tmp_path / "meeting"), phases]
        for rank in range(RANKS)
    ]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    found = []
    try:
        for process in started:
            out, error = process.communicate(timeout=100)
            assert process.returncode == 0, error[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
            process.wait()
    first, second = found
    assert first["parameters"] == second["parameters"]
    assert first["lineage"] == second["lineage"]
    assert first["lineage"]
    assert first["losses"] != second["losses"]
    assert first["hebbian"] != second["hebbian"]
    assert first["logged"] == second["logged"] == pytest.approx((first["own"] + second["own"]) / 2)
