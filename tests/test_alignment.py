"""Products on kernels for unaligned rows, in simulated steps whose savings are worked out by hand. Times are in us."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis import findings
from kernbench.analysis.whole import enrich
from kernbench.record import Finding, LineLog, SourceLine
from kernbench.traces import trace

US = 1e-6
STEPS = 2
UNALIGNED = "cutlass_75_tensorop_bf16_s1688gemm_bf16_128x128_{}_align1"
ALIGNED = "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNN"
OTHER = "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>(int)"


@dataclass(frozen=True)
class Call:
    """One operator, "" for none, with its kernel; ``dims`` are its inputs', None where shapes are not recorded."""

    kernel: str
    length: float
    dims: tuple[tuple[int, ...], ...] | None = None
    op: str = "aten::mm"
    type: str = "c10::BFloat16"


def full_name(cutlass: str) -> str:
    return f"void cutlass::Kernel2<{cutlass}>({cutlass}::Params)"


def unaligned(layout: str, length: float, *dims: tuple[int, ...]) -> Call:
    return Call(full_name(UNALIGNED.format(layout)), length, dims or None)


def filler(length: float) -> Call:
    return Call(OTHER, length, op="aten::add")


# 2 * 1024**3 flops in 10 us.
FAST = Call(ALIGNED, 10, ((1024, 1024), (1024, 1024)))
# One column more, on a kernel for unaligned rows: 100 us, of which the rate of FAST needs 10 * 1025 / 1024.
SLOW = unaligned("tn", 100, (1024, 1024), (1024, 1025))
SAVED = (100 - 10 * 1025 / 1024) * US


def load(path: Path, *calls: Call) -> trace.Trace:
    """Steps in which the host launches all calls at once and the device works them off without a pause."""
    builder = KinetoBuilder()
    now = 0.0
    for number in range(STEPS):
        begin, busy = now, now + 20
        for call in calls:
            dims = [list(one) for one in call.dims] if call.dims is not None else None
            if call.op:
                builder.op(call.op, now, now + 1, dims=dims, types=[call.type] * len(dims or ()))
            builder.launch(call.kernel, now + 0.1, busy, busy + call.length, call_us=0.5)
            busy += call.length
            now += 1
        now = busy
        builder.step(number, begin, now)
    return trace.load(builder.write(path / "trace.json"))


def found(path: Path, *calls: Call, lines: LineLog | None = None) -> list[Finding]:
    return [one for one in findings.findings(load(path, *calls), lines=lines) if one.cause == "unaligned product"]


def test_a_product_costs_what_the_best_aligned_one_would_not_have_taken(tmp_path: Path) -> None:
    slower = Call(ALIGNED, 40, ((2048, 1024), (1024, 1024)))
    small_and_fast = Call(ALIGNED, 0.1, ((256, 256), (256, 256)))
    off_tensor_cores = Call("ampere_sgemm_128x64_nn", 1, ((1024, 1024), (1024, 2048)))
    of_another_type = Call(ALIGNED, 1, ((1024, 1024), (1024, 4096)), type="c10::Half")
    calls = (FAST, slower, small_and_fast, off_tensor_cores, of_another_type, SLOW, filler(100))
    loaded = load(tmp_path, *calls)
    first, *others = findings.findings(loaded)
    assert first.cause == "unaligned product"
    assert first.seconds_per_step == pytest.approx(SAVED, rel=1e-6)
    assert first.sentence == (
        "aten::mm multiplies [1024, 1024] by [1024, 1025] on a kernel for unaligned rows (cutlass_75…align1), as 1025 "
        "is no multiple of 8; at the rate of this trace's aligned products a step would be up to 90 µs (33 %) shorter."
    )
    assert first.advice.startswith("Pad 1025 to 1032 (the next multiple of 8);")
    assert findings.headline(loaded, [first, *others]).startswith(f"Unaligned product: {first.sentence}")


@pytest.mark.parametrize(
    "name",
    [
        "cutlass_75_tensorop_bf16_s1688gemm_bf16_128x128_tn_align1",
        "cutlass_75_tensorop_bf16_s1688gemm_bf16_256x128_nn_align1",
        "cutlass_75_tensorop_bf16_s1688gemm_bf16_128x256_nt_align1",
        "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_64x3_tn_align2",
        "cutlass_80_wmma_tensorop_f16_s161616gemm_f16_32x32_64x1_tn_align4",
        "cutlass_75_tensorop_h1688gemm_64x64_nn_align4",
        "cutlass_80_tensorop_s16816gemm_f16_128x128_64x3_tn_align2",
        "cutlass_80_tensorop_s1688gemm_128x128_16x5_nn_align2",
        "cutlass_80_tensorop_i16832gemm_s8_128x128_64x3_tn_align4",
    ],
)
def test_names_of_kernels_for_unaligned_rows(name: str, tmp_path: Path) -> None:
    (only,) = found(tmp_path, Call(full_name(name), 100), filler(100))
    assert only.seconds_per_step == pytest.approx(100 * US)


@pytest.mark.parametrize(
    "name",
    [
        "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8",
        "cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8",
        "cutlass3x_sm90_tensorop_s64x128x16gemm_bf16_bf16_f32_void_bf16_128x128x64_2x1x1_0_tnn_align8_warpspecialized",
        "cutlass_80_tensorop_s1688gemm_256x64_16x4_nn_align4",
        "cutlass_80_tensorop_s1688tf32gemm_256x64_16x4_nn_align4",
        "cutlass_80_simt_sgemm_128x32_8x5_nn_align1",
        "cutlass_80_tensorop_d884gemm_32x32_16x5_nn_align1",
        "cutlass_80_tensorop_z884gemm_32x16_16x3_nn_align1",
        "cutlass_80_tensorop_i16832gemm_s8_128x128_64x3_tn_align16",
        "cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128_32x4_nhwc_align2",
        "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16_aligna2_alignc2",
        "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x8_stage3_warpsize1x4x1_ffma_aligna4_alignc4",
    ],
)
def test_names_of_kernels_that_have_their_alignment_or_no_other_form(name: str, tmp_path: Path) -> None:
    assert found(tmp_path, Call(full_name(name), 100, ((1025, 1025), (1025, 1025))), filler(100)) == []


def test_without_shapes_all_of_the_time_is_the_most_that_can_be_saved(tmp_path: Path) -> None:
    (only,) = found(tmp_path, Call(ALIGNED, 10), unaligned("tn", 100), filler(70))
    assert only.seconds_per_step == pytest.approx(100 * US)
    assert only.sentence == (
        "aten::mm multiplies on a kernel for unaligned rows (cutlass_75…align1), as some size is no multiple of 8; a "
        "step would be up to 100 µs (50 %) shorter, all of its time, as this trace has no shapes to compare it by."
    )
    assert "record_shapes=True" in only.advice


def test_a_product_that_no_operator_launched_is_named_by_its_launch(tmp_path: Path) -> None:
    (only,) = found(tmp_path, FAST, Call(full_name(UNALIGNED.format("tn")), 100, op=""), filler(70))
    assert only.sentence.startswith("cudaLaunchKernel multiplies on a kernel for unaligned rows")


def test_without_a_large_aligned_product_all_of_the_time_is_the_most_that_can_be_saved(tmp_path: Path) -> None:
    (only,) = found(tmp_path, Call(ALIGNED, 10, ((256, 256), (256, 256))), SLOW, filler(70))
    assert only.seconds_per_step == pytest.approx(100 * US)
    assert "as 1025 is no multiple of 8; a step would be up to 100 µs (50 %) shorter, all of its time" in only.sentence
    assert only.sentence.endswith("as this trace has no large aligned product to compare it by.")


def test_all_products_of_one_size_are_one_finding(tmp_path: Path) -> None:
    """Forward, and both gradients: each of them stores rows of 50257 elements, transposed or not."""
    forward = unaligned("tn", 600, (1024, 768), (768, 50257))
    of_input = unaligned("nn", 500, (1024, 50257), (50257, 768))
    of_weight = unaligned("nt", 500, (50257, 1024), (1024, 768))
    place = SourceLine(file="model.py", line=7, text="logits = head(x)")
    log = LineLog(steps=1, lines=[place], op_lines={"aten::mm": [-1, -1, 0, -1]})
    (only,) = found(tmp_path, FAST, of_input, forward, of_weight, filler(1000), lines=log)
    each = 10 * 1024 * 768 * 50257 / 1024**3
    assert only.seconds_per_step == pytest.approx((600 + 500 + 500 - 3 * each) * US, rel=1e-6)
    assert only.source == place
    assert only.sentence.startswith(
        "3 products a step run on kernels for unaligned rows, as 50257 is no multiple of 8; the costliest is where "
        "model.py:7 `logits = head(x)` multiplies [1024, 768] by [768, 50257] (cutlass_75…align1); at the rate of "
    )
    assert only.advice.startswith("Pad 50257 to 50304 (the next multiple of 64);")


def test_each_size_that_matters_has_its_finding_and_the_others_share_one(tmp_path: Path) -> None:
    def of(columns: int, length: float) -> Call:
        return unaligned("nn", length, (1024, 1024), (1024, columns))

    found_now = found(
        tmp_path, FAST, of(1025, 100), of(1027, 60), of(1029, 30), of(1031, 28), of(1033, 27), of(1035, 26), filler(800)
    )
    told = [one.sentence.split(", as ")[1].split(" multiple")[0] for one in found_now]
    assert told == ["1025 is no", "1029, 1031, 1033 and 1 more are no", "1027 is no"]
    needed = 10 * (1029 + 1031 + 1033 + 1035) / 1024
    assert found_now[1].seconds_per_step == pytest.approx((30 + 28 + 27 + 26 - needed) * US, rel=1e-6)
    assert found_now[1].sentence.startswith("4 products a step")


@pytest.mark.parametrize(
    ("layout", "left", "right", "op", "at_fault"),
    [
        ("nn", (2047, 1024), (1024, 1024), "aten::mm", ""),
        ("nt", (2047, 1024), (1024, 1024), "aten::mm", "2047 is"),
        ("nt", (1024, 2047), (2047, 1024), "aten::mm", ""),
        ("nn", (1024, 2047), (2047, 1024), "aten::mm", "2047 is"),
        ("tt", (1024, 2047), (2047, 1024), "aten::mm", "2047 is"),
        ("nn", (16, 196, 196), (16, 196, 1000), "aten::bmm", "196 is"),
        ("tn", (16, 512, 197), (16, 197, 515), "aten::bmm", "515 and 197 are"),
    ],
)
def test_only_lengths_of_rows_as_they_are_stored_are_at_fault(
    layout: str, left: tuple[int, ...], right: tuple[int, ...], op: str, at_fault: str, tmp_path: Path
) -> None:
    slow = Call(full_name(UNALIGNED.format(layout)), 100, (left, right), op=op)
    result = found(tmp_path, FAST, slow, filler(100))
    assert len(result) == bool(at_fault)
    assert all(f", as {at_fault} no multiple" in one.sentence for one in result)


def test_a_bias_is_no_operand(tmp_path: Path) -> None:
    added = Call(full_name(UNALIGNED.format("tn")), 100, ((1025,), (1024, 1024), (1024, 1025)), op="aten::addmm")
    (only,) = found(tmp_path, FAST, added, filler(100))
    assert only.sentence.startswith("aten::addmm multiplies [1024, 1024] by [1024, 1025] on a kernel")


def test_what_alignment_may_not_be_to_blame_for_is_no_finding(tmp_path: Path) -> None:
    small = unaligned("nn", 100, (64, 512), (512, 1025))
    short_and_many = [unaligned("nn", 4) for _ in range(25)]
    convolution = Call(full_name(UNALIGNED.format("nn")), 100, op="aten::cudnn_convolution")
    no_slower = unaligned("nn", 9, (1024, 1024), (1024, 1025))
    little = unaligned("nn", 14, (1024, 1024), (1024, 1025))
    for calls in ([small], short_and_many, [convolution], [no_slower], [little]):
        assert found(tmp_path, FAST, *calls, filler(300)) == []
    assert [one.cause for one in findings.findings(load(tmp_path, FAST, little, filler(300)))] == ["device-bound"]


def test_a_detailed_trace_of_the_step_tells_the_shapes(tmp_path: Path) -> None:
    timed = load(tmp_path, Call(ALIGNED, 10), unaligned("tn", 100), filler(70))
    detailed = load(tmp_path, FAST, SLOW, filler(70))
    (only,) = enrich(timed, None, None, (), shaped=detailed).findings
    assert only.seconds_per_step == pytest.approx(SAVED, rel=1e-6)
    on_cpu = KinetoBuilder()
    on_cpu.step(0, 0, 10)
    on_cpu.op("aten::mm", 0, 10, dims=[[1024, 1024], [1024, 1025]])
    without_device = trace.load(on_cpu.write(tmp_path / "cpu.json"))
    (only,) = findings.findings(timed, shaped=without_device)
    assert only.seconds_per_step == pytest.approx(100 * US)


def test_each_call_counts_and_none_takes_from_what_another_saves(tmp_path: Path) -> None:
    no_slower = unaligned("nn", 9, (1024, 1024), (1024, 1025))
    (only,) = found(tmp_path, FAST, SLOW, SLOW, no_slower, filler(100))
    assert only.seconds_per_step == pytest.approx(2 * SAVED, rel=1e-6)
    assert only.sentence.startswith("3 products a step")


def test_small_ones_share_a_finding_only_with_their_like(tmp_path: Path) -> None:
    sized = [unaligned("nn", 10, (1024, 1024), (1024, columns)) for columns in (1025, 1027)]
    (only,) = found(tmp_path, *sized, unaligned("nn", 10), filler(450))
    assert only.seconds_per_step == pytest.approx(20 * US)
    assert "as 1025 and 1027 are no multiples of 8" in only.sentence
