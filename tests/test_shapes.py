"""Work from shapes: against hand-computed figures, and against PyTorch's own flop counter on real operators."""

import json
from pathlib import Path

import pytest
import torch
from kineto_builder import KinetoBuilder
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from kernbench.analysis import opwork, shapes
from kernbench.analysis.opwork import Tensor
from kernbench.record import Ceilings, RooflinePoint
from kernbench.traces import trace

US = 1e-6
HALF = "c10::BFloat16"


def given(*tensors: tuple[list[int], str]) -> list[Tensor | None]:
    dims, types = zip(*tensors, strict=True)
    return opwork.inputs((json.dumps(list(dims)), json.dumps(list(types))))


def points(path: Path, builder: KinetoBuilder, ceilings: Ceilings | None = None) -> dict[str, RooflinePoint]:
    return {point.op: point for point in shapes.roofline(trace.load(builder.write(path / "t.json")), ceilings)}


@pytest.mark.parametrize(
    ("name", "tensors", "flops", "read", "written"),
    [
        ("aten::mm", [([4, 8], HALF), ([8, 3], HALF)], 2 * 4 * 8 * 3, 2 * (32 + 24), 2 * 12),
        ("aten::addmm", [([3], HALF), ([4, 8], HALF), ([8, 3], HALF)], 192, 2 * (3 + 32 + 24), 24),
        ("aten::bmm", [([5, 4, 8], "float"), ([5, 8, 3], "float")], 5 * 192, 4 * 5 * (32 + 24), 4 * 60),
        ("aten::mv", [([4, 8], "float"), ([8], "float")], 64, 4 * 40, 16),
        ("aten::dot", [([8], "float"), ([8], "float")], 16, 64, 4),
        ("aten::linear", [([2, 4, 8], "float"), ([3, 8], "float"), ([3], "float")], 384, 4 * (64 + 24 + 3), 4 * 24),
        # A row broadcast over four, and a half raised to float: each input is read once at its own size.
        ("aten::add", [([4, 8], "float"), ([8], HALF), ([], "Scalar")], 32, 4 * 32 + 2 * 8, 4 * 32),
        ("aten::add_", [([4, 8], HALF), ([4, 8], "float"), ([], "Scalar")], 32, 32 * 6, 32 * 2),
        ("aten::lt", [([4, 8], "float"), ([4, 8], "float")], 32, 256, 32),
        ("aten::where", [([4, 8], "bool"), ([4, 8], HALF), ([], HALF)], 32, 32 + 64 + 2, 64),
        ("aten::copy_", [([4, 8], HALF), ([4, 8], "float"), ([], "Scalar")], 0, 128, 64),
        ("aten::zero_", [([4, 8], "double")], 0, 0, 256),
        ("aten::sum", [([4, 8], "float"), ([], "")], 32, 128, 0),
        ("aten::_softmax", [([4, 8], HALF), ([], "Scalar"), ([], "Scalar")], 5 * 32, 64, 64),
        (
            "aten::native_layer_norm",
            [([4, 8], "float"), ([], "ScalarList"), ([8], "float"), ([8], "float"), ([], "Scalar")],
            7 * 32,
            4 * (32 + 8 + 8),
            128,
        ),
        # Ten rows of a table of a thousand are touched, not the table.
        ("aten::embedding", [([1000, 8], "float"), ([10], "long int")], 0, 80 + 320, 320),
        # Two heads: queries of 5, keys of 7, widths 4 and 6; two flops for each of 4 + 6 per pair.
        (
            "aten::_scaled_dot_product_flash_attention",
            [([1, 2, 5, 4], HALF), ([1, 2, 7, 4], HALF), ([1, 2, 7, 6], HALF)],
            2 * 2 * 5 * 7 * 10,
            2 * (40 + 56 + 84),
            2 * 60,
        ),
        # The kernel's own operator has the sequence before the heads.
        (
            "aten::_flash_attention_forward",
            [([1, 5, 2, 4], HALF), ([1, 7, 2, 4], HALF), ([1, 7, 2, 6], HALF)],
            2 * 2 * 5 * 7 * 10,
            2 * (40 + 56 + 84),
            2 * 60,
        ),
    ],
)
def test_work_is_what_one_counts_by_hand(
    name: str, tensors: list[tuple[list[int], str]], flops: float, read: float, written: float
) -> None:
    found = opwork.work(name, given(*tensors))
    assert found is not None
    assert (found.flops, found.bytes_read, found.bytes_written) == (flops, read, written)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("aten::mm", [([4, 8], "float"), ([7, 3], "float")]),
        ("aten::mm", [([4, 8], "float")]),
        ("aten::bmm", [([5, 4, 8], "float"), ([6, 8, 3], "float")]),
        ("aten::add", [([4, 8], "float"), ([3], "float")]),
        ("aten::add", [([4, 8], "Undefined"), ([4, 8], "float")]),
        ("aten::convolution", [([1, 3, 8, 8], "float"), ([4, 3, 3, 3], "float")]),
        ("aten::roll", [([4, 8], "float")]),
    ],
)
def test_shapes_that_do_not_fit_have_no_work(name: str, tensors: list[tuple[list[int], str]]) -> None:
    assert opwork.work(name, given(*tensors)) is None


@pytest.mark.parametrize("shape", [("[[4", "[]"), ("{}", "[]"), ("[[4], [4]]", '["float"]'), ("[[4.5]]", '["float"]')])
def test_damaged_shapes_are_no_tensors(shape: tuple[str, str]) -> None:
    assert all(one is None for one in opwork.inputs(shape))


def test_two_halves_of_different_kinds_give_a_float() -> None:
    assert opwork.promoted([Tensor((2,), "float16"), Tensor((2,), "bfloat16")]) == "float32"
    assert opwork.promoted([Tensor((2,), "bfloat16"), Tensor((), "float64")]) == "bfloat16"
    assert opwork.promoted([Tensor((2,), "int64"), Tensor((2,), "float16")]) == "float16"


def test_flops_agree_with_pytorchs_own_counter(tmp_path: Path) -> None:
    """Products, convolution and attention of a real step on the CPU, forward and backward."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(2),
        torch.nn.Linear(16, 24),
        torch.nn.GELU(),
    )
    image = torch.randn(2, 3, 8, 8)
    heads = torch.randn(2, 4, 6, 16, requires_grad=True)

    def step() -> None:
        batch = model(image)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.autograd.backward([torch.bmm(batch, batch.transpose(1, 2)).sum() + batch.sum(), attended.sum()])

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    recorded.export_chrome_trace(str(tmp_path / "cpu.json"))
    found = shapes.roofline(trace.load(tmp_path / "cpu.json"), None, limit=1000)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}

    def ours(*names: str) -> float:
        return sum(point.flops * point.calls_per_step for point in found if point.op.removeprefix("aten::") in names)

    assert ours("bmm") == counted["aten.bmm"] > 0
    # A linear layer is a product with a bias, which the counter sees below it.
    assert ours("linear", "addmm", "mm") == counted["aten.addmm"] + counted["aten.mm"] > 0
    convolving = {point.op.removeprefix("aten::") for point in found if "conv" in point.op} - {"convolution_backward"}
    assert ours(*convolving) == counted["aten.convolution"] > 0
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    # The first convolution needs no gradient of its image, which the trace does not tell: counted with it.
    assert ours("convolution_backward") == 2 * counted["aten.convolution_backward"] > 0
    # PyTorch's counter does not know the CPU's fused attention: 2 batches, 4 heads, 6 by 6 pairs, widths 16 and 16.
    assert ours(attention) == 2 * 2 * 4 * 36 * 32
    assert ours(f"{attention}_backward") == 2.5 * ours(attention)


def with_kernel(builder: KinetoBuilder, op: str, start: float, kernel_us: float, dims: list[list[int]]) -> None:
    builder.op(op, start, start + 20, dims=dims)
    builder.launch("kernel", start + 5, start + 30, start + 30 + kernel_us)


def test_a_point_has_its_rate_against_the_roofs(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        begin = step * 1000
        builder.step(step, begin, begin + 1000)
        with_kernel(builder, "aten::mm", begin, 100, [[1000, 1000], [1000, 1000]])
        with_kernel(builder, "aten::mm", begin + 200, 100, [[1000, 1000], [1000, 1000]])
        with_kernel(builder, "aten::exp", begin + 400, 50, [[1000, 1000]])
    ceilings = Ceilings(copy_bytes_per_second=320e9, matmul_flops_per_second={"float32": 40e12})
    found = points(tmp_path, builder, ceilings)
    product, pointwise = found["aten::mm"], found["aten::exp"]
    assert product.calls_per_step == 2
    assert product.seconds_per_step == pytest.approx(200 * US)
    assert (product.flops, product.bytes) == (2e9, 12e6)
    assert (product.bound, pointwise.bound) == ("compute", "memory")
    # 2e9 flops in 100 us are half of 40e12 per second; 8e6 bytes in 50 us are half of 320e9.
    assert product.share_of_roof == pytest.approx(0.5)
    assert pointwise.share_of_roof == pytest.approx(0.5)
    assert list(found) == ["aten::mm", "aten::exp"]


def test_without_roofs_there_is_no_share_and_no_guess(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    with_kernel(builder, "aten::mm", 0, 100, [[1000, 1000], [1000, 1000]])
    with_kernel(builder, "aten::exp", 200, 3, [[10, 10]])
    found = points(tmp_path, builder)
    assert found["aten::mm"].share_of_roof is None
    assert (found["aten::mm"].bound, found["aten::exp"].bound) == ("unknown", "launch")


def test_above_the_roof_is_said(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    with_kernel(builder, "aten::exp", 0, 10, [[1000, 1000]])
    point = points(tmp_path, builder, Ceilings(copy_bytes_per_second=320e9))["aten::exp"]
    assert point.share_of_roof == pytest.approx(2.5)
    assert "above the measured copy roof" in point.note


def test_kernels_count_for_the_innermost_operator_that_is_understood(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::linear", 0, 40, dims=[[4, 8], [3, 8], [3]])
    builder.op("aten::addmm", 5, 35, dims=[[3], [4, 8], [8, 3]])
    builder.op("library::helper", 6, 30, dims=[[4, 8]])
    builder.launch("gemm", 10, 50, 70)
    builder.launch("reduce", 20, 70, 75)
    found = points(tmp_path, builder)
    assert list(found) == ["aten::addmm"]
    assert found["aten::addmm"].calls_per_step == 1
    assert found["aten::addmm"].seconds_per_step == pytest.approx(25 * US)
    assert found["aten::addmm"].shapes == "[3], [4, 8], [8, 3]"


def test_a_convolutions_result_is_what_follows_it(tmp_path: Path) -> None:
    """Stride and padding are not recorded; what normalises the result tells its size."""
    builder = KinetoBuilder()
    convolved = [[2, 3, 8, 8], [4, 3, 3, 3], [4]]
    builder.op("aten::cudnn_convolution", 0, 20, dims=convolved)
    builder.launch("conv", 5, 30, 60)
    with_kernel(builder, "aten::relu", 30, 20, [[2, 4, 4, 4]])
    point = points(tmp_path, builder)["aten::cudnn_convolution"]
    assert point.flops == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert point.bytes == 4 * (2 * 3 * 64 + 4 * 27 + 4 + 2 * 4 * 16)


def test_without_shapes_there_are_no_points(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("aten::mm", 0, 20)
    builder.launch("gemm", 5, 30, 60)
    assert points(tmp_path, builder) == {}
