"""The replay of a traced step, with answers worked out by hand. All times in the traces are in microseconds."""

from pathlib import Path

import msgspec
import pytest
import report_records
from kineto_builder import AUTOGRAD, MAIN, KinetoBuilder

from kernbench import experiment
from kernbench.analysis import stalls
from kernbench.analysis.phasewhatif import with_phases
from kernbench.analysis.replay import replay, steady, without_waits
from kernbench.analysis.replaymodel import CannotReplayError, model
from kernbench.analysis.replaywaits import NOTHING
from kernbench.analysis.whatif import LIMIT, whatif, with_savings
from kernbench.record import Estimate, HostRead, LineLog, Prediction, SourceLine, TraceAnalysis, WhatIf
from kernbench.traces import trace
from kernbench.workload import Phase

US = 1000
LATENCY, WAKE, CALL = 5, 8, 4


def read_item(builder: KinetoBuilder, start: float, until: float) -> float:
    """An ``aten::item`` that returns ``WAKE`` after ``until``; gives back when."""
    end = until + 2 + WAKE
    builder.op("aten::item", start, end + 1)
    builder.op("aten::_local_scalar_dense", start, end + 1)
    copy = builder.call("cudaMemcpyAsync", start + 1, start + 5)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", until, until + 2, copy)
    builder.call("cudaStreamSynchronize", start + 5, end)
    return end + 1


def reading(tmp_path: Path, *, kernel: float = 200, work: float = 100, steps: int = 3) -> trace.Trace:
    """Per step: ``work`` us of host, a kernel, a read of its result. Host and device take turns."""
    builder = KinetoBuilder()
    now = 0.0
    for step in range(steps):
        start = now
        launched = start + work
        builder.launch("kernel", launched, launched + LATENCY, launched + LATENCY + kernel)
        now = read_item(builder, launched + CALL, launched + LATENCY + kernel)
        builder.step(step, start, now)
    return trace.load(builder.write(tmp_path / "reading.json"))


def by_change(found: WhatIf | None) -> dict[str, Estimate]:
    assert found is not None
    return {estimate.change: estimate for estimate in found.estimates}


def test_the_unchanged_trace_is_replayed_to_the_nanosecond(tmp_path: Path) -> None:
    program = model(reading(tmp_path))
    assert program.steps == 3
    assert replay(program).done_ns == [program.traced_ns] == [3 * 316 * US]
    assert steady(program) == 316 * US


def test_without_the_read_the_longer_of_host_and_device_remains(tmp_path: Path) -> None:
    """A step of 316: host 100 + 4 + 5 + 1, device 200 + 2. Without the read the device goes on without a pause."""
    loaded = reading(tmp_path)
    found = by_change(whatif(loaded, stalls.stalls(loaded, None)))["without stall"]
    program = model(loaded)
    waits = program.nodes.waits != NOTHING
    assert waits.sum() == 3
    # The copy stays where only the wait goes: 202 and the pauses between them. Where the read goes, 200 stay.
    assert steady(without_waits(program, waits)) == pytest.approx(202 * US, abs=3 * US)
    assert found.op == "aten::item"
    assert found.saving_seconds_per_step == pytest.approx([116e-6, 116e-6], abs=2e-6)
    assert found.share == pytest.approx(116 / 316, abs=0.01)
    assert not found.deferred


def test_a_host_bound_step_wins_only_the_wait(tmp_path: Path) -> None:
    """A step of 426: 400 host, 4 launch, then 22 in the read. Without it 404 remain; the kernel's 10 fit beside."""
    loaded = reading(tmp_path, kernel=10, work=400)
    found = by_change(whatif(loaded))["without stall"]
    assert found.saving_seconds_per_step == pytest.approx([22e-6, 22e-6], abs=1e-6)


def test_a_read_in_a_full_queue_costs_the_bubble_behind_it(tmp_path: Path) -> None:
    """Ten kernels of 100 are queued, then a read: 100 of host, the launch and the wake-up are all that is lost."""
    builder = KinetoBuilder()
    now = 0.0
    for step in range(4):
        start = now
        first = start + 20
        device = first + LATENCY
        for number in range(10):
            builder.launch("kernel", first + number * CALL, device, device + 100)
            device += 101
        now = read_item(builder, first + 10 * CALL, device)
        builder.step(step, start, now)
    loaded = trace.load(builder.write(tmp_path / "full.json"))
    found = by_change(whatif(loaded))["without stall"]
    # 20 host before the first launch, 5 latency, 2 copy, 8 waking up, 1 to leave the operator, all exposed; but the
    # pause of 1 between two kernels stays.
    assert found.saving_seconds_per_step == pytest.approx([36e-6, 36e-6], abs=2e-6)


def line_log(text: str, steps: int = 1) -> LineLog:
    place = SourceLine(file="model.py", line=7, text=text)
    read = HostRead(step=0, line=0, op="aten::item", form="item", host_tensor=False, real=True)
    return LineLog(steps=steps, lines=[place], reads=[read], op_lines={"aten::item": [0]})


@pytest.mark.parametrize(
    ("text", "deferred"),
    [
        ("losses.append(loss.item())", False),
        ("total += loss.item()", False),
        ("if loss.item() > 3:", True),
        ("while error.item() > tolerance:", True),
        ("for i in range(count.item()):", True),
        ("row = table[index.item()]", True),
        ("x = a if flag.item() else b", True),
        ("stop = flag.item() or late", True),
    ],
)
def test_a_value_that_steers_the_host_is_deferred_not_deleted(tmp_path: Path, text: str, deferred: bool) -> None:
    loaded, log = reading(tmp_path), line_log(text)
    rows = stalls.stalls(loaded, log)
    found = whatif(loaded, rows, None, log)
    (estimate,) = [row for row in found.estimates if row.change == "without stall"] if found else []
    assert estimate.source == log.lines[0]
    assert estimate.deferred is deferred
    assert ("deferred" in estimate.note) is deferred
    (stall,) = with_savings(rows, found)
    assert stall.saving_seconds_per_step == pytest.approx(116e-6, abs=5e-6)


def test_stalls_that_cover_each_other_save_only_together(tmp_path: Path) -> None:
    """Two reads in a row: without either one the other still waits."""
    builder = KinetoBuilder()
    now = 0.0
    places = [SourceLine(file="model.py", line=line, text=f"log({line})") for line in (1, 2)]
    for step in range(3):
        start = now
        builder.launch("kernel", start + 100, start + 105, start + 405)
        now = read_item(builder, start + CALL + 100, start + 405)
        builder.op("aten::nonzero", now, now + 10)
        builder.call("cudaStreamSynchronize", now + 1, now + 9)
        now += 10
        builder.step(step, start, now)
    loaded = trace.load(builder.write(tmp_path / "two.json"))
    reads = [
        HostRead(step=0, line=line, op=op, form="item", host_tensor=False, real=True)
        for line, op in ((0, "aten::item"), (1, "aten::nonzero"))
    ]
    log = LineLog(steps=1, lines=places, reads=reads, op_lines={"aten::item": [0], "aten::nonzero": [1]})
    found = whatif(loaded, stalls.stalls(loaded, log), None, log)
    assert found is not None
    alone = [row for row in found.estimates if row.change == "without stall"]
    together = by_change(found)["without all stalls"]
    ordered = [row for row in found.estimates if row.change == "stalls in best order"]
    assert len(alone) == 2
    assert sum(together.saving_seconds_per_step) > 2 * sum(sum(row.saving_seconds_per_step) for row in alone)
    assert [row.title[:2] for row in ordered] == ["1.", "2."]
    assert ordered[-1].cumulative_seconds_per_step == pytest.approx(together.cumulative_seconds_per_step, abs=1e-6)


def test_backward_on_its_own_thread_shares_the_clock_of_the_step(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        start = step * 400.0
        builder.step(step, start, start + 400)
        builder.op("aten::mm", start + 10, start + 60)
        builder.launch("forward", start + 20, start + 25, start + 35)
        builder.op("MmBackward0", start + 100, start + 300, AUTOGRAD, sequence=1, backward=True)
        builder.launch("backward", start + 290, start + 295, start + 305, tid=AUTOGRAD)
        builder.op("aten::add_", start + 320, start + 390, MAIN)
        builder.launch("update", start + 380, start + 385, start + 390)
    program = model(trace.load(builder.write(tmp_path / "threads.json")))
    assert program.clocks == 1
    assert steady(program) == 400 * US


def test_threads_that_overlap_keep_their_own_clocks(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    for number in range(10):
        builder.op("aten::mm", number * 100, number * 100 + 90)
        builder.launch("main", number * 100 + 10, number * 100 + 15, number * 100 + 20)
        builder.op("aten::copy_", number * 100 + 20, number * 100 + 95, AUTOGRAD)
        builder.launch("side", number * 100 + 30, number * 100 + 35, number * 100 + 40, tid=AUTOGRAD, stream=9)
    program = model(trace.load(builder.write(tmp_path / "overlap.json")))
    assert program.clocks == 2
    assert replay(program).done_ns == [1000 * US]


def test_streams_that_wait_for_each_other_do_so_again(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        start = step * 500.0
        builder.step(step, start, start + 500)
        builder.launch("compute", start + 10, start + 15, start + 215)
        builder.call("cudaEventRecord", start + 20, start + 21)
        builder.call("cudaStreamWaitEvent", start + 22, start + 23)
        builder.launch("copy", start + 30, start + 216, start + 416, stream=9)
        builder.call("cudaDeviceSynchronize", start + 40, start + 424)
    loaded = trace.load(builder.write(tmp_path / "streams.json"))
    program = model(loaded)
    assert len(program.items.depends) == 2
    assert steady(program) == pytest.approx(500 * US, abs=US)
    free = by_change(whatif(loaded))["without stream waits"]
    assert sum(free.saving_seconds_per_step) / 2 == pytest.approx(181e-6, abs=3e-6)


def test_a_full_queue_holds_the_host_back(tmp_path: Path) -> None:
    """2000 launches of 5 us for kernels of 20 us: the host may run at most 1024 launches ahead, replayed too."""
    builder = KinetoBuilder()
    starts: list[float] = []
    now, device = 0.0, 0.0
    for number in range(2000):
        if number >= 1024:
            now = max(now, starts[number - 1024] + 20)
        device = max(device + 1, now + LATENCY)
        starts.append(device)
        builder.launch("kernel", now, device, device + 20, call_us=CALL)
        now, device = now + 5, device + 20
    builder.step(0, 0, now)
    program = model(trace.load(builder.write(tmp_path / "full.json")))
    assert replay(program).done_ns[-1] == pytest.approx(program.traced_ns, rel=0.01)


def test_a_replay_that_misses_gives_no_estimate(tmp_path: Path) -> None:
    """Kernels that wait for something that the trace does not show, such as another process on the device."""
    builder = KinetoBuilder()
    for number in range(20):
        start = number * 500.0
        builder.launch("kernel", start, start + 300, start + 310)
        builder.call("cudaStreamSynchronize", start + 10, start + 315)
    builder.step(0, 0, 10_000)
    found = whatif(trace.load(builder.write(tmp_path / "hidden.json")))
    assert found is not None
    assert found.error is not None
    assert abs(found.error) > LIMIT
    assert found.estimates == []
    assert "cannot be told" in found.refused


def test_a_trace_without_launches_is_refused_in_one_sentence(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.launch("kernel", 10, 15, 20)
    builder.on_device("kernel", "orphan", 30, 40, 77)
    loaded = trace.load(builder.write(tmp_path / "orphan.json"))
    with pytest.raises(CannotReplayError, match="launches of 1 of 2"):
        model(loaded)
    found = whatif(loaded)
    assert found is not None
    assert found.estimates == []
    assert "1 of 2" in found.refused


def test_a_trace_of_a_cpu_has_no_replay(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 10, 90)
    assert whatif(trace.load(builder.write(tmp_path / "cpu.json"))) is None


def test_host_time_is_scaled_to_the_unprofiled_step(tmp_path: Path) -> None:
    loaded = reading(tmp_path, kernel=10, work=400)
    found = whatif(loaded, unprofiled_seconds=226e-6)
    assert found is not None
    assert found.host_scale == pytest.approx(0.5, abs=0.02)
    assert found.baseline_seconds == pytest.approx(226e-6, rel=0.01)
    assert msgspec.json.decode(msgspec.json.encode(found), type=WhatIf) == found


def phased(tmp_path: Path) -> trace.Trace:
    """A host-bound step with four launches and a read in phase 1, which nothing else waits for."""
    builder = KinetoBuilder()
    now = 0.0
    for step in range(3):
        start = now
        builder.launch("before", start + 100, start + 105, start + 115)
        begin = start + 150
        for number in range(4):
            builder.launch("small", begin + 10 + 50 * number, begin + 15 + 50 * number, begin + 25 + 50 * number)
        now = read_item(builder, begin + 170, begin + 175)
        builder.annotation("kernbench.phase1:block.norm", begin, now)
        now += 300
        builder.step(step, start, now)
    return trace.load(builder.write(tmp_path / "phased.json"))


def test_a_phase_is_foretold_from_its_reads_gone_to_one_launch_for_all(tmp_path: Path) -> None:
    loaded = phased(tmp_path)
    found = with_phases(whatif(loaded), loaded, None, None, None)
    assert found is not None
    (estimate,) = [row for row in found.estimates if row.change == "phase"]
    low, high = estimate.saving_seconds_per_step
    assert (estimate.phase, estimate.title) == (1, "phase 1")
    named = with_phases(whatif(loaded), loaded, None, None, None, titles={1: "fused norm", 2: "other"})
    assert named is not None
    assert [row.title for row in named.estimates if row.change == "phase"] == ["phase 1, fused norm"]
    # The read takes 16 from its start to its end. Three of four launches take 4 each, with 46 before each of them.
    assert low == pytest.approx(16e-6, abs=1e-6)
    assert high == pytest.approx((16 + 3 * 50) * 1e-6, abs=2e-6)


def test_an_experiment_shows_the_replay_beside_the_promise_of_the_phase(tmp_path: Path) -> None:
    loaded = phased(tmp_path)
    phase = Phase(number=1, title="norm", swaps=(), predicts="Faster.")
    before = report_records.profile(
        analysis=TraceAnalysis(whatif=with_phases(whatif(loaded), loaded, None, None, None))
    )
    predicted = experiment._predict(phase, before)
    step = steady(model(loaded)) / 1e9
    assert predicted.replayed == pytest.approx((step / (step - 16e-6), step / (step - 166e-6)), rel=0.01)
    assert (predicted.ratio_low, predicted.ratio_high) == predicted.replayed
    promising = Phase(
        number=1,
        title="norm",
        swaps=(),
        predicts="Faster.",
        predict=lambda before: Prediction(text="Faster.", ratio_low=1.0, ratio_high=1.5),
    )
    kept = experiment._predict(promising, before)
    assert (kept.ratio_low, kept.ratio_high) == (1.0, 1.5)
    assert kept.replayed == predicted.replayed
    other = Phase(number=2, title="other", swaps=(), predicts="Faster.")
    assert experiment._predict(other, before).replayed is None


def test_recorded_stream_waits_hold_a_stream_back_for_the_work_before_the_record(tmp_path: Path) -> None:
    """The side stream waits for the first of two kernels, launched before the record, and not for the second."""
    builder = KinetoBuilder()
    for step in range(2):
        start = step * 800.0
        builder.step(step, start, start + 800)
        builder.launch("first", start + 10, start + 15, start + 115)
        recorded = builder.call("cudaEventRecord", start + 15, start + 16)
        builder.launch("second", start + 20, start + 116, start + 616)
        builder.stream_wait(start + 26, 9, 7, recorded)
        builder.launch("side", start + 30, start + 116, start + 166, stream=9)
        builder.call("cudaDeviceSynchronize", start + 700, start + 703)
    program = model(trace.load(builder.write(tmp_path / "waits.json")))
    assert {item: [back for back, _ in edges] for item, edges in program.items.depends.items()} == {2: [2], 5: [2]}
    assert steady(program) == pytest.approx(800 * US, abs=US)


def test_blocking_copies_of_amd_wait_for_themselves(tmp_path: Path) -> None:
    """``hipMemcpyWithStream`` copies and waits in one call; without it 100 of host and 4 of the launch remain."""
    builder = KinetoBuilder()
    for step in range(3):
        start = step * 330.0
        builder.step(step, start, start + 330)
        correlation = builder.call("hipLaunchKernel", start + 100, start + 104)
        builder.on_device("kernel", "kernel", start + 110, start + 310, correlation)
        builder.op("aten::item", start + 104, start + 330)
        builder.op("aten::_local_scalar_dense", start + 104, start + 330)
        copy = builder.call("hipMemcpyWithStream", start + 105, start + 329)
        builder.on_device("gpu_memcpy", "CopyDeviceToHost", start + 311, start + 313, copy)
    loaded = trace.load(builder.write(tmp_path / "amd.json"))
    assert steady(model(loaded)) == pytest.approx(330 * US, abs=US)
    saved = by_change(whatif(loaded))["without stall"].saving_seconds_per_step
    assert saved == pytest.approx([130e-6, 130e-6], abs=2e-6), "200 of the kernel bound the step then"
