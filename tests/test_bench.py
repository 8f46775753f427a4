"""Implementations side by side: rows, labels, speedups, and what happens to those that fail."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernbench import bench
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.measurement import calls, ceilings, replays
from kernbench.record import BenchResult, Ceilings
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Tolerance

CPU = torch.device("cpu", 0)
ROOFS = Ceilings(
    copy_bytes_per_second=1e12,
    matmul_flops_per_second={"float32": 1e13, "tf32": 8e13, "bfloat16": 1e14},
    launch_seconds=1e-9,
)


def workload_rows(arms: dict[str, Callable[[int], float]]) -> list[BenchResult]:
    finished = bench.race(arms, device=torch.device("cpu", 0), rounds=6)
    return bench.workload_results(
        finished, list(arms), workload="toy", preset="tiny", dtype="float32", units_per_step=100
    )


def test_whole_steps_compare_with_the_first_arm() -> None:
    baseline, phase = workload_rows({"baseline": lambda r: 2.0 + r, "phase 0": lambda r: (2.0 + r) / 2})
    assert (baseline.kernel, baseline.case, baseline.implementation) == ("toy", "tiny", "baseline")
    assert baseline.seconds == 4.5
    assert baseline.units_per_second == pytest.approx(100 / 4.5)
    assert baseline.speedup is None
    assert phase.speedup == (2.0, 2.0, 2.0)
    assert phase.interval is not None
    assert phase.interval[0] <= 2.25 <= phase.interval[1]


def test_an_arm_that_fails_midway_leaves_the_others_paired() -> None:
    def fail(number: int) -> float:
        if number == 3:
            raise WorkloadFailed("step 3 of toy failed: no memory")
        return 1.0

    rows = workload_rows({"baseline": lambda r: 2.0, "peer": fail, "phase": lambda r: 1.0})
    assert [row.label for row in rows] == ["", "failed", ""]
    assert rows[1].seconds is None
    assert rows[1].note == "WorkloadFailed: step 3 of toy failed: no memory"
    assert rows[2].speedup == (2.0, 2.0, 2.0)


def test_without_its_baseline_the_rest_has_no_speedup() -> None:
    def fail(_: int) -> float:
        raise ValueError

    rows = workload_rows({"baseline": fail, "phase": lambda r: 1.0})
    assert rows[0].note == "ValueError"
    assert rows[1].seconds == 1.0
    assert rows[1].speedup is None


def reference(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.add_(x)
    return torch.sin(x) * 2 + 1


def optimized(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    raise AssertionError("Triton must not be timed on the CPU")


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case["rows"], 64, generator=generator, device=device).to(dtype)
    return {"x": x, "out": torch.zeros_like(x)}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    size = case["rows"] * 64 * dtype.itemsize
    return Cost(flops=4 * case["rows"] * 64, bytes_read=2 * size, bytes_written=2 * size)


def toy(**changes: Any) -> KernelSpec:
    settings: dict[str, Any] = {
        "name": "toy",
        "reference": reference,
        "optimized": optimized,
        "make_inputs": make_inputs,
        "cases": (Case("ragged", rows=1001), Case("huge", large=True, rows=1 << 30)),
        "tolerance": {"float32": Tolerance()},
        "cost": cost,
        "mutates": ("out",),
    }
    return KernelSpec(**settings | changes)


def rows_of(spec: KernelSpec, **arguments: Any) -> list[BenchResult]:
    return list(bench.bench_kernel(spec, device=CPU, rounds=3, **{"ceilings": ROOFS, **arguments}))


def test_eager_compile_and_peers_are_timed_and_triton_is_not() -> None:
    def twice(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        reference(x, out.clone())
        return reference(x, out)

    eager, compiled, triton, peer, huge = rows_of(toy(peers={"twice": twice}))
    assert [row.implementation for row in (eager, compiled, triton, peer)] == ["eager", "compile", "triton", "twice"]
    for row in (eager, compiled, peer):
        assert row.label == "", row
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.interval is not None
        assert row.interval[0] <= row.seconds <= row.interval[1]
        assert row.cache in ("warm", "cold")
        assert row.noise_floor is not None
        assert row.noise_floor == eager.noise_floor
        assert row.bytes == 4 * 1001 * 64 * 4
        assert row.bytes_per_second == pytest.approx(row.bytes / row.seconds)
    assert eager.speedup is None
    assert peer.speedup is not None
    assert peer.speedup[0] < 1
    assert (triton.seconds, triton.label) == (None, "not measured here")
    assert "interpreter" in triton.note
    assert (huge.case, huge.seconds, huge.label) == ("huge", None, "not measured here")


def test_an_implementation_that_fails_is_a_result_and_the_others_go_on() -> None:
    def broken(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    rows = rows_of(toy(peers={"broken": broken}), cases=[Case("small", rows=3)])
    assert [row.label for row in rows] == ["", "", "not measured here", "failed"]
    assert rows[3].note == "RuntimeError: out of resource: shared memory"
    assert rows[3].seconds is None


@pytest.mark.parametrize("left_out", ["eager", "compile", "twice", "triton"])
def test_an_implementation_is_left_out_and_the_running_one_is_told(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[str] = []

    def named(name: str) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            assert running[-1] == name
            return reference(x, out)

        return call

    monkeypatch.setattr(torch, "compile", lambda _: named("compile"))
    spec = toy(reference=named("eager"), peers={"twice": named("twice")})
    rows = rows_of(spec, cases=[Case("small", rows=3)], without=frozenset({left_out}), begin=running.append)
    left = [name for name in ("eager", "compile", "triton", "twice") if name != left_out]
    assert [row.implementation for row in rows] == left
    timed = [row for row in rows if row.implementation != "triton"]
    assert all(row.seconds for row in timed), rows
    assert all(("eager is left out" in row.note) == (left_out == "eager") for row in timed)
    assert set(running) == set(left) - {"triton"}


def test_a_failing_reference_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        raise ValueError("needs a GPU")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows = rows_of(toy(reference=broken, peers={"works": reference}), cases=[Case("small", rows=3)])
    assert [row.label for row in rows] == ["failed", "failed", "not measured here", ""]
    assert rows[3].speedup is None
    assert rows[3].noise_floor is not None, "the first that runs is raced against itself"
    assert rows[3].note.endswith("not compared with eager while timed: eager fails with ValueError")


def test_inputs_that_cannot_be_made_fail_one_case() -> None:
    def refuse(case: Case, *arguments: Any) -> Inputs:
        if case.name == "bad":
            raise MemoryError("no memory")
        return make_inputs(case, *arguments)

    rows = rows_of(toy(make_inputs=refuse, peers={}), cases=[Case("bad", rows=1), Case("good", rows=5)])
    by_case = {(row.case, row.implementation): row for row in rows}
    assert by_case["bad", "eager"].label == "failed"
    assert "no memory" in by_case["bad", "eager"].note
    assert by_case["good", "eager"].seconds is not None


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(KernbenchError, match="no dtype 'float31'"):
        rows_of(toy(), dtypes=["float31"])


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is tested above; the labels do not need it."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.mark.usefixtures("eager_only")
def test_a_planted_wrong_cost_is_called_impossible_after_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.device] = []

    def measure(device: torch.device) -> Ceilings:
        measured.append(device)
        return Ceilings(copy_bytes_per_second=2e12)

    monkeypatch.setattr(bench, "measure_ceilings", measure)
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 1)
    wrong = toy(cost=lambda case, dtype: Cost(flops=1, bytes_read=1e15, bytes_written=1e15))
    rows = rows_of(wrong, cases=[Case("small", rows=3)])
    assert rows[0].label == "impossible"
    assert rows[0].share_of_roof is not None
    assert rows[0].share_of_roof > 1.02
    assert "times the bytes that its tensors hold" in rows[0].note
    assert measured == [CPU]


@pytest.mark.usefixtures("eager_only")
def test_a_roof_that_was_measured_too_low_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", lambda _: Ceilings(copy_bytes_per_second=1e15))
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 1)
    rows = rows_of(toy(), cases=[Case("small", rows=300)], ceilings=Ceilings(copy_bytes_per_second=1.0))
    assert rows[0].label == ""
    assert rows[0].share_of_roof is not None
    assert rows[0].share_of_roof < 1


@pytest.mark.usefixtures("eager_only")
def test_a_call_near_the_launch_floor_is_launch_bound() -> None:
    rows = rows_of(toy(), cases=[Case("one", rows=1)], ceilings=Ceilings(launch_seconds=1.0))
    assert rows[0].label == "launch-bound"
    assert "3 times the launch floor" in rows[0].note


def test_inputs_rotate_and_what_is_written_in_place_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 5000)
    sets = calls.InputSets(toy(), Case("c", rows=10), torch.float32, CPU)
    assert len(sets.sets) == 2, "two sets of 5120 bytes exceed twice the cache"
    assert sets.exceeds_cache
    assert sets[0]["x"] is sets[2]["x"]
    assert not torch.equal(sets[0]["x"], sets[1]["x"])
    reference(**sets[1])
    assert sets[1]["out"].abs().sum() > 0
    sets.restore()
    assert sets[1]["out"].abs().sum() == 0


def test_state_moves_on_and_little_memory_means_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "free_bytes", lambda _: 0)
    spec = toy(stateful=True, next_inputs=lambda inputs, seed: None)
    sets = calls.InputSets(spec, Case("c", rows=10), torch.float32, CPU)
    assert len(sets.sets) == 1
    reference(**sets[0])
    sets.restore()
    assert sets[0]["out"].abs().sum() > 0


def test_gradients_are_not_asked_for() -> None:
    def wanting(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = make_inputs(case, dtype, device, seed)
        return {"x": inputs["x"].requires_grad_(), "out": [inputs["out"].requires_grad_()]}

    sets = calls.InputSets(toy(differentiable=True, make_inputs=wanting), Case("c", rows=1), torch.float32, CPU)
    assert not sets[0]["x"].requires_grad
    assert not sets[0]["out"][0].requires_grad


def doubled(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.add(x, x, out=out)


def gpu_calls(rows: int) -> tuple[calls.InputSets, torch.device]:
    chosen = torch.device("cuda", 0)
    return calls.InputSets(toy(reference=doubled), Case("c", rows=rows), torch.float32, chosen), chosen


@pytest.mark.gpu
def test_event_times_agree_with_graph_replay() -> None:
    # 4 GB, so that replaying over the same data finds next to none of it in the cache.
    inputs, chosen = gpu_calls(rows=1 << 23)

    cold = calls.ColdCalls(inputs, chosen).prepare(doubled)
    replayed = replays.GraphCalls(inputs, chosen, 1e-3).prepare(doubled)
    pairs = [(cold(number), replayed(number)) for number in range(10)]
    by_events, by_graph = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"events {by_events * 1e6:.2f} us, graph {by_graph * 1e6:.2f} us")
    assert by_graph > 5e-5
    assert by_events == pytest.approx(by_graph, rel=0.03)


@pytest.mark.gpu
def test_clearing_the_cache_makes_small_data_cold() -> None:
    inputs, chosen = gpu_calls(rows=40_000)
    assert inputs.bytes_per_set < ceilings.cache_bytes(chosen)

    cold = statistics.median(calls.ColdCalls(inputs, chosen).prepare(doubled)(r) for r in range(5))
    hot = statistics.median(replays.GraphCalls(inputs, chosen, cold).prepare(doubled)(r) for r in range(5))
    print(f"cold {cold * 1e6:.2f} us, hot {hot * 1e6:.2f} us")
    assert cold > 1.2 * hot


@pytest.mark.gpu
def test_the_memory_of_a_call_is_the_most_it_holds_beside_its_inputs() -> None:
    inputs, chosen = gpu_calls(rows=1 << 20)
    given = inputs[0]["x"]
    # Each result is there until the next one is, so two at a time.
    peak = calls.ColdCalls(inputs, chosen).peak_bytes(lambda x, **_: (x * 2).sin().cos())
    assert peak == pytest.approx(2 * given.numel() * given.element_size(), rel=0.01)


@pytest.mark.gpu
def test_a_kernel_is_timed_on_a_gpu() -> None:
    def fused(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out.add_(x)
        return torch.add(torch.tensor(1.0), torch.sin(x), alpha=2)

    spec = toy(optimized=fused, cases=(Case("ragged", rows=1001), Case("wide", rows=1 << 21)))
    rows = list(bench.bench_kernel(spec, device=torch.device("cuda", 0), rounds=5))
    for row in rows:
        print(row)
    small = [row for row in rows if row.case == "ragged"]
    wide = {row.implementation: row for row in rows if row.case == "wide"}
    assert [row.cache for row in small] == ["cold"] * 3 + ["cold, as called"] * 3 + ["graph"] * 3
    assert all(row.label in ("", "launch-bound") for row in rows)
    assert wide["compile"].share_of_roof is not None
    assert wide["compile"].share_of_roof > 0.8
    assert wide["triton"].speedup is not None
    assert wide["triton"].speedup[0] > 1
    assert wide["triton"].peak_bytes is not None
