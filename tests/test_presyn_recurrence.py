"""The presynaptic recurrence: golden vectors, and a state that is carried from call to call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernbench import device, registry
from kernbench.spec import Case

DEVICE = device.resolve("auto")
SPEC = registry.kernel("presyn_recurrence").declaration
MODULE: Any = __import__("sys").modules[SPEC.optimized.__module__]
STATES = {
    "calcium": [0.128863, 0.247963, 0.361178, 0.438383],
    "buffer": [0, 0.077318, 0.199503, 0.33404],
    "pool": [0.64816, 0.252046, 0, 0],
    "reserve": [0.332088, 0.712198, 0.958022, 0.958022],
    "primed": [0.601972, 0.593508, 0.591112, 0.598524],
    "energy": [0.813953, 0.826215, 0.841585, 0.860304],
}


def golden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head, token, column = (torch.arange(n, dtype=torch.float64) for n in (2, 4, 8))
    phase = 0.5 * head[:, None, None] + 0.8 * token[:, None] + 0.37 * column
    q = torch.sin(0.3 + phase)[None]
    k = torch.cos(0.1 + 0.4 * head[:, None, None] + 0.6 * token[:, None] + 0.53 * column)[None]
    return q, k, torch.full((1, 2, 4), 0.5, dtype=torch.float64)


def test_the_reference_repeats_the_golden_vectors() -> None:
    q, k, clamp = golden()
    _, bias, states = MODULE.biased(q, k, clamp, MODULE.start(q).double())
    rows = [
        [-2.130797],
        [-1.655247, -1.954581],
        [-2.399116, -2.509251, -2.816562],
        [-4.732104, -4.707731, -4.796655, -5.048846],
    ]
    for row, wanted in enumerate(rows):
        assert bias[0, 0, row, : row + 1].tolist() == pytest.approx(wanted, abs=1e-6)
    for got, (name, wanted) in zip(states, STATES.items(), strict=True):
        assert got[0, 0].tolist() == pytest.approx(wanted, abs=1e-6), name


def test_the_kernel_repeats_the_golden_state() -> None:
    q, k, clamp = (one.float().to(DEVICE) for one in golden())
    _, *states = SPEC.optimized(q, k, q, clamp, MODULE.start(q))
    for got, (name, wanted) in zip(states, STATES.items(), strict=True):
        assert got[0, 0].tolist() == pytest.approx(wanted, abs=1e-5), name


def test_the_state_of_the_last_row_is_carried_into_the_next_call() -> None:
    inputs = SPEC.make_inputs(Case("drawn", batch=1, heads=2, tokens=9, dim=16), torch.float32, DEVICE, 3)
    _, *states = SPEC.optimized(**inputs)
    inputs["carried"] = torch.stack([state[:, :, -1] for state in states])
    got, wanted = SPEC.optimized(**inputs), SPEC.reference(**inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got[1], states[0])


def test_a_gradient_is_refused() -> None:
    inputs = SPEC.make_inputs(Case("drawn", batch=1, heads=1, tokens=2, dim=16), torch.float32, DEVICE, 0)
    inputs["q"].requires_grad_()
    with pytest.raises(ValueError, match="presyn_recurrence has no gradient"):
        SPEC.optimized(**inputs)


def test_a_state_of_another_shape_is_refused() -> None:
    inputs = SPEC.make_inputs(Case("drawn", batch=1, heads=1, tokens=2, dim=16), torch.float32, DEVICE, 0)
    with pytest.raises(ValueError, match="carried"):
        SPEC.optimized(**inputs | {"carried": inputs["carried"][:5]})
