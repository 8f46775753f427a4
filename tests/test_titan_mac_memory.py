"""TitanMAC's phases 1 and 3: the memory's gradient step and its loss without autograd's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_titan_mac import CPU, VARIANTS, module, small, training
from test_titan_mac_phases import assert_same_state, bits, profile, run, swapped, workload
from test_titan_mac_reads import counted_reads

from kernbench import device, record, registry, swap

ARMS = ((1,), (3,), (1, 3), (0, 1), (0, 3), (0, 1, 3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("numbers", ARMS, ids=str)
def test_trains_like_the_baseline(variant: str, numbers: tuple[int, ...]) -> None:
    # A clip that counts in some steps, and not in others.
    config = small(variant=variant, attention="block" if variant == "mal" else "windowed", memory_clip=0.02)
    before, after = (run(config, arm, 12) for arm in ((), numbers))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-12)
    assert_same_state(after, before, rtol=1e-9)


@pytest.mark.parametrize("numbers", ARMS, ids=str)
@pytest.mark.parametrize("fault", workload().faults, ids=lambda fault: fault.name)
def test_a_bad_step_changes_no_bit(numbers: tuple[int, ...], fault: Any) -> None:
    built = training(small(), dtype=torch.float32)
    with swapped(*numbers):
        for index in range(2):
            built.step(index)
        before = {name: tensor.clone() for name, tensor in fault.protects(built).items()}
        fault.inject(built)
        built.step(2)
        after = fault.protects(built)
        for name, tensor in before.items():
            assert torch.equal(bits(tensor), bits(after[name])), name
        built.step(3)
    assert not torch.equal(before["model.memory.momentum"], built.model.memory.momentum)


def test_hooks_of_the_weights_are_heard_and_said() -> None:
    fused = module("fused_memory")
    built, expected = training(small()), training(small())
    hooks = [
        [weight.register_hook(lambda g: g * 2) for weight in one.model.memory.weights()] for one in (built, expected)
    ]
    with swapped(0, 1, 3):
        built.step(0)
    expected.step(0)
    assert fused.HOOKED in device.WARNINGS
    assert len(hooks[0]) == 4
    torch.testing.assert_close(built.model.memory.momentum, expected.model.memory.momentum, rtol=1e-9, atol=1e-15)


def test_the_loss_is_differentiated_at_the_weights_it_was_taken_with() -> None:
    config = small(memory_clip=1e-3)
    memory = module("memory").NeuralMemory(config, device=CPU, dtype=torch.float64)
    x_BTD = torch.randn(2, 11, config.width, dtype=torch.float64, requires_grad=True)
    wanted = [x_BTD, memory.key.weight, memory.value.weight, *memory.weights()]
    memory.eval()
    expected = torch.autograd.grad(memory.update(x_BTD), wanted)
    memory.train()
    with swapped(1, 3):
        found = torch.autograd.grad(memory.update(x_BTD), wanted)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_kernels_train_like_the_baseline(variant: str) -> None:
    config = small(variant=variant, width=8, length=12)
    before, after = training(config, dtype=torch.float32), training(config, dtype=torch.float32)
    declaration = workload()
    plan = swap.plan(declaration, (0, 1, 3), use={}, kernels=lambda name: registry.kernel(name).declaration)
    with plan.applied(after) as receipt:
        for index in range(3):
            after.step(index)
    for index in range(3):
        before.step(index)
    assert after.losses() == pytest.approx(before.losses(), rel=1e-5)
    torch.testing.assert_close(after.model.memory.momentum, before.model.memory.momentum, rtol=1e-3, atol=1e-8)
    hits = {hit.site: hit.calls for hit in receipt.hits(3) if "NeuralMemory" in hit.site}
    assert len(hits) == 4
    assert set(hits.values()) == {3 * (2 if variant == "mac" else 1)}


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac"])
def test_nothing_is_read(preset: str) -> None:
    built = workload().make(preset, CPU, torch.float32, 0, None)
    with swapped(0, 1, 3):
        built.step(0)
        with counted_reads() as reads:
            built.step(1)
    assert not reads


def test_predictions_in_figures() -> None:
    update, loss = workload().phases_numbered((1, 3))
    spots = [
        record.Hotspot(name="a", self_seconds_per_step=0.001, share=0.1, calls_per_step=200, phase=1),
        record.Hotspot(name="b", self_seconds_per_step=0.002, share=0.2, calls_per_step=10, phase=3),
    ]
    before = profile(hotspots=spots, launches_per_step=1000.0)
    # The step is 10 ms: a fifth of its launches, and a fifth of its time.
    assert update.predict(before).ratio_high == pytest.approx(10 / 8)
    assert loss.predict(before).ratio_high == pytest.approx(10 / 8)
    assert update.predict(profile(hotspots=[])).basis.startswith("no hotspot")
