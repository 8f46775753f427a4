"""bio-nanochat on two gloo ranks: equal weights and moves, own tokens and plastic state, a log of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bio_parts import module

RANKS = 2


def run_ranks(folder: Path, phases: str) -> list[dict[str, Any]]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, str(here / "bio_ranks.py"), str(rank), str(RANKS), str(folder / "meeting"), phases]
        for rank in range(RANKS)
    ]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    results = []
    for process in started:
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.mark.parametrize("phases", ["0,2", "0,2,3,4"])
def test_two_ranks_agree_on_weights_and_moves_and_keep_their_own_state(tmp_path: Path, phases: str) -> None:
    first, second = run_ranks(tmp_path, phases)
    assert first["parameters"] == second["parameters"]
    assert first["lineage"] == second["lineage"]
    assert first["lineage"]
    assert first["losses"] != second["losses"]
    assert first["hebbian"] != second["hebbian"]
    assert first["logged"] == second["logged"] == pytest.approx((first["own"] + second["own"]) / 2)


def test_gradients_are_sent_in_pieces_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = module("parallel")
    monkeypatch.setattr(parallel, "BUCKET_NUMBERS", 10)
    sizes = [4, 5, 30, 3, 3, 3, 3]
    gradients = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.float64)]
    found = [[one.numel() for one in bucket] for bucket in parallel.buckets(gradients)]
    assert found == [[2], [3, 3, 3], [3], [30], [5, 4]]


def test_without_a_group_there_is_one_rank() -> None:
    parallel = module("parallel")
    assert parallel.world() == (0, 1)
    assert parallel.from_first_rank([[1.0, 2.0]], 3, 2, torch.device("cpu")) == [[1.0, 2.0]]
