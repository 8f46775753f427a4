"""What the declarations of the Kasmina kernels cannot say: bits that pass through, blueprints that are not there,
states that move on before the backward pass, updates one after the other, and telemetry of numbers far from zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import device, registry
from kernbench.spec import Case, Inputs

DEVICE = device.resolve("auto")
BLEND = registry.kernel("seed_blend").declaration
TELEMETRY = registry.kernel("seed_telemetry").declaration
UPDATE = registry.kernel("seed_state_update").declaration
LERP, MULTIPLY, ADD = range(3)


def blended(x: Tensor, bank: Tensor, seeds: list[tuple[int, int, int, float]], chunk: int, **more: Any) -> list[Tensor]:
    """What seed_blend gives for seeds of (lifecycle, blueprint, operator, alpha)."""
    lifecycle, blueprint, operator = (
        torch.tensor([seed[column] for seed in seeds], dtype=torch.int32, device=DEVICE) for column in range(3)
    )
    alpha = torch.tensor([seed[3] for seed in seeds], device=DEVICE)
    return list(BLEND.optimized(x.to(DEVICE), bank.to(DEVICE), lifecycle, blueprint, operator, alpha, chunk, **more))


@pytest.mark.parametrize(
    ("table", "expected"), [("alpha", [4.0, 6.0, 5.0, 5.0]), ("simple", [6.0, 5.0, 2.5, 2.5])], ids=["alpha", "simple"]
)
def test_operators_give_what_the_tables_say(table: str, expected: list[float]) -> None:
    seeds = [(3, 0, operator, 0.5) for operator in (0, 1, 2, 7)]
    y = blended(torch.full((2, 4), 2.0), torch.full((1, 4), 3.0), seeds, 1, table=table)[0]
    assert y.tolist() == [expected, expected]


@pytest.mark.parametrize("lifecycle", range(-1, 12))
def test_lifecycles_from_3_to_6_blend_unless_told_otherwise(lifecycle: int) -> None:
    seeds, x, bank = [(lifecycle, 0, ADD, 0.5)], torch.ones(1, 2), torch.ones(1, 2)
    assert blended(x, bank, seeds, 2)[0].tolist() == [[2.0, 2.0] if 3 <= lifecycle <= 6 else [1.0, 1.0]]
    chosen = blended(x, bank, seeds, 2, active_states=1 << 2 | 1 << 10)[0]
    assert chosen.tolist() == [[2.0, 2.0] if lifecycle in (2, 10) else [1.0, 1.0]]


@pytest.mark.parametrize("batch", [1, 3, 64], ids=["row", "ragged", "even"])
def test_what_nobody_blends_passes_through_bit_for_bit(batch: int) -> None:
    x = torch.tensor([-0.0, 0.0, 1e-45, -1e-38, float("inf"), float("-inf"), 3.4e38, -1.0]).repeat(batch, 8)
    bank = torch.full((2, 64), float("nan"))
    y = blended(x, bank, [(0, -1, LERP, 0.5), (7, 1, ADD, 0.5)], 16)[0].cpu()
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_a_blueprint_that_is_not_there_makes_nan_of_its_seed_alone() -> None:
    bank = torch.ones(4, 8)[1:3]
    seeds = [(4, -1, LERP, 0.5), (4, 0, MULTIPLY, 0.5), (4, 2, ADD, 0.5), (4, 1, ADD, 0.5)]
    y = blended(torch.ones(3, 8), bank, seeds, 2)[0]
    assert y.isnan().all(0).tolist() == [True, True, False, False, True, True, False, False]
    assert y[0, [2, 3, 6, 7]].tolist() == [1.0, 1.0, 2.0, 2.0]


def drawn(name: str = "ragged") -> Inputs:
    return BLEND.make_inputs(next(case for case in BLEND.cases if case.name == name), torch.float32, DEVICE, 0)


def test_gradients_are_those_of_the_seeds_as_they_were_in_the_forward_pass() -> None:
    inputs = drawn()
    sources = [inputs[name] for name in ("x", "bank", "alpha")]
    y = BLEND.optimized(**inputs)[0]
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(BLEND.reference(**inputs)[0], sources, upstream)
    inputs["lifecycle"].fill_(0)
    inputs["operator"].fill_(1)
    torch.testing.assert_close(torch.autograd.grad(y, sources, upstream), expected)


@pytest.mark.parametrize("table", ["alpha", "simple"])
@pytest.mark.parametrize("wanted", ["x", "bank", "alpha"])
def test_one_gradient_alone(wanted: str, table: str) -> None:
    inputs = drawn() | {"table": table}
    for name in {"x", "bank", "alpha"} - {wanted}:
        inputs[name] = inputs[name].detach()
    y, *statistics = BLEND.optimized(**inputs)
    assert not any(tensor.requires_grad for tensor in statistics)
    if table == "simple" and wanted == "alpha":
        assert not torch.autograd.grad(y.sum(), [inputs[wanted]])[0].any()
        return
    expected = torch.autograd.grad(BLEND.reference(**inputs)[0].square().sum(), [inputs[wanted]])
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [inputs[wanted]]), expected)


def test_the_operator_of_torch_gives_the_same_gradients() -> None:
    inputs = drawn("simple")
    sources = [inputs[name] for name in ("x", "bank")]
    expected = torch.autograd.grad(BLEND.optimized(**inputs)[0].sum(), sources)
    y = torch.ops.kernbench.seed_blend.default(*inputs.values())[0]
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), sources), expected))


@pytest.mark.parametrize(
    ("features", "seeds", "chunk"), [(100, 3, 32), (100, 5, 24), (96, 3, 32), (130, 40, 13), (7, 9, 100)]
)
def test_telemetry_of_numbers_far_from_zero_keeps_its_digits(features: int, seeds: int, chunk: int) -> None:
    """A mean of 10,000 standard deviations, at which E[x^2] - E[x]^2 has no digit left in float32."""
    x = torch.randn(130, features, generator=torch.Generator().manual_seed(0)) + 1e4
    x[0, ::3] = 0.0
    statistics = blended(x, torch.ones(1, features), [(0, -1, 0, 0.0)] * seeds, chunk)[1:]
    got = TELEMETRY.optimized(*statistics, 130, features, seeds, chunk)
    chunks = [x[:, seed * chunk : (seed + 1) * chunk].double() for seed in range(seeds)]
    live = [columns for columns in chunks if columns.numel()]
    empty = [0.0] * (seeds - len(live))
    expected = (
        [float(columns.mean()) for columns in live],
        [float(columns.var(correction=0)) for columns in live],
        [float((columns == 0).double().mean()) for columns in live],
    )
    for figures, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(figures.cpu().double(), torch.tensor(wanted + empty).double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0}, {"table": "other"}, {"alpha": torch.ones(3)}, {"bank": torch.ones(0, 61)},
        {"bank": torch.ones(3, 61).bfloat16()}, {"lifecycle": torch.zeros(9)}, {"x": torch.ones(2, 60)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_blend_refuses_what_does_not_fit(change: Inputs) -> None:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match="seed_blend"):
        BLEND.optimized(**(drawn() | moved))


def one_by_one(inputs: Inputs) -> None:
    """The updates in a loop, in the words of the contract."""
    state, history, pointer = inputs["state"], inputs["history"], inputs["pointer"]
    ids = range(len(state)) if inputs["seeds"] is None else inputs["seeds"].tolist()
    for seed, values, fields in zip(ids, inputs["values"].tolist(), inputs["fields"].tolist(), strict=True):
        if not 0 <= seed < len(state):
            continue
        if fields & 1:
            history[seed, pointer[seed]] = torch.stack([state[seed, 0], torch.full_like(state[seed, 0], values[0])])
            pointer[seed] = (pointer[seed] + 1) % history.shape[1]
            state[seed, 4] = state[seed, 0]
            state[seed, 0] = values[0]
            state[seed, 2] = 0
        for column, bit in ((1, 2), (2, 4), (3, 8)):
            if fields & bit:
                state[seed, column] = values[column]


@pytest.mark.parametrize("function", [UPDATE.reference, UPDATE.optimized], ids=["reference", "kernel"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"updates": 50, "seeds": 7, "length": 10, "by_id": 1},
        {"updates": 300, "seeds": 7, "length": 3, "by_id": 1},
        {"updates": 300, "seeds": 250, "length": 10, "by_id": 1},
        {"updates": 0, "seeds": 300, "length": 1, "by_id": 0},
    ],
    ids=["pairs", "many of one seed", "claims", "all"],
)
def test_updates_are_as_if_made_one_by_one(function: Any, sizes: dict[str, Any]) -> None:
    inputs, expected = (UPDATE.make_inputs(Case("drawn", **sizes), torch.float32, DEVICE, 3) for _ in range(2))
    one_by_one(expected)
    function(**inputs)
    for name in UPDATE.mutates:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize("name", ["state", "history", "pointer"])
def test_update_refuses_what_it_cannot_write_in_place(name: str) -> None:
    inputs = UPDATE.make_inputs(Case("drawn", updates=3, seeds=5, length=2, by_id=1), torch.float32, DEVICE, 0)
    inputs[name] = torch.stack([inputs[name], inputs[name]], -1)[..., 0]
    with pytest.raises(ValueError, match="contiguous"):
        UPDATE.optimized(**inputs)


@pytest.mark.gpu
def test_forward_and_telemetry_in_a_graph_follow_the_seeds() -> None:
    """A replay reads the seeds' state anew: nothing of it is kept on the host."""
    inputs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in drawn().items()}
    sizes = (67, 61, 9, 6)

    def run() -> list[Tensor]:
        y, *statistics = BLEND.optimized(**inputs)
        return [y, *TELEMETRY.optimized(*statistics, *sizes)]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs["lifecycle"].fill_(4)
    inputs["blueprint"].fill_(1)
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        assert torch.equal(got, expected)
