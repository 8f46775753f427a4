"""bio-nanochat's phases: the same training as the baseline, and with no host read where that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bio_parts import module, small, training
from torch import Tensor

from kernbench import device, registry, swap
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
            torch.testing.assert_close(found[name], leaf, rtol=rtol, atol=rtol * scale + 1e-12, msg=name)
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


def test_scores_on_the_device_are_those_on_the_host() -> None:
    config = small(experts=5, log_every=3)
    expected, losses = run(config, 7, 0)
    found, again = run(config, 7, 0, 2)
    assert again == pytest.approx(losses, rel=1e-9)
    assert_same(found, expected)


def test_scores_by_their_kernels_are_the_same() -> None:
    sides = []
    for numbers in ((), (2,)):
        built = training(small(experts=5, log_every=2), dtype=torch.float32)
        with plan(*numbers, use="triton").applied(built):
            for index in range(2):
                built.step(index)
        for score in built.scores:
            if score.log is not None:
                score.log.flush()
        sides.append(built)
    for before, after in zip(sides[0].scores, sides[1].scores, strict=True):
        for one, other in zip(before.vectors(), after.vectors(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
        assert [entry["step"] for entry in after.log_entries] == [2]
        assert after.log_entries[0]["gini"] == pytest.approx(before.log_entries[0]["gini"], abs=1e-5)
        assert after.log_entries[0]["best"][0][0] == before.log_entries[0]["best"][0][0]


def test_phases_can_be_taken_out_again() -> None:
    """Scores that moved to the device come back to the host when the kernels go."""
    built = training(small(experts=5))
    with plan(0, 2).applied(built):
        built.step(0)
    built.step(1)
    assert built.scores[0].steps == 2
    assert built.losses()[1] == pytest.approx(run(small(experts=5), 2)[1][1])


def deterministic(**changes: Any) -> Any:
    return small(synapses=module("synapses").SynapticConfig(stochastic_train_frac=0.0), **changes)


def noisy(share: float, **changes: Any) -> Any:
    return small(synapses=module("synapses").SynapticConfig(stochastic_train_frac=share), **changes)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_attention_by_its_operator_is_the_same(share: float) -> None:
    """The operator's reference in the place of attend: the same steps in float64, with the same noise."""
    expected, losses = run(noisy(share), 4)
    found, again = run(noisy(share), 4, 1)
    assert again == pytest.approx(losses, rel=1e-9)
    assert_same(found, expected)


def test_noise_of_no_quanta_is_that_of_one() -> None:
    synapses = module("synapses").SynapticConfig(stochastic_train_frac=0.4, stochastic_quanta=0)
    expected, _ = run(small(synapses=synapses), 2)
    found, _ = run(small(synapses=synapses), 2, 1)
    assert_same(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_attention_by_its_kernel_is_the_same(share: float) -> None:
    """One interpreted step in float32, forward and backward through both layers' synapses."""
    sides = [training(noisy(share, length=18), dtype=torch.float32) for _ in range(2)]
    for built, numbers in zip(sides, ((), (1,)), strict=True):
        with plan(*numbers, use="triton").applied(built):
            built.loss_value = built.differentiate(*built.batch(0))
    assert float(sides[1].loss_value) == pytest.approx(float(sides[0].loss_value), rel=1e-6)
    for (name, one), other in zip(sides[0].model.named_parameters(), sides[1].model.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=2e-5 * scale + 1e-9, msg=name)


def test_docking_as_upstream_has_it_is_done_as_before_and_said() -> None:
    config = small(dock="upstream")
    device.WARNINGS.clear()
    expected, _ = run(config, 2)
    found, _ = run(config, 2, 1)
    assert_same(found, expected)
    assert any("docks" in message for message in device.WARNINGS)


def test_profile_k_has_its_attention_as_before_and_that_is_said() -> None:
    config = small(synapses=module("synapses").TopKConfig(attn_topk=7))
    device.WARNINGS.clear()
    expected, _ = run(config, 2)
    assert device.WARNINGS == []
    found, _ = run(config, 2, 1)
    assert_same(found, expected)
    assert any("profile K runs as the baseline" in message for message in device.WARNINGS)
