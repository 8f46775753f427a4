"""bio-nanochat on two gloo ranks: equal weights and moves, own tokens and plastic state, a log of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bio_parts import module
from bio_ranks import Train, at_once


@pytest.mark.parametrize("phases", [(0, 2), (0, 2, 3, 4)])
def test_two_ranks_agree_on_weights_and_moves_and_keep_their_own_state(tmp_path: Path, phases: tuple[int, ...]) -> None:
    first, second = at_once([Train(rank, 2, tmp_path / "meeting", phases) for rank in range(2)])
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
