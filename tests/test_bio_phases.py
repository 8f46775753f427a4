"""bio-nanochat's phases: the same training as the baseline, and with no host read where that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bio_parts import module, small, training
from torch import Tensor

from kernbench import registry, swap
from kernbench.parity import compare


def plan(*numbers: int, use: str = "eager") -> Any:
    workload = registry.workload("bio-nanochat").declaration
    kernels = registry.kernels()
    return swap.plan(workload, numbers, use=dict.fromkeys(numbers, use), kernels=lambda name: kernels[name].declaration)


def run(config: Any, steps: int, *numbers: int, use: str = "eager") -> tuple[dict[str, Any], list[float]]:
    """The state after some steps, by leaf, and the losses."""
    built = training(config)
    with plan(*numbers, use=use).applied(built):
        losses = [float(built.step(index)) for index in range(steps)]
    return compare.leaves(compare.clone(built.state_dict()), ""), losses


def assert_same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-7) -> None:
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            scale = float(leaf.abs().max())
            torch.testing.assert_close(
                found[name], leaf, rtol=rtol, atol=rtol * scale + 1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
        elif isinstance(leaf, Tensor):
            assert torch.equal(found[name], leaf), name


def configs() -> dict[str, Any]:
    top_k = module("synapses").TopKConfig
    return {
        "dense": small(),
        "experts": small(experts=5),
        "one-of-many": small(experts=40, chosen=1, batch=1),
        "muon": small(experts=3, optimizer="muon"),
        "k": small(experts=5, synapses=top_k(attn_topk=7)),
        "k-counts": small(synapses=top_k(attn_topk=7, stochastic_mode="straight_through")),
        "k-forward": small(experts=5, synapses=top_k(attn_topk=7), step="forward"),
        "k-forward-dense": small(synapses=top_k(attn_topk=7), step="forward"),
        "k-off": small(
            experts=3, synapses=top_k(enable_presyn=False, enable_hebbian=False, enable_metabolism=False)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(configs()))
def test_without_reads_the_training_is_the_same(name: str) -> None:
    config = configs()[name]
    expected, losses = run(config, 4)
    found, again = run(config, 4, 0)
    assert again == pytest.approx(losses, rel=1e-9)
    assert_same(found, expected)
