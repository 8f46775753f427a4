"""The flame view of planted Python calls and operators. Times in the traces are in microseconds."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kineto_builder import AUTOGRAD, KinetoBuilder

from kernbench.analysis import flame
from kernbench.record import FlameFrame
from kernbench.traces import trace

US = 1e-6
TORCH = "/usr/lib/python3.11/site-packages/torch/nn/modules/module.py"
ENGINE = "autograd::engine::evaluate_function: "


def view(tmp_path: Path, builder: KinetoBuilder, limit: int = 600) -> list[FlameFrame]:
    return flame.flame(trace.load(builder.write(tmp_path / "trace.json")), limit)


def told(frames: list[FlameFrame]) -> list[tuple[str, str, float, float]]:
    """Each frame's path of names, kind, and its whole and own time in us."""
    paths: list[str] = []
    for frame in frames:
        above = f"{paths[frame.parent]}/" if frame.parent >= 0 else ""
        paths.append(above + frame.name)
    return [
        (path, frame.kind, round(frame.seconds_per_step / US, 6), round(frame.self_seconds_per_step / US, 6))
        for path, frame in zip(paths, frames, strict=True)
    ]


def test_without_stacks_it_shows_annotations_operators_and_calls(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        begin = step * 100
        builder.step(step, begin, begin + 100)
        builder.annotation("forward", begin + 10, begin + 60)
        builder.op("aten::linear", begin + 20, begin + 50)
        builder.op("aten::addmm", begin + 25, begin + 45)
        builder.launch("gemm", begin + 30, begin + 40, begin + 80)
        builder.op("aten::add", begin + 70, begin + 90 + step * 2)
    assert told(view(tmp_path, builder)) == [
        ("kernbench.step", "annotation", 100, 100 - 50 - 21),
        ("kernbench.step/forward", "annotation", 50, 20),
        ("kernbench.step/forward/aten::linear", "op", 30, 10),
        ("kernbench.step/forward/aten::linear/aten::addmm", "op", 20, 16),
        ("kernbench.step/forward/aten::linear/aten::addmm/cudaLaunchKernel", "call", 4, 4),
        ("kernbench.step/aten::add", "op", 21, 21),
    ]


def stacked(builder: KinetoBuilder) -> None:
    """train (before the step) > step > forward, called through four functions of torch, > linear (built in) > aten."""
    builder.step(0, 0, 1000, marker="ProfilerStep#")
    builder.python("train.py(5): train", -100, 2000)
    builder.python("train.py(20): step", 10, 900)
    builder.python("nn.Module: Net_0", 20, 800)
    for depth, function in enumerate(("_wrapped_call_impl", "_call_impl", "inner", "inner")):
        builder.python(f"{TORCH}({1000 + depth % 3}): {function}", 30 + depth * 10, 790 - depth * 10)
    builder.python("model.py(30): forward", 100, 700)
    builder.python("<built-in function linear>", 200, 600)
    builder.op("aten::linear", 300, 500)


def test_frames_of_libraries_are_folded(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    stacked(builder)
    frames = view(tmp_path, builder)
    step = "ProfilerStep/step"
    assert told(frames) == [
        ("ProfilerStep", "annotation", 1000, 110),
        (step, "python", 890, 110),
        (f"{step}/nn.Module: Net_0", "python", 780, 20),
        (f"{step}/nn.Module: Net_0/torch", "library", 760, 160),
        (f"{step}/nn.Module: Net_0/torch/forward", "python", 600, 400),
        (f"{step}/nn.Module: Net_0/torch/forward/aten::linear", "op", 200, 200),
    ]
    # Four functions of torch, of which two are named alike but defined on different lines.
    assert [frame.folded for frame in frames] == [0, 0, 0, 4, 1, 0]
    assert frames[4].source is not None
    assert (frames[4].source.file, frames[4].source.line, frames[4].source.function) == ("model.py", 30, "forward")


def test_only_the_steps_that_count(tmp_path: Path) -> None:
    """A step whose launches lost their kernels says nothing, and neither does what lies between steps."""
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 10, 30)
    builder.launch("gemm", 15, 20, 40)
    builder.op("aten::between", 110, 190)
    builder.step(1, 200, 300)
    builder.op("aten::mm", 210, 290)
    builder.call("cudaLaunchKernel", 220, 230)
    assert told(view(tmp_path, builder)) == [
        ("kernbench.step", "annotation", 100, 80),
        ("kernbench.step/aten::mm", "op", 20, 16),
        ("kernbench.step/aten::mm/cudaLaunchKernel", "call", 4, 4),
    ]


def test_the_engines_thread_lies_under_what_waits_for_it(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mul", 0, 20, sequence=3)
    builder.annotation("backward", 30, 90)
    builder.op(f"{ENGINE}MulBackward0", 40, 80, AUTOGRAD, sequence=3, backward=True)
    builder.op("MulBackward0", 45, 75, AUTOGRAD, sequence=3, backward=True)
    builder.op("aten::mul", 50, 70, AUTOGRAD)
    builder.op("aten::watch", 0, 100, tid=300)
    builder.on_device("kernel", "mul", 60, 75, 77)
    assert told(view(tmp_path, builder)) == [
        ("kernbench.step", "annotation", 100, 20),
        ("kernbench.step/aten::mul", "op", 20, 20),
        ("kernbench.step/backward", "annotation", 60, 20),
        ("kernbench.step/backward/MulBackward0", "op", 40, 20),
        ("kernbench.step/backward/MulBackward0/aten::mul", "op", 20, 20),
    ]


def test_one_frame_for_equal_calls_of_one_caller(tmp_path: Path) -> None:
    """Also where a folded library calls the same operator from different depths."""
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.python(f"{TORCH}(1): outer", 10, 90)
    builder.op("aten::add", 20, 30)
    builder.python(f"{TORCH}(2): inner", 40, 80)
    builder.op("aten::add", 50, 60)
    assert told(view(tmp_path, builder)) == [
        ("kernbench.step", "annotation", 100, 20),
        ("kernbench.step/torch", "library", 80, 60),
        ("kernbench.step/torch/aten::add", "op", 20, 20),
    ]


def test_the_longest_frames_stay_with_their_callers(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    for number in range(20):
        start = number * 40
        builder.op(f"aten::outer{number}", start, start + 20 + number)
        builder.op(f"aten::inner{number}", start, start + 20 + number)
    frames = view(tmp_path, builder, limit=7)
    assert [frame.name for frame in frames[1:]] == [
        f"aten::{place}{number}" for number in (17, 18, 19) for place in ("outer", "inner")
    ]


def test_silence_where_the_host_is_not_recorded(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.on_device("kernel", "gemm", 0, 10, 1)
    assert view(tmp_path, builder) == []


_EVENT = st.tuples(st.integers(0, 250), st.integers(0, 150), st.integers(0, 4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_EVENT, min_size=1, max_size=40), st.integers(2, 40))
def test_own_times_add_up_whatever_happens(tmp_path: Path, events: list[tuple[int, int, int]], limit: int) -> None:
    """Also of rows that overlap without nesting: no time counts twice, and parents come before their children."""
    builder = KinetoBuilder()
    builder.step(0, 0, 200)
    builder.step(1, 200, 300)
    for start, length, kind in events:
        if kind == 0:
            builder.op("aten::add", start, start + length)
        elif kind == 1:
            builder.annotation("part", start, start + length)
        else:
            file = ("model.py(1): run", f"{TORCH}(1): call", "<built-in method add>")[kind - 2]
            builder.python(file, start, start + length)
    frames = view(tmp_path, builder)
    if not frames:
        return
    assert sum(frame.self_seconds_per_step for frame in frames) == pytest.approx(frames[0].seconds_per_step)
    for frames_shown in (frames, view(tmp_path, builder, limit)):
        assert all(frame.parent < position for position, frame in enumerate(frames_shown))
        assert all(
            frame.seconds_per_step <= frames_shown[frame.parent].seconds_per_step + 1e-12 for frame in frames_shown[1:]
        )
