"""The critical path of traces with planted dependencies. Times in the traces are in microseconds."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kineto_builder import AUTOGRAD, KinetoBuilder

from kernbench.analysis import criticalpath, windows
from kernbench.record import LineLog, PathPart, SourceLine
from kernbench.traces import trace

US = 1e-6


def path(tmp_path: Path, builder: KinetoBuilder, lines: LineLog | None = None) -> list[PathPart]:
    loaded = trace.load(builder.write(tmp_path / "trace.json"))
    found = criticalpath.critical_path(loaded, lines, limit=10_000)
    whole = sum(part.seconds_per_step for part in found)
    assert whole == pytest.approx(windows.step_windows(loaded).mean_ns / 1e9, abs=1e-12)
    return found


def spent(found: list[PathPart]) -> dict[tuple[str, str], float]:
    return {(part.kind, part.name): round(part.seconds_per_step / US, 6) for part in found}


def test_a_busy_device_is_the_path(tmp_path: Path) -> None:
    """All is launched early; only the first launch and the kernels count, and the host's operators do not."""
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 0, 10)
    builder.launch("first", 2, 8, 508)
    builder.op("aten::add", 20, 90)
    builder.launch("second", 30, 510, 810)
    assert spent(path(tmp_path, builder)) == {
        ("kernel", "first"): 500,
        ("kernel", "second"): 300,
        ("idle", "between queued kernels"): 2,
        ("launch", "cudaLaunchKernel"): 6,
        ("host", "aten::mm"): 2,
    }


def test_a_late_host_is_the_path(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 340)
    builder.op("aten::mm", 0, 30)
    builder.launch("first", 10, 15, 25)
    builder.op("aten::add", 200, 330)
    builder.launch("second", 300, 305, 345)
    assert spent(path(tmp_path, builder)) == {
        ("kernel", "second"): 40,
        ("launch", "cudaLaunchKernel"): 5,
        ("host", "aten::add"): 100,
        ("host", "Python between operators"): 170,
        ("host", "aten::mm"): 30,
    }


def test_a_wait_leads_back_to_the_device(tmp_path: Path) -> None:
    """What was launched during the first kernel is not on the path, but what the host did after its return is."""
    builder = KinetoBuilder()
    builder.step(0, 0, 500)
    builder.launch("first", 0, 10, 210)
    builder.op("aten::item", 20, 220)
    copy = builder.call("cudaMemcpyAsync", 22, 26)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 212, 214, copy)
    builder.call("cudaStreamSynchronize", 27, 218)
    builder.op("aten::add", 250, 340)
    builder.launch("second", 300, 310, 500)
    found = path(tmp_path, builder)
    assert spent(found) == {
        ("kernel", "second"): 190,
        ("launch", "cudaLaunchKernel"): 10 + 10,
        ("host", "aten::add"): 50,
        ("host", "Python between operators"): 30,
        ("host", "aten::item"): 2,
        ("sync", "aten::item"): 4,
        ("copy", "Memcpy DtoH (Device -> Pinned)"): 2,
        ("idle", "between queued kernels"): 2,
        ("kernel", "first"): 200,
    }
    assert [part.count_per_step for part in found if part.kind == "launch"] == [2]


def test_a_wait_for_nothing_is_the_hosts_own(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 300)
    builder.launch("first", 0, 10, 20)
    builder.call("cudaDeviceSynchronize", 100, 130)
    builder.launch("second", 200, 210, 300)
    found = spent(path(tmp_path, builder))
    assert found["sync", "cudaDeviceSynchronize"] == 30
    assert ("kernel", "first") not in found


def test_another_stream_that_is_waited_for_is_on_the_path(tmp_path: Path) -> None:
    """The kernel was queued early; it began as the collective in the other stream ended."""
    builder = KinetoBuilder()
    builder.step(0, 0, 500)
    builder.launch("gemm", 0, 10, 100)
    builder.launch("ncclDevKernel_AllReduce_Sum_f32", 10, 20, 400, stream=20)
    builder.launch("update", 20, 402, 500)
    assert spent(path(tmp_path, builder)) == {
        ("kernel", "update"): 98,
        ("idle", "between queued kernels"): 2,
        ("communication", "ncclDevKernel_AllReduce_Sum_f32"): 380,
        ("launch", "cudaLaunchKernel"): 10,
        ("host", "cudaLaunchKernel"): 4,
        ("host", "Python between operators"): 6,
    }


def test_the_engines_thread_counts_while_the_steps_thread_waits_for_it(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 340)
    builder.op("aten::mul", 0, 100, sequence=3)
    node = "autograd::engine::evaluate_function: MulBackward0"
    builder.op(node, 120, 320, AUTOGRAD, sequence=3, backward=True)
    builder.launch("backward", 310, 315, 340, tid=AUTOGRAD)
    here = SourceLine(file="model.py", line=7, text="y = x * a")
    log = LineLog(steps=1, lines=[here], op_lines={"aten::mul": [0]})
    found = path(tmp_path, builder, log)
    assert spent(found) == {
        ("kernel", "backward"): 25,
        ("launch", "cudaLaunchKernel"): 5,
        ("host", "MulBackward0"): 190,
        ("host", "Python between operators"): 20,
        ("host", "aten::mul"): 100,
    }
    assert {part.name: part.source for part in found if part.kind == "host"}["MulBackward0"] == here


def test_time_outside_operators_has_its_annotation(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 400)
    builder.annotation("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 250)
    builder.op("aten::stack", 100, 150)
    builder.op("aten::mm", 300, 330)
    builder.launch("gemm", 310, 315, 400)
    assert spent(path(tmp_path, builder)) == {
        ("kernel", "gemm"): 85,
        ("launch", "cudaLaunchKernel"): 5,
        ("host", "aten::mm"): 10,
        ("host", "Python between operators"): 50,
        ("host", "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"): 200,
        ("host", "aten::stack"): 50,
    }


def test_steps_are_averaged(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        begin = step * 1000
        builder.step(step, begin, begin + 1000)
        builder.launch("gemm", begin, begin + 10, begin + 510 + 200 * step)
    found = path(tmp_path, builder)
    # Both end with the host's own time after the kernel, so all of it is the host's.
    assert spent(found) == {("host", "Python between operators"): 996, ("host", "cudaLaunchKernel"): 4}


def test_a_graphs_kernels_follow_one_another(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    launch = builder.call("cudaGraphLaunch", 10, 30)
    for number in range(5):
        builder.on_device("kernel", "node", 40 + 20 * number, 59 + 20 * number, launch)
    assert spent(path(tmp_path, builder)) == {
        ("kernel", "node"): 95,
        ("idle", "between queued kernels"): 4,
        ("launch", "cudaGraphLaunch"): 30,
        ("host", "Python between operators"): 10,
    }


def test_neither_a_cpu_nor_a_device_alone_has_a_path(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::mm", 0, 100)
    assert path_of(tmp_path, builder) == []
    builder = KinetoBuilder()
    builder.on_device("kernel", "gemm", 0, 10, 1)
    assert path_of(tmp_path, builder) == []


def path_of(tmp_path: Path, builder: KinetoBuilder) -> list[PathPart]:
    return criticalpath.critical_path(trace.load(builder.write(tmp_path / "trace.json")), None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.integers(-3, 60),
            st.integers(0, 80),
            st.integers(7, 9),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_parts_add_up_whatever_happens(tmp_path: Path, works: list[tuple[int, int, int, int, bool, bool]]) -> None:
    """Overlapping, empty and out of order: the walk ends, and every nanosecond of the step is in one part."""
    builder = KinetoBuilder()
    for step in range(2):
        begin = step * 300
        builder.step(step, begin, begin + 300)
    for start, delay, length, stream, waits, backward in works:
        tid = AUTOGRAD if backward else 100
        builder.launch("kernel", start, start + delay, start + delay + length, stream=stream, tid=tid)
        if waits:
            builder.call("cudaStreamSynchronize", start + 5, start + 5 + length, tid)
    path(tmp_path, builder)
