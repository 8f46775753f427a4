"""bio-nanochat's phase 6: the same training with a padded head and with Muon in stacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bio_parts import module, small
from test_bio_phases import assert_same, run
from torch import nn


def configs() -> dict[str, Any]:
    synapses = module("synapses")
    return {
        "ragged": small(vocabulary=301),
        "aligned": small(vocabulary=320),
        "shared-keys": small(heads=4, kv_heads=2, vocabulary=301),
        "muon": small(experts=3, optimizer="muon"),
        "muon-dense": small(optimizer="muon", hidden_multiple=4),
        "k": small(experts=3, synapses=synapses.TopKConfig(attn_topk=7), optimizer="muon"),
        "vanilla": small(synapses=None, optimizer="muon", vocabulary=257),
        "forward": small(vocabulary=301, step="forward"),
    }


@pytest.mark.parametrize("name", list(configs()))
def test_training_is_the_same(name: str) -> None:
    config = configs()[name]
    expected, losses = run(config, 4)
    found, again = run(config, 4, 6)
    assert again == pytest.approx(losses, rel=1e-9)
    assert_same(found, expected)


@pytest.mark.parametrize(("words", "row"), [(256, 256), (257, 320), (50_257, 50_304)])
def test_rows_of_logits_are_whole_cache_lines(words: int, row: int) -> None:
    head = module("attention").Head(8, words, device=torch.device("cpu"), dtype=torch.bfloat16)
    nn.init.normal_(head.weight)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    logits = module("products").logits(head, x)
    assert logits.shape == (2, 3, words)
    assert logits.stride(1) == row
    torch.testing.assert_close(logits, head(x))


def test_stacks_hold_matrices_of_one_shape_and_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    products = module("products")
    monkeypatch.setattr(products, "STACK_ELEMENTS", 60)
    shapes = [(4, 6), (6, 4), (4, 6), (2, 4, 6), (5, 4, 6), (4, 6)]
    found = list(products.stacks([nn.Parameter(torch.zeros(shape)) for shape in shapes]))
    assert [[tuple(one.shape) for one in stack] for stack in found] == [
        [(4, 6), (4, 6)],
        [(2, 4, 6)],
        [(5, 4, 6)],
        [(4, 6)],
        [(6, 4)],
    ]
    assert list(products.stacks([])) == []


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (1, 5, 5)])
def test_a_stack_is_as_orthogonal_as_its_matrices(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([module("optimizers").orthogonal(one) for one in x])
    torch.testing.assert_close(module("products").orthogonal_stack(x), expected)


def test_muon_launches_a_stack_at_a_time() -> None:
    """96 matrices of three shapes took 4,700 operators; they take as many as a few stacks do."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 12), (12, 6)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    counts = []
    for move in (module("optimizers").Muon.move, module("products").move_in_stacks):
        muon = module("optimizers").Muon(parameters, lr=0.1, momentum=0.9, dtype=torch.float32)
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            move(muon, parameters, muon.param_groups[0])
        counts.append(sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::bmm")))
        counts[-1] += sum(event.count for event in profiler.key_averages() if event.key == "aten::baddbmm")
    assert counts == [48 * 15, 3 * 15]


def test_the_promise_leaves_the_products_of_the_head() -> None:
    spots = [SimpleNamespace(phase=6, self_seconds_per_step=0.03, calls_per_step=250.0)]
    ceilings = SimpleNamespace(matmul_flops_per_second={"bfloat16": 1e12})
    before: Any = SimpleNamespace(
        steps=SimpleNamespace(seconds=[0.1]),
        hotspots=spots,
        environment=SimpleNamespace(ceilings=ceilings),
        workload=SimpleNamespace(preset="tiny", dtype="bfloat16"),
    )
    found = module("predictions").predict_products(before)
    # Three products of 4 x 64 tokens, 128 features and 1,024 words: 0.2 GFLOP, 0.2 ms at 1 TFLOP/s.
    assert found.ratio_high == pytest.approx(0.1 / (0.07 + 3 * 2 * 4 * 64 * 128 * 1024 / 1e12))
    before.workload.preset = "of another's"
    assert module("predictions").predict_products(before).ratio_high is None
    before.workload.preset, before.environment.ceilings = "tiny", None
    assert module("predictions").predict_products(before).ratio_high is None
