"""Analyses of GPU traces with planted kernels, waits and gaps. All times in the traces are in microseconds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kineto_builder import AUTOGRAD, KinetoBuilder

from kernbench.analysis import breakdown, findings, hotspots, idle, launches, stalls, timeline
from kernbench.analysis.intervals import Intervals, union
from kernbench.record import HostRead, LineLog, SourceLine
from kernbench.traces import trace
from kernbench.traces.nesting import Ints

US = 1e-6
NO_LINE = SourceLine(file="model.py", line=1, text="pass")


def causes(loaded: trace.Trace) -> dict[str, float]:
    found = idle.idle(loaded)
    assert found is not None
    assert sum(found.causes.values()) == pytest.approx(found.idle_seconds_per_step, abs=1e-12)
    return {name: round(seconds / US, 6) for name, seconds in found.causes.items()}


def one_step(tmp_path: Path, builder: KinetoBuilder, end: float = 1000) -> trace.Trace:
    builder.step(0, 0, end)
    return trace.load(builder.write(tmp_path / "trace.json"))


def reading_step(builder: KinetoBuilder, start: float) -> None:
    """A kernel, a read of its result that drains the device, 100 us of host work, and another kernel."""
    builder.launch("first", start + 10, start + 20, start + 220)
    builder.op("aten::item", start + 30, start + 240)
    builder.op("aten::_local_scalar_dense", start + 31, start + 239)
    copy = builder.call("cudaMemcpyAsync", start + 32, start + 36)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 222, start + 224, copy)
    builder.call("cudaStreamSynchronize", start + 37, start + 234)
    builder.launch("second", start + 334, start + 340, start + 390)


@pytest.fixture
def two_reading_steps(tmp_path: Path) -> trace.Trace:
    builder = KinetoBuilder()
    for step in range(2):
        builder.step(step, step * 400, step * 400 + 400)
        reading_step(builder, step * 400)
    return trace.load(builder.write(tmp_path / "reading.json"))


def test_idle_is_exact_and_its_causes_add_up(two_reading_steps: trace.Trace) -> None:
    found = idle.idle(two_reading_steps)
    assert found is not None
    assert found.busy_seconds_per_step == pytest.approx(252 * US)
    assert found.idle_seconds_per_step == pytest.approx(148 * US)
    # 110 from the drained copy to the next launch, less than the wait; launches take 10 and 6, and 2 pass between the
    # first kernel and the queued copy. The 20 between the steps end with a launch 76 after the one before; the 10
    # before the first launch of all and the 10 after the last kernel are the host's.
    assert causes(two_reading_steps) == {"host": 10, "launch-bound": 10, "sync": 110, "launch": 18}


def test_host_bound_gaps_are_the_hosts(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 10)
    builder.launch("second", 300, 305, 310)
    assert causes(one_step(tmp_path, builder, end=310)) == {"host": 290, "launch": 10}


def test_a_sync_that_came_too_late_costs_only_its_own_time(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 10)
    builder.call("cudaDeviceSynchronize", 100, 130)
    builder.launch("second", 300, 305, 310)
    assert causes(one_step(tmp_path, builder, end=310)) == {"sync": 30, "host": 260, "launch": 10}


def test_a_sync_is_to_blame_for_no_more_than_the_host_waited(tmp_path: Path) -> None:
    """Without its 18 us in the read the host would come back 18 us earlier, and still be 282 us late."""
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 30)
    builder.op("aten::item", 12, 40)
    copy = builder.call("cudaMemcpyAsync", 14, 18)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 30, 32, copy)
    builder.call("cudaStreamSynchronize", 20, 38)
    builder.launch("second", 332, 337, 350)
    loaded = one_step(tmp_path, builder, end=350)
    assert causes(loaded) == {"sync": 18, "host": 282, "launch": 10}
    found = {(site.cause, site.op): round(site.seconds_per_step / US, 6) for site in idle.sites(loaded, None)}
    assert found == {
        ("host", "cudaLaunchKernel"): 282,
        ("sync", "aten::item"): 18,
        ("launch", "cudaLaunchKernel"): 10,
    }


def test_waiting_for_a_batch_comes_before_the_read_that_drained_the_device(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 200)
    builder.call("cudaStreamSynchronize", 10, 205)
    builder.annotation("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 210, 510)
    builder.launch("second", 540, 545, 600)
    loaded = one_step(tmp_path, builder, end=600)
    assert causes(loaded) == {"sync": 40, "data loading": 300, "launch": 10}
    assert idle.sites(loaded, None)[0].op == "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


def test_a_data_loader_of_another_thread_is_nobodys_wait(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 10)
    builder.annotation("load_batch", 0, 500, tid=300)
    builder.annotation("dist", 20, 480)
    builder.op("c10d::barrier", 40, 140)
    builder.launch("second", 540, 545, 600)
    assert causes(one_step(tmp_path, builder, end=600)) == {"communication": 100, "host": 430, "launch": 10}


def test_a_release_of_memory_is_the_allocators_with_the_wait_before_it(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 200)
    builder.op("aten::empty", 8, 260)
    builder.call("cudaDeviceSynchronize", 10, 205)
    builder.call("cudaFree", 206, 230)
    builder.call("cudaMalloc", 232, 255)
    builder.launch("second", 270, 275, 300)
    loaded = one_step(tmp_path, builder, end=300)
    assert causes(loaded) == {"allocation": 70, "launch": 10}
    assert idle.sites(loaded, None)[0].op == "aten::empty"


def test_allocation_slow_launches_and_queues_are_told_apart(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 10)
    builder.call("cudaMalloc", 20, 70)
    builder.launch("loaded from disk", 100, 195, 200, call_us=90)
    builder.launch("waits for an event", 120, 400, 410, stream=8)
    expected = {"launch": 5, "allocation": 50, "launch-bound": 40, "slow launch": 95, "queued": 200}
    assert causes(one_step(tmp_path, builder, end=410)) == expected


def test_a_trace_of_the_device_alone_does_not_guess_causes(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.on_device("kernel", "gemm", 0, 10, 1)
    builder.on_device("kernel", "gemm", 20, 30, 2)
    loaded = trace.load(builder.write(tmp_path / "device.json"))
    assert causes(loaded) == {"unknown": 10}
    assert hotspots.hotspots(loaded, None)[0].calls_per_step == 2
    assert stalls.stalls(loaded, None) == []


def test_overlapping_streams_are_busy_once(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("gemm", 0, 5, 105)
    builder.launch("ncclDevKernel_AllReduce", 2, 55, 155, stream=20)
    loaded = one_step(tmp_path, builder, end=155)
    found = idle.idle(loaded)
    assert found is not None
    assert found.busy_seconds_per_step == pytest.approx(150 * US)
    parts = {part.cause: part.seconds_per_step / US for part in breakdown.breakdown(loaded, 155 * US)}
    assert parts == pytest.approx({"matrix product": 100, "communication": 50, "idle: launch": 5})


def test_work_of_a_late_device_counts_in_its_own_step(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(3):
        builder.step(step, step * 50, step * 50 + 50)
        builder.launch("long", step * 50, 10 + step * 200, 210 + step * 200)
    loaded = trace.load(builder.write(tmp_path / "late.json"))
    windows = idle.step_windows(loaded)
    assert windows.start.tolist() == [0, 210_000, 410_000]
    assert windows.end.tolist() == [210_000, 410_000, 610_000]
    found = idle.idle(loaded)
    assert found is not None
    assert found.busy_seconds_per_step == pytest.approx(200 * US)


def test_breakdown_adds_up_to_the_unprofiled_step_and_says_how(two_reading_steps: trace.Trace) -> None:
    for step_seconds in (400 * US, 300 * US, 500 * US, 100 * US):
        parts = breakdown.breakdown(two_reading_steps, step_seconds)
        assert sum(part.seconds_per_step for part in parts) == pytest.approx(step_seconds, rel=1e-12)
        assert all(part.seconds_per_step > 0 for part in parts)
        assert all(f"{400 * US / step_seconds:.2f} x" in part.description for part in parts)
    shorter = {part.cause: part for part in breakdown.breakdown(two_reading_steps, 300 * US)}
    assert shorter["copy"].seconds_per_step == pytest.approx(2 * US), "busy time is not scaled"
    assert shorter["idle: sync"].seconds_per_step == pytest.approx(110 * US * 48 / 148)
    assert not shorter["idle: sync"].busy


def test_a_breakdown_without_an_unprofiled_step_says_nothing_of_one(two_reading_steps: trace.Trace) -> None:
    parts = breakdown.breakdown(two_reading_steps)
    assert sum(part.seconds_per_step for part in parts) == pytest.approx(400 * US, rel=1e-12)
    assert not [part.description for part in parts if "profiled" in part.description]


def test_launches_count_kernels_copies_and_memsets(two_reading_steps: trace.Trace) -> None:
    found = launches.launches(two_reading_steps)
    assert (found.per_step, found.kernels_per_step, found.copies_per_step, found.memsets_per_step) == (3, 2, 1, 0)
    assert found.median_seconds == pytest.approx(125 * US)
    assert found.short_share == 0


def test_hotspots_rank_kernels_by_own_time(two_reading_steps: trace.Trace) -> None:
    found = hotspots.hotspots(two_reading_steps, None)
    assert [hotspot.name for hotspot in found] == ["first", "second", "Memcpy DtoH (Device -> Pinned)"]
    assert [hotspot.kind for hotspot in found] == ["kernel", "kernel", "copy"]
    assert found[0].self_seconds_per_step == pytest.approx(200 * US)
    assert sum(hotspot.share for hotspot in found) == pytest.approx(1)
    assert found[2].op == "aten::_local_scalar_dense"
    assert len(hotspots.hotspots(two_reading_steps, None, limit=1)) == 1


def test_a_hotspot_names_the_line_that_costs_most(tmp_path: Path) -> None:
    """Three calls of one kernel from two lines, and its backward, which counts for the forward line."""
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    for number, (start, length) in enumerate(((10, 5), (20, 5), (30, 40))):
        builder.op("aten::mul", start, start + 8, sequence=number)
        builder.launch("mul_kernel", start + 1, 100 + number * 50, 100 + number * 50 + length)
    builder.op("MulBackward0", 300, 320, AUTOGRAD, sequence=1, backward=True)
    builder.op("aten::mul", 301, 310, AUTOGRAD)
    builder.launch("mul_kernel", 302, 400, 500, tid=AUTOGRAD)
    loaded = trace.load(builder.write(tmp_path / "lines.json"))
    places = [SourceLine(file="model.py", line=line, text=f"line {line}") for line in (11, 12, 13)]
    log = LineLog(steps=1, lines=places, op_lines={"aten::mul": [0, 1, 2, -1]})
    (found,) = hotspots.hotspots(loaded, log)
    assert found.source == places[1], "5 us forward and 100 us backward, against 40 us for line 13"
    assert found.calls_per_step == 4
    forward_only = LineLog(steps=1, lines=places, op_lines={"aten.mul.Tensor": [0, 1, 2]})
    assert hotspots.hotspots(loaded, forward_only)[0].source == places[1]
    disagreeing = LineLog(steps=1, lines=places, op_lines={"aten::mul": [0, 2, 2, 1, 2, 0]})
    assert hotspots.hotspots(loaded, disagreeing)[0].source == places[2], "the most frequent line stands in"
    unknown = LineLog(steps=1, lines=places, op_lines={"aten::add": [0]})
    assert hotspots.hotspots(loaded, unknown)[0].source is None


def test_a_hotspot_carries_its_phase(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.annotation("kernbench.phase3:block.norm", 5, 60)
    builder.annotation("kernbench.phase3:block.norm", 100, 160)
    builder.launch("norm", 10, 20, 30)
    builder.launch("other", 70, 80, 90)
    phases = {hotspot.name: hotspot.phase for hotspot in hotspots.hotspots(one_step(tmp_path, builder), None)}
    assert phases == {"norm": 3, "other": None}


def test_kernels_of_an_optimizer_step_are_the_optimizers(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.annotation("Optimizer.step#AdamW.step", 5, 60)
    builder.launch("vectorized_elementwise_kernel", 10, 20, 30)
    builder.launch("vectorized_elementwise_kernel", 70, 80, 90)
    parts = {part.cause: part.seconds_per_step / US for part in breakdown.breakdown(one_step(tmp_path, builder), 1e-3)}
    assert parts["optimizer"] == parts["elementwise"] == pytest.approx(10)


def read(line: int, op: str = "aten::item", *, step: int = 0, real: bool = True) -> HostRead:
    return HostRead(step=step, line=line, op=op, form="item", host_tensor=not real, real=real)


def test_waits_are_matched_to_lines_and_classified(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    reading_step(builder, 0)  # drains the device
    builder.op("aten::nonzero", 500, 540)
    builder.call("cudaStreamSynchronize", 510, 530)  # nothing was left to wait for
    builder.launch("long", 600, 610, 700)
    builder.call("cudaEventSynchronize", 620, 705)
    builder.launch("next", 708, 712, 720)
    builder.op("aten::item", 800, 806)
    builder.call("cudaStreamSynchronize", 801, 804)
    loaded = trace.load(builder.write(tmp_path / "waits.json"))
    places = [SourceLine(file="model.py", line=line, text=f"line {line}", function="step") for line in range(5)]
    reads = [read(0), read(1, "aten::nonzero"), read(2, "torch.cuda.synchronize"), read(3), read(4, real=False)]
    found = stalls.stalls(loaded, LineLog(steps=1, lines=places, reads=reads))
    assert [(stall.line, stall.klass, stall.real) for stall in found] == [
        (0, "drain", True),
        (2, "busy", True),
        (1, "starved", True),
        (3, "free", True),
        (4, "cpu-tensor", False),
    ]
    assert [stall.wait_seconds_per_step for stall in found[:4]] == pytest.approx([197 * US, 85 * US, 20 * US, 3 * US])
    assert found[4].wait_seconds_per_step is None


def test_waits_that_cannot_be_matched_stay_unclassified(two_reading_steps: trace.Trace) -> None:
    log = LineLog(steps=1, lines=[NO_LINE], reads=[read(0), read(0), read(0)])
    (found,) = stalls.stalls(two_reading_steps, log)
    assert (found.klass, found.real, found.wait_seconds_per_step) == ("unclassified", True, None)


def test_waits_match_per_operator_where_the_totals_differ(two_reading_steps: trace.Trace) -> None:
    """The log saw a wait that the trace did not have; the reads of items still line up."""
    log = LineLog(steps=1, lines=[NO_LINE, NO_LINE], reads=[read(1, "aten::nonzero"), read(0)])
    classes = {stall.op: stall.klass for stall in stalls.stalls(two_reading_steps, log)}
    assert classes == {"aten::item": "drain", "aten::nonzero": "unclassified"}


def test_the_match_rate_counts_waits_that_found_their_line(two_reading_steps: trace.Trace) -> None:
    def rate(reads: list[HostRead]) -> tuple[float, float]:
        found = stalls.line_match(two_reading_steps, LineLog(steps=1, lines=[NO_LINE], reads=reads))
        assert found is not None
        return found.waits_per_step, found.matched_per_step

    assert rate([read(0)]) == (1, 1)
    assert rate([read(0), read(0)]) == (1, 0)
    assert rate([]) == (1, 0)


def test_a_step_that_waits_for_nothing_has_no_match_rate(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.launch("first", 0, 5, 10)
    assert stalls.line_match(one_step(tmp_path, builder), LineLog(steps=1)) is None


def test_threads_are_told_apart(tmp_path: Path) -> None:
    """The steps' thread reads once, a worker twice: by order alone, the worker's first wait would be the step's."""
    builder = KinetoBuilder()
    builder.op("aten::add", 0, 4)
    builder.launch("first", 1, 5, 100)
    builder.launch("copies ahead", 2, 5, 10, tid=300, stream=8)
    for start in (8, 60):
        builder.op("aten::item", start, start + 20, 300)
        builder.call("cudaStreamSynchronize", start + 1, start + 19, 300)
    builder.op("aten::item", 30, 120)
    builder.call("cudaStreamSynchronize", 31, 110)
    loaded = one_step(tmp_path, builder)
    places = [SourceLine(file="model.py", line=line, text=f"line {line}") for line in (11, 22)]
    ahead = HostRead(step=0, line=1, op="aten::item", form="item", host_tensor=False, real=True, thread="Thread-1")
    log = LineLog(steps=1, lines=places, reads=[ahead, read(0), ahead])
    found = {stall.line: stall.wait_seconds_per_step for stall in stalls.stalls(loaded, log)}
    assert found == pytest.approx({11: 79 * US, 22: 36 * US})
    match = stalls.line_match(loaded, log)
    assert match is not None
    assert (match.waits_per_step, match.matched_per_step) == (3, 3)


def test_waits_of_a_trace_alone_are_listed_by_operator(two_reading_steps: trace.Trace) -> None:
    (found,) = stalls.stalls(two_reading_steps, None)
    assert (found.op, found.count_per_step, found.klass, found.file, found.line) == ("aten::item", 1, "drain", "", 0)
    assert found.wait_seconds_per_step == pytest.approx(197 * US)


def test_timeline_shows_the_median_step(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step, length in enumerate((900, 400, 500)):
        start = step * 1000
        builder.step(step, start, start + length)
        reading_step(builder, start)
    loaded = trace.load(builder.write(tmp_path / "three.json"))
    spans = timeline.timeline(loaded)
    assert {(span.track, span.kind) for span in spans} == {
        ("host", "op"),
        ("host", "launch"),
        ("host", "sync"),
        ("stream 7", "kernel"),
        ("stream 7", "copy"),
    }
    (wait,) = [span for span in spans if span.kind == "sync"]
    assert [wait.start_seconds, wait.duration_seconds] == pytest.approx([37 * US, 197 * US])
    assert all(span.start_seconds >= 0 and span.start_seconds + span.duration_seconds <= 500.001 * US for span in spans)


def test_timeline_merges_what_a_pixel_cannot_show_and_keeps_to_its_limit(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for number in range(3000):
        builder.launch(f"kernel {number}", number * 10, number * 10 + 5, number * 10 + 6)
    builder.launch("long", 30_000, 30_005, 45_000)
    spans = timeline.timeline(one_step(tmp_path, builder, end=45_000))
    kernels = [span for span in spans if span.kind == "kernel"]
    assert "in all" in kernels[0].name
    assert kernels[-1].name == "long"
    assert len(kernels) < 1500
    assert len(timeline.timeline(trace.load(tmp_path / "trace.json"), max_spans=50)) <= 50


def brute_force(start: Ints, end: Ints) -> set[int]:
    return {tick for first, last in zip(start, end, strict=True) for tick in range(first, last)}


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12),
    st.integers(-5, 80),
    st.integers(0, 40),
)
def test_interval_sets_agree_with_counting(
    first: list[tuple[int, int]], second: list[tuple[int, int]], begin: int, length: int
) -> None:
    def made(pairs: list[tuple[int, int]]) -> tuple[Intervals, set[int]]:
        start = np.array([pair[0] for pair in pairs], np.int64)
        end = start + np.array([pair[1] for pair in pairs], np.int64)
        return union(start, end), brute_force(start, end)

    (one, ticks), (two, others) = made(first), made(second)
    assert brute_force(one.start, one.end) == ticks
    assert np.all(one.start[1:] > one.end[:-1]), "disjoint, ascending, touching ones merged"
    window = set(range(begin, begin + length))
    assert one.covered(np.array([begin]), np.array([begin + length]))[0] == len(ticks & window)
    gaps = one.gaps(begin, begin + length)
    assert brute_force(gaps.start, gaps.end) == window - ticks
    for found, expected in ((one.without(two), ticks - others), (one.within(two), ticks & others)):
        assert brute_force(found.start, found.end) == expected


_TIME = st.integers(0, 500)
_EVENT = st.tuples(
    st.sampled_from(
        ["launch", "orphan", "lost", "sync", "malloc", "op", "step", "copy", "phase", "loader", "wait", "free"]
    ),
    _TIME,
    st.integers(0, 80),
    st.integers(0, 100),
    st.sampled_from([7, 20]),
    st.sampled_from([100, AUTOGRAD]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(_EVENT, min_size=1, max_size=25))
def test_any_trace_is_analysed_and_everything_adds_up(
    tmp_path: Path, events: list[tuple[str, int, int, int, int, int]]
) -> None:
    builder = KinetoBuilder(offset_us=0)
    builder.op("aten::add", 0, 1)
    if not {"launch", "orphan", "copy"} & {event[0] for event in events}:
        # Launches that all lost their kernels are refused when the file is read, and have a test there.
        events = [event for event in events if event[0] != "lost"]
    for number, (what, start, length, delay, stream, tid) in enumerate(events):
        end = start + length
        if what == "launch":
            builder.launch(
                f"gemm {number % 3}", start, end + delay, end + 2 * delay, stream=stream, tid=tid, call_us=length
            )
        elif what == "orphan":
            builder.on_device("kernel", "reduce_kernel", start, end, 10_000 + number, stream)
        elif what == "copy":
            call = builder.call("cudaMemcpyAsync", start, end, tid)
            builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", start, end + delay, call, stream)
        elif what == "op":
            builder.op(f"aten::mul{number % 4}", start, end, tid, sequence=delay % 4, backward=delay % 2 == 1)
        elif what == "step":
            builder.step(number, start, end)
        elif what == "loader":
            builder.annotation("load_batch", start, end, tid)
        elif what == "phase":
            builder.annotation(f"kernbench.phase{number % 3}:site", start, end, tid)
        else:
            calls = {
                "lost": "cudaLaunchKernel",
                "sync": "cudaStreamSynchronize",
                "malloc": "cudaMalloc",
                "wait": "cudaStreamWaitEvent",
                "free": "cudaFree",
            }
            builder.call(calls[what], start, end, tid)
    loaded = trace.load(builder.write(tmp_path / "any.json"))
    log = LineLog(steps=1, lines=[NO_LINE], reads=[read(0)], op_lines={"aten::mul1": [0], "aten::mul2": [0, -1]})
    window = idle.step_windows(loaded).mean_ns / 1e9
    found = idle.idle(loaded)
    if found is not None:
        assert sum(found.causes.values()) == pytest.approx(found.idle_seconds_per_step, abs=1e-12)
        assert found.busy_seconds_per_step + found.idle_seconds_per_step == pytest.approx(window, abs=1e-12)
        assert found.idle_seconds_per_step >= 0
    if window:
        parts = breakdown.breakdown(loaded, 1e-3)
        assert sum(part.seconds_per_step for part in parts) == pytest.approx(1e-3)
        assert all(part.seconds_per_step >= 0 for part in parts)
    # Operators of a CPU run in several threads at once; shares are of the step.
    whole = 1 + 1e-9 if loaded.on_gpu else len(loaded.threads) + 1e-9
    assert sum(hotspot.share for hotspot in hotspots.hotspots(loaded, log)) <= whole
    assert launches.launches(loaded).per_step >= 0
    assert all(stall.count_per_step > 0 for stall in stalls.stalls(loaded, log))
    assert all(span.duration_seconds >= 0 for span in timeline.timeline(loaded))
    for rows in hotspots.views(loaded, log).values():
        assert sum(row.share for row in rows) <= whole
    everywhere = sum(site.seconds_per_step for site in idle.sites(loaded, log, limit=1000))
    assert everywhere == pytest.approx(found.idle_seconds_per_step if found is not None else 0, abs=1e-12)
    ahead = launches.gaps(loaded)
    assert ahead is None or ahead.depth is None or 0 <= ahead.depth[0] <= ahead.depth[1]
    match = stalls.line_match(loaded, log)
    assert match is None or 0 <= match.matched_per_step <= match.waits_per_step
    for with_lines in (None, log):
        told = findings.findings(loaded, lines=with_lines)
        assert all(0 <= one.share <= 1 and one.sentence.endswith(".") for one in told)
        assert findings.headline(loaded, told)
