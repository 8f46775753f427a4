"""Kasmina's phases: the same layer, lifecycle and training with all seeds at once and through the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kasmina_layer import module, small, training, workload
from test_kasmina_reads import watched

from kernbench import device, record, registry
from kernbench.errors import KernbenchError
from kernbench.parity import compare
from kernbench.swap import plan

PLANS = tuple(tuple(range(count)) for count in range(1, len(workload().phases) + 1))
PRESETS = ("tiny", "tiny-schedules", "tiny-networks")


@contextlib.contextmanager
def swapped(built: Any, numbers: tuple[int, ...], use: str = "eager") -> Iterator[Any]:
    """The phases of these numbers in place, kernels by their references."""
    with planned(numbers, use).applied(built) as receipt:
        yield receipt


def planned(numbers: tuple[int, ...], use: str = "eager") -> Any:
    """The plan of these phases."""
    return plan(
        workload(), numbers, use=dict.fromkeys(numbers, use), kernels=lambda name: registry.kernel(name).declaration
    )


def run(config: Any, numbers: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> Any:
    built = training(config, dtype=dtype)
    with swapped(built, numbers):
        for index in range(steps):
            built.step(index)
    return built


@functools.cache
def baseline(config: Any, steps: int, dtype: torch.dtype = torch.float64) -> Any:
    """A run without phases, once for all tests that look at it and do not step it on."""
    return run(config, (), steps, dtype)


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
        assert float((found.cpu().double() - expected.cpu().double()).abs().max()) <= allowed, path


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
    assert_same_state(run(config, numbers, 12), baseline(config, 12), rtol=1e-9)


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_phases_train_like_the_baseline_in_float32(preset: str, numbers: tuple[int, ...]) -> None:
    config = workload().presets[preset]
    assert_same_state(run(config, numbers, 20, torch.float32), baseline(config, 20, torch.float32), rtol=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "tiny-schedules"])
def test_kernels_train_like_the_baseline(preset: str) -> None:
    config = dataclasses.replace(workload().presets[preset], batch=7)
    before, after = run(config, (), 10, torch.float32), training(config, dtype=torch.float32)
    with swapped(after, PLANS[-1], "triton") as receipt:
        for index in range(10):
            after.step(index)
        assert all(hit.calls for hit in receipt.hits(10))
        assert after.accuracy() == before.accuracy()
    assert_same_state(after, before, rtol=1e-5)


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("preset", PRESETS)
def test_phases_read_nothing(preset: str, numbers: tuple[int, ...]) -> None:
    assert watched(preset, dict.fromkeys(numbers, "triton")) == []


def test_a_fallback_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(device, "WARNINGS", said)
    built = training(small(), dtype=torch.float32)
    with swapped(built, (0, 1, 2, 3)):
        built.step(0)
    assert said == []
    built = training(small())
    with swapped(built, PLANS[-1]):
        built.step(0)
        built.step(1)
    assert said == [module("graph").UNCAPTURED, module("fused").NO_KERNEL, module("fused").NO_TILES]
    del said[:]
    built = training(small(blueprint="network"), dtype=torch.float32)
    with swapped(built, (0, 1, 2, 3)):
        built.step(0)
    assert said == [module("fused").NO_TILES]


def test_a_graph_needs_phase_0() -> None:
    with pytest.raises(KernbenchError, match="phase 4 of kasmina needs phase 0 in place"):
        planned((4,))


def test_a_graph_is_looked_up_once_for_what_stands_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = module("graph")
    looked: list[Any] = []
    monkeypatch.setattr(graph, "Captured", type("Captured", (), {}))
    functions_at = graph.functions_at

    def counted(sites: Any) -> Any:
        looked.append(sites)
        return functions_at(sites)

    monkeypatch.setattr(graph, "functions_at", counted)
    built, cpu = training(small()), torch.device("cpu")
    every, few = planned(PLANS[-1]), planned((0, 1, 4))
    found = []
    for one in (every, few, every):
        with one.applied(built):
            found.append(graph.captured_of(built, cpu))
            assert all(graph.captured_of(built, cpu) is found[-1] for _ in range(5))
    assert len(looked) == 3
    assert found[0] is found[2] is not found[1]
    # A graph has written addresses into its kernels.
    built.model.kasmina.schedules.rows_SK = built.model.kasmina.schedules.rows_SK.clone()
    with every.applied(built):
        assert graph.captured_of(built, cpu) is not found[0]


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
        for seed in range(200):
            each.watch_drift(seed, seed % 10)
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
    built = training(config)
    for index in range(16):
        with swapped(built, ((), *PLANS)[index % (len(PLANS) + 1)]):
            built.step(index)
    assert_same_state(built, baseline(config, 16), rtol=1e-9)


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


def test_networks_of_another_form_run_one_by_one_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(device, "WARNINGS", said)
    config = workload().presets["tiny-networks"]
    sides = []
    for arm in ((), (0,)):
        built = training(config)
        first = next(iter(built.model.kasmina.networks))
        built.model.kasmina.networks[first] = torch.nn.Linear(config.chunk, config.chunk, dtype=torch.float64)
        torch.nn.init.eye_(built.model.kasmina.networks[first].weight)
        torch.nn.init.zeros_(built.model.kasmina.networks[first].bias)
        with swapped(built, arm):
            built.step(0)
        sides.append(built)
    assert_same_state(sides[1], sides[0], rtol=1e-12)
    assert said == [module("together").UNBATCHED]


def test_phases_claim_no_site_twice_and_state_their_promise() -> None:
    phases = workload().phases
    sites = [(swap.site[0].__name__, swap.site[1]) for phase in phases for swap in phase.swaps]
    assert len(set(sites)) == len(sites)
    assert [phase.number for phase in phases] == list(range(len(phases)))
    assert all(phase.claim and phase.predicts and phase.flag.startswith("KASMINA_") for phase in phases)


def profile(**changes: Any) -> record.ProfileRecord:
    environment = record.Environment(
        device=record.Device(type="cuda", name="test"),
        python="3", torch="2", triton="3", kernbench="0", platform="x", cpu="x", cpu_threads=1,
        ceilings=record.Ceilings(copy_bytes_per_second=28e9),
    )  # fmt: skip
    info = record.WorkloadInfo(name="kasmina", preset="extreme", dtype="float32", seed=0, unit="images")
    figures: dict[str, Any] = {
        "run_id": "r", "created_utc": "now", "command": "c", "environment": environment, "workload": info,
        "steps": record.Steps(seconds=[0.1, 0.1, 0.3], units_per_step=1.0), "syncs_per_step": 84.0,
        "idle": record.Idle(
            busy_seconds_per_step=0.08, idle_seconds_per_step=0.02, causes={"sync": 0.02, "launch": 0.01}
        ),
        "hotspots": [
            record.Hotspot(name="a", self_seconds_per_step=0.03, share=0.3, calls_per_step=12, phase=1),
            record.Hotspot(name="b", self_seconds_per_step=0.01, share=0.1, calls_per_step=9, phase=2),
            record.Hotspot(name="c", self_seconds_per_step=0.02, share=0.2, calls_per_step=7, phase=3),
            record.Hotspot(name="d", self_seconds_per_step=0.05, share=0.5, calls_per_step=40, phase=5),
        ],
    }  # fmt: skip
    return record.ProfileRecord(**{**figures, **changes})


def test_predictions_in_figures() -> None:
    reads, blend, move, measure, graph, bookkeeping = (phase.predict(profile()) for phase in workload().phases)
    assert reads.syncs_per_step == 84
    assert reads.ratio_high == pytest.approx(10 / 8)
    # 4096 x 8192 numbers of 4 bytes, twice: 9.6 of 30 ms.
    assert blend.ratio_high == pytest.approx(100 / (100 - 30 + 2 * 4 * 4096 * 8192 / 28e9 * 1e3))
    assert [found.launches_per_step for found in (blend, move, measure)] == [11, 6, 6]
    assert move.ratio_high == pytest.approx(10 / 9)
    assert measure.ratio_high == pytest.approx(10 / 8)
    assert graph.ratio_high == pytest.approx(10 / 8)
    assert (bookkeeping.launches_per_step, bookkeeping.ratio_high) == (38, pytest.approx(2))


def test_predictions_stay_silent_without_a_basis() -> None:
    bare = profile(steps=None, idle=None, hotspots=[], syncs_per_step=None)
    for phase in workload().phases:
        prediction = phase.predict(bare)
        assert (prediction.launches_per_step, prediction.ratio_low, prediction.ratio_high) == (None, None, None)
        assert prediction.basis.startswith("no ")


@pytest.mark.parametrize("preset", ["tiny", "tiny-schedules"])
def test_the_compiled_peer_trains_like_the_baseline(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    # The graphs are what is in question here; generating code for them would take minutes.
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="aot_eager"))
    config = workload().presets[preset]
    built = training(config)
    (peer,) = workload().peers
    peer.prepare(built)
    for index in range(12):
        built.step(index)
    assert_same_state(built, baseline(config, 12), rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("preset", [*PRESETS, "document-small"])
def test_phases_never_wait_on_a_gpu_and_agree(preset: str, numbers: tuple[int, ...]) -> None:
    config = workload().presets[preset]
    sides = [
        workload().build(preset=config, device=torch.device("cuda:0"), dtype=torch.float32, seed=0, data=None)
        for _ in range(2)
    ]
    with swapped(sides[0], numbers, "triton"):
        for index in range(10):
            sides[0].step(index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(10, 24):
                sides[0].step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for index in range(24):
        sides[1].step(index)
    assert_same_state(sides[0], sides[1], rtol=1e-3)
