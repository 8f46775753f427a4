"""The backward of a kernel side by side: its rows, its own gradients as witness, and libraries that write in place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import run
from torch import Tensor

from kernbench import bench
from kernbench.measurement import calls
from kernbench.measurement.backward import ARRIVING, backward_of
from kernbench.parity import compare
from kernbench.record import BenchResult, Ceilings
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Peer, Tolerance

CPU = torch.device("cpu", 0)
ROOFS = Ceilings(copy_bytes_per_second=1e15, matmul_flops_per_second={"float32": 1e15}, launch_seconds=1e-9)
CASE = Case("ragged", rows=127)
GPU = torch.device("cuda", 0)


def reference(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scaled = torch.sin(x) * weight
    return scaled * scale, x + weight


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case["rows"], 64, generator=generator, device=device).to(dtype)
    return {"x": x, "weight": torch.rand(64, generator=generator, device=device).to(dtype), "scale": 2.0}


def right(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return reference(x, weight, scale)


class Own(torch.autograd.Function):
    """The same with a backward of its own; ``off`` is what its gradients are multiplied by."""

    off = 1.0
    forward_seconds = 0.0

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        time.sleep(cls.forward_seconds)
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return torch.sin(x) * weight * scale, x + weight

    @classmethod
    def backward(cls, ctx: Any, scaled: Tensor, added: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_weight = (scaled * ctx.scale * torch.sin(x) + added).sum(0)
        return (scaled * ctx.scale * weight * torch.cos(x) + added) * cls.off, to_weight * cls.off, None


class InPlace(Own):
    """Writes one gradient over the gradient that arrives, and zeros over what forward saved, as some libraries do."""

    @classmethod
    def backward(cls, ctx: Any, scaled: Tensor, added: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weight, _ = super().backward(ctx, scaled, added)
        assert to_x is not None
        for saved in ctx.saved_tensors:
            saved.data.zero_()
        added.copy_(to_x)
        return added, to_weight, None


class Off(Own):
    off = 1.001


class SlowForward(Own):
    forward_seconds = 3e-3


def peer_of(function: Any) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, scale: float) -> Any:
        return function.apply(x, weight, scale)

    return call


def spec_of(**changes: Any) -> KernelSpec:
    settings: dict[str, Any] = {
        "name": "toy",
        "reference": reference,
        "optimized": peer_of(Own),
        "make_inputs": make_inputs,
        "cases": (CASE,),
        "tolerance": {"float32": Tolerance()},
        "cost": lambda case, dtype: Cost(flops=7.0, bytes_read=7.0, bytes_written=0.0),
        "backward_cost": lambda case, dtype: Cost(flops=3.0, bytes_read=4e4, bytes_written=2e4),
        "differentiable": True,
    }
    return KernelSpec(**settings | changes)


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 2 * CASE["rows"] * 64 * 4)
    monkeypatch.setattr(calls, "MOST_CALLS", 8)


def rows_of(spec: KernelSpec, *, without: frozenset[str] = frozenset({"compile"}), **more: Any) -> list[BenchResult]:
    arguments = {"device": CPU, "directions": ["backward"], "rounds": 4, "ceilings": ROOFS, **more}
    return list(bench.bench_kernel(spec, without=without, **arguments))


def row_of(peer: Callable[..., Any], **changes: Any) -> BenchResult:
    eager, _, row = rows_of(spec_of(peers={"peer": peer}, **changes))
    assert eager.seconds is not None, eager
    assert (row.implementation, row.direction) == ("peer", "backward")
    return row


def test_both_directions_have_rows_of_their_own() -> None:
    rows = rows_of(spec_of(peers={"peer": peer_of(Own)}), without=frozenset(), directions=None)
    names = ["eager", "compile", "triton", "peer"]
    assert [(row.direction, row.implementation) for row in rows] == [
        (direction, name) for direction in ("forward", "backward") for name in names
    ]
    for row in rows:
        if row.implementation == "triton":
            assert (row.seconds, row.label) == (None, "not measured here")
            continue
        assert row.label == "", row
        assert row.note == ""
        assert row.seconds is not None
        counted = 6e4 if row.direction == "backward" else 7.0
        assert row.bytes == counted
        assert row.bytes_per_second == pytest.approx(counted / row.seconds)
        assert (row.speedup is None) == (row.implementation == "eager")


def test_a_kernel_without_a_backward_has_forward_rows_only() -> None:
    rows = rows_of(spec_of(differentiable=False), directions=None)
    assert {row.direction for row in rows} == {"forward"}


def test_the_forward_before_it_is_not_timed() -> None:
    row = row_of(peer_of(SlowForward))
    assert row.seconds is not None
    assert row.seconds < SlowForward.forward_seconds / 2


def test_without_a_cost_of_its_own_a_backward_has_no_rate() -> None:
    row = row_of(peer_of(Own), backward_cost=None)
    assert row.seconds is not None
    assert (row.bytes, row.flops, row.bytes_per_second, row.share_of_roof, row.label) == (None, None, None, None, "")


def test_a_wrong_gradient_has_no_time() -> None:
    row = row_of(peer_of(Off))
    assert (row.label, row.seconds) == ("wrong", None)
    assert row.note.startswith("after warm-up, gradient.")
    assert "max error" in row.note


def test_gradients_are_held_to_the_tolerance_of_gradients() -> None:
    loose = {"float32": Tolerance(forward=2.0, gradient=1e6)}
    assert row_of(peer_of(Off), tolerance=loose).label == ""
    swapped = {"float32": Tolerance(forward=1e6, gradient=3.0)}
    assert row_of(peer_of(Off), tolerance=swapped).label == "wrong"


def test_less_exact_gradients_by_declaration_say_how_far_off() -> None:
    declared = Peer(call=peer_of(Off), tolerance=Tolerance(floor_ulp=4e4), because="it is the test's")
    row = row_of(declared)
    assert row.label == "less exact"
    assert row.note.endswith(": it is the test's")
    assert row.seconds is not None


def test_a_backward_may_write_over_what_it_has_read() -> None:
    spec = spec_of(peers={"in place": peer_of(InPlace), "after it": peer_of(Own)})
    rows = {row.implementation: row for row in rows_of(spec, rounds=6)}
    assert {name: row.label for name, row in rows.items() if name != "triton"} == {
        "eager": "", "in place": "", "after it": "",
    }, rows  # fmt: skip


def test_all_that_a_backward_can_write_over_goes_back() -> None:
    spec = backward_of(spec_of(peers={"in place": peer_of(InPlace)}), CASE, torch.float32, CPU)
    sets = calls.InputSets(spec, CASE, torch.float32, CPU)
    assert len(sets.sets) > 1
    first = compare.clone(sets[1])
    spec.peers["in place"](**sets[1])
    assert not sets[1]["x"].any()
    assert not torch.equal(sets[1][ARRIVING]["output[1]"], first[ARRIVING]["output[1]"])
    sets.restore()
    for name, leaf in compare.leaves(first, "").items():
        assert compare.same_leaf(compare.leaves(sets[1], "")[name], leaf), name


def test_a_gradient_that_is_missing_is_wrong() -> None:
    def forgets(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return reference(x, weight.detach(), scale)

    row = row_of(forgets)
    assert row.label == "wrong"
    assert "gradient.weight is no tensor, eager gives a tensor" in row.note


def test_a_peer_without_a_backward_fails_in_one_sentence() -> None:
    def forward_only(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return reference(x, weight, scale)

    row = row_of(forward_only)
    assert row.label == "failed"
    assert row.note == "RuntimeError: its output[0] requires no gradient, so there is no backward to time"


def test_what_the_reference_does_not_differentiate_is_not_asked_for() -> None:
    def partly(x: Tensor, weight: Tensor, scale: float) -> Tensor:
        return torch.sin(x) * weight.detach() * scale

    assert row_of(partly, reference=lambda **inputs: partly(**inputs)).label == ""


def test_a_reference_without_a_backward_fails_all() -> None:
    def broken(x: Tensor, weight: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            return torch.sin(x)

    rows = rows_of(spec_of(reference=broken, peers={"peer": right}))
    assert [row.label for row in rows] == ["failed"] * 3
    assert {row.direction for row in rows} == {"backward"}
    assert "no output of its reference requires a gradient" in rows[0].note


def test_without_eager_nothing_says_which_gradients_arrive() -> None:
    rows = rows_of(spec_of(peers={"peer": right}), without=frozenset({"compile", "eager"}))
    assert [row.implementation for row in rows] == ["triton", "peer"]
    assert {row.label for row in rows} == {"not measured here"}


def test_strides_and_shared_memory_of_inputs_stay() -> None:
    def halves(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = make_inputs(case, dtype, device, seed)
        packed = torch.cat([inputs["x"], inputs["x"]], dim=1)
        return inputs | {"x": packed[:, :64]}

    seen: set[tuple[int, ...]] = set()

    def watches(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        seen.add(x.stride())
        return reference(x, weight, scale)

    assert row_of(watches, make_inputs=halves).label == ""
    assert seen == {(128, 1)}


@pytest.fixture
def graded(toy_workspace: Path) -> Path:
    """The toy workspace with a kernel "graded" that is differentiable."""
    plain = toy_workspace / "kernels" / "toy_kernel.py"
    plain.write_text(plain.read_text().replace("range(60)", "range(2)"))
    text = plain.read_text().replace('"toy_broken"', '"graded"')
    text = text.replace("    cost=", "    differentiable=True,\n    cost=")
    (toy_workspace / "kernels" / "graded.py").write_text(text)
    return toy_workspace


def test_the_command_line_chooses_the_direction(graded: Path) -> None:
    arguments = ["--rounds", "3", "--json", "--quiet", "--device", "cpu"]
    result = run("bench", "graded", "toy_broken", "--direction", "backward", *arguments)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert {(row["kernel"], row["direction"]) for row in rows} == {("graded", "backward")}
    assert all(row["seconds"] for row in rows if row["implementation"] == "eager"), rows


def test_a_backward_that_kills_its_process_is_a_result_and_forward_keeps_its_rows(graded: Path) -> None:
    text = (graded / "kernels" / "graded.py").read_text()
    deadly = """
import os


class Deadly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return reference(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        os._exit(7)


def deadly(x, weight):
    return Deadly.apply(x, weight)


SPEC = KernelSpec("""
    text = text.replace("SPEC = KernelSpec(", deadly).replace("    cost=", '    peers={"deadly": deadly},\n    cost=')
    (graded / "kernels" / "graded.py").write_text(text)
    result = run("bench", "graded", "--rounds", "3", "--json", "--quiet", "--device", "cpu")
    rows = {(row["direction"], row["implementation"]): row for row in json.loads(result.stdout)["results"]}
    assert rows["forward", "deadly"]["seconds"]
    assert rows["backward", "deadly"]["label"] == "failed"
    assert "exit code 7" in rows["backward", "deadly"]["note"]
    assert rows["backward", "eager"]["seconds"]
    shown = " ".join(run("report", json.loads(result.stdout)["run_id"]).stdout.split())
    assert "graded, ragged, float32, backward: " in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy_broken", "--direction", "backward"], "no kernel named is differentiable: toy_broken"),
        (["graded", "--direction", "backwards"], "direction"),
        (["toy", "--direction", "backward"], "--direction goes with kernels"),
        (["graded", "--direction", "forward", "--compile-only"], "--compile-only times nothing"),
    ],
)
def test_a_direction_that_cannot_be_is_one_sentence(graded: Path, arguments: list[str], said: str) -> None:
    result = run("bench", *arguments, "--device", "cpu", "--quiet")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.gpu
def test_a_backward_is_timed_on_a_gpu() -> None:
    spec = spec_of(
        cases=(CASE, Case("wide", rows=1 << 19)),
        peers={"in place": peer_of(InPlace), "off": peer_of(Off), "slow forward": peer_of(SlowForward)},
        backward_cost=lambda case, dtype: Cost(flops=1.0, bytes_read=3.0 * case["rows"] * 256, bytes_written=0.0),
    )
    rows = list(bench.bench_kernel(spec, device=GPU, directions=["backward"], rounds=5))
    for row in rows:
        print(row)
    assert [row.implementation for row in rows if row.label == "wrong"] == ["off", "off"]
    right_ones = [row for row in rows if row.label != "wrong"]
    assert all(row.seconds and "compared" not in row.note for row in right_ones), right_ones
    small = {row.cache for row in right_ones if row.case == "ragged"}
    assert small == {"cold", "cold, as called", "graph"}
    slow = next(row for row in right_ones if row.implementation == "slow forward")
    assert slow.seconds is not None
    assert slow.seconds < SlowForward.forward_seconds / 2


@pytest.mark.gpu
def test_a_wrong_gradient_in_a_replayed_graph_is_seen() -> None:
    capturing = torch.cuda.is_current_stream_capturing

    class OffInGraphs(Own):
        @classmethod
        def backward(cls, ctx: Any, scaled: Tensor, added: Tensor) -> tuple[Tensor | None, ...]:
            to_x, to_weight, _ = super().backward(ctx, scaled, added)
            assert to_x is not None
            return (to_x * 1.01 if capturing() else to_x), to_weight, None

    rows = bench.bench_kernel(
        spec_of(peers={"peer": peer_of(OffInGraphs)}),
        device=GPU,
        directions=["backward"],
        rounds=3,
        ceilings=ROOFS,
        without=frozenset({"compile", "triton"}),
    )
    labels = {(row.cache, row.implementation): row.label for row in rows}
    assert labels["graph", "peer"] == "wrong"
    assert labels["cold", "peer"] != "wrong"
