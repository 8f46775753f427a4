"""Kasmina's layer as it stands before any swap: blends, telemetry, lifecycle, checkpoint, data and figures."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernbench import registry
from kernbench.errors import KernbenchError

CPU = torch.device("cpu:0")


def workload() -> Any:
    return registry.workload("kasmina").declaration


def module(name: str) -> ModuleType:
    """A file of the workload's folder."""
    return importlib.import_module(f"{workload().build.__module__.rpartition('.')[0]}.{name}")


def small(**changes: Any) -> Any:
    return dataclasses.replace(workload().presets["tiny"], **changes)


def training(config: Any = None, *, dtype: torch.dtype = torch.float64, seed: int = 0, data: str | None = None) -> Any:
    return workload().build(preset=config or small(), device=CPU, dtype=dtype, seed=seed, data=data)


def layer_in(state: int, **changes: Any) -> Any:
    """A layer whose seeds are all in one state, at epoch 25 of 50, and its input."""
    built = training(small(**changes))
    layer = built.model.kasmina
    layer.seeds.state_S8[:, 0] = state
    layer.seeds.state_S8[:, 2] = 25
    layer.seeds.state_S8[:, 1] = torch.arange(layer.config.seeds) % 10
    return layer, built.digits.slice(0)[0]


@pytest.mark.parametrize(("state", "alpha"), [(3, 0.5), (6, 0.9)])
def test_blend_operators_by_definition(state: int, alpha: float) -> None:
    layer, x = layer_in(state)
    y = layer.linear(x).detach()
    expected = y.clone()
    for column in range(layer.config.width):
        seed = column // layer.config.chunk
        w = layer.bank_KH[seed % 10, column]
        before = y[:, column]
        mixed = (alpha * w * before + (1 - alpha) * before, w * before, w + before)
        expected[:, column] = mixed[seed % 3]
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("state", [0, 1, 2, 4, 5, 7, 8, 9, 10])
def test_every_other_state_passes_through_bit_for_bit(state: int) -> None:
    layer, x = layer_in(state)
    assert torch.equal(layer(x), layer.linear(x))


@pytest.mark.parametrize(("state", "alpha", "learns"), [(3, 0.5, False), (6, 0.9, True)])
def test_networks_learn_when_they_are_fine_tuned_and_not_when_grafted(state: int, alpha: float, learns: bool) -> None:
    built = training(small(blueprint="network", seeds=4, width=32))
    layer = built.model.kasmina
    for seed in range(4):
        layer.place(seed, state, blueprint=seed + 1, epochs=25, schedule=0)
    x = built.digits.slice(0)[0]
    y = layer.linear(x).detach()
    parts = [
        (1 - alpha) * part + alpha * layer.networks[str(seed + 1)](part) for seed, part in enumerate(y.split(8, 1))
    ]
    found = layer(x)
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(bool(weight.grad is not None and weight.grad.any()) == learns for weight in layer.networks.parameters())
    # Grafted without a gradient, the chunk itself passes on what is left of it.
    if not learns:
        assert torch.allclose(layer.linear.bias.grad, torch.full((32,), (1 - alpha) * len(x), dtype=torch.float64))


def test_performance_by_definition() -> None:
    layer, x = layer_in(3)
    with torch.no_grad():
        layer.linear.weight[:3] = 0
        layer.linear.bias[:3] = 0
    y = layer.linear(x).detach()
    layer(x)
    for seed, part in enumerate(y.split(8, 1)):
        variance, sparsity = part.var(correction=0), (part.abs() < 1e-6).double().mean()
        expected = [variance + 0.1 * sparsity, 1 - sparsity, 1 / (1 + variance), part.norm().clamp(max=1)]
        assert layer.seeds.performance_S4[seed].tolist() == pytest.approx([float(figure) for figure in expected])
        assert layer.seeds.moments_S2[seed].tolist() == pytest.approx([float(part.mean()), float(variance)])
    assert float(layer.seeds.performance_S4[0, 1]) == 1 - 3 / 8


@pytest.mark.parametrize("source", range(11))
def test_transitions_are_those_of_the_table(source: int) -> None:
    life = module("lifecycle").Life
    allowed = {0: [1], 1: [2, 9], 2: [3, 8, 9], 3: [4, 10], 4: [5, 10], 5: [6, 8, 10], 6: [7, 8, 10]}
    least = {2: 100, 3: 50, 4: 20, 5: 30, 6: 50}
    context = module("lifecycle").Context(reconstruction_loss=0.0, delta=0.5, improvement=0.5)
    bad = dataclasses.replace(context, errors=6)
    for target in itertools.chain(range(1), range(2, 11)):
        layer, _ = layer_in(source)
        may = target in allowed.get(source, [])
        needed = 0 if target == 10 else least.get(source, 0)
        told = bad if (source, target) == (5, 8) else context
        if may and needed:
            layer.seeds.state_S8[:, 2] = needed - 1
            assert not layer.request_transition(0, life(target), told)
        layer.seeds.state_S8[:, 2] = needed
        assert layer.request_transition(0, life(target), told) == may, (source, target)
        row = layer.seeds.state_S8[0].tolist()
        assert row[0] == (target if may else source)
        if may:
            assert (row[2], row[4]) == (0, source)
            assert layer.seeds.history_SH2[0, 0].tolist() == [source, target]


@pytest.mark.parametrize(
    ("source", "target", "good", "bad"),
    [
        (2, 3, {"reconstruction_loss": 0.01}, {"reconstruction_loss": 0.011}),
        (5, 6, {"delta": 0.001, "stability": 0.8}, {"delta": 0.0}),
        (5, 6, {"delta": 0.001, "stability": 0.8}, {"delta": 1.0, "stability": 0.79}),
        (5, 8, {"delta": -0.06}, {"delta": -0.05}),
        (5, 8, {"error_rate": 0.11}, {"error_rate": 0.1}),
        (5, 8, {"errors": 6}, {"errors": 5}),
        (6, 7, {"improvement": 0.01, "stability": 0.95}, {"improvement": 0.009}),
        (6, 7, {"improvement": 0.01, "stability": 0.95}, {"improvement": 1.0, "stability": 0.94}),
    ],
)
def test_guards(source: int, target: int, good: dict[str, float], bad: dict[str, float]) -> None:
    lifecycle = module("lifecycle")
    for figures, passes in ((bad, False), (good, True)):
        layer, _ = layer_in(source)
        layer.seeds.state_S8[:, 2] = 1000
        assert layer.request_transition(0, lifecycle.Life(target), lifecycle.Context(**figures)) == passes


def test_history_is_a_ring() -> None:
    layer, _ = layer_in(0)
    for count in range(13):
        layer.seeds.change(2, count % 11)
    history = layer.seeds.history_SH2[2].tolist()
    assert history[:3] == [[9, 10], [10, 0], [0, 1]]
    assert history[3] == [2, 3]
    assert int(layer.seeds.pointer_S[2]) == 3
    assert not layer.seeds.history_SH2[1].any()


def test_grafting_ends_by_itself() -> None:
    layer, x = layer_in(3)
    layer.seeds.state_S8[:, 2] = 48
    layer(x)
    assert layer.seeds.lifecycle_S.unique().tolist() == [3]
    layer(x)
    assert layer.seeds.state_S8[:, [0, 2, 4]].unique(dim=0).tolist() == [[4, 0, 3]]


def test_a_blueprint_that_is_not_there_is_refused() -> None:
    layer, _ = layer_in(0)
    life = module("lifecycle").Life
    for blueprint in (-1, 10):
        with pytest.raises(ValueError, match=f"no blueprint {blueprint}"):
            layer.germinate(0, blueprint)
        with pytest.raises(ValueError, match=f"no blueprint {blueprint}"):
            layer.place(0, life.GRAFTING, blueprint=blueprint, epochs=0, schedule=0)
    with pytest.raises(ValueError, match="no seed 8"):
        layer.germinate(8, 0)
    with pytest.raises(ValueError, match="call germinate"):
        layer.request_transition(0, life.GERMINATED, module("lifecycle").Context())
    assert layer.germinate(0, 9)
    assert layer.seeds.state_S8[0, :2].tolist() == [1, 9]
    assert not layer.germinate(0, 3)
    assert layer.seeds.state_S8[0, :2].tolist() == [1, 9]


@pytest.mark.parametrize("blueprint", [-1, 0])
def test_no_network_is_made_for_a_number_that_none_has(blueprint: int) -> None:
    layer = training(small(blueprint="network")).model.kasmina
    before, placed = sorted(layer.networks), dict(layer.network_of)
    with pytest.raises(ValueError, match=f"no blueprint {blueprint}"):
        layer.place(3, module("lifecycle").Life.GRAFTING, blueprint=blueprint, epochs=0, schedule=0)
    assert (sorted(layer.networks), layer.network_of) == (before, placed)
    assert layer.seeds.state_S8[3, :2].tolist() == [0, -1]


def test_a_schedule_that_is_not_there_is_refused() -> None:
    layer, _ = layer_in(0, schedules=(0, 2))
    with pytest.raises(ValueError, match="no schedule 1; this layer has 0, 2"):
        layer.place(0, module("lifecycle").Life.GRAFTING, blueprint=1, epochs=0, schedule=1)
    assert layer.seeds.state_S8[0, 0] == 0


@pytest.mark.parametrize(
    ("column", "value", "says"), [(1, -1, "there is no blueprint -1"), (3, 2, "there is no schedule 2")]
)
def test_a_checkpoint_that_asks_for_what_is_not_there_is_refused(column: int, value: int, says: str) -> None:
    built = training()
    state = built.state_dict()
    state["model"]["kasmina.seeds.state_S8"] = state["model"]["kasmina.seeds.state_S8"].clone()
    state["model"]["kasmina.seeds.state_S8"][0, column] = value
    with pytest.raises(ValueError, match=f"seed 0 is GRAFTING: {says}"):
        training().load_state_dict(state)


def test_a_blueprint_that_fails_is_counted_and_rolled_back() -> None:
    built = training(small(blueprint="network"))
    layer = built.model.kasmina
    layer.networks["1"] = torch.nn.Linear(3, 3, dtype=torch.float64)
    x = built.digits.slice(0)[0]
    y = layer.linear(x).detach()
    for count in range(1, 6):
        with pytest.warns(RuntimeWarning, match="blueprint of seed 0 failed"):
            found = layer(x)
        assert torch.equal(found[:, :8], y[:, :8])
        assert int(layer.seeds.state_S8[0, 7]) == count
    assert int(layer.seeds.state_S8[0, 0]) == 10


def test_evaluation_leaves_no_trace() -> None:
    built = training(small(schedules=(0, 1, 2, 3, 4)))
    built.step(0)
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    built.accuracy()
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.model.state_dict().items())
    assert built.model.training


def test_training_learns_to_read() -> None:
    built = training(dtype=torch.float32)
    losses = [float(built.step(index)) for index in range(250)]
    # log(10) = 2.3 is what guessing costs.
    assert 2.2 < losses[0] < 2.5
    assert built.accuracy() > 0.85
    assert built.figures(0.01) == {
        "test accuracy": (100 * built.accuracy(), "%"),
        "after steps of training": (250, "steps"),
    }


def test_seeds_live_through_their_lifecycle() -> None:
    built = training(dtype=torch.float32)
    for index in range(200):
        built.step(index)
    pairs = {tuple(pair) for row in built.model.kasmina.seeds.history_SH2.tolist() for pair in row}
    assert {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)} <= pairs


def test_bytes_of_the_documents_sizes() -> None:
    """The factors by which the source document overstates; specification, section 9."""
    config, train = module("config"), module("training")
    for name, factor in {"small": 14, "medium": 71, "large": 139, "extreme": 271}.items():
        preset = config.PRESETS[f"document-{name}"]
        ratio = train.document_bytes(preset) / train.blend_bytes(preset, 4)
        assert ratio == pytest.approx(factor, rel=0.02)
    # 15 us a call, and its 4993 GB/s come out.
    assert train.document_bytes(config.PRESETS["document-extreme"]) / 15.1e-6 / 1e9 == pytest.approx(4993, rel=0.01)


def test_every_honest_preset_fills_its_width_and_the_documents_do_not() -> None:
    for name, preset in workload().presets.items():
        assert (preset.seeds * preset.chunk == preset.width) != name.startswith("document")
    assert workload().default_preset == "tiny"


def test_data_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("\n".join(f"{row % 17},{row % 5},{row % 10}" for row in range(60)))
    built = training(data=str(path))
    assert torch.isfinite(built.step(0))
    assert built.digits.images.shape[1] == 2


@pytest.mark.parametrize(
    ("text", "says"), [("", "no table"), ("1,2\n3,x\n", "no table"), ("1,2\n" * 20 + "1,11\n", "rows of 2 numbers")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(KernbenchError, match=says):
        training(data=str(path))
    with pytest.raises(KernbenchError, match="cannot read"):
        training(data=str(tmp_path / "missing.csv"))


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"schedules": (5,)}, {"blueprint": "network", "chunk": 9}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|0 to 4|equal chunks"):
        small(**changes)
