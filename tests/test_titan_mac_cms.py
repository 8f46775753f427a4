"""TitanMAC's optimizer in CMS mode: its reads, its formula, its network, its state, and the fused path."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_titan_mac import CPU, VARIANTS, module, small, training
from test_titan_mac_phases import assert_same_state, bits, run, swapped, workload
from test_titan_mac_reads import counted_reads, expected_reads, line_of

from kernbench import device, registry
from kernbench.workload import Fault

READ_LINES = {
    "momentum clamp": ("cms.py", "if norm > largest:", 1),
    "level guard": ("cms.py", "if torch.isnan(update).any()", 2),
    "parameter guard": ("cms.py", "if torch.isnan(change).any()", 2),
}
"""For each place the file, a text that starts on the reading line, and its reads per parameter and active level."""


def cms(**changes: Any) -> Any:
    return small(**{"optimizer": "cms", "layers": 2, **changes})


def line(name: str, text: str) -> tuple[str, int]:
    source = (registry.workload("titan-mac").file.parent / name).read_text()
    assert source.count(text) == 1
    return name, source[: source.index(text)].count("\n") + 1


@pytest.mark.parametrize(("calls", "levels"), [(0, 1), (9, 2), (99, 3)])
def test_five_reads_per_parameter_on_an_ordinary_step(calls: int, levels: int) -> None:
    config = cms(meta_update_freq=1000)
    built = training(config)
    for index in range(2):
        built.step(index)
    built.optimizer.calls = calls
    with counted_reads() as reads:
        built.step(2)
    common = expected_reads(config, len(list(built.model.parameters())))
    having = common["gradient norms"]
    expected = {line_of(label): count for label, count in common.items()}
    for label, (file, text, each) in READ_LINES.items():
        expected[line(file, text)] = having * each * (1 if label == "parameter guard" else levels)
    assert reads == expected
    assert sum(each for _, _, each in READ_LINES.values()) == 5


@pytest.mark.parametrize("numbers", [(0,), (0, 5), (0, 5, 6)])
def test_no_reads_without_syncs(numbers: tuple[int, ...]) -> None:
    built = training(cms())
    with swapped(*numbers):
        built.step(0)
        built.optimizer.calls = 99
        with counted_reads() as reads:
            built.step(99)
    assert not reads


def test_levels_are_due_at_their_own_pace() -> None:
    active = module("cms").active_levels
    assert [active(calls) for calls in (1, 5, 10, 11, 50, 100, 200, 1000)] == [1, 1, 2, 1, 2, 3, 3, 3]


def expected_update(network: Any, state: Any, gradient: Any, parameter: Any, lr: float, active: int, wd: float) -> Any:
    """One update from the specification's sentences, in numbers of Python where there are decisions."""
    momenta, totals, averages, squares = (list(part.clone()) for part in state)
    change, count = torch.zeros_like(gradient), 0
    for level in range(3):
        totals[level] = totals[level] + gradient
        if level >= active:
            continue
        g, totals[level] = totals[level] / 10**level, torch.zeros_like(gradient)
        averages[level] = 0.9 * averages[level] + 0.1 * g
        squares[level] = 0.999 * squares[level] + 0.001 * g**2
        u = network(g, momenta[level])
        m = 0.9 * momenta[level] + 0.1 * u
        share = float(m.norm()) / float(g.norm())
        if not u.isfinite().all():
            continue
        momenta[level] = m / max(1.0, share / 100)
        change, count = change + u, count + 1
    if count:
        parameter = parameter - lr * (change / math.sqrt(count) + wd * parameter)
    return torch.stack([torch.stack(part) for part in (momenta, totals, averages, squares)]), parameter


def prepared(scale: float) -> tuple[Any, Any, Any]:
    """An optimizer whose first parameters have gradients and a state from the middle of a run."""
    config = cms(weight_decay=0.1)
    built = training(config)
    momenta = built.optimizer.momenta
    torch.manual_seed(0)
    for parameter, state in zip(momenta.parameters[:6], momenta.states[:6], strict=True):
        parameter.grad = torch.randn_like(parameter) * 1e-2
        state.normal_(0, 1e-2)
        state[0].mul_(scale)
        state[3].square_()
    return config, built, momenta


@pytest.mark.parametrize("path", ["branches", "selections", "kernel"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_an_update_is_the_formula(active: int, scale: float, path: str) -> None:
    _, _, momenta = prepared(scale)
    parameters = [parameter.detach().clone() for parameter in momenta.parameters[:6]]
    before = [state.clone() for state in momenta.states[:6]]
    with torch.no_grad():
        expected = [
            expected_update(momenta.network, state, parameter.grad, value, 0.01, active, 0.1)
            for state, parameter, value in zip(before, momenta.parameters[:6], parameters, strict=True)
        ]
    if scale > 1:
        assert any(
            float(want[0][0, 0].norm()) < 0.5 * float(state[0, 0].norm())
            for want, state in zip(expected, before, strict=True)
        )
    host, ok = [0.01, 0.01], torch.tensor(True)
    rates = torch.tensor(host, dtype=torch.float64)
    with swapped(*((5,) if path == "kernel" else ())):
        momenta.update(host if path == "branches" else rates, True if path == "branches" else ok, active)
    for state, parameter, (want_state, want) in zip(momenta.states, momenta.parameters, expected, strict=False):
        torch.testing.assert_close(state, want_state, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("path", ["branches", "selections", "kernel"])
def test_a_level_with_nan_is_skipped_and_a_parameter_without_levels_stays(path: str) -> None:
    _, _, momenta = prepared(1.0)
    # Of the first tensor one level of two is bad, of the second both.
    momenta.states[0][1, 1].view(-1)[0] = math.nan
    momenta.states[1][1, :2].view(2, -1)[:, 0] = math.inf
    values = [parameter.detach().clone() for parameter in momenta.parameters[:2]]
    kept = [state[0].clone() for state in momenta.states[:2]]
    rates = torch.full((2,), 0.01, dtype=torch.float64)
    with swapped(*((5,) if path == "kernel" else ())):
        momenta.update([0.01, 0.01] if path == "branches" else rates, path == "branches" or torch.tensor(True), 2)
    assert torch.equal(kept[0][1:], momenta.states[0][0, 1:])
    assert not torch.equal(kept[0][0], momenta.states[0][0, 0])
    assert momenta.parameters[0].isfinite().all()
    assert not torch.equal(values[0], momenta.parameters[0])
    assert torch.equal(kept[1], momenta.states[1][0])
    assert torch.equal(values[1], momenta.parameters[1])
    assert not momenta.states[1][1, :2].any()


def test_the_network_sees_logarithms_and_signs() -> None:
    cms_module = module("cms")
    size, sign = cms_module.log_sign(torch.tensor([1.0, -math.exp(-5), math.exp(-11), 0.0, math.nan]))
    assert size[:4].tolist() == pytest.approx([0.0, -0.5, -1.0, -1.0])
    assert sign[:4].tolist() == pytest.approx([1.0, -1.0, math.exp(-1), 0.0])
    assert sign[4].isnan()
    network = cms_module.MomentumNetwork(cms(), device=CPU, dtype=torch.float32, seed=0)
    # Linear(4, 20), three of Linear(20, 20), Linear(20, 1), with biases.
    assert network.weights_W.numel() == 4 * 20 + 20 + 3 * (400 + 20) + 20 + 1


def test_training_follows_autograd_and_adam() -> None:
    _, _, momenta = prepared(1.0)
    momenta.states[0][0, 0].normal_(0, 1e-3)
    twin = copy.deepcopy(momenta.network)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3)
    own = momenta.network
    for _ in range(3):
        momenta.network = twin
        loss = momenta.training_loss()
        adam.zero_grad()
        loss.backward()
        adam.step()
        momenta.network = own
        momenta.train(torch.tensor(True))
        torch.testing.assert_close(own.weights_W, twin.weights_W, rtol=1e-12, atol=1e-15)
    before = own.weights_W.detach().clone()
    momenta.train(torch.tensor(False))
    assert torch.equal(bits(before), bits(own.weights_W))
    assert momenta.trainings == 3


def test_training_loss_by_its_definition() -> None:
    _, _, momenta = prepared(1.0)
    terms = []
    for parameter, state in zip(momenta.parameters[:6], momenta.states[:6], strict=True):
        g, m = parameter.grad.flatten(), state[0, 0].flatten()
        u = momenta.network(g, m).detach()
        cosine = float(u @ g) / float(u.norm() * g.norm())
        terms.append(1 - cosine + 0.1 * float(u.norm() / g.norm() - 1) ** 2 + 0.1 * float((u - m).square().mean()))
    assert float(momenta.training_loss().detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_the_network_learns_the_direction_of_the_gradient() -> None:
    _, _, momenta = prepared(1.0)
    first = float(momenta.training_loss().detach())
    for _ in range(50):
        momenta.train(True)
    assert float(momenta.training_loss().detach()) < 0.75 * first


def test_samples_are_spread_evenly() -> None:
    sampled = module("cms").sampled
    assert sampled(torch.arange(10.0)).tolist() == list(range(10))
    found = sampled(torch.arange(10000.0))
    assert (len(found), float(found[1]), float(found[-1])) == (3334, 3.0, 9999.0)
    assert len(sampled(torch.zeros(0, 3))) == 0


@pytest.mark.parametrize(
    ("variant", "numbers"), [*((variant, (0, 5, 6)) for variant in VARIANTS), ("mag", (0,)), ("mag", (5,))], ids=str
)
def test_phases_train_like_the_baseline(variant: str, numbers: tuple[int, ...]) -> None:
    before, after = (run(cms(variant=variant, meta_update_freq=8), arm, 12) for arm in ((), numbers))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-12)
    assert_same_state(after, before, rtol=1e-9)


@pytest.mark.parametrize("fault", workload().faults, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [*((arm, torch.float32) for arm in ((), (0,), (0, 5), (0, 5, 6))), ((0, 5), torch.bfloat16)],
    ids=str,
)
def test_a_bad_step_changes_no_bit(numbers: tuple[int, ...], fault: Fault, dtype: torch.dtype) -> None:
    built = training(cms(), dtype=dtype)
    with swapped(*numbers):
        for index in range(4):
            built.step(index)
        # The fifth step would train the network, and with a count of 100 all levels would be due.
        built.optimizer.calls = 99
        before = {name: tensor.clone() for name, tensor in fault.protects(built).items()}
        assert {"network", "trainings", "momenta.norm.scale"} <= before.keys()
        fault.inject(built)
        built.step(4)
        after = fault.protects(built)
        assert all(torch.equal(bits(tensor), bits(after[name])) for name, tensor in before.items())
        built.step(5)
    assert not torch.equal(before["momenta.norm.scale"], fault.protects(built)["momenta.norm.scale"])


@pytest.mark.parametrize("numbers", [(), (0, 5)], ids=str)
def test_state_goes_round(numbers: tuple[int, ...], tmp_path: Any) -> None:
    with swapped(*numbers):
        first, second = training(cms()), training(cms(), seed=5)
        for index in range(6):
            first.step(index)
        torch.save(first.state_dict(), tmp_path / "state")
        second.load_state_dict(torch.load(tmp_path / "state"))
        second.seed = 0
        for index in range(6, 12):
            assert torch.equal(first.step(index), second.step(index))
    assert_same_state(second, first, rtol=0)


def test_state_has_twelve_copies_of_the_parameters() -> None:
    built = training(cms())
    state = built.state_dict()["optimizer"]
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    assert sum(tensor.numel() for tensor in state["momenta"]["states"]) == 12 * parameters
    assert not state["adamw"]["state"]
    assert "momenta" not in training(small()).state_dict()["optimizer"]


def test_phase_5_says_where_it_does_nothing() -> None:
    device.WARNINGS.clear()
    plain, swapped_in = run(small(), (0,), 3), run(small(), (0, 5), 3)
    assert_same_state(swapped_in, plain, rtol=0)
    assert [text for text in device.WARNINGS if "phase 5" in text] == [
        "phase 5 of titan-mac does nothing here: it fuses the optimizer's CMS mode, which tiny-cms and seed-cms have"
    ]
    device.WARNINGS.clear()
    run(cms(), (0, 5), 3)
    assert not device.WARNINGS
