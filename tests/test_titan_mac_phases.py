"""TitanMAC's phases: the same training without host reads, and through the fused AdamW."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_titan_mac import CPU, VARIANTS, small, training
from test_titan_mac_reads import counted_reads
from torch._dynamo.testing import CompileCounterWithBackend

from kernbench import record, registry
from kernbench.workload import Fault, Phase

ARMS = ((), (0,), (2,), (0, 2))


def workload() -> Any:
    return registry.workload("titan-mac").declaration


@contextlib.contextmanager
def swapped(*numbers: int) -> Iterator[None]:
    """The phases of these numbers in place, kernels by their references."""
    phases: tuple[Phase, ...] = workload().phases_numbered(numbers)
    with contextlib.ExitStack() as stack:
        for swap in (swap for phase in phases for swap in phase.swaps):
            use: Any = swap.use or registry.kernel(swap.kernel).declaration.reference
            owner: Any = swap.site[0]
            name = swap.site[1]
            stack.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, swap.adapt(use) if swap.adapt else use)
        yield


def run(config: Any, numbers: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> Any:
    built = training(config, dtype=dtype)
    with swapped(*numbers):
        for index in range(steps):
            built.step(index)
    return built


def flat(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state by their path; numbers as float64 tensors."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if isinstance(state, (int, float)):
        return {prefix: torch.tensor(state, dtype=torch.float64)}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {path: tensor for key, value in items for path, tensor in flat(value, f"{prefix}/{key}").items()}


def assert_same_state(after: Any, before: Any, *, rtol: float) -> None:
    # The group's lr is where the host path leaves its figures; the device path leaves it alone.
    states = [
        {path: tensor for path, tensor in flat(built.state_dict()).items() if not path.endswith("/lr")}
        for built in (after, before)
    ]
    assert states[0].keys() == states[1].keys()
    for path, tensor in states[1].items():
        found = states[0][path].double()
        scale = float(tensor.double().abs().max())
        assert float((found - tensor.double()).abs().max()) <= rtol * scale, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_syncs_trains_like_the_baseline(variant: str) -> None:
    config = small(variant=variant, attention="block" if variant == "mal" else "windowed", meta_update_freq=8)
    before, after = (run(config, numbers, 20) for numbers in ((), (0,)))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-12)
    assert_same_state(after, before, rtol=1e-9)


def test_no_syncs_trains_like_the_baseline_in_float32() -> None:
    before, after = (run(small(), numbers, 20, torch.float32) for numbers in ((), (0,)))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-5)


@pytest.mark.parametrize("numbers", [(2,), (0, 2)])
def test_fused_adamw_trains_like_the_baseline(numbers: tuple[int, ...]) -> None:
    # The kernel takes float32 learning rates, which a float64 run sees.
    before, after = (run(small(), arm, 20) for arm in ((), numbers))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-6)
    assert_same_state(after, before, rtol=1e-4)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and 0.0 is not -0.0."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("fault", workload().faults, ids=lambda fault: fault.name)
@pytest.mark.parametrize("numbers", ARMS, ids=str)
@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, torch.float32) for variant in VARIANTS), ("mag", torch.bfloat16)]
)
def test_a_bad_step_changes_no_bit(variant: str, numbers: tuple[int, ...], fault: Fault, dtype: torch.dtype) -> None:
    built = training(small(variant=variant), dtype=dtype)
    with swapped(*numbers):
        for index in range(3):
            built.step(index)
        before = {name: tensor.clone() for name, tensor in fault.protects(built).items()}
        fault.inject(built)
        loss = built.step(3)
        after = fault.protects(built)
        assert torch.isfinite(loss) == (fault.name == "nan-gradient")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(bits(tensor), bits(after[name])), name
        built.step(4)
        changed = fault.protects(built)
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in before.items() if "blocks" in name)
    assert float(changed["step.norm.scale"]) == 4
    assert torch.isfinite(changed["model.norm.scale"]).all()


@pytest.mark.parametrize("numbers", [(0,), (0, 2)])
def test_bad_steps_leave_the_same_trajectory(numbers: tuple[int, ...]) -> None:
    runs = []
    for arm in ((), numbers):
        built = training(small(meta_update_freq=4))
        with swapped(*arm):
            for index in range(10):
                if index in (3, 6, 7):
                    workload().faults[index % 2].inject(built)
                built.step(index)
        runs.append(built)
    assert_same_state(runs[1], runs[0], rtol=1e-9 if numbers == (0,) else 1e-4)


def test_a_bad_first_step_is_survived() -> None:
    built = training(small())
    with swapped(0):
        for fault in workload().faults:
            before = {name: tensor.clone() for name, tensor in fault.protects(built).items()}
            fault.inject(built)
            built.step(0)
            assert all(torch.equal(before[name], tensor) for name, tensor in fault.protects(built).items())


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac", "tiny-mal"])
@pytest.mark.parametrize("numbers", [(0,), (0, 2)])
def test_no_syncs_reads_nothing(preset: str, numbers: tuple[int, ...]) -> None:
    built = workload().make(preset, CPU, torch.float32, 0, None)
    with swapped(*numbers):
        built.step(0)
        built.optimizer.calls = built.config.meta_update_freq - 1
        with counted_reads() as reads:
            built.step(99)
    assert not reads
    assert len(built.losses()) == 2
    assert built.log_entries[0].shape == (5,)


def test_arms_alternate_on_one_object() -> None:
    config = small()
    baseline = run(config, (), 8)
    built = training(config)
    for index, numbers in enumerate(((), (0,), (0, 2), (2,), (), (0,), (), (0, 2))):
        with swapped(*numbers):
            built.step(index)
    assert built.losses() == pytest.approx(baseline.losses(), rel=1e-6)
    steps = [float(entry["step"]) for entry in built.optimizer.adamw.state.values()]
    assert set(steps) == {0.0, 8.0}


@pytest.mark.parametrize("numbers", ARMS, ids=str)
def test_optimizer_state_loads_into_torch_adamw(numbers: tuple[int, ...]) -> None:
    built = run(small(), numbers, 3)
    state = copy.deepcopy(built.state_dict())
    groups = [{"params": group["params"]} for group in built.optimizer.adamw.param_groups]
    plain = torch.optim.AdamW(groups, lr=1.0)
    plain.load_state_dict(copy.deepcopy(state["optimizer"]["adamw"]))
    again = training(small(), seed=3)
    again.load_state_dict(state)
    again.seed = 0
    built.optimizer.detach_state()
    for index in (3, 4):
        assert float(again.step(index)) == pytest.approx(float(built.step(index)), rel=1e-13)
    assert plain.state[groups[0]["params"][0]]["step"] == 3


def test_a_parameter_that_gets_its_first_gradient_later_is_taken_up() -> None:
    built = training(small())
    with swapped(0):
        built.step(0)
        spare = built.model.memory_proj.weight
        before = spare.detach().clone()
        built.optimizer.zero_grad()
        (built.loss(built.batch(1)) + spare.square().sum()).backward()
        built.optimizer.step(torch.tensor(1.0, dtype=torch.float64))
        steps = built.optimizer.adamw.state
        assert (float(steps[spare]["step"]), float(steps[built.model.norm.scale]["step"])) == (1, 2)
        assert not torch.equal(before, spare)


def test_phases_claim_no_site_twice_and_state_their_promise() -> None:
    phases = workload().phases
    sites = [swap.site for phase in phases for swap in phase.swaps]
    assert len(set(sites)) == len(sites)
    flags = {phase.number: phase.flag for phase in phases}
    expected = {0: "TITAN_SYNC_FREE", 2: "TITAN_FUSED_ADAMW", 5: "TITAN_FUSED_CMS", 6: "TITAN_GRAPH"}
    assert flags | expected == flags
    # The source document has no phases after 4.
    assert all(phase.predicts and bool(phase.claim) == (phase.number < 5) for phase in phases)


def profile(**changes: Any) -> record.ProfileRecord:
    environment = record.Environment(
        device=record.Device(type="cuda", name="test"),
        python="3", torch="2", triton="3", kernbench="0", platform="x", cpu="x", cpu_threads=1,
        ceilings=record.Ceilings(copy_bytes_per_second=28e9),
    )  # fmt: skip
    info = record.WorkloadInfo(
        name="titan-mac", preset="seed", dtype="float32", seed=0, unit="tokens", parameters=1_000_000
    )
    figures: dict[str, Any] = {
        "run_id": "r", "created_utc": "now", "command": "c", "environment": environment, "workload": info,
        "steps": record.Steps(seconds=[0.010, 0.010, 0.030], units_per_step=1.0), "syncs_per_step": 84.0,
        "idle": record.Idle(
            busy_seconds_per_step=0.006, idle_seconds_per_step=0.004, causes={"sync": 0.002, "launch": 0.002}
        ),
        "hotspots": [
            record.Hotspot(name="a", self_seconds_per_step=0.002, share=0.2, calls_per_step=30, phase=2),
            record.Hotspot(name="b", self_seconds_per_step=0.001, share=0.1, calls_per_step=12, phase=2),
            record.Hotspot(name="c", self_seconds_per_step=0.003, share=0.3, calls_per_step=99),
        ],
    }  # fmt: skip
    return record.ProfileRecord(**{**figures, **changes})


def test_predictions_in_figures() -> None:
    syncs, adamw, graph = (phase.predict(profile()) for phase in workload().phases_numbered((0, 2, 6)))
    assert syncs.syncs_per_step == 84
    assert (syncs.ratio_low, syncs.ratio_high) == (1.0, pytest.approx(10 / 8))
    assert adamw.launches_per_step == 30 + 12 - 2
    # 28 MB at 28 GB/s are 1 ms of the 3 ms now.
    assert adamw.ratio_high == pytest.approx(10 / 8)
    assert "1e+06" not in adamw.basis
    assert "1000000 parameters" in adamw.basis
    assert graph.ratio_high == pytest.approx(10 / 6)


def test_predictions_stay_silent_without_a_basis() -> None:
    bare = profile(steps=None, idle=None, hotspots=[], syncs_per_step=None)
    for phase in workload().phases:
        prediction = phase.predict(bare)
        assert (prediction.syncs_per_step, prediction.launches_per_step) == (None, None)
        assert (prediction.ratio_low, prediction.ratio_high) == (None, None)
        assert prediction.basis.startswith("no ")


def test_torch_fused_adamw_is_a_peer_that_trains() -> None:
    built, baseline = training(small()), run(small(), (), 4)
    next(peer for peer in workload().peers if peer.name == "torch fused AdamW").prepare(built)
    for index in range(4):
        built.step(index)
    assert built.losses() == pytest.approx(baseline.losses(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "variant"), [*(("torch.compile", variant) for variant in VARIANTS), ("torch.compile of phase 0", "mac")]
)
def test_compiled_peers_train_like_the_baseline(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    # The graphs are what is in question here; generating code for them would take minutes.
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend))
    config = small(variant=variant, layers=2 if variant == "mal" else 1, length=18)
    built, baseline = training(config), run(config, (), 3)
    next(peer for peer in workload().peers if peer.name == name).prepare(built)
    built.step(0)
    graphs = backend.frame_count
    with counted_reads() as reads:
        for index in range(1, 3):
            built.step(index)
    assert backend.frame_count == graphs
    assert bool(reads) == (name == "torch.compile")
    assert built.losses() == pytest.approx(baseline.losses(), rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("numbers", [(0,), (0, 2)])
def test_no_syncs_never_waits_on_a_gpu(variant: str, numbers: tuple[int, ...]) -> None:
    config = dataclasses.replace(workload().presets["tiny"], variant=variant)
    device = torch.device("cuda:0")
    built = workload().build(preset=config, device=device, dtype=torch.float32, seed=0, data=None)
    with swapped(*numbers):
        for index in range(3):
            built.step(index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(3, 6):
                built.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(built.losses()) == 6
