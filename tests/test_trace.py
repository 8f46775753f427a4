import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kineto_builder import AUTOGRAD, KinetoBuilder

from kernbench.errors import KernbenchError
from kernbench.traces import trace
from kernbench.traces.nesting import ANNOTATION, CALL, OP, Ints
from kernbench.traces.trace import COPY, KERNEL


def names(loaded: trace.Trace, column: Ints) -> list[str]:
    return [loaded.names[number] if number >= 0 else "" for number in column.tolist()]


def row_of(loaded: trace.Trace, name: str) -> int:
    return next(row for row in range(len(loaded.host)) if loaded.names[loaded.host.name[row]] == name)


@pytest.fixture
def nested(tmp_path: Path) -> trace.Trace:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.annotation("kernbench.phase2:block.norm", 5, 60)
    builder.op("aten::linear", 10, 50, sequence=7)
    builder.op("aten::addmm", 15, 45, sequence=7)
    builder.op("aten::copy_", 20.5, 25)
    builder.launch("gemm", 30, 200, 230)
    builder.op("aten::relu", 70, 80)
    builder.op("autograd::engine::evaluate_function: AddmmBackward0", 82, 98, AUTOGRAD, sequence=7, backward=True)
    builder.op("aten::mm", 84, 90, AUTOGRAD)
    builder.launch("gemm_backward", 85, 230, 250, tid=AUTOGRAD)
    return trace.load(builder.write(tmp_path / "nested.json.gz"))


def test_operators_know_their_parent_and_own_time(nested: trace.Trace) -> None:
    host = nested.host
    parents = {nested.names[host.name[row]]: host.parent[row] for row in np.flatnonzero(host.kind == OP)}
    assert parents["aten::linear"] == -1
    assert parents["aten::addmm"] == row_of(nested, "aten::linear")
    assert parents["aten::copy_"] == row_of(nested, "aten::addmm")
    own = {nested.names[host.name[row]]: int(host.self_ns[row]) for row in np.flatnonzero(host.kind == OP)}
    assert own["aten::linear"] == 10_000
    assert own["aten::addmm"] == 25_500
    assert own["aten::copy_"] == 4_500


def test_kernels_know_their_launch_operator_phase_and_step(nested: trace.Trace) -> None:
    device = nested.device
    assert names(nested, device.name) == ["gemm", "gemm_backward"]
    assert names(nested, nested.host.name[device.op]) == ["aten::addmm", "aten::mm"]
    assert device.phase.tolist() == [2, 2], "the backward kernel belongs to the phase of its forward operator"
    assert device.step.tolist() == [0, 0], "launched in the step, though they ran after it"
    assert device.kind.tolist() == [KERNEL, KERNEL]


def test_backward_links_to_the_operator_that_made_the_node(nested: trace.Trace) -> None:
    host = nested.host
    linked = row_of(nested, "aten::mm")
    assert names(nested, host.name[host.forward[[linked]]]) == ["aten::addmm"]
    assert host.forward[row_of(nested, "aten::relu")] == -1


def test_device_events_belong_to_the_step_that_launched_them(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        builder.step(step, step * 100, step * 100 + 99)
        builder.launch(f"kernel{step}", step * 100 + 10, 150 + step * 50, 190 + step * 50)
    loaded = trace.load(builder.write(tmp_path / "late.json"))
    assert loaded.device.step.tolist() == [0, 1]


def test_profiler_steps_are_the_fallback_and_other_marks_are_ignored(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(4, 0, 50, marker="ProfilerStep#")
    builder.step(5, 50, 90, marker="ProfilerStep#")
    builder.op("aten::add", 10, 20)
    builder.op("aten::add", 60, 70)
    loaded = trace.load(builder.write(tmp_path / "fallback.json"))
    assert loaded.steps.marker == "ProfilerStep#"
    assert loaded.steps.number.tolist() == [4, 5]
    builder.step(0, 0, 30)
    assert trace.load(builder.write(tmp_path / "ours.json")).steps.number.tolist() == [0]


def test_a_trace_without_steps_counts_as_one(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::add", 10, 20)
    builder.launch("add", 12, 30, 45)
    loaded = trace.load(builder.write(tmp_path / "plain.json"))
    assert loaded.steps.marker == ""
    assert (loaded.steps.start_ns.tolist(), loaded.steps.end_ns.tolist()) == ([0], [35_000])
    assert loaded.device.step.tolist() == [0]


def test_steps_that_lost_their_kernels_are_not_counted(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(3):
        builder.step(step, step * 100, step * 100 + 99)
        builder.launch("whole", step * 100 + 10, step * 100 + 20, step * 100 + 30)
    builder.call("cudaLaunchKernel", 250, 255)
    builder.step(3, 300, 399)
    loaded = trace.load(builder.write(tmp_path / "cut.json"))
    assert loaded.steps.complete.tolist() == [True, True, False, False]
    assert loaded.counted.tolist() == [0, 1]


def test_the_profilers_own_synchronisation_is_left_out(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100, marker="ProfilerStep#")
    builder.call("cudaDeviceSynchronize", 5, 30)
    builder.op("aten::add", 40, 50)
    builder.launch("add", 42, 50, 60)
    builder.call("cudaDeviceSynchronize", 80, 99)
    loaded = trace.load(builder.write(tmp_path / "profiler.json"))
    assert len(loaded.sync_calls) == 0
    assert (loaded.steps.start_ns.tolist(), loaded.steps.end_ns.tolist()) == ([30_000], [80_000])


def test_the_programs_own_synchronisation_stays_in(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.launch("add", 2, 10, 60)
    builder.call("cudaDeviceSynchronize", 20, 65)
    loaded = trace.load(builder.write(tmp_path / "program.json"))
    assert names(loaded, loaded.host.name[loaded.sync_calls]) == ["cudaDeviceSynchronize"]


def test_waiting_calls_are_told_from_the_others(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.launch("work", 2, 10, 60)
    builder.call("cudaEventQuery", 20, 25)
    builder.call("cudaStreamWaitEvent", 25, 26)
    pageable = builder.call("cudaMemcpyAsync", 30, 70)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 60, 65, pageable, bytes=4)
    pinned = builder.call("cudaMemcpyAsync", 80, 84)
    builder.on_device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 90, 95, pinned)
    builder.call("cudaStreamSynchronize", 85, 99)
    builder.call("hipMemcpyWithStream", 100, 120)
    builder.call("cudaStreamSynchronize", 200, 900, tid=999)
    loaded = trace.load(builder.write(tmp_path / "waits.json"))
    assert names(loaded, loaded.host.name[loaded.sync_calls]) == [
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "hipMemcpyWithStream",
    ]
    assert loaded.device.bytes[loaded.device.kind == COPY].tolist() == [4, -1]


def test_device_side_synchronisation_events_are_kept(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::item", 0, 30)
    call = builder.call("cudaStreamSynchronize", 5, 25)
    builder.on_device("cuda_sync", "Stream Sync", 6, 24, call)
    builder.launch("later", 30, 40, 45)
    loaded = trace.load(builder.write(tmp_path / "sync.json"))
    assert names(loaded, loaded.device_syncs.name) == ["Stream Sync"]
    assert names(loaded, loaded.host.name[loaded.device_syncs.call]) == ["cudaStreamSynchronize"]
    assert len(loaded.device) == 1, "a synchronisation is no work of the device"


def test_kinds_of_host_rows(nested: trace.Trace) -> None:
    assert np.bincount(nested.host.kind, minlength=3)[[OP, CALL, ANNOTATION]].tolist() == [6, 2, 2]


def test_a_bare_list_of_events_and_numbers_that_are_none_load(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(
        '[{"ph":"X","cat":"cpu_op","name":"aten::add","pid":1,"tid":1,"ts":1,"dur":2},'
        '{"ph":"X","cat":"gpu_memcpy","name":"Memcpy","pid":0,"tid":7,"ts":5,"dur":0,"args":{"bandwidth": inf}}]'
    )
    loaded = trace.load(path)
    assert (len(loaded.host), len(loaded.device)) == (1, 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"not json", "no JSON"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "na', "cut off"),
        (b'{"kind": "profile"}', "no Kineto trace"),
        (b'{"traceEvents": 3}', "no Kineto trace"),
        (b"[1, 2]", "no Kineto trace"),
        (b"3", "no Kineto trace"),
        (b'{"traceEvents": []}', "no operator"),
        (b'{"traceEvents": [{"ph": "M", "name": "process_name"}]}', "no operator"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "\xff", "ts": 1}]}', "no JSON"),
        (b'{"traceEvents": [{"ph":"X","cat":"cpu_op","ts":1},{"ph":"X","cat":"cpu_op","ts":1e300}]}', "damaged"),
        (b'{"a":' * 100_000, "cut off"),
        (gzip.compress(b'{"traceEvents": []}' * 50, mtime=0)[:-20], "cut off"),
        (b"\x1f\x8b but not gzip", "damaged"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.json.gz"
    path.write_bytes(content)
    with pytest.raises(KernbenchError, match=says) as error:
        trace.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(KernbenchError, match="cannot read"):
            trace.load(path)


def test_truncation_at_any_point_is_an_error_or_a_trace(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.launch("kernel", 10, 20, 30)
    whole = builder.write(tmp_path / "whole.json.gz").read_bytes()
    path = tmp_path / "part.json.gz"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(KernbenchError):
            trace.load(path)


def test_a_large_trace_loads_fast(tmp_path: Path) -> None:
    """132 k events; the bound is ten times what an idle machine needs, so that only a changed complexity fails."""
    builder = KinetoBuilder()
    for step in range(33):
        builder.step(step, step * 10_000, step * 10_000 + 9_999)
        for number in range(1000):
            start = step * 10_000 + number * 10
            builder.op("aten::outer", start, start + 9)
            builder.op("aten::inner", start + 1, start + 8)
            builder.launch("kernel", start + 2, start + 30, start + 35)
    path = builder.write(tmp_path / "large.json")
    start_time = time.perf_counter()
    loaded = trace.load(path)
    assert time.perf_counter() - start_time < 8
    assert (len(loaded.host), len(loaded.device)) == (99_033, 33_000)
    assert int(loaded.host.self_ns.sum()) == 33_000 * 9_000


def test_reading_needs_neither_torch_nor_triton_nor_pandas() -> None:
    code = (
        "import sys, kernbench.traces.trace\n"
        "from kernbench.analysis import breakdown, hotspots, idle, launches, stalls, timeline\n"
        "import json; print(json.dumps([name for name in ('torch', 'triton', 'pandas') if name in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == []
