"""What parity does not ask of fused_cms: refused arguments, two dtypes at once, its compiled peer, a training run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_titan_mac import CPU, small, training
from test_titan_mac_phases import workload

from kernbench import registry
from kernbench import request as asked


def spec() -> Any:
    return registry.kernel("fused_cms").declaration


def inputs(case: str, seed: int = 0) -> dict[str, Any]:
    made: dict[str, Any] = spec().make_inputs(spec().case(case), torch.float32, CPU, seed)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 0}, "3 levels and cannot have 0 active"),
        ({"active": 4}, "3 levels and cannot have 4 active"),
        ({"grads": []}, "2 params, 0 grads and 2 states"),
        ({"width": 33}, "a width of 1 to 32 and 1 to 8 layers, not 33 and 1"),
        ({"layers": 9}, "not 2 and 9"),
        ({"width": 4}, "weights must be contiguous, torch.float32"),
        ({"lrs": torch.zeros(1)}, "lrs must be contiguous"),
        ({"states": [torch.zeros(4, 3, 33), torch.zeros(4, 3, 32)]}, "states number 1 must be contiguous"),
        ({"states": [torch.zeros(33, dtype=torch.float64)] * 2}, "states number 0 must be contiguous"),
    ],
)
def test_it_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec().optimized(**{**inputs("levels"), **change})


def test_nothing_to_do_is_no_error() -> None:
    empty: dict[str, Any] = {"params": [], "grads": [], "states": [], "lrs": torch.zeros(0)}
    spec().optimized(**{**inputs("one"), **empty})


def test_parameters_of_two_dtypes() -> None:
    given, expected = inputs("levels"), inputs("levels")
    for one in (given, expected):
        for name in ("params", "grads"):
            one[name] = [one[name][0], one[name][1].bfloat16()]
        # A tensor of each dtype has a level that is cut or skipped, so their verdicts differ.
        one["states"][0][1, 1].fill_(float("nan"))
    spec().optimized(**given)
    spec().reference(**expected)
    for tensor, other in zip(given["params"] + given["states"], expected["params"] + expected["states"], strict=True):
        torch.testing.assert_close(tensor, other, rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", ["one", "ragged", "levels"])
def test_the_compiled_peer_computes_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = spec().peers["torch.compile, vectorised"]
    plain = sys.modules[peer.__module__]
    monkeypatch.setattr(plain, "_compiled_network", lambda: plain.network)
    given, expected = inputs(case), inputs(case)
    peer(**given)
    spec().reference(**expected)
    for tensor, other in zip(given["params"] + given["states"], expected["params"] + expected["states"], strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-7)


def test_it_trains_like_the_baseline() -> None:
    config = small(
        optimizer="cms", momentum_width=2, momentum_layers=1, layers=1, length=12, persistent=2, base_lr=0.1, width=8
    )
    runs = []
    for numbers in ((), (0, 5)):
        built = training(config, dtype=torch.float32)
        built.optimizer.calls = 8
        with asked.plan(workload(), dict.fromkeys(numbers, "triton")).applied(built) as receipt:
            # One level is due in the first step, two are in the next.
            losses = [float(built.step(index)) for index in range(2)]
            runs.append((losses, built.model.state_dict()))
    assert receipt.hits(2)[-1].calls == 2
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-3, atol=1e-6)
