"""Two traces with planted differences, aligned by step and operator. All times in the traces are in microseconds."""

from pathlib import Path

import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis.difference import difference
from kernbench.record import OperatorChange
from kernbench.traces import trace

US = 1e-6


def traced(path: Path, steps: dict[int, float], *, read: bool = False, kernel: str = "gemm") -> trace.Trace:
    """Steps of 1000 us by number: a product whose kernel takes as long as given, an addition, and perhaps a read."""
    builder = KinetoBuilder()
    for position, (number, length) in enumerate(steps.items()):
        start = position * 1000
        builder.step(number, start, start + 900)
        builder.op("aten::mm", start + 10, start + 30)
        builder.launch(kernel, start + 15, start + 40, start + 40 + length)
        if read:
            builder.op("aten::item", start + 35, start + 60)
            builder.call("cudaStreamSynchronize", start + 36, start + 59)
        builder.op("aten::add", start + 70, start + 90)
        builder.launch("add_kernel", start + 75, start + 500, start + 520)
        builder.launch("own_kernel", start + 100, start + 530, start + 540)
    return trace.load(builder.write(path))


def by_name(changes: list[OperatorChange]) -> dict[str, OperatorChange]:
    return {change.name: change for change in changes}


def test_a_trace_does_not_differ_from_itself(tmp_path: Path) -> None:
    loaded = traced(tmp_path / "one.json", {3: 100, 4: 100})
    found = difference(loaded, loaded)
    assert (found.operators, found.same, found.parting) == ([], 3, "")
    assert [(pair.before, pair.after) for pair in found.steps] == [(3, 3), (4, 4)]
    assert all(before == after for before, after in found.idle_seconds_per_step.values())


def test_an_operator_that_came_and_one_that_got_slower(tmp_path: Path) -> None:
    before = traced(tmp_path / "before.json", {1: 100, 2: 100})
    after = traced(tmp_path / "after.json", {1: 300, 2: 300}, read=True)
    found = difference(before, after)
    slower, came = found.operators
    assert (slower.name, slower.kind, slower.calls_per_step) == ("aten::mm", "op", (1, 1))
    assert slower.device_seconds_per_step == pytest.approx((100 * US, 300 * US))
    assert slower.host_seconds_per_step == pytest.approx((20 * US, 20 * US))
    assert (came.name, came.calls_per_step, came.gone, came.new) == ("aten::item", (0, 1), [], [])
    assert came.host_seconds_per_step == pytest.approx((0, 25 * US))
    assert found.same == 2, "the addition, and the kernel that no operator launched"
    assert found.parting == "operator 2 of the step is aten::add before and aten::item after"
    assert found.idle_seconds_per_step


def test_another_kernel_for_the_same_operator_is_a_change(tmp_path: Path) -> None:
    before = traced(tmp_path / "before.json", {1: 100}, kernel="gemm_64")
    found = difference(before, traced(tmp_path / "after.json", {1: 100}, kernel="gemm_128"))
    (change,) = found.operators
    assert (change.name, change.gone, change.new) == ("aten::mm", ["gemm_64"], ["gemm_128"])
    assert found.parting == ""


def test_kernels_without_an_operator_stand_for_themselves(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 900)
    builder.launch("own_kernel", 100, 130, 140)
    builder.launch("own_kernel", 150, 160, 260)
    builder.op("aten::mm", 300, 320)
    before = trace.load(builder.write(tmp_path / "before.json"))
    builder.launch("own_kernel", 400, 410, 510)
    change = by_name(difference(before, trace.load(builder.write(tmp_path / "after.json"))).operators)["own_kernel"]
    assert (change.kind, change.calls_per_step) == ("kernel", (2, 3))
    assert change.device_seconds_per_step == pytest.approx((110 * US, 210 * US))


def test_steps_pair_by_number_else_in_order(tmp_path: Path) -> None:
    one = traced(tmp_path / "one.json", {3: 100, 4: 110, 5: 120})
    shifted = difference(one, traced(tmp_path / "shifted.json", {5: 400, 6: 400}))
    assert [(pair.before, pair.after) for pair in shifted.steps] == [(5, 5)]
    assert by_name(shifted.operators)["aten::mm"].device_seconds_per_step == pytest.approx((120 * US, 400 * US))
    apart = difference(one, traced(tmp_path / "apart.json", {7: 400, 8: 400}))
    assert [(pair.before, pair.after) for pair in apart.steps] == [(3, 7), (4, 8)]
    assert by_name(apart.operators)["aten::mm"].device_seconds_per_step == pytest.approx((105 * US, 400 * US))


def test_a_longer_sequence_is_named(tmp_path: Path) -> None:
    builder = KinetoBuilder(offset_us=0)
    builder.step(0, 0, 900)
    builder.op("aten::mm", 10, 30)
    before = trace.load(builder.write(tmp_path / "before.json"))
    builder.op("aten::relu", 40, 50)
    after = trace.load(builder.write(tmp_path / "after.json"))
    assert difference(before, after).parting == "after goes on after operator 1 of the step, with aten::relu"
    assert difference(after, before).parting == "before goes on after operator 1 of the step, with aten::relu"
    assert difference(before, after).idle_seconds_per_step == {}, "there is no device in these traces"
