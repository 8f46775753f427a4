"""What stands beside the events of a trace: Python calls, lines, modules, shapes, collectives, memory, notes."""

import json
from pathlib import Path
from typing import Any

import pytest
from kineto_builder import AUTOGRAD, MAIN, KinetoBuilder

from kernbench.errors import KernbenchError
from kernbench.traces import frames, trace
from kernbench.traces.nesting import Ints


def row_of(loaded: trace.Trace, name: str) -> int:
    return next(row for row in range(len(loaded.host)) if loaded.names[loaded.host.name[row]] == name)


def named(loaded: trace.Trace, column: Ints) -> list[str]:
    return [loaded.names[index] if index >= 0 else "" for index in column.tolist()]


@pytest.fixture
def stacked(tmp_path: Path) -> trace.Trace:
    builder = KinetoBuilder()
    builder.python("/home/me/train.py(3): <module>", 0, 1000)
    builder.step(0, 10, 900)
    builder.python("/home/me/train.py(40): step", 20, 800)
    builder.python("nn.Module: Net_0", 30, 400)
    builder.python("/home/me/model.py(12): forward", 35, 390)
    builder.python("nn.Module: Linear_0", 40, 100)
    builder.python("torch/nn/modules/linear.py(130): forward", 42, 98)
    builder.python("<built-in function linear>", 45, 95)
    builder.op("aten::linear", 50, 90, sequence=3, dims=[[8, 4], [2, 4]], types=["float", "float"])
    builder.python("threading.py(300): wait", 410, 420)
    builder.op("aten::add", 412, 418, dims=[[8], []], types=["float", "Scalar"])
    builder.op("aten::mul", 430, 440, dims=[[8], []], types=["float", "Scalar"])
    builder.op("AddmmBackward0", 500, 600, AUTOGRAD, sequence=3, backward=True)
    builder.op("aten::mm", 510, 590, AUTOGRAD)
    builder.op("aten::accumulate", 610, 620, AUTOGRAD)
    builder.op("aten::watch", 610, 620, tid=999)
    return trace.load(builder.write(tmp_path / "stacked.json"))


def test_python_calls_nest_and_know_their_file_and_line(stacked: trace.Trace) -> None:
    calls = stacked.frames
    assert named(stacked, calls.name)[:3] == [
        "/home/me/train.py(3): <module>",
        "/home/me/train.py(40): step",
        "nn.Module: Net_0",
    ]
    assert calls.parent.tolist() == [-1, 0, 1, 2, 3, 4, 5, 1]
    assert named(stacked, calls.file) == [
        "/home/me/train.py", "/home/me/train.py", "", "/home/me/model.py", "", "torch/nn/modules/linear.py", "",
        "threading.py",
    ]  # fmt: skip
    assert calls.line.tolist() == [3, 40, -1, 12, -1, 130, -1, 300]


@pytest.mark.parametrize(
    ("name", "frame", "line", "module"),
    [
        ("aten::linear", "<built-in function linear>", ("/home/me/model.py", 12, "forward"), "nn.Module: Linear_0"),
        ("aten::add", "threading.py(300): wait", ("/home/me/train.py", 40, "step"), ""),
        ("aten::mul", "/home/me/train.py(40): step", ("/home/me/train.py", 40, "step"), ""),
        ("kernbench.step#0", "/home/me/train.py(3): <module>", ("/home/me/train.py", 3, "<module>"), ""),
        ("aten::mm", "", ("/home/me/model.py", 12, "forward"), "nn.Module: Linear_0"),
        ("aten::accumulate", "", ("/home/me/train.py", 40, "step"), ""),
        ("aten::watch", "", None, ""),
    ],
)
def test_host_rows_know_the_python_call_line_and_module_around_them(
    stacked: trace.Trace, name: str, frame: str, line: tuple[str, int, str] | None, module: str
) -> None:
    row = row_of(stacked, name)
    found = stacked.sources[stacked.source[row]] if stacked.source[row] >= 0 else None
    assert (found and (found.file, found.line, found.function)) == line
    frame_row = stacked.frame[row]
    assert (stacked.names[stacked.frames.name[frame_row]] if frame_row >= 0 else "") == frame
    assert named(stacked, stacked.modules[[row]]) == [module]


def test_equal_shapes_share_one_text(stacked: trace.Trace) -> None:
    shapes = {
        name: stacked.shapes[row_of(stacked, name)] for name in ("aten::linear", "aten::add", "aten::mul", "aten::mm")
    }
    assert shapes["aten::add"] == shapes["aten::mul"] != shapes["aten::linear"]
    assert shapes["aten::mm"] == -1
    dims, types = stacked.shape_texts[shapes["aten::linear"]]
    assert (json.loads(dims), json.loads(types)) == ([[8, 4], [2, 4]], ["float", "float"])


@pytest.mark.parametrize(
    ("file", "ours"),
    [
        ("train.py", True),
        ("/work/project/src/model.py", True),
        ("transformers/models/qwen2/modeling_qwen2.py", True),
        ("/home/me/torch/train.py", True),
        ("<stdin>", True),
        ("kernbench/builtin/workloads/toy/workload.py", True),
        ("kernbench/capture.py", False),
        ("/opt/env/lib/python3.11/site-packages/transformers/trainer.py", False),
        ("/usr/lib/python3/dist-packages/numpy/core.py", False),
        ("/usr/lib/python3.12/threading.py", False),
        ("/opt/pytorch/torch/nn/modules/module.py", False),
        ("/opt/pytorch/torch/_ops.py", False),
        ("torch/autograd/function.py", False),
        ("torch\\optim\\adamw.py", False),
        ("threading.py", False),
        ("json/decoder.py", False),
        ("<frozen os>", False),
        ("<string>", False),
    ],
)
def test_libraries_are_told_from_the_program(file: str, ours: bool) -> None:
    assert frames.is_program(file) is ours


def test_a_readable_file_gives_the_text_of_its_line(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import x\n\n\ndef step(batch):\n    return batch\n\n@decorated\ndef other(): ...\n")
    builder = KinetoBuilder()
    for start, call in enumerate(("(4): step", "(5): step", "(7): other", "(99): gone")):
        builder.python(f"{program}{call}", start * 10, start * 10 + 9)
        builder.op(f"aten::op{start}", start * 10 + 1, start * 10 + 2)
    loaded = trace.load(builder.write(tmp_path / "text.json"))
    texts = [loaded.sources[loaded.source[row_of(loaded, f"aten::op{start}")]].text for start in range(4)]
    assert texts == ["def step(batch):", "", "@decorated", ""], "a line that is not the function's is not shown"


def test_module_ranges_of_our_own_traces_name_modules(tmp_path: Path) -> None:
    def loaded(marker: str) -> trace.Trace:
        builder = KinetoBuilder()
        builder.step(0, 0, 100, marker=marker)
        builder.annotation("kernbench.phase2:block", 5, 90)
        builder.annotation("layers.0.attention", 10, 80)
        builder.annotation("Optimizer.step#AdamW.step", 20, 70)
        builder.op("aten::mm", 30, 40)
        return trace.load(builder.write(tmp_path / "ranges.json"))

    ours, other = loaded("kernbench.step#"), loaded("ProfilerStep#")
    assert named(ours, ours.modules[[row_of(ours, "aten::mm")]]) == ["layers.0.attention"]
    assert set(other.modules.tolist()) == {-1}, "an annotation of another program may be anything"


def test_graph_launches_and_their_kernels(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::add", 0, 10)
    launch = builder.call("cudaGraphLaunch", 2, 8)
    for number in range(3):
        builder.on_device("kernel", f"captured{number}", 10 + number * 5, 14 + number * 5, launch)
    builder.launch("eager", 9, 30, 40)
    loaded = trace.load(builder.write(tmp_path / "graph.json"))
    assert loaded.device.graph.tolist() == [1, 1, 1, 0]
    assert len(set(loaded.device.call[:3].tolist())) == 1


@pytest.mark.parametrize(
    ("kernel", "args", "scope", "expected"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", {}, "", ("all_reduce", -1, -1)),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_float(x)", {}, "", ("reduce_scatter", -1, -1)),
        ("ncclDevKernel_Generic_1(x)", {}, "nccl:_all_gather_base", ("all_gather", -1, -1)),
        ("ncclDevKernel_Generic_1(x)", {}, "", ("ncclDevKernel_Generic_1(x)", -1, -1)),
        (
            "ncclDevKernel_SendRecv(x)",
            {"Collective name": "_allgather_base", "In msg nelems": 10, "Out msg nelems": 80, "Group size": 8,
             "dtype": "BFloat16"},
            "",
            ("all_gather", 160, 8),
        ),
        ("ncclDevKernel_Generic(x)", {"Collective name": "alltoallv", "dtype": "Odd"}, "", ("all_to_all", -1, -1)),
    ],
)  # fmt: skip
def test_collectives_by_record_name_and_annotation(
    tmp_path: Path, kernel: str, args: dict[str, Any], scope: str, expected: tuple[str, int, int]
) -> None:
    builder = KinetoBuilder()
    builder.launch("gemm", 1, 5, 8)
    if scope:
        builder.annotation(scope, 8, 20)
    builder.launch(kernel, 10, 20, 30, stream=20, **args)
    loaded = trace.load(builder.write(tmp_path / "nccl.json"))
    found = loaded.collectives
    assert found.row.tolist() == [1]
    assert (loaded.names[found.name[0]], found.bytes[0], found.group[0]) == expected
    assert loaded.device.collective.tolist() == [-1, found.name[0]]


def test_memory_and_waits_between_streams(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::empty", 0, 50)
    builder.memory(30, -512, 512, 4096)
    builder.memory(10, 1024, 1024, 4096, device=1)
    builder.memory(20, 64, 64, 0, device=None)
    builder.launch("produce", 31, 35, 60)
    record = builder.call("cudaEventRecord", 36, 37)
    builder.stream_wait(38, stream=20, on_stream=7, record=record)
    builder.stream_wait(40, stream=20, on_stream=4294967295, record=4294967295)
    loaded = trace.load(builder.write(tmp_path / "memory.json"))
    memory, waits = loaded.memory, loaded.waits_on
    assert memory.time_ns.tolist() == [10_000, 20_000, 30_000]
    assert memory.device.tolist() == [1, -1, 0]
    assert memory.delta.tolist() == [1024, 64, -512]
    assert (memory.allocated.tolist(), memory.reserved.tolist()) == ([1024, 64, 512], [4096, 0, 4096])
    assert (waits.stream.tolist(), waits.on_stream.tolist()) == ([20, 20], [7, -1])
    assert waits.record.tolist() == [row_of(loaded, "cudaEventRecord"), -1], "newer drivers do not tell the event"
    assert named(loaded, loaded.host.name[waits.call]) == ["cudaStreamWaitEvent"] * 2


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.metadata |= {
        "deviceProperties": [{"id": 1, "name": "Other"}, {"id": 0, "name": "NVIDIA Test"}],
        "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},
    }
    builder.step(0, 0, 2000)
    builder.python("train.py(3): step", 0, 2000)
    builder.op("aten::add", 5, 10, dims=[[1]])
    builder.launch("add", 6, 10, 20)
    path = builder.write(tmp_path / "rank3.json.gz")
    info = trace.load(path).info
    assert (info.vendor, info.device, info.rank, info.world_size) == ("nvidia", "NVIDIA Test", 3, 8)
    assert (info.file, info.bytes, info.events) == ("rank3.json.gz", path.stat().st_size, len(builder.events))
    assert (info.steps, info.counted_steps, info.marker, info.step_seconds) == (1, 1, "kernbench.step#", 0.002)
    assert (info.stacks, info.shapes, info.sync_events, info.memory_events) == (True, True, False, False)
    assert (info.lost_launches, info.notes) == (0, [])


def test_damaged_metadata_does_not_matter(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.metadata |= {"deviceProperties": "[{'id': 0}]", "distributedInfo": {"rank": "zero"}}
    builder.op("aten::add", 5, 10)
    builder.launch("add", 6, 10, 20)
    info = trace.load(builder.write(tmp_path / "odd.json")).info
    assert (info.device, info.rank) == ("", None)


def test_a_trace_of_the_host_alone_says_so(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::add", 5, 10)
    loaded = trace.load(builder.write(tmp_path / "cpu.json"))
    loaded.check()
    assert (loaded.info.vendor, loaded.info.shapes, loaded.info.stacks) == ("cpu", False, False)
    assert "no device event" in " ".join(loaded.info.notes)


def test_a_step_without_device_work_between_others_is_kept(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(3):
        builder.step(step, step * 100, step * 100 + 99)
        builder.op("aten::add", step * 100 + 5, step * 100 + 10)
    builder.launch("only", 6, 10, 20)
    loaded = trace.load(builder.write(tmp_path / "idle.json"))
    loaded.check()
    assert loaded.counted.tolist() == [0, 1, 2]


def test_lost_kernels_are_counted_and_too_many_are_refused(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.step(1, 100, 200)
    builder.launch("kept", 10, 20, 30)
    builder.call("cuLaunchKernelEx", 110, 115)
    loaded = trace.load(builder.write(tmp_path / "lost.json"))
    loaded.check()
    assert loaded.info.lost_launches == 1
    assert (loaded.info.steps, loaded.info.counted_steps) == (2, 1)
    assert any("1 launch" in note for note in loaded.info.notes)
    builder.call("hipExtModuleLaunchKernel", 40, 45)
    with pytest.raises(KernbenchError, match=r"lost the kernels of 2 launches"):
        trace.load(builder.write(tmp_path / "lost.json")).check()
    builder.events = [event for event in builder.events if event.get("cat") != "kernel"]
    with pytest.raises(KernbenchError, match="holds no device event"):
        trace.load(builder.write(tmp_path / "lost.json")).check()


def test_slices_that_overlap_instead_of_nesting_keep_their_rows_and_times(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::outer", 0, 50)
    builder.op("aten::late", 40, 90)
    builder.op("aten::inside", 60, 70)
    builder.op("aten::after", 95, 99)
    loaded = trace.load(builder.write(tmp_path / "overlap.json"))
    parent = {loaded.names[name]: row for name, row in zip(loaded.host.name, loaded.host.parent, strict=True)}
    assert parent == {"aten::outer": -1, "aten::late": 0, "aten::inside": 1, "aten::after": -1}
    assert (loaded.host.self_ns >= 0).all()


def test_a_child_that_seems_to_end_later_by_rounding_stays_a_child(tmp_path: Path) -> None:
    builder = KinetoBuilder(offset_us=0)
    builder.op("aten::outer", 0, 10)
    builder.op("aten::inner", 2, 10.002)
    builder.op("aten::next", 10.005, 12)
    loaded = trace.load(builder.write(tmp_path / "rounded.json"))
    assert loaded.host.parent.tolist() == [-1, 0, -1]


@pytest.mark.parametrize("offset_ns", [0, 4_458_676_000_000_000, 4_458_676_000_000_999])
def test_nanoseconds_come_back_exactly(tmp_path: Path, offset_ns: int) -> None:
    builder = KinetoBuilder()
    for number in range(2000):
        builder.op("aten::add", 0, 1.237)
        time_ns = offset_ns + number * 1237
        builder.events[-1]["ts"] = float(f"{time_ns // 1000}.{time_ns % 1000:03}")
    host = trace.load(builder.write(tmp_path / "exact.json")).host
    assert host.start_ns.tolist() == [number * 1237 for number in range(2000)]
    assert set(host.parent.tolist()) == {-1}, "neighbours touch and do not overlap"


def test_work_without_recorded_calls_belongs_to_the_operator_of_its_number(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 10, 20, external=41)
    builder.on_device("kernel", "gemm", 150, 180, 0, **{"External id": 41})
    loaded = trace.load(builder.write(tmp_path / "external.json"))
    assert named(loaded, loaded.host.name[loaded.device.op]) == ["aten::mm"]
    assert (loaded.device.call.tolist(), loaded.device.step.tolist()) == ([-1], [0])


def test_main_thread_of_the_builder_is_the_steps_thread(stacked: trace.Trace) -> None:
    assert stacked.threads[stacked.steps.thread] == f"1/{MAIN}"
