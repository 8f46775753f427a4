"""Kasmina's phases: the same layer, lifecycle and training with all seeds at once and through the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kasmina_layer import module, small, training, workload
from test_kasmina_reads import watched

from kernbench import registry
from kernbench.parity import compare
from kernbench.swap import plan

PLANS = tuple(tuple(range(count)) for count in range(1, len(workload().phases) + 1))
PRESETS = ("tiny", "tiny-schedules", "tiny-networks")


@contextlib.contextmanager
def swapped(built: Any, numbers: tuple[int, ...], use: str = "eager") -> Iterator[Any]:
    """The phases of these numbers in place, kernels by their references."""
    chosen = plan(
        workload(), numbers, use=dict.fromkeys(numbers, use), kernels=lambda name: registry.kernel(name).declaration
    )
    with chosen.applied(built) as receipt:
        yield receipt


def run(config: Any, numbers: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> Any:
    built = training(config, dtype=dtype)
    with swapped(built, numbers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(steps):
            built.step(index)
    return built


def assert_same_state(after: Any, before: Any, *, rtol: float) -> None:
    """Integers equal, other tensors within ``rtol`` of the largest element."""
    states = [compare.leaves(built.state_dict(), "") for built in (after, before)]
    assert states[0].keys() == states[1].keys()
    for path, expected in states[1].items():
        if not isinstance(expected, torch.Tensor):
            continue
        found = states[0][path]
        assert found.shape == expected.shape, path
        if not expected.numel():
            continue
        allowed = rtol * float(expected.double().abs().max()) if expected.is_floating_point() else 0.0
        assert float((found.double() - expected.double()).abs().max()) <= allowed, path


@pytest.mark.parametrize("preset", PRESETS)
def test_all_seeds_at_once_train_like_one_by_one(preset: str) -> None:
    config = workload().presets[preset]
    before, after = (run(config, numbers, 25) for numbers in ((), (0,)))
    assert_same_state(after, before, rtol=1e-10)
    # The state that was compared is one in which something happened.
    assert before.model.kasmina.seeds.pointer_S.sum() >= 4
    assert after.accuracy() == before.accuracy()


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 60, "seeds": 7, "chunk": 8},  # uncovered columns
        {"width": 61, "seeds": 9, "chunk": 8},  # empty seeds, and a last one that is narrower
        {"width": 5, "seeds": 8, "chunk": 8},  # a single live seed
        {"width": 9, "seeds": 1, "chunk": 4},
    ],
)
@pytest.mark.parametrize("numbers", PLANS)
def test_seeds_that_do_not_fill_the_width(sizes: dict[str, int], numbers: tuple[int, ...]) -> None:
    config = small(schedules=(0, 1, 3), **sizes)
    before, after = (run(config, arm, 12) for arm in ((), numbers))
    assert_same_state(after, before, rtol=1e-9)


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_phases_train_like_the_baseline_in_float32(preset: str, numbers: tuple[int, ...]) -> None:
    config = workload().presets[preset]
    before, after = (run(config, arm, 20, torch.float32) for arm in ((), numbers))
    assert_same_state(after, before, rtol=1e-4)


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("preset", [*PRESETS, "document-small"])
def test_phases_read_nothing(preset: str, numbers: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert watched(preset, dict.fromkeys(numbers, "eager")) == []


def test_the_controller_reads_nothing_either() -> None:
    def hurry(built: Any) -> None:
        step = built.step
        built.step = lambda index: step(index * 10 + 9)

    assert watched("tiny", {0: "python"}, hurry) == []
    assert watched("tiny", {}, hurry) != []


@pytest.mark.parametrize("numbers", PLANS)
def test_a_layer_without_active_seeds_records_sums(numbers: tuple[int, ...]) -> None:
    sides = []
    for arm in ((), numbers):
        built = training(small())
        built.model.kasmina.seeds.state_S8[:, 0] = 4
        with swapped(built, arm):
            built.step(0)
        sides.append(built)
    assert_same_state(sides[1], sides[0], rtol=1e-10)
    assert sides[0].model.kasmina.seeds.telemetry_S2.abs().min() > 0
    assert not sides[0].model.kasmina.seeds.performance_S4.any()


def test_schedules_agree_on_whatever_they_are_shown() -> None:
    """Figures and weights that jump, so that every branch of every schedule is taken by some seed."""
    schedules, ramps = module("schedules"), module("ramps")
    config = small(seeds=200, chunk=1, width=200, schedules=(0, 1, 2, 3, 4), pause=3)
    layer, together = (training(config).model.kasmina for _ in range(2))
    for each in (layer, together):
        each.seeds.state_S8[:, 0] = 3
        each.watch_all = [each.watch_drift(seed, seed % 10) for seed in range(200)]
    generator = torch.Generator().manual_seed(0)
    held = returned = 0
    for _ in range(40):
        step = 0.05 * torch.rand(1, generator=generator)
        change = step * torch.randn(layer.bank_KH.shape, generator=generator, dtype=torch.float64)
        loss, accuracy = torch.rand(2, 200, generator=generator, dtype=torch.float64)
        for each in (layer, together):
            each.bank_KH.data += change
            each.seeds.performance_S4[:, 0] = 2 * loss
            each.seeds.performance_S4[:, 1] = accuracy
            each.seeds.state_S8[:, 2] += 1
            each.seeds.state_S8[:, 1] = torch.arange(200) % 10
        before = layer.schedules.rows_SK.clone()
        expected = [layer.alpha(seed, seed % 10) for seed in range(200)]
        found = ramps.advance_all(together, torch.ones(200, dtype=torch.bool))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.schedules.rows_SK, layer.schedules.rows_SK, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.drift_ema_SC, layer.drift_ema_SC, rtol=1e-12, atol=1e-14)
        held += int((layer.schedules.rows_SK[:, schedules.HOLD] > 0).sum())
        fewer = layer.schedules.rows_SK[:, schedules.FAILURES] < before[:, schedules.FAILURES]
        returned += int(fewer.sum())
    assert held > 100
    assert returned > 10
    assert layer.schedules.rows_SK[:, schedules.VELOCITY].abs().max() > 0


def test_arms_alternate_on_one_object() -> None:
    config = workload().presets["tiny-schedules"]
    baseline, built = run(config, (), 16), training(config)
    for index in range(16):
        with swapped(built, ((), *PLANS)[index % (len(PLANS) + 1)]):
            built.step(index)
    assert_same_state(built, baseline, rtol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("write", "read"), [((), PLANS[-1]), (PLANS[-1], ()), ((0,), (0,))], ids=str)
def test_a_checkpoint_goes_both_ways(preset: str, write: tuple[int, ...], read: tuple[int, ...], tmp_path: Any) -> None:
    config = workload().presets[preset]
    built = run(config, write, 12)
    torch.save(built.state_dict(), tmp_path / "checkpoint.pt")
    again = training(config, seed=5)
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    again.digits = built.digits
    for index in range(12, 24):
        with swapped(built, write):
            one = built.step(index)
        with swapped(again, read):
            other = again.step(index)
        assert float(other) == pytest.approx(float(one), rel=1e-9)
    assert_same_state(again, built, rtol=1e-9)


def test_networks_of_another_form_run_one_by_one_and_it_says_so() -> None:
    config = workload().presets["tiny-networks"]
    sides = []
    for arm in ((), (0,)):
        built = training(config)
        first = next(iter(built.model.kasmina.networks))
        built.model.kasmina.networks[first] = torch.nn.Linear(config.chunk, config.chunk, dtype=torch.float64)
        torch.nn.init.eye_(built.model.kasmina.networks[first].weight)
        torch.nn.init.zeros_(built.model.kasmina.networks[first].bias)
        says = pytest.warns(RuntimeWarning, match="runs seed by seed") if arm else contextlib.nullcontext()
        with swapped(built, arm), says:
            built.step(0)
        sides.append(built)
    assert_same_state(sides[1], sides[0], rtol=1e-12)


def test_phases_claim_no_site_twice_and_state_their_promise() -> None:
    phases = workload().phases
    sites = [(swap.site[0].__name__, swap.site[1]) for phase in phases for swap in phase.swaps]
    assert len(set(sites)) == len(sites)
    assert [phase.number for phase in phases] == list(range(len(phases)))
    assert all(phase.claim and phase.predicts and phase.flag.startswith("KASMINA_") for phase in phases)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_phases_never_wait_on_a_gpu(preset: str) -> None:
    config = dataclasses.replace(workload().presets[preset], pace=2)
    built = workload().build(preset=config, device=torch.device("cuda:0"), dtype=torch.float32, seed=0, data=None)
    with swapped(built, PLANS[-1], "triton"):
        for index in range(12):
            built.step(index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(12, 24):
                built.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 0.0 <= built.accuracy() <= 1.0
