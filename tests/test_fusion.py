"""Fusion candidates of traces with planted sequences. Times in the traces are in microseconds."""

from pathlib import Path

import pytest
from kineto_builder import AUTOGRAD, KinetoBuilder

from kernbench.analysis import fusion, sequences
from kernbench.analysis.sequences import Unit
from kernbench.record import Ceilings, FusionCandidate, LineLog, SourceLine
from kernbench.traces import trace

US = 1e-6
ADD, MUL, EXP = "vectorized_elementwise_add", "vectorized_elementwise_mul", "elementwise_kernel_exp"
GEMM = "sm90_gemm"


def found(tmp_path: Path, builder: KinetoBuilder, ceilings: Ceilings | None = None) -> list[FusionCandidate]:
    return fusion.fusion(trace.load(builder.write(tmp_path / "trace.json")), None, ceilings)


def chain(builder: KinetoBuilder, start: float, names: list[str], *, gap: float = 5, dims: bool = False) -> float:
    """Kernels of 10 us, ``gap`` apart, each launched 5 us ahead by an operator of its own; returns when they end."""
    for name in names:
        shape = [[1000, 1000], [1000, 1000]] if dims else None
        builder.op("aten::add", start, start + 4, dims=shape)
        builder.launch(name, start + 1, start + 5, start + 15, call_us=2)
        start += 10 + gap
    return start - gap + 5


def test_a_chain_is_one_candidate_and_saves_its_gaps(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        builder.step(step, step * 1000, step * 1000 + 1000)
        end = chain(builder, step * 1000, [GEMM, ADD, MUL, EXP, GEMM])
        chain(builder, end + 200, [GEMM, ADD, MUL, EXP])
    [only] = found(tmp_path, builder)
    assert only.kernels == [ADD, MUL, EXP]
    assert only.repeats_per_step == 2
    assert only.seconds_per_step == pytest.approx(2 * 40 * US)
    assert only.saving_seconds_per_step == pytest.approx((2 * 10 * US, 2 * 10 * US))
    assert only.bytes_saved_per_step is None
    assert only.op == "aten::add"
    assert "alone" in only.basis


def test_shapes_add_the_tensors_between_the_kernels(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    chain(builder, 0, [ADD, MUL, EXP], dims=True)
    [only] = found(tmp_path, builder, Ceilings(copy_bytes_per_second=4e12))
    # Two tensors of 4 MB are neither written nor read: 16 MB at 4 TB/s are 4 us, beside two gaps of 5 us.
    assert only.bytes_saved_per_step == 16e6
    assert only.saving_seconds_per_step == pytest.approx((10 * US, 14 * US))
    assert "measured copy rate" in only.basis
    [unmeasured] = found(tmp_path, builder)
    # At their own rate (36 MB in 30 us) the 16 MB would take 13.3 us.
    assert unmeasured.saving_seconds_per_step == pytest.approx((10 * US, (10 + 30 * 16 / 36) * US))


def test_one_kernel_takes_at_least_the_longest_of_those_it_replaces(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    chain(builder, 0, [ADD, MUL], dims=True)
    [only] = found(tmp_path, builder, Ceilings(copy_bytes_per_second=1e11))
    # 8 MB would take 80 us at this roof, but the kernels took 10 each.
    assert only.saving_seconds_per_step == pytest.approx((5 * US, 15 * US))


def test_other_shapes_share_no_tensor(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    for start, rows in ((0, 1000), (15, 500)):
        builder.op("aten::exp", start, start + 4, dims=[[rows, 1000]])
        builder.launch(EXP, start + 1, start + 5, start + 15, call_us=2)
    [only] = found(tmp_path, builder)
    assert only.saving_seconds_per_step == pytest.approx((5 * US, 5 * US))
    assert "none of them reads" in only.basis


def between_two_kernels(builder: KinetoBuilder, case: str) -> None:
    builder.launch(ADD, 0, 5, 15)
    if case == "a wait of the host":
        builder.call("cudaStreamSynchronize", 6, 16)
    if case == "a product":
        builder.launch(GEMM, 8, 15, 17)
    if case == "the optimizer's step":
        builder.annotation("Optimizer.step#SGD.step", 16, 40)
    start = 150.0 if case == "a long pause" else 17.0
    stream = 8 if case == "another stream" else 7
    name = "triton_poi_fused_mul" if case == "a kernel of the compiler" else MUL
    if case == "the backward pass":
        builder.op("aten::mul", 1, 2, sequence=3)
        builder.op("autograd::engine::evaluate_function: MulBackward0", 16, 40, AUTOGRAD, sequence=3, backward=True)
    tid = AUTOGRAD if case == "the backward pass" else 100
    builder.launch(name, start, start + 5, start + 15, stream=stream, tid=tid)


@pytest.mark.parametrize(
    "case",
    [
        "a wait of the host",
        "a product",
        "the optimizer's step",
        "a long pause",
        "another stream",
        "a kernel of the compiler",
        "the backward pass",
    ],
)
def test_what_stands_between_kernels_keeps_them_apart(tmp_path: Path, case: str) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    between_two_kernels(builder, case)
    assert found(tmp_path, builder) == []


def test_nothing_between_them_joins_them(tmp_path: Path) -> None:
    """What the test above varies is a candidate as it stands."""
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    between_two_kernels(builder, "nothing")
    assert [one.kernels for one in found(tmp_path, builder)] == [[ADD, MUL]]


def test_steps_do_not_join(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(3):
        builder.step(step, step * 20, step * 20 + 20)
        builder.launch(ADD, step * 20, step * 20 + 5, step * 20 + 15)
    assert found(tmp_path, builder) == []


def test_a_pattern_is_found_in_a_long_run(tmp_path: Path) -> None:
    """An optimizer without foreach: the same three kernels for each of fifty tensors."""
    builder = KinetoBuilder()
    builder.step(0, 0, 10_000)
    chain(builder, 0, [ADD, MUL, EXP] * 50)
    [only] = found(tmp_path, builder)
    assert only.kernels == [ADD, MUL, EXP]
    assert only.repeats_per_step == 50
    assert only.saving_seconds_per_step == pytest.approx((50 * 10 * US, 50 * 10 * US))


def test_kernels_all_alike_are_one_row(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    chain(builder, 0, [ADD] * 30)
    [only] = found(tmp_path, builder)
    assert only.kernels == [f"{ADD} × 30"]
    assert only.repeats_per_step == 1


def test_gaps_too_small_to_matter_are_not_worth_a_line(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100_000)
    chain(builder, 0, [ADD, MUL])
    assert found(tmp_path, builder) == []


def test_a_candidate_has_its_line(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    chain(builder, 0, [ADD, MUL])
    here = SourceLine(file="model.py", line=7, text="y = x * a + b")
    log = LineLog(steps=1, lines=[here], op_lines={"aten::add": [0, 0]})
    [only] = fusion.fusion(trace.load(builder.write(tmp_path / "trace.json")), log, None)
    assert only.source == here


def test_a_trace_of_the_device_alone_has_candidates_too(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.on_device("kernel", ADD, 0, 10, 1)
    builder.on_device("kernel", MUL, 15, 25, 2)
    [only] = found(tmp_path, builder)
    assert only.saving_seconds_per_step == pytest.approx((5 * US, 5 * US))
    assert (only.source, only.op) == (None, "")


def test_a_cpu_has_none(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::add", 0, 10)
    builder.op("aten::mul", 10, 20)
    assert found(tmp_path, builder) == []


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("", []),
        ("A", []),
        ("AB", [Unit(0, 2)]),
        ("AAA", [Unit(0, 3)]),
        ("AAAA", [Unit(0, 4, alike=True)]),
        ("ABAB", [Unit(0, 4)]),
        ("ABABAB", [Unit(0, 2), Unit(2, 4), Unit(4, 6)]),
        ("XABABABY", [Unit(1, 3), Unit(3, 5), Unit(5, 7)]),
        ("XYABABAB", [Unit(0, 2), Unit(2, 4), Unit(4, 6), Unit(6, 8)]),
        ("XAAAAYZ", [Unit(1, 5, alike=True), Unit(5, 7)]),
        ("AABAABAABC", [Unit(0, 3), Unit(3, 6), Unit(6, 9)]),
    ],
)
def test_runs_are_cut_into_patterns(run: str, expected: list[Unit]) -> None:
    assert sequences.units([ord(letter) for letter in run]) == expected


def test_a_chain_without_pattern_is_cut_where_one_kernel_would_do_too_much() -> None:
    found = sequences.units(list(range(60)))
    assert [(unit.begin, unit.end) for unit in found] == [(0, 24), (24, 48), (48, 60)]
