"""bio-nanochat's controller: who merges, splits and is reset, and what becomes of weights, state and optimizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bio_parts import module, small, training


def lively(**changes: Any) -> Any:
    base = module("config").LIVELY
    return dataclasses.replace(base, **changes)


def trained(structure: Any, *, profile: str = "SynapticConfig", optimizer: str = "adamw", steps: int = 2) -> Any:
    synapses = getattr(module("synapses"), profile)()
    quiet = dataclasses.replace(structure, every=0)
    built = training(small(experts=5, structure=quiet, synapses=synapses, optimizer=optimizer))
    for index in range(steps):
        built.step(index)
    built.controller.config = structure
    return built


def test_split_copies_the_healthiest_into_the_weakest() -> None:
    structure = lively(merges_per_call=0)
    built = trained(structure)
    mixture = built.model.blocks[0].mlp
    mixture.fatigue.copy_(torch.tensor([0.3, 0.1, 0.4, 0.2, 0.25]))
    mixture.energy.fill_(0.9)
    built.controller.apply(0, mixture, built.optimizers, 7)
    assert built.controller.lineage == [(0, "split", 1, 2, 7)]
    linear = mixture.outer
    difference = (linear.slow[2] - linear.slow[1]).std()
    assert 0.017 < difference < 0.023
    assert linear.hebbian[2].abs().sum() == 0
    torch.testing.assert_close(linear.trace_in[2], 0.5 * linear.trace_in[1])
    assert (float(mixture.fatigue[2]), float(mixture.energy[2])) == (0.0, 1.0)
    assert float(mixture.embedding[2].norm()) == pytest.approx(1)
    assert float(mixture.embedding[2] @ mixture.embedding[1]) > 0.9


def test_merge_takes_the_most_similar_pair_and_weighs_by_fatigue() -> None:
    structure = lively(splits_per_call=0, merge_cosine_threshold=0.5, merge_health_max=1.0)
    built = trained(structure)
    mixture = built.model.blocks[0].mlp
    mixture.embedding.copy_(torch.eye(5, 24))
    mixture.embedding[3].copy_(torch.nn.functional.normalize(torch.eye(5, 24)[0] * 2 + torch.eye(5, 24)[3], dim=0))
    mixture.fatigue.copy_(torch.tensor([0.1, 0.2, 0.2, 0.3, 0.2]))
    mixture.energy.fill_(0.9)
    slow, camkii, genome = mixture.inner.slow.clone(), mixture.inner.camkii.clone(), mixture.genome.clone()
    mixture.inner.camkii[3] = 0.2
    camkii[3] = 0.2
    router = mixture.router.weight.clone()
    built.controller.apply(0, mixture, built.optimizers, 7)
    assert built.controller.lineage == [(0, "merge", 0, 3, 7)]
    torch.testing.assert_close(mixture.inner.slow[0], 0.25 * slow[0] + 0.75 * slow[3])
    torch.testing.assert_close(mixture.inner.camkii[0], 0.9 * camkii[0] + 0.1 * camkii[3])
    torch.testing.assert_close(mixture.router.weight[0], 0.5 * (router[0] + router[3]))
    assert torch.equal(mixture.genome, genome)
    others = [1, 2, 4]
    assert torch.equal(mixture.inner.slow[others], slow[others])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("patch", ["zero", "inherit"])
def test_optimizer_state_follows_the_expert(patch: str, optimizer: str) -> None:
    built = trained(lively(merges_per_call=0, patch=patch), optimizer=optimizer)
    mixture = built.model.blocks[0].mlp
    mixture.fatigue.copy_(torch.tensor([0.3, 0.1, 0.4, 0.2, 0.25]))
    mixture.energy.fill_(0.9)
    rows = module("structure").row_states
    states = [
        state
        for parameter in (mixture.inner.slow, mixture.inner.bias, mixture.outer.fast)
        for one in built.optimizers
        for _, state in rows(one, parameter)
    ]
    router = [state for one in built.optimizers for _, state in rows(one, mixture.router.weight)]
    assert states
    assert router
    for state in (*states, *router):
        state.normal_()
    before = [state.clone() for state in (*states, *router)]
    built.controller.apply(0, mixture, built.optimizers, 7)
    for state, then in zip((*states, *router), before, strict=True):
        assert torch.equal(state[2], then[1]) if patch == "inherit" else state[2].abs().sum() == 0
    kept = [0, 1, 3, 4]
    assert all(torch.equal(state[kept], then[kept]) for state, then in zip(states, before, strict=False))
    whole_router_is_zero = all(state.abs().sum() == 0 for state in router)
    assert whole_router_is_zero is (patch == "zero")


def test_dead_experts_of_profile_k_are_reset_from_the_best() -> None:
    structure = lively(merges_per_call=0, splits_per_call=0, reset_health_max=0.02)
    built = trained(structure, profile="TopKConfig")
    mixture = built.model.blocks[0].mlp
    mixture.fatigue.copy_(torch.tensor([0.3, 0.0, 0.4, 0.2, 0.25]))
    mixture.energy.fill_(0.9)
    built.controller.apply(0, mixture, built.optimizers, 7)
    assert built.controller.lineage == [(0, "reset", 2, 1, 7)]
    assert mixture.inner.trace_in[1].abs().sum() == 0
    torch.testing.assert_close(mixture.inner.gain_in[1], 0.5 * mixture.inner.gain_in[2])


@pytest.mark.parametrize(
    ("step", "last", "expected"), [(20_000, None, True), (20_500, None, False), (10_000, None, False),
                                   (21_000, 20_000, False), (30_000, 20_000, True)]
)  # fmt: skip
def test_when_the_controller_acts(step: int, last: int | None, expected: bool) -> None:
    controller = module("structure").StructuralController(module("config").StructureConfig(), 0)
    controller.last_step = last
    assert controller.due(step) is expected


def test_equal_seeds_make_equal_clones() -> None:
    weights = []
    for _ in range(2):
        built = training(small(experts=4, structure=lively()))
        for index in range(4):
            built.step(index)
        assert built.controller.lineage
        weights.append(built.model.blocks[0].mlp.inner.slow.clone())
    assert torch.equal(*weights)


def test_training_goes_on_after_splits_and_merges() -> None:
    built = training(small(experts=4, structure=lively()), dtype=torch.float32)
    losses = [float(built.step(index)) for index in range(16)]
    assert {kind for _, kind, *_ in built.controller.lineage} >= {"split"}
    assert losses[-1] < losses[0]
