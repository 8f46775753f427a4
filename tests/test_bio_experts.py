"""bio-nanochat's experts: genes, routing, metabolism, plasticity, scores; each by its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bio_parts import module, small, training
from torch import Tensor


def mixture(experts: int = 5, **changes: Any) -> Any:
    return training(small(experts=experts, **changes)).model.blocks[0].mlp


def random_input() -> Tensor:
    return torch.randn(2, 11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("genome", "rates"),
    [((0, 0, 0, 0), (0.0110, 0.0055, 1.3133, 0.9741)), ((1, -1, 0.5, -0.5), (0.0156, 0.0032, 1.7014, 0.6931))],
)
def test_genes_are_golden(genome: tuple[float, ...], rates: tuple[float, ...]) -> None:
    found = module("genes").decode(torch.tensor([genome], dtype=torch.float64))
    assert [round(float(rate), 4) for rate in found] == list(rates)


def test_router_scores_are_the_formula() -> None:
    one = mixture()
    x = random_input().flatten(0, 1)
    one.energy.uniform_(0.2, 1)
    one.fatigue.uniform_(0, 0.5)
    genes = one.phenotype()
    found = one.score(x, genes)
    probe = x @ one.probe.weight.T
    for token in (0, 7):
        for expert in range(5):
            z = one.embedding[expert]
            expected = (
                x[token] @ one.router.weight[expert]
                + 0.05 * (genes.energy_rate[expert] - genes.fatigue_rate[expert])
                + 0.02 * x[token].mean() * (1 + z.norm())
                + 0.02 * (probe[token] @ z) / (probe[token].norm() * z.norm())
                + 0.1 * one.energy[expert]
                - 0.1 * one.fatigue[expert]
            )
            torch.testing.assert_close(found[token, expert], expected)


def test_metabolism_and_balance_are_the_formulas() -> None:
    one = mixture()
    x = random_input()
    genes = one.phenotype()
    _, balance = one(x)
    count = torch.stack([(one.last.index == expert).sum() for expert in range(5)])
    mass = torch.stack([one.last.gates[one.last.index == expert].sum() for expert in range(5)])
    torch.testing.assert_close(balance, 5 * (count / 22 * mass / 22).sum())
    utilisation = count.clamp(min=1) / 22
    torch.testing.assert_close(one.fatigue, (genes.fatigue_rate * utilisation).detach())
    torch.testing.assert_close(one.energy, (1 - genes.energy_rate + genes.energy_rate * (1 - utilisation)).detach())


def test_the_genome_learns_through_the_router_alone() -> None:
    one = mixture()
    y, balance = one(random_input())
    (y.square().sum() + balance).backward()
    assert one.genome.grad[:, :2].abs().sum() > 0
    assert one.genome.grad[:, 2:].abs().sum() == 0


def test_embeddings_move_by_the_formula_and_stay_unit() -> None:
    one = mixture()
    before = one.embedding.clone()
    share = torch.rand(5, dtype=torch.float64)
    one.arrange(share)
    s = before @ before.T
    o = torch.diag(share)
    g = o * (s - 1) - (1 - o) * (s + 0.3) * 0.1
    moved = before - 1e-4 * (g - g.mean()) @ before
    torch.testing.assert_close(one.embedding, moved / moved.norm(dim=1, keepdim=True))
    assert (o * (s - 1)).abs().max() < 1e-6


def test_an_expert_without_tokens_changes_nothing() -> None:
    one = mixture(experts=40, chosen=1)
    buffers = {name: buffer.clone() for name, buffer in one.inner.named_buffers()}
    y, _ = one(random_input())
    y.square().sum().backward()
    idle = [expert for expert in range(40) if not (one.last.index == expert).any()]
    assert idle
    for expert in idle:
        assert one.inner.slow.grad[expert].abs().sum() == 0
        assert all(torch.equal(buffer[expert], buffers[name][expert]) for name, buffer in one.inner.named_buffers())


def test_a_synaptic_layer_is_the_formula() -> None:
    """Two calls of profile P's layer, with the rule as upstream has it: no bound."""
    config = module("synapses").SynapticConfig()
    layer = module("postsynaptic").SynapticLinear(
        3, 4, config, limit=math.inf, device=torch.device("cpu"), dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    u, v, h = torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), torch.zeros(3, 4).double()
    camkii, gate = 0.0, 0.0
    for _ in range(2):
        x = torch.randn(7, 3, dtype=torch.float64)
        y = layer(x)
        torch.testing.assert_close(y, x @ (layer.fast + gate * layer.slow + h) + layer.bias)
        y = y.detach()
        u, v = 0.95 * u + 0.02 * x.mean(0), 0.95 * v + 0.02 * y.mean(0)
        h = 0.95 * h + 0.03 * 16 * torch.outer(u, v)
        camkii = min(1.0, camkii + 1.5 * (0.5 - 0.2))
        gate = 1 / (1 + math.exp(-(3 * (camkii - 0.5) - 2 * 0.5)))
        torch.testing.assert_close(layer.hebbian, h)
        torch.testing.assert_close(layer.trace_in, u[:, None].expand(3, 16))
        assert float(layer.gate) == pytest.approx(gate)


def test_the_bound_on_the_traces_is_one_on_their_product() -> None:
    config = module("synapses").SynapticConfig()
    layer = module("postsynaptic").SynapticLinear(
        30, 40, config, limit=1.0, device=torch.device("cpu"), dtype=torch.float64
    )
    for scale in (1.0, 1e3):
        for _ in range(50):
            layer.consolidate(
                layer.plastic(),
                scale * torch.ones(30, dtype=torch.float64),
                scale * torch.ones(40, dtype=torch.float64),
                layer.dense_signals(),
            )
    assert layer.hebbian.norm() <= 0.03 / (1 - 0.95) + 1e-9
    assert layer.hebbian.norm() > 0.5


def test_profile_k_learns_only_without_gradients() -> None:
    config = module("synapses").TopKConfig(camkii_thr=0.1)
    layer = module("postsynaptic_topk").TopKLinear(5, 5, config, device=torch.device("cpu"), dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith("_gain"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(9, 5, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    y = layer(x)
    y0 = x @ layer.slow + (x @ layer.fast) * 0.4 + layer.bias
    torch.testing.assert_close(y, y0 + y0 @ (layer.gain_in @ layer.gain_out))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with torch.no_grad():
        layer(x)
    u, v = 0.05 * x.mean(0), 0.05 * y.mean(0).detach()
    product = 8 * torch.outer(u, v)
    active = (y.detach().abs().mean(0).clamp(0, 10) > 0.1).double()
    camkii = 0.05 * active
    gate = torch.sigmoid(camkii - 0.5) - 0.3
    torch.testing.assert_close(layer.camkii, camkii)
    torch.testing.assert_close(layer.fast.detach(), 0.95 * before["fast"] + 1.5e-3 * product * gate.mean())
    torch.testing.assert_close(layer.slow.detach(), before["slow"] + 5e-4 * product * gate.mean())
    torch.testing.assert_close(layer.fast_gain.detach(), 1.5e-3 * product.diagonal())
    torch.testing.assert_close(layer.slow_gain.detach(), 5e-4 * product.diagonal() * gate)
    torch.testing.assert_close(layer.accumulated, (0.015 * product.diagonal().abs()).clamp(0, 10))
    assert layer.logged_change > 0


def test_a_bad_call_of_profile_k_is_not_learnt() -> None:
    config = module("synapses").TopKConfig()
    layer = module("postsynaptic_topk").TopKLinear(5, 6, config, device=torch.device("cpu"), dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    learn = module("syncfree").learn
    for function in (type(layer).learn, learn):
        with torch.no_grad():
            x = torch.full((3, 5), float("nan"), dtype=torch.float64)
            function(layer, layer.plastic(), x, torch.ones(3, 6, dtype=torch.float64), layer.dense_signals())
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_scores_are_the_formulas() -> None:
    neuroscore = module("neuroscore")
    one = mixture()
    score = neuroscore.NeuroScore(5, every=2, dtype=torch.float64)
    contribution, resilience = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        one(random_input())
        score.observe(one)
        score.count(one)
        mass = torch.stack([one.last.gates[one.last.index == expert].sum() for expert in range(5)])
        earlier, contribution = contribution, 0.99 * contribution + 0.01 * mass / 22
        resilience = 0.99 * resilience + 0.01 / ((contribution - earlier).abs() + 1e-6)
    torch.testing.assert_close(score.contribution, contribution)
    torch.testing.assert_close(score.efficiency, contribution / (one.energy + 1e-6))
    alive = contribution > 1e-6
    torch.testing.assert_close(score.resilience[alive], resilience[alive])
    assert (score.resilience[~alive] == 0).all()
    sampled, index = one.last.x[::10], one.last.index[::10]
    for expert in range(5):
        taken = (index == expert).any(-1)
        expected = 1 - torch.cosine_similarity(sampled[taken].mean(0), sampled.mean(0), dim=0) if taken.any() else 0
        assert float(score.specialisation[expert]) == pytest.approx(float(expected))
    (entry,) = score.log_entries
    assert entry["best"][0][0] == int(score.efficiency.argmax())
    assert 0 <= entry["gini"] < 1


@pytest.mark.parametrize(("values", "expected"), [((1, 1, 1, 1), 0.0), ((0, 0, 0, 1), 0.75), ((0, 0, 0, 0), 0.0)])
def test_gini(values: tuple[float, ...], expected: float) -> None:
    assert module("neuroscore").gini(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)
