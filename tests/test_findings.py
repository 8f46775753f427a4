"""Faults planted in small simulated steps, and what the findings say of them. All times are in microseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis import advice, findings
from kernbench.analysis.windows import step_windows
from kernbench.record import (
    Cause,
    Communication,
    Estimate,
    Finding,
    HostRead,
    Hotspot,
    LineLog,
    RankTime,
    SourceLine,
    WhatIf,
)
from kernbench.record.traced import Change
from kernbench.traces import trace

US = 1e-6
LATENCY, WAKE, STEPS = 5.0, 8.0, 4


class Program:
    """One host thread and its streams: each method does a thing and lets the clocks run on."""

    def __init__(self) -> None:
        self.builder = KinetoBuilder()
        self.now = 0.0
        self.free: dict[int, float] = {}
        self.step_start = 0.0

    def kernels(self, count: int, length: float, *, every: float = 8.0, stream: int = 7, name: str = "gemm") -> None:
        for _ in range(count):
            self.builder.op("aten::mm", self.now, self.now + every)
            call = self.now + 2
            start = max(call + LATENCY, self.free.get(stream, 0.0) + 1)
            self.builder.launch(name, call, start, start + length, stream=stream)
            self.free[stream] = start + length
            self.now += every

    def copy(self, direction: str, length: float, size: int, stream: int = 7) -> None:
        call = self.builder.call("cudaMemcpyAsync", self.now, self.now + 4)
        start = max(self.now + LATENCY, self.free.get(stream, 0.0) + 1)
        self.builder.on_device("gpu_memcpy", f"Memcpy {direction}", start, start + length, call, stream, bytes=size)
        self.free[stream] = start + length
        self.now += 5

    def synchronize(self, call: str = "cudaStreamSynchronize") -> None:
        done = max(self.now + 2, max(self.free.values(), default=0.0) + WAKE)
        self.builder.call(call, self.now, done)
        self.now = done + 1

    def read(self, *operators: str) -> None:
        """A read of one value under the operators, outermost first."""
        self.now += 1
        begin = self.now
        self.copy("DtoH (Device -> Pinned)", 1, 4)
        self.synchronize()
        for depth, name in enumerate(operators):
            self.builder.op(name, begin - (len(operators) - depth) * 0.1, self.now + (len(operators) - depth) * 0.1)
        self.now += 1

    def python(self, length: float) -> None:
        self.now += length

    def end_step(self, number: int) -> None:
        self.builder.step(number, self.step_start, self.now)
        self.step_start = self.now


def item(program: Program) -> None:
    program.read("aten::item", "aten::_local_scalar_dense")


def read_in_a_device_bound_loop(program: Program) -> None:
    for _ in range(4):
        program.kernels(4, 100)
        item(program)
        program.python(60)


def read_in_a_host_bound_loop(program: Program) -> None:
    for _ in range(4):
        program.kernels(4, 6, every=20)
        item(program)
        program.python(300)


def slow_data_loading(program: Program) -> None:
    program.builder.annotation(
        "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", program.now, program.now + 900
    )
    program.python(910)
    program.kernels(8, 100)
    item(program)


def pageable_copies(program: Program) -> None:
    for _ in range(3):
        program.now += 1
        begin = program.now
        program.copy("HtoD (Pageable -> Device)", 150, 1 << 20)
        program.synchronize()
        program.builder.op("aten::to", begin - 0.2, program.now + 0.2)
        program.builder.op("aten::copy_", begin - 0.1, program.now + 0.1)
        program.now += 1
        program.kernels(4, 100)


def implicit_sync_by_mask(program: Program) -> None:
    for _ in range(4):
        program.kernels(4, 100)
        program.read("aten::index", "aten::nonzero")
        program.python(50)


def launch_bound_chain(program: Program) -> None:
    program.kernels(100, 3, every=15)


def allocator_churn(program: Program) -> None:
    for _ in range(4):
        program.kernels(4, 80)
        begin = program.now
        program.synchronize("cudaFree")
        program.builder.call("cudaMalloc", program.now, program.now + 120)
        program.now += 121
        program.builder.op("aten::empty", begin, program.now)


def serialised_streams(program: Program) -> None:
    for _ in range(4):
        for stream, other in ((7, 20), (20, 7)):
            program.builder.call("cudaStreamWaitEvent", program.now, program.now + 1)
            program.now += 2
            program.free[stream] = max(program.free.get(stream, 0.0), program.free.get(other, 0.0))
            program.kernels(3, 90, stream=stream)


def exposed_communication(program: Program) -> None:
    program.kernels(8, 100)
    program.free[7] += 300
    program.builder.launch(
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL", program.now, program.free[7] - 299, program.free[7], stream=30
    )
    program.now += 8


def healthy(program: Program) -> None:
    program.kernels(40, 100)
    item(program)


Scenario = Callable[[Program], None]
SCENARIOS: dict[Scenario, Cause] = {
    read_in_a_device_bound_loop: "host read",
    read_in_a_host_bound_loop: "host-bound",
    slow_data_loading: "data loading",
    pageable_copies: "pageable copy",
    implicit_sync_by_mask: "implicit sync",
    launch_bound_chain: "launch-bound",
    allocator_churn: "allocator",
    serialised_streams: "serialised streams",
    exposed_communication: "communication",
    healthy: "device-bound",
}


def run(scenario: Scenario, tmp_path: Path) -> trace.Trace:
    program = Program()
    for number in range(STEPS):
        scenario(program)
        program.end_step(number)
    return trace.load(program.builder.write(tmp_path / "planted.json"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_planted_cause_comes_first(scenario: Scenario, tmp_path: Path) -> None:
    loaded = run(scenario, tmp_path)
    found = findings.findings(loaded)
    assert found[0].cause == SCENARIOS[scenario], [(one.cause, one.sentence) for one in found]
    assert found[0].advice
    assert all(0 < one.share <= 1 for one in found)
    sentence = findings.headline(loaded, found)
    assert found[0].sentence in sentence


def test_a_healthy_trace_is_healthy_in_one_line(tmp_path: Path) -> None:
    loaded = run(healthy, tmp_path)
    (only,) = findings.findings(loaded)
    assert only.cause == "device-bound"
    assert findings.headline(loaded, [only]) == only.sentence
    assert only.sentence.startswith("Healthy: the device is busy 99 %")
    assert "\n" not in only.sentence


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>(int)", None),
        (
            "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8_stage3_warpsize2x2x1_ffma_aligna4",
            "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n…",
        ),
        ("x" * 80, "x" * 50 + "…"),
    ],
)
def test_a_headline_names_a_kernel_in_whole_words(name: str, shown: str | None) -> None:
    top = Hotspot(name=name, self_seconds_per_step=0.5, share=0.5, calls_per_step=1)
    sentence = advice.healthy_sentence(1.0, 0.99, top)
    assert f"; {shown or 'at::native::vectorized_elementwise_kernel'} takes 50 % of its time." in sentence


def launch_bound(program: Program) -> None:
    program.kernels(150, 2)


def test_a_launch_bound_step_costs_no_more_than_the_replay_wins_by_capturing_it(tmp_path: Path) -> None:
    loaded = run(launch_bound, tmp_path)

    def saving(change: Change, low: float, high: float) -> Estimate:
        return Estimate(change=change, title="in a graph", saving_seconds_per_step=(low, high), share=0.1)

    step = step_windows(loaded).mean_ns / 1e9
    idle = findings.findings(loaded)[0].share
    assert 0.5 < idle < 0.9
    half = saving("graph", 0.4 * step, 0.5 * step)
    waits = saving("without all stalls", 0.1 * step, 0.15 * step)
    more = saving("graph", 0.9 * step, 0.95 * step)
    for estimates, wanted in (([half], 0.5), ([half, waits], 0.35), ([more], idle)):
        found = findings.findings(loaded, WhatIf(step_seconds=step, estimates=estimates))
        assert found[0].cause == "launch-bound"
        assert found[0].share == pytest.approx(wanted, rel=0.01)
        assert "in a graph a step would be" in found[0].sentence


def test_the_cost_of_a_read_is_what_a_step_would_win(tmp_path: Path) -> None:
    """Without its reads the device-bound loop runs 1616 us of kernels a step, launches hidden; with them it waits."""
    with_reads = run(read_in_a_device_bound_loop, tmp_path)

    def without(program: Program) -> None:
        for _ in range(4):
            program.kernels(4, 100)
            program.python(60)

    def period(loaded: trace.Trace) -> float:
        return float(loaded.device.end_ns.max() - loaded.device.start_ns.min()) / STEPS / 1e9

    saved = period(with_reads) - period(run(without, tmp_path))
    assert findings.findings(with_reads)[0].seconds_per_step == pytest.approx(saved, rel=0.1)


def test_a_read_in_a_host_bound_loop_is_blamed_for_its_wait_alone(tmp_path: Path) -> None:
    loaded = run(read_in_a_host_bound_loop, tmp_path)
    costs = {one.cause: one.seconds_per_step / US for one in findings.findings(loaded)}
    assert costs["host-bound"] > 4 * 250
    assert costs.get("host read", 0) < 4 * 45


def estimate(op: str, low: float, high: float, *, deferred: bool = False) -> WhatIf:
    return WhatIf(
        step_seconds=2e-3,
        replayed_seconds=2e-3,
        error=0.0,
        estimates=[
            Estimate(
                change="without stall",
                title=op,
                saving_seconds_per_step=(low * US, high * US),
                share=0.1,
                op=op,
                deferred=deferred,
            )
        ],
    )


def test_the_replay_replaces_the_estimate_from_idle_time(tmp_path: Path) -> None:
    loaded = run(read_in_a_device_bound_loop, tmp_path)
    first = findings.findings(loaded, estimate("aten::item", 200, 250, deferred=True))[0]
    assert first.seconds_per_step == pytest.approx(250 * US)
    assert "200 µs to 250 µs" in first.sentence
    assert "by the replay" in first.sentence
    assert "deferred, not deleted" in first.advice
    nothing = findings.findings(loaded, estimate("aten::item", 0, 0))
    assert "host read" not in {one.cause for one in nothing}


@pytest.mark.parametrize(
    ("memory", "told"), [("Pageable", "as from and to pageable memory it must"), ("Pinned", "non_blocking=True would")]
)
def test_a_blocking_copy_tells_the_memory_and_what_could_overlap(memory: str, told: str, tmp_path: Path) -> None:
    def copies(program: Program) -> None:
        for _ in range(3):
            begin = program.now = program.now + 1
            program.copy(f"HtoD ({memory} -> Device)", 150, 1 << 20)
            program.synchronize()
            program.builder.op("aten::copy_", begin - 0.1, program.now + 0.1)
            program.now += 1
            program.kernels(4, 100)

    first = findings.findings(run(copies, tmp_path))[0]
    assert first.cause == "pageable copy"
    assert told in first.sentence
    assert "450 µs of each step" in first.sentence, "three copies of 150 while no kernel runs"
    assert first.seconds_per_step > 450 * US


def test_a_large_copy_to_the_host_is_a_copy_and_a_small_one_a_read(tmp_path: Path) -> None:
    def to_host(size: int) -> Cause:
        def fetch(program: Program) -> None:
            for _ in range(4):
                program.kernels(4, 100)
                begin = program.now = program.now + 1
                program.copy("DtoH (Device -> Pageable)", 20, size)
                program.synchronize()
                program.builder.op("aten::_to_copy", begin - 0.1, program.now + 0.1)
                program.python(60)

        return findings.findings(run(fetch, tmp_path))[0].cause

    assert to_host(1 << 20) == "pageable copy"
    assert to_host(400) == "host read"


def test_an_explicit_synchronisation_is_a_read_without_an_operator(tmp_path: Path) -> None:
    def pacing(program: Program) -> None:
        for _ in range(4):
            program.kernels(4, 100)
            program.now += 1
            program.synchronize("cudaDeviceSynchronize")
            program.python(60)

    first = findings.findings(run(pacing, tmp_path))[0]
    assert (first.cause, first.op) == ("host read", "cudaDeviceSynchronize")
    assert first.advice.startswith("Take the synchronisation out")


def test_reads_in_a_row_cost_what_they_save_in_order(tmp_path: Path) -> None:
    """Either of two reads alone saves nothing, as the other waits in its place."""

    def two_reads(program: Program) -> None:
        for _ in range(4):
            program.kernels(4, 100)
            program.read("aten::item", "aten::_local_scalar_dense")
            program.python(30)
            program.read("aten::is_nonzero", "aten::_local_scalar_dense")
            program.python(60)

    loaded = run(two_reads, tmp_path)
    single = [estimate(op, 0, 0).estimates[0] for op in ("aten::item", "aten::is_nonzero")]
    in_order = [
        msgspec.structs.replace(one, change="stalls in best order", saving_seconds_per_step=(low * US, high * US))
        for one, low, high in zip(single, (0, 400), (0, 420), strict=True)
    ]
    found = findings.findings(loaded, WhatIf(step_seconds=2e-3, error=0.0, estimates=[*single, *in_order]))
    (only,) = (one for one in found if one.cause == "host read" and one.seconds_per_step)
    assert only.op == "aten::is_nonzero"
    assert only.seconds_per_step == pytest.approx(420 * US)
    assert "by the replay, once waits of other places are gone too" in only.sentence


def test_idle_time_that_profiling_made_is_nobodys_fault(tmp_path: Path) -> None:
    loaded = run(launch_bound_chain, tmp_path)
    profiled = findings.findings(loaded)[0]
    assert profiled.share == pytest.approx(0.8, abs=0.05)
    faster = WhatIf(step_seconds=1.5e-3, error=0.0, baseline_seconds=5e-4, host_scale=0.3)
    (only,) = findings.findings(loaded, faster)
    assert only.cause == "launch-bound"
    assert only.share == pytest.approx(0.4, abs=0.03), "300 us of 500 are busy"
    assert "A step takes 500 µs, the device is busy 60 % of it." in findings.headline(loaded, [only], faster)
    busy = WhatIf(step_seconds=1.5e-3, error=0.0, baseline_seconds=2.9e-4, host_scale=0.1)
    assert findings.findings(loaded, busy)[0].cause == "device-bound"


def test_a_finding_names_the_line_of_the_log(tmp_path: Path) -> None:
    loaded = run(read_in_a_device_bound_loop, tmp_path)
    place = SourceLine(file="train.py", line=42, text="total += loss.item()")
    one = HostRead(step=0, line=0, op="aten::item", form="item", host_tensor=False, real=True)
    first = findings.findings(loaded, lines=LineLog(steps=1, lines=[place], reads=[one] * 4))[0]
    assert first.source == place
    assert first.sentence.startswith("train.py:42 `total += loss.item()` makes the host wait for the device 4 times")


def test_many_small_reads_make_one_finding(tmp_path: Path) -> None:
    def many(program: Program) -> None:
        for number in range(12):
            program.kernels(4, 100)
            program.read(f"mine::read{number}", "aten::_local_scalar_dense")

    found: list[Finding] = findings.findings(run(many, tmp_path))
    assert [one.cause for one in found] == ["host read"]
    assert found[0].sentence.startswith("12 places make the host wait")
    assert 0.03 <= found[0].share < 0.1


def test_a_slow_rank_is_named_and_its_wait_is_no_communication(tmp_path: Path) -> None:
    loaded = run(exposed_communication, tmp_path)

    def rank(number: int, wait: float) -> RankTime:
        return RankTime(
            rank=number,
            step_seconds=1.1e-3,
            compute_seconds_per_step=8e-4,
            communication_seconds_per_step=3e-4,
            exposed_seconds_per_step=3e-4,
            wait_seconds_per_step=wait,
        )

    known = Communication(ranks=[rank(0, 2.9e-4), rank(1, 0.0)], slowest_rank=1, lag_seconds_per_step=2.9e-4)
    found = findings.findings(loaded, communication=known)
    assert [one.cause for one in found] == ["slow rank"]
    assert "rank 1 keeps the other ranks waiting" in found[0].sentence


def test_streams_that_overlap_do_not_take_turns(tmp_path: Path) -> None:
    def overlapping(program: Program) -> None:
        for _ in range(4):
            program.builder.call("cudaStreamWaitEvent", program.now, program.now + 1)
            program.kernels(3, 90, stream=7)
            program.kernels(3, 90, stream=20)

    assert [one.cause for one in findings.findings(run(overlapping, tmp_path))] == ["device-bound"]


def test_a_trace_of_a_cpu_finds_slow_loading_and_nothing_else(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.annotation("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 400)
    builder.op("aten::mm", 400, 1000)
    loaded = trace.load(builder.write(tmp_path / "cpu.json"))
    (only,) = findings.findings(loaded)
    assert only.cause == "data loading"
    assert only.share == pytest.approx(0.4)
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.op("aten::mm", 400, 1000)
    loaded = trace.load(builder.write(tmp_path / "cpu.json"))
    assert findings.findings(loaded) == []
    assert findings.headline(loaded, []).startswith("A step takes 1 ms on the CPU, most of it in aten::mm (60 %)")
