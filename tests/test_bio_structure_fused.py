"""bio-nanochat's phases 3 and 4: genes in the router, and experts that move on the device, against the baseline."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from bio_parts import module, small, training
from test_bio_phases import assert_same, plan, run

from kernbench import registry
from kernbench.parity import compare

DRAWN = ("slow", "fast", "bias", "router.weight", "embedding")
"""What moves draw noise for; all else has to be equal bit for bit."""
PROFILES = {"P": "SynapticConfig", "K": "TopKConfig"}


def controlled(profile: str, optimizer: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A run of a few steps, with experts as ready for merges, splits and resets as they can be."""
    structure = dataclasses.replace(module("config").LIVELY, **changes)
    synapses = getattr(module("synapses"), PROFILES[profile])()
    quiet = dataclasses.replace(structure, every=0)
    built = training(small(experts=9, structure=quiet, synapses=synapses, optimizer=optimizer), dtype=dtype)
    for index in range(2):
        built.step(index)
    built.controller.config = structure
    generator = torch.Generator().manual_seed(5)
    for mixture in built.model.mixtures():
        for buffer in (mixture.fatigue, mixture.energy):
            buffer.copy_(torch.rand(9, generator=generator))
        mixture.fatigue[4] = 0.0
        # The expert that profile K finds the healthiest merges too, so that a reset starts from what a merge left.
        strongest = int((mixture.fatigue * mixture.energy).argmax())
        mixture.embedding[(strongest + 1) % 9].copy_(mixture.embedding[strongest])
        for _, tensor in module("structure").tensors_of(mixture):
            tensor.detach().add_(torch.rand(tensor.shape, generator=generator))
    for one in built.optimizers:
        for state in one.state.values():
            for entry in state.values():
                if entry.dim():
                    entry.normal_(generator=generator)
    return built


def moved(built: Any, *phases: int, use: str = "eager") -> tuple[dict[str, Any], list[Any]]:
    """The state after two calls of the controller for all layers, and who moved."""
    with plan(*phases, use=use).applied(built):
        for step in (2, 4):
            built.controller.step(built.model.mixtures(), built.optimizers, step)
    return compare.leaves(compare.clone(built.state_dict()), ""), built.controller.lineage


SETTINGS = {
    "merge_health_max": 1.0, "split_health_min": 0.2, "merges_per_call": 2, "resets_per_call": 2,
    "reset_health_max": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("patch", ["zero", "inherit"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("profile", ["P", "K"])
def test_moves_leave_weights_states_and_optimizers_as_the_baseline_does(
    profile: str, optimizer: str, patch: str
) -> None:
    """The operators' references, in float64, noise and all."""
    sides = [controlled(profile, optimizer, torch.float64, patch=patch, **SETTINGS) for _ in range(2)]
    expected, lineage = moved(sides[0])
    found, again = moved(sides[1], 4)
    assert again == lineage
    kinds = {kind for _, kind, *_ in lineage}
    assert kinds >= ({"merge", "split", "reset"} if profile == "K" else {"merge", "split"})
    assert_same(found, expected, rtol=1e-12)
    for name, leaf in expected.items():
        if isinstance(leaf, torch.Tensor) and not name.endswith(DRAWN):
            assert torch.equal(found[name], leaf), name


@pytest.mark.parametrize(("profile", "optimizer", "patch"), [("P", "adamw", "zero"), ("K", "muon", "inherit")])
def test_moves_by_the_kernels_are_equal_bit_for_bit_but_for_their_noise(
    profile: str, optimizer: str, patch: str
) -> None:
    sides = [controlled(profile, optimizer, torch.float32, patch=patch, **SETTINGS) for _ in range(2)]
    expected, lineage = moved(sides[0])
    found, again = moved(sides[1], 4, use="triton")
    assert again == lineage
    assert lineage
    assert found["controller.moves"] == expected["controller.moves"] == len(lineage)
    for name, leaf in expected.items():
        if not isinstance(leaf, torch.Tensor):
            assert found[name] == leaf, name
        elif name.startswith("model") and name.endswith(DRAWN):
            # The two sides round logarithm and cosine differently in the last place.
            torch.testing.assert_close(found[name], leaf, rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert torch.equal(found[name], leaf), name


def test_without_noise_the_weights_are_equal_bit_for_bit_too() -> None:
    silent = {"noise_linear": 0.0, "noise_router": 0.0}
    sides = [controlled("P", "adamw", torch.float32, **SETTINGS, **silent) for _ in range(2)]
    expected, lineage = moved(sides[0])
    found, again = moved(sides[1], 4, use="triton")
    assert again == lineage
    for name, leaf in expected.items():
        if isinstance(leaf, torch.Tensor) and not name.endswith("mlp.embedding"):
            assert torch.equal(found[name], leaf), name


@pytest.mark.parametrize("size", [3, 700, 1024])
def test_a_vector_longer_than_a_block_is_turned_in_one_piece(size: int) -> None:
    declared = registry.kernel("expert_moves").declaration
    codes = importlib.import_module(f"{declared.optimized.__module__.rpartition('.')[0]}._expert_codes")
    vectors = torch.nn.functional.normalize(torch.randn(4, size, generator=torch.Generator().manual_seed(1)), dim=1)
    moves = torch.tensor([[codes.SPLIT.value, 0, 3, 17]])
    sides = [vectors.clone(), vectors.clone()]
    for side, implementation in zip(sides, (declared.reference, declared.optimized), strict=True):
        implementation([side], [codes.KEPT.value], [codes.TURNED.value], [0.05], moves, torch.ones(1))
    assert not torch.equal(sides[0][3], vectors[3])
    torch.testing.assert_close(sides[1], sides[0])
    with pytest.raises(ValueError, match="turns vectors .* of at most 1024"):
        declared.optimized(
            [torch.ones(4, 1025)], [codes.KEPT.value], [codes.TURNED.value], [0.05], moves, torch.ones(1)
        )


def test_training_with_moves_on_the_device_is_the_same() -> None:
    config = small(experts=5, structure=module("config").LIVELY)
    expected, losses = run(config, 6, 0)
    found, again = run(config, 6, 0, 2, 3, 4)
    assert again == pytest.approx(losses, rel=1e-9)
    assert any("lineage" in name for name in expected)
    assert_same(found, expected)


def test_a_saved_run_goes_on_with_its_next_move() -> None:
    """Noise streams count moves: a run that was saved and loaded draws what one in a piece does."""
    config = small(experts=5, structure=module("config").LIVELY)
    whole, parts = training(config), training(config)
    with plan(0, 2, 3, 4).applied(whole):
        for index in range(4):
            whole.step(index)
    with plan(0, 2, 3, 4).applied(parts):
        for index in range(2):
            parts.step(index)
        loaded = training(config)
        loaded.load_state_dict(compare.clone(parts.state_dict()))
        for index in range(2, 4):
            loaded.step(index)
    one, other = (compare.leaves(built.state_dict(), "") for built in (whole, loaded))
    assert whole.controller.moves > parts.controller.moves > 0
    assert_same(other, one)


def test_moves_are_counted_on_when_the_phase_is_taken_out_and_put_back() -> None:
    expected, lineage = moved(controlled("P", "adamw", torch.float64, **SETTINGS))
    built = controlled("P", "adamw", torch.float64, **SETTINGS)
    controller, step = built.controller, (built.model.mixtures(), built.optimizers)
    with plan(4).applied(built):
        controller.apply(0, step[0][0], step[1], 2)
    controller.apply(1, step[0][1], step[1], 2)
    with plan(4).applied(built):
        controller.apply(0, step[0][0], step[1], 4)
        controller.apply(1, step[0][1], step[1], 4)
        controller.settle()
    assert controller.lineage == lineage
    controller.last_step = 4
    assert_same(compare.leaves(compare.clone(built.state_dict()), ""), expected, rtol=1e-12)


@pytest.mark.parametrize("metabolic", [True, False])
def test_genes_in_the_router_are_the_same(metabolic: bool) -> None:
    synapses = module("synapses").TopKConfig(attn_topk=7, enable_metabolism=metabolic)
    config = small(experts=5, synapses=synapses)
    expected, losses = run(config, 3)
    found, again = run(config, 3, 3)
    assert again == pytest.approx(losses, rel=1e-9)
    assert_same(found, expected)


def test_genes_by_their_kernels_give_the_same_gradients() -> None:
    config = small(experts=5)
    sides = [training(config, dtype=torch.float32) for _ in range(2)]
    for built, numbers in zip(sides, ((), (3,)), strict=True):
        for mixture in built.model.mixtures():
            mixture.fatigue.uniform_(0, 0.5, generator=torch.Generator().manual_seed(1))
        with plan(*numbers, use="triton").applied(built):
            built.loss_value = built.differentiate(*built.batch(0))
    assert float(sides[1].loss_value) == pytest.approx(float(sides[0].loss_value), rel=1e-6)
    assert sides[0].model.blocks[0].mlp.genome.grad.abs().sum() > 0
    for (name, one), other in zip(sides[0].model.named_parameters(), sides[1].model.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=2e-5 * scale + 1e-9, msg=name)
    for one, other in zip(sides[0].model.mixtures(), sides[1].model.mixtures(), strict=True):
        torch.testing.assert_close(other.fatigue, one.fatigue)
        torch.testing.assert_close(other.energy, one.energy)
