"""Memory over time, from planted allocator events."""

from pathlib import Path

from kineto_builder import KinetoBuilder

from kernbench.analysis import memory
from kernbench.record import MemoryPoint
from kernbench.traces import trace


def load(tmp_path: Path, builder: KinetoBuilder) -> trace.Trace:
    builder.step(0, 100, 1000)
    builder.op("aten::empty", 100, 1000)
    return trace.load(builder.write(tmp_path / "trace.json"))


def test_points_begin_with_what_the_step_began_with(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.memory(10, 5, 5, 8)
    builder.memory(20, 5, 10, 16)
    builder.memory(300, 30, 40, 64)
    builder.memory(400, -30, 10, 64)
    builder.memory(5000, 7, 17, 64)
    assert memory.memory(load(tmp_path, builder)) == [
        MemoryPoint(seconds=0.0, allocated_bytes=10, reserved_bytes=16),
        MemoryPoint(seconds=0.0002, allocated_bytes=40, reserved_bytes=64),
        MemoryPoint(seconds=0.0003, allocated_bytes=10, reserved_bytes=64),
    ]


def test_only_the_device_that_holds_the_most(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.memory(150, 1000, 1000, 1000, device=None)
    builder.memory(160, 5, 5, 8, device=0)
    builder.memory(170, 50, 50, 80, device=1)
    assert [point.allocated_bytes for point in memory.memory(load(tmp_path, builder))] == [50]


def test_thinning_keeps_the_peak_the_first_and_the_last(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for number in range(500):
        builder.memory(200 + number, 1, 9999 if number == 377 else number, 10_000)
    points = memory.memory(load(tmp_path, builder), limit=50)
    assert len(points) <= 50
    assert max(point.allocated_bytes for point in points) == 9999
    assert (points[0].allocated_bytes, points[-1].allocated_bytes) == (0, 499)
    assert [point.seconds for point in points] == sorted(point.seconds for point in points)
    assert len(memory.memory(load(tmp_path, builder), limit=500)) == 500


def test_silence_where_nothing_is_recorded(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.memory(200, 5, 5, 5, device=None)
    assert memory.memory(load(tmp_path, builder)) == []
