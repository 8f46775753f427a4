"""Training curves: what is followed, that kasmina learns the same with every phase, and how it is shown."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import report_records
import torch
from terminal import run

from kernbench import band, curves, registry, swap
from kernbench.errors import WorkloadFailed
from kernbench.measurement import measure
from kernbench.record import BenchRecord, Curve
from kernbench.report import curveplot, html
from kernbench.workload import Curves, Workload

CPU = torch.device("cpu:0")


def kasmina() -> Workload:
    return registry.workload("kasmina").declaration


def trained(numbers: tuple[int, ...], dtype: torch.dtype, use: str = "eager") -> dict[str, Curve]:
    """The curves of the tiny preset with these phases in place, by their names."""
    workload = kasmina()
    settings = measured(workload, "tiny", dtype)
    return {curve.name: curve for curve in follow(settings, plan=plan(workload, numbers, use))}


def measured(workload: Workload, preset: str, dtype: torch.dtype = torch.float32) -> measure.Settings:
    return measure.Settings(workload=workload, preset=preset, device=CPU, dtype=dtype, seed=0, data=None, steps=1)


def plan(workload: Workload, numbers: tuple[int, ...] = (), use: str = "eager") -> swap.Plan:
    return swap.plan(
        workload, numbers, use=dict.fromkeys(numbers, use), kernels=lambda name: registry.kernel(name).declaration
    )


def follow(settings: measure.Settings, **changes: Any) -> list[Curve]:
    """The curves of the baseline, or of what is changed in its training."""
    declared = curves.wanted(settings)
    assert declared is not None
    given = {"implementation": "baseline", "plan": plan(settings.workload), **changes}
    return curves.follow(settings, declared, curves.Training(**given), lambda _: None)


def test_kasmina_learns_the_same_with_every_phase() -> None:
    baseline, phases = trained((), torch.float64), trained((0, 1, 2, 3, 4), torch.float64)
    assert baseline["test accuracy"].steps == list(range(15, 301, 15))
    assert baseline["test accuracy"].values == phases["test accuracy"].values
    assert phases["loss"].values == pytest.approx(baseline["loss"].values, rel=1e-9)
    assert baseline["test accuracy"].values[-1] > 90
    assert baseline["loss"].values[-1] < 0.2 < 1.5 < baseline["loss"].values[0]


def test_in_float32_rounding_changes_no_image_in_a_hundred() -> None:
    baseline, phases = trained((), torch.float32), trained((0, 1, 2, 3, 4), torch.float32)
    assert phases["test accuracy"].values[-1] == pytest.approx(baseline["test accuracy"].values[-1], abs=1.0)
    assert phases["loss"].values[-1] == pytest.approx(baseline["loss"].values[-1], rel=1e-2)


class Counting:
    """Its loss counts its steps, so that each reading can be told."""

    units_per_step = 1.0

    def __init__(self) -> None:
        self.count = 0

    def step(self, index: int) -> torch.Tensor | None:
        self.count += 1
        return torch.tensor(float(index))

    def state_dict(self) -> dict[str, Any]:
        return {}


def counting(read: Any, preset: str = "one") -> measure.Settings:
    workload = Workload(
        name="counting", unit="steps", summary="", presets={"one": 1, "other": 2}, build=lambda **_: Counting(),
        curves=Curves(read=read, presets=("one",), steps=7, every=3),
    )  # fmt: skip
    return measured(workload, preset)


def test_a_reading_comes_after_its_steps_and_the_loss_is_their_mean() -> None:
    loss, count = follow(counting(lambda built: {"count": (built.count, "steps")}))
    assert (loss.name, loss.steps, loss.values) == ("loss", [3, 6, 7], [1.0, 4.0, 6.0])
    assert (count.name, count.unit, count.values) == ("count", "steps", [3.0, 6.0, 7.0])


def test_a_reading_that_fails_says_so() -> None:
    def fail(built: Any) -> dict[str, tuple[float, str]]:
        raise ValueError("no images")

    with pytest.raises(WorkloadFailed, match="curves of counting could not be read: ValueError: no images"):
        follow(counting(fail))


def test_other_presets_are_not_followed() -> None:
    assert curves.wanted(counting(dict, preset="other")) is None
    with pytest.raises(ValueError, match="follows curves of huge, which are no presets"):
        dataclasses.replace(kasmina(), curves=Curves(read=dict, presets=("huge",)))
    for every in (0, 8):
        with pytest.raises(ValueError, match="are no curve"):
            Curves(read=dict, presets=(), steps=7, every=every)


def shown(**ends: float) -> BenchRecord:
    return BenchRecord(
        run_id="r", created_utc="2026-11-21T14:25:30+00:00", command="c", environment=report_records.environment(),
        status="complete",
        curves=[
            Curve(name="test accuracy", unit="%", implementation=name, steps=[15, 30], values=[60.0, end])
            for name, end in ends.items()
        ],
    )  # fmt: skip


def test_the_page_shows_every_curve() -> None:
    found = shown(baseline=94.0, phases_0_1=94.0)
    table = curveplot.curves(found)
    assert table is not None
    assert table.said == ["Test accuracy ends at 94.0 % in all of them."]
    page = html.render(found)
    assert "Training curves" in page
    assert page.count("phases_0_1") >= 3
    assert curveplot.curves(shown(baseline=94.0, phase=92.5)).said == [  # type: ignore[union-attr]
        "Test accuracy ends between 92.5 % and 94.0 %, 1.50 % apart."
    ]
    assert curveplot.curves(shown()) is None


def moved_apart(*values: float, moved: bool = False, name: str = "phase 0") -> Curve:
    steps = list(range(1, len(values) + 1))
    return Curve(name="loss", implementation=name, steps=steps, values=list(values), moved=moved)


def test_the_band_is_three_times_as_wide_as_rounding_drove_the_baseline_apart_so_far() -> None:
    baseline = moved_apart(5.0, 4.0, 3.0, 2.0, name="baseline")
    others = [moved_apart(5.0, 4.1, 3.0, 2.0, moved=True), moved_apart(5.0, 4.0, 2.8, 2.0, moved=True)]
    assert band.around([baseline]) is None
    around = band.around([baseline, *others])
    assert around is not None
    assert around.low == pytest.approx([5.0 - 5e-6, 4.0 - 0.3, 3.0 - 0.6, 2.0 - 0.6])
    assert around.high == pytest.approx([5.0 + 5e-6, 4.0 + 0.3, 3.0 + 0.6, 2.0 + 0.6])
    assert around.left_by(moved_apart(5.000004, 3.71, 3.59, 1.41)) is None
    assert around.left_by(moved_apart(5.0, 4.31, 3.0, 2.0)) == 2
    assert around.left_by(moved_apart(5.0, 4.0, 3.0, float("nan"))) == 4


def test_the_page_says_who_leaves_the_band() -> None:
    lines = [moved_apart(5.0, 4.0, name="baseline"), moved_apart(5.0, 4.1, moved=True, name="baseline rounded apart 1")]
    inside, outside = moved_apart(5.0, 4.2), moved_apart(5.0, 4.4, name="phases 0+1")
    record = shown()
    record.curves = [*lines, inside]
    table = curveplot.curves(record)
    assert table is not None
    assert table.said[1] == (
        "Loss stays in the band of 1 baseline runs that differ from it by rounding alone, 3 times as wide as they go, "
        "with every phase."
    )
    record.curves.append(outside)
    table = curveplot.curves(record)
    assert table is not None
    assert table.said[1].endswith("3 times as wide as they go: phases 0+1 at step 2.")
    assert "Shaded: where rounding alone" in html.render(record)


def test_equal_curves_are_drawn_too() -> None:
    record = shown()
    record.curves = [moved_apart(5.0, 4.0, moved=number == 1, name=str(number)) for number in range(3)]
    page = html.render(record)
    assert "Loss stays in the band of 1 baseline runs" in page
    assert page.count("baseline, rounded otherwise") == 2


def titan(steps: int) -> Workload:
    """TitanMAC at sizes that are quick, with few steps."""
    workload = registry.workload("titan-mac").declaration
    assert workload.curves is not None
    sizes = {"width": 16, "heads": 2, "feed_forward": 24, "length": 32, "window": 9, "gate_width": 6, "batch": 2}
    preset = dataclasses.replace(workload.presets["tiny"], **sizes)
    followed = dataclasses.replace(workload.curves, steps=steps, every=10)
    return dataclasses.replace(workload, presets={**workload.presets, "tiny": preset}, curves=followed)


def test_titan_mac_learns_within_the_band_of_rounding_with_every_phase() -> None:
    workload = titan(100)
    settings = measured(workload, "tiny")
    full = plan(workload, tuple(phase.number for phase in workload.phases))
    changes: list[dict[str, Any]] = [
        {}, {"order": 1}, {"order": 2}, {"exact": True}, {"implementation": "phases", "plan": full},
    ]  # fmt: skip
    lines = [line for change in changes for line in follow(settings, **change)]
    around = band.around(lines)
    assert around is not None
    assert lines[1].values != lines[0].values != lines[2].values
    assert [line.moved for line in lines] == [False, True, True, True, False]
    assert not curves.draws_other_numbers(lines[3:4], lines, torch.float32)
    assert lines[3].values == pytest.approx(lines[0].values, rel=1e-3)
    assert lines[3].values != lines[0].values
    assert around.left_by(lines[4]) is None
    # The band is narrow beside what is learned.
    assert lines[0].values[0] - lines[0].values[-1] > 0.5 > 10 * (around.high[-1] - around.low[-1])


@pytest.mark.parametrize(("value", "dtype", "others"), [
    (2.0005, torch.float32, False), (2.002, torch.float32, True), (2.01, torch.bfloat16, False),
    (2.03, torch.bfloat16, True), (float("nan"), torch.bfloat16, True),
])  # fmt: skip
def test_a_float64_run_that_begins_elsewhere_draws_other_numbers(
    value: float, dtype: torch.dtype, others: bool
) -> None:
    known = [moved_apart(2.0, 1.0, name="baseline"), moved_apart(7.0, 1.0)]
    assert curves.draws_other_numbers([moved_apart(value, 1.0, moved=True)], known, dtype) is others
    assert not curves.draws_other_numbers([], known, dtype)
    assert not curves.draws_other_numbers(known, [], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_kasmina_learns_the_same_with_kernels_on_a_gpu(numbers: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr("test_curves.CPU", torch.device("cuda:0"))
    baseline, phases = trained((), torch.float32), trained(numbers, torch.float32, "triton")
    assert phases["test accuracy"].values[-1] == pytest.approx(baseline["test accuracy"].values[-1], abs=1.0)


def test_a_phase_that_leaves_the_band_is_run_in_other_orders_too(toy_workspace: Path) -> None:
    shutil.copy(Path(__file__).with_name("astray_workload.py"), toy_workspace / "workloads" / "astray.py")
    shown = run("bench", "astray", "--rounds", "3", "--device", "cpu", "--json", "--quiet")
    assert shown.exit_code == 0, shown.output
    found = msgspec.json.decode(shown.stdout, type=BenchRecord)
    lines = {curve.implementation: curve for curve in found.curves}
    others = ["baseline reordered 1", "baseline reordered 2", "baseline in float64"]
    assert list(lines)[:4] == ["baseline", *others]
    assert [name for name, curve in lines.items() if curve.moved] == others
    assert [name for name, curve in lines.items() if curve.reorders == "phase 0"] == [
        "phase 0 reordered 1", "phase 0 reordered 2",
    ]  # fmt: skip
    table = curveplot.curves(found)
    assert table is not None
    assert "phase 0 at step 2, phases 0+1 at step 2." in table.said[1]
    assert table.said[1].endswith("With their sums in other orders 2 of 4 runs of these stay in it.")
    places = {row[0].text: row[3].text for row in table.rows}
    assert places["phase 0"] == "left at step 2; in other orders 2 of 2 stay"
    assert places["phases 0+1"] == "left at step 2; in other orders 0 of 2 stay"
    assert [places[name] for name in ("baseline", *others)] == ["", *["part of it"] * 3]
    assert len(places) == 6
    assert html.render(found).count("phases that left, in other orders") == 2


def test_a_state_of_copies_has_no_float64_run() -> None:
    class Copying(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"noise": torch.rand(3)}

    settings = counting(lambda built: {})
    workload = dataclasses.replace(settings.workload, build=lambda **_: Copying())
    with pytest.raises(WorkloadFailed, match=r"let state_dict\(\) return the tensors themselves"):
        follow(dataclasses.replace(settings, workload=workload), exact=True)
