"""bio-nanochat's presynaptic rules against golden vectors in float64, and what the rules promise beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bio_parts import module
from torch import Tensor

BATCH, HEADS, TOKENS, SIZE = 1, 2, 4, 8
DIGITS = 5.1e-7
"""Half a unit of the sixth decimal, to which the golden vectors are given, and a little for their binary forms."""


def shared_inputs() -> tuple[Tensor, Tensor]:
    """q and k [B, H, T, D] of the golden vectors: sines and cosines of head, token and feature."""
    h = torch.arange(HEADS, dtype=torch.float64)[:, None, None]
    t = torch.arange(TOKENS, dtype=torch.float64)[:, None]
    d = torch.arange(SIZE, dtype=torch.float64)
    return torch.sin(0.3 + 0.5 * h + 0.8 * t + 0.37 * d)[None], torch.cos(0.1 + 0.4 * h + 0.6 * t + 0.53 * d)[None]


def config(**changes: Any) -> Any:
    return module("synapses").SynapticConfig(**changes)


def close(found: Tensor, expected: list[float], digits: float = DIGITS) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=digits)


def check_rows(bias: Tensor, rows: list[list[float]]) -> None:
    for row, expected in enumerate(rows):
        close(bias[0, 0, row, : row + 1], expected)


def check_state(state: Any, expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        close(getattr(state, name)[0, 0], values)


def test_rule_by_key_is_golden() -> None:
    presynaptic = module("presynaptic")
    q, k = shared_inputs()
    initial = presynaptic.State.initial(q, config())
    _, bias, after, used = presynaptic.release(q, k, initial, config(), dock="upstream", noise=None)
    check_rows(
        bias,
        [
            [-1.916681],
            [-2.288635, -1.729864],
            [-2.463218, -2.201494, -1.736888],
            [-2.343217, -2.572095, -2.262743, -1.751507],
        ],
    )
    close(bias[0, 0, 0, 1], -13.834261)  # type: ignore[arg-type]
    check_state(
        after,
        {
            "calcium": [0.297598, 0.284517, 0.239657, 0.190749],
            "pool": [0.267428, 0.351709, 0.45503, 0.583461],
            "reserve": [0.71282, 0.628539, 0.525218, 0.396787],
            "primed": [0.586743, 0.590114, 0.594247, 0.599384],
            "energy": [0.810527, 0.811285, 0.812215, 0.813371],
        },
    )
    torch.testing.assert_close(used, after.reserve - 0.2 * (1 - config().alpha_refill))


def test_rule_by_row_from_the_start_is_golden() -> None:
    q, k = shared_inputs()
    initial = module("presynaptic").State.initial(q, config())
    bias, after = module("rowrules").rows_from_start(q, k, initial, config())
    check_rows(
        bias,
        [
            [-2.130805],
            [-1.493538, -1.792875],
            [-1.366539, -1.476675, -1.783991],
            [-1.743761, -1.719388, -1.808324, -2.060552],
        ],
    )
    check_state(
        after,
        {
            "calcium": [0.128863, 0.224922, 0.297607, 0.31062],
            "buffer": [0, 0, 0, 0],
            "pool": [0.64816, 0.320915, 0, 0],
            "reserve": [0.332088, 0.659333, 0.980248, 0.980248],
            "primed": [0.601972, 0.588882, 0.576046, 0.576046],
            "energy": [0.813953, 0.811008, 0.80812, 0.80812],
        },
    )


def test_rule_by_row_in_turn_is_golden() -> None:
    q, k = shared_inputs()
    clamp = torch.full((BATCH, HEADS, TOKENS), config().complexin_bias, dtype=torch.float64)
    bias, after = module("rowrules").rows_in_turn(q, k, clamp, config())
    check_rows(
        bias,
        [
            [-2.130797],
            [-1.655247, -1.954581],
            [-2.399116, -2.509251, -2.816562],
            [-4.732104, -4.707731, -4.796655, -5.048846],
        ],
    )
    check_state(
        after,
        {
            "calcium": [0.128863, 0.247963, 0.361178, 0.438383],
            "buffer": [0, 0.077318, 0.199503, 0.33404],
            "pool": [0.64816, 0.252046, 0, 0],
            "reserve": [0.332088, 0.712198, 0.958022, 0.958022],
            "primed": [0.601972, 0.593508, 0.591112, 0.598524],
            "energy": [0.813953, 0.826215, 0.841585, 0.860304],
        },
    )


def test_the_row_recurrence_goes_on_from_a_carried_state() -> None:
    """A state carried in is what the next row starts from, so two halves of a sequence know of each other."""
    rowrules, presynaptic = module("rowrules"), module("presynaptic")
    q, k = shared_inputs()
    clamp = torch.full((BATCH, HEADS, TOKENS), 0.5, dtype=torch.float64)
    _, whole = rowrules.rows_in_turn(q, k, clamp, config())
    start = presynaptic.State(*(entry[:, :, 1] for entry in whole))
    _, fresh = rowrules.rows_in_turn(q, k, clamp, config())
    _, later = rowrules.rows_in_turn(q, k, clamp, config(), start)
    torch.testing.assert_close(fresh.pool[0, 0, 0], whole.pool[0, 0, 0])
    assert later.calcium[0, 0, 0] > whole.calcium[0, 0, 0]


EDGES = {
    0: ([0.003443, 0.016134, 3.902896], [0.017675, 0.003431, 0.037834], 28.232679, 0.99940531),
    1: ([0.054823, 0.422182, 4.609791], [0.012335, 0.000267, 1.153329], 15.902175, 0.9946838),
    2: ([0.142634, 0.042445, 4.521973], [0.637068, 0.026137, 0.042596], 16.058554, 0.99003649),
}
"""Of each call: released at the last query of head 0, at query 2 of head 1, all of it, and the running mean after."""


def test_rule_of_edges_is_golden() -> None:
    topk, settings = module("topk"), module("synapses").TopKConfig()
    tokens, edges = 5, 3
    h = torch.arange(HEADS)[:, None, None]
    t = torch.arange(tokens)[:, None]
    edge = torch.arange(edges)
    phase = 1 + 0.7 * h.double() + 0.9 * t.double() + 1.3 * edge.double()
    state = topk.EdgeState.initial(torch.zeros(1, HEADS, tokens, 1, dtype=torch.float64), settings)
    mean = torch.ones((), dtype=torch.float64)
    for step, (last, second, total, mean_after) in EDGES.items():
        drive = 2 * torch.sin(phase + 0.5 * step)[None]
        drive = drive.masked_fill(edge > t, float("-inf"))
        index = ((t * (edge + 1) + h + step) % (t + 1))[None]
        released, state = topk.release(drive, index, state, mean, settings, None)
        close(released[0, 0, 4], last)
        close(released[0, 1, 2], second)
        close(released.sum(), total)  # type: ignore[arg-type]
        close(mean, mean_after, 5.1e-9)  # type: ignore[arg-type]
    check_state(
        state,
        {
            "calcium": [0.637677, 0.418081, 0.944199, 1.562664, 1.545544],
            "pool": [0.075, 0.271481, 0.327128, 0.648268, 1.306113],
            "reserve": [17.775] * 5,
            "primed": [0.563435, 0.591827, 0.595323, 0.585073, 0.588059],
            "clamp": [0.25097, 0.310615, 0.313667, 0.328298, 0.360133],
            "amplitude": [0.994155] * 5,
            "energy": [0.720138, 0.743437, 0.74498, 0.74915, 0.760614],
        },
    )
    for entry, total in zip(state.delay, (1.692955, 0.950961, 0.957695), strict=True):
        close(entry.sum(), total)  # type: ignore[arg-type]


def test_every_field_of_the_specification_is_there() -> None:
    synapses = module("synapses")
    assert len(dataclasses.fields(synapses.SynapticConfig)) == 44
    assert len(dataclasses.fields(synapses.TopKConfig)) == 80


@pytest.mark.parametrize(
    ("profile", "changes", "words"),
    [
        ("SynapticConfig", {"native_presyn": True}, "native_presyn is on"),
        ("SynapticConfig", {"xi_dim": 2}, "at least 4 genes"),
        ("TopKConfig", {"use_flex_attention": True}, "use_flex_attention is on"),
        ("TopKConfig", {"stochastic_mode": "normal"}, "stochastic_mode is 'normal'; it can be 'normal_reparam' or"),
    ],
)  # fmt: skip
def test_what_would_steer_nothing_is_refused(profile: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(module("synapses"), profile)(**changes)


def random_heads(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    return q, k


def test_the_sums_of_a_key_follow_from_one_pass() -> None:
    """What the fused kernel relies on: nothing is clipped before scaling, so the pool's use is a product of sums."""
    presynaptic = module("presynaptic")
    q, k = random_heads(19)
    state = presynaptic.State.initial(q, config())
    logits, _, after, used = presynaptic.release(q, k, state, config(), dock="qk", noise=None)
    visible = torch.isfinite(logits)
    influx = torch.nn.functional.softplus(logits.clamp(-20, 20)).masked_fill(~visible, 0).sum(2)
    rested = presynaptic.rest(state, influx / torch.arange(19, 0, -1), config())
    wanted = presynaptic.fire(rested, state.clamp, config()) * rested.pool * torch.sigmoid(logits).sum(2)
    torch.testing.assert_close(used, torch.minimum(wanted, rested.pool))
    torch.testing.assert_close(after.pool, (rested.pool - used).clamp(min=0))


def test_docking_as_upstream_has_it_is_transposed() -> None:
    presynaptic = module("presynaptic")
    q, k = random_heads(7)
    scores = presynaptic.scores(q, k)
    right, upstream = (presynaptic.docking(q, k, scores, dock) for dock in ("qk", "upstream"))
    torch.testing.assert_close(upstream, right.transpose(2, 3))


def test_a_key_hears_every_query_that_sees_it() -> None:
    """The rule by key looks ahead: what a later query drives into a synapse biases the queries before it."""
    presynaptic = module("presynaptic")
    q, k = random_heads(7)
    later = q.clone()
    later[:, :, 5] += 1
    state = presynaptic.State.initial(q, config())
    biases = [presynaptic.release(a, k, state, config(), dock="qk", noise=None)[1] for a in (q, later)]
    assert not torch.equal(biases[0][:, :, 2, :3], biases[1][:, :, 2, :3])


def test_noise_moves_some_rows_and_no_unseen_entry() -> None:
    presynaptic, noise = module("presynaptic"), module("noise").Noise(torch.tensor(7), counted=True)
    raw = torch.rand(2, 3, 40, 40, dtype=torch.float64).tril()
    visible = presynaptic.causal_mask(40, raw)
    moved = presynaptic.perturb(raw, visible, noise, config())
    assert torch.equal(moved.triu(1), raw.triu(1))
    rows = (moved != raw).any(-1)
    assert 0.04 < rows.double().mean() < 0.2
    assert (moved - raw).abs().max() <= 0.5 / 8
    assert torch.equal(moved, presynaptic.perturb(raw, visible, noise, config()))


@pytest.mark.parametrize("mode", ["normal_reparam", "gumbel_sigmoid_ste", "straight_through"])
def test_counts_have_the_moments_of_a_binomial(mode: str) -> None:
    """Within 0.03 of the mean and 0.05 of the variance at 50,000 draws; the normal is cut, which takes 0.02."""
    topk = module("topk")
    settings = module("synapses").TopKConfig(stochastic_mode=mode)
    probability = torch.full((50_000,), 0.5, dtype=torch.float64)
    pool = torch.full_like(probability, 7.8)
    noise = topk.trial_noise(probability, settings, module("noise").Noise(torch.tensor(0), counted=True))
    counts = topk.sample_counts(probability, pool, noise, settings)
    assert abs(float(counts.mean()) - 8 * 0.5) < 0.03
    assert abs(float(counts.var()) - 8 * 0.5 * 0.5) < 0.05


@pytest.mark.parametrize("mode", ["normal_reparam", "gumbel_sigmoid_ste", "straight_through"])
def test_counts_teach_the_probability(mode: str) -> None:
    topk = module("topk")
    settings = module("synapses").TopKConfig(stochastic_mode=mode)
    probability = torch.full((100,), 0.4, dtype=torch.float64, requires_grad=True)
    noise = topk.trial_noise(probability, settings, module("noise").Noise(torch.tensor(3), counted=True))
    topk.sample_counts(probability, torch.full((100,), 3.0, dtype=torch.float64), noise, settings).sum().backward()
    assert probability.grad is not None
    assert probability.grad.mean() > 0.5
