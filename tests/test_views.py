"""Where the time goes by operator, module, line and shape, and how far the host runs ahead. Times in microseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis import hotspots, launches, stalls
from kernbench.record import HotspotView, LineLog, SourceLine
from kernbench.traces import trace

US = 1e-6


@pytest.fixture
def layers(tmp_path: Path) -> trace.Trace:
    """Two linear layers of one module class from two lines, and a kernel outside of all modules."""
    builder = KinetoBuilder()
    builder.step(0, 0, 200, marker="ProfilerStep#")
    builder.python("/home/me/train.py(12): step", 1, 190)
    for number, (start, length) in enumerate(((10, 30), (60, 50))):
        builder.python(f"nn.Module: Linear_{number}", start, start + 40)
        builder.python(f"/home/me/model.py({20 + number}): forward", start + 1, start + 39)
        builder.op("aten::linear", start + 2, start + 38)
        builder.op("aten::addmm", start + 3, start + 37)
        builder.events[-1]["args"] |= {"Input Dims": [[8, 4], [4, 4 + number]], "Input type": ["float", "float"]}
        builder.launch("sgemm", start + 4, start + 10, start + 10 + length)
    builder.op("aten::mul", 120, 130)
    builder.launch("mul_kernel", 121, 130, 150)
    return trace.load(builder.write(tmp_path / "layers.json"))


def named(loaded: trace.Trace, view: HotspotView) -> dict[str, float]:
    return {row.name: round(row.self_seconds_per_step / US, 6) for row in hotspots.views(loaded, None)[view]}


def test_views_place_every_kernel_that_they_can(layers: trace.Trace) -> None:
    assert named(layers, "kernel") == {"sgemm": 80, "mul_kernel": 20}
    assert named(layers, "operator") == {"aten::linear": 80, "aten::mul": 20}
    assert named(layers, "module") == {"nn.Module: Linear_1": 50, "nn.Module: Linear_0": 30}
    assert list(named(layers, "line").values()) == [50, 30, 20]
    assert [name.split("/")[-1] for name in named(layers, "line")] == [
        "model.py:21 forward",
        "model.py:20 forward",
        "train.py:12 step",
    ]
    assert named(layers, "shape") == {"aten::addmm [[8, 4], [4, 5]]": 50, "aten::addmm [[8, 4], [4, 4]]": 30}
    modules = hotspots.views(layers, None)["module"]
    assert [row.share for row in modules] == pytest.approx([0.5, 0.3]), "of all device time"
    assert modules[0].op == "aten::addmm"


def test_views_are_silent_about_what_the_trace_does_not_hold(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mul", 0, 10)
    builder.launch("mul_kernel", 1, 10, 20)
    assert set(hotspots.views(trace.load(builder.write(tmp_path / "bare.json")), None)) == {"kernel", "operator"}
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mul", 0, 10)
    loaded = trace.load(builder.write(tmp_path / "cpu.json"))
    assert set(hotspots.views(loaded, None)) == {"operator"}
    log = LineLog(steps=1, lines=[SourceLine(file="a.py", line=3, text="x * y")], op_lines={"aten::mul": [0]})
    assert [row.name for row in hotspots.views(loaded, log)["line"]] == ["a.py:3"]


def test_stalls_of_a_foreign_trace_have_the_function_around_them(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000, marker="ProfilerStep#")
    for number, name in enumerate(("train", "evaluate")):
        start = number * 400
        builder.python(f"/home/me/loop.py({10 + number}): {name}", start + 1, start + 390)
        builder.launch("gemm", start + 2, start + 10, start + 200 + number)
        builder.python("/usr/lib/python3.11/site-packages/torch/_tensor.py(9): item", start + 10, start + 250)
        builder.op("aten::item", start + 11, start + 240)
        builder.call("cudaStreamSynchronize", start + 12, start + 210 + number)
    loaded = trace.load(builder.write(tmp_path / "foreign.json"))
    found = stalls.stalls(loaded, None)
    assert [(stall.line, stall.function, stall.op) for stall in found] == [
        (11, "evaluate", "aten::item"),
        (10, "train", "aten::item"),
    ]
    assert all(stall.file.endswith("loop.py") and stall.klass == "drain" and stall.real for stall in found)
    assert [known.rows.tolist() for known in stalls.waiting(loaded, None)] == [
        [row] for row in reversed(loaded.sync_calls.tolist())
    ]


def test_launch_gaps_and_depth(tmp_path: Path) -> None:
    """Three kernels are launched ahead of the device, which then runs dry twice."""
    builder = KinetoBuilder()
    builder.step(0, 0, 300)
    builder.launch("a", 0, 6, 56)
    builder.launch("a", 10, 58, 108)
    builder.launch("a", 20, 110, 160)
    builder.launch("b", 180, 188, 200)
    builder.launch("b", 220, 230, 250)
    loaded = trace.load(builder.write(tmp_path / "gaps.json"))
    found = launches.gaps(loaded)
    assert found is not None
    assert found.latency_seconds == pytest.approx(9 * US), "8 and 10 where the stream was free"
    assert found.gap_seconds == pytest.approx(15 * US), "of 2, 2, 28 and 30"
    assert found.gaps_per_step == 4
    assert found.idle_in_gaps_seconds_per_step == pytest.approx(62 * US)
    assert found.depth == (1, 3)
    assert found.graph_launches_per_step == 0


def test_gaps_need_launches(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.on_device("kernel", "gemm", 0, 10, 1)
    builder.on_device("kernel", "gemm", 20, 30, 2)
    assert launches.gaps(trace.load(builder.write(tmp_path / "device.json"))) is None
    builder = KinetoBuilder()
    builder.op("aten::mul", 0, 10)
    assert launches.gaps(trace.load(builder.write(tmp_path / "cpu.json"))) is None
