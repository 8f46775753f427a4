"""What the declarations of a norm with a linear layer cannot say: gradients alone, layouts, operators, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import bench, device, registry
from kernbench.spec import Case, Inputs, KernelSpec

DEVICE = device.resolve("auto")
SPECS = [registry.kernel(name).declaration for name in ("rms_norm_linear", "layer_norm_linear")]
BOTH = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
SMALL = Case("small", rows=6, inner=20, outputs=9, bias=1, gelu=1)


def drawn(spec: KernelSpec, case: Case = SMALL, dtype: torch.dtype = torch.float32) -> Inputs:
    return spec.make_inputs(case, dtype, DEVICE, 0)


def gradients(function: Any, inputs: Inputs) -> list[Tensor]:
    sources = [leaf for leaf in inputs.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    output = function(**inputs)
    upstream = torch.linspace(-1.0, 1.0, output.numel(), device=output.device, dtype=output.dtype)
    return list(torch.autograd.grad(output, sources, upstream.view(output.shape)))


@BOTH
@pytest.mark.parametrize("gelu", [False, True])
def test_each_input_alone_gets_its_gradient(spec: KernelSpec, gelu: bool) -> None:
    names = [name for name, leaf in drawn(spec).items() if isinstance(leaf, Tensor)]
    for chosen in names:
        inputs = {**drawn(spec), "gelu": gelu}
        for name in names:
            inputs[name] = inputs[name].detach().requires_grad_(name == chosen)
        torch.testing.assert_close(gradients(spec.optimized, inputs), gradients(spec.reference, inputs))


@BOTH
def test_rows_of_any_shape_come_back_in_it(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    # Rows that lie apart, as in a packed projection.
    inputs["x"] = torch.randn(2, 3, 40, device=DEVICE)[..., :20].requires_grad_()
    torch.testing.assert_close(spec.optimized(**inputs), spec.reference(**inputs))
    torch.testing.assert_close(gradients(spec.optimized, inputs), gradients(spec.reference, inputs))
    inputs["x"] = torch.randn(20, device=DEVICE)
    torch.testing.assert_close(spec.optimized(**inputs), spec.reference(**inputs))


@BOTH
def test_the_linear_layer_alone_is_timed_beside_it(spec: KernelSpec) -> None:
    case = Case("beside", rows=6, inner=40, outputs=33, bias=1, gelu=1)
    rows = bench.bench_kernel(
        spec, device=DEVICE, dtypes=["float32"], cases=[case], rounds=3, without=frozenset({"compile"})
    )
    found = {row.direction: row for row in rows if row.implementation == "linear without the norm"}
    assert found.keys() == {"forward", "backward"}
    for row in found.values():
        assert row.seconds is not None, row.note
        assert row.label == bench.LESS_EXACT
        assert "it is the linear layer alone" in row.note


@BOTH
@pytest.mark.parametrize("rows, outputs", [(0, 9), (3, 0), (0, 0)])
def test_without_rows_or_outputs_there_is_nothing_and_gradients_are_zero(
    spec: KernelSpec, rows: int, outputs: int
) -> None:
    inputs = drawn(spec, Case("empty", rows=rows, inner=20, outputs=outputs, bias=1, gelu=1))
    assert spec.optimized(**inputs).shape == (rows, outputs)
    torch.testing.assert_close(gradients(spec.optimized, inputs), gradients(spec.reference, inputs))


def test_a_layer_norm_keeps_its_digits_where_the_mean_is_large() -> None:
    spec = SPECS[1]
    inputs = drawn(spec, Case("steep", rows=4, inner=64, outputs=32, bias=0, gelu=0), torch.bfloat16)
    x = inputs["x"].detach()
    x[0] = 3.0
    x[1] += 300.0
    exact = {name: leaf.double() if isinstance(leaf, Tensor) else leaf for name, leaf in {**inputs, "x": x}.items()}
    expected = spec.reference(**exact)
    own = (spec.reference(**{**inputs, "x": x}).double() - expected).abs().max()
    assert (spec.optimized(**{**inputs, "x": x}).double() - expected).abs().max() <= 2 * own


@BOTH
def test_the_operator_is_one_for_torch(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    centred = "norm_bias" in inputs
    arguments = (inputs["x"], inputs["norm_weight"], inputs.get("norm_bias"), inputs["weight"], inputs["bias"])
    torch.library.opcheck(torch.ops.kernbench.norm_linear.default, (*arguments, 1e-2, centred, True, True))


@BOTH
def test_a_graph_of_gradients_is_refused(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(spec.optimized(**inputs).sum(), [inputs["x"]], create_graph=True)


@BOTH
@pytest.mark.parametrize(
    ("name", "replacement", "why"),
    [
        ("norm_weight", torch.ones(19), "one dtype and device"),
        ("weight", torch.ones(9, 21), "one dtype and device"),
        ("bias", torch.ones(8), "one dtype and device"),
        ("weight", torch.ones(9, 20, dtype=torch.float64), "one dtype and device"),
    ],
)
def test_what_does_not_fit_is_refused(spec: KernelSpec, name: str, replacement: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        spec.optimized(**{**drawn(spec), name: replacement.to(DEVICE)})


def test_a_row_too_long_for_registers_is_refused() -> None:
    x, scale, weight = torch.ones(1, 16385), torch.ones(16385), torch.ones(1, 16385)
    with pytest.raises(ValueError, match="at most 16384"):
        SPECS[0].optimized(x, scale, weight, None, 1e-5, False)
