"""What the declarations of add_rms_norm and swiglu cannot say: a gradient alone, layouts without a copy, operators."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import device, registry
from kernbench.spec import Case, Inputs, KernelSpec

DEVICE = device.resolve("auto")
ADD_RMS_NORM = registry.kernel("add_rms_norm").declaration
SWIGLU = registry.kernel("swiglu").declaration
SPECS = pytest.mark.parametrize("spec", [ADD_RMS_NORM, SWIGLU], ids=lambda spec: spec.name)


def module_of(spec: KernelSpec) -> ModuleType:
    return sys.modules[spec.optimized.__module__]


@SPECS
def test_rows_are_swept_at_sizes_that_are_built_as_cases(spec: KernelSpec) -> None:
    (swept,) = spec.sweeps
    assert (swept.size, swept.values) == ("rows", (1, 16, 512, 16384))
    for rows in swept.values:
        case = swept.case(rows)
        assert case["rows"] == rows
        assert case.sizes in [declared.sizes for declared in spec.cases]


def drawn(spec: KernelSpec, dtype: torch.dtype = torch.float32) -> Inputs:
    ragged = next(case for case in spec.cases if case.name == "ragged")
    return spec.make_inputs(ragged, dtype, DEVICE, 0)


def gradients(function: Callable[..., Any], inputs: Inputs, chosen: Callable[[Any], Tensor]) -> list[Tensor | None]:
    sources = [leaf for leaf in inputs.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    output = chosen(function(**inputs))
    upstream = torch.linspace(-1.0, 1.0, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad(output, sources, upstream, allow_unused=True))


@pytest.mark.parametrize("rows_and_dim", [(11, 61), (5, 301)], ids=["whole", "long"])
@pytest.mark.parametrize("index", [0, 1], ids=["normed alone", "summed alone"])
def test_a_single_result_of_add_rms_norm_has_gradients(index: int, rows_and_dim: tuple[int, int]) -> None:
    rows, dim = rows_and_dim
    inputs = ADD_RMS_NORM.make_inputs(Case("one result", rows=rows, dim=dim), torch.float32, DEVICE, 0)
    expected = gradients(ADD_RMS_NORM.reference, inputs, lambda results: results[index])
    got = gradients(ADD_RMS_NORM.optimized, inputs, lambda results: results[index])
    torch.testing.assert_close(got, expected)
    assert (got[2] is None) == (index == 1)


@SPECS
def test_without_gradients_for_some_inputs_the_others_get_theirs(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    frozen = next(name for name, leaf in reversed(inputs.items()) if isinstance(leaf, Tensor))
    inputs[frozen] = inputs[frozen].detach()

    def first(results: Any) -> Tensor:
        return results if isinstance(results, Tensor) else results[0]

    expected = gradients(spec.reference, inputs, first)
    torch.testing.assert_close(gradients(spec.optimized, inputs, first), expected)


@SPECS
def test_a_second_derivative_is_refused_rather_than_missing(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    results = spec.optimized(**inputs)
    output = results if isinstance(results, Tensor) else results[0]
    source = next(iter(inputs.values()))
    with pytest.raises(RuntimeError, match=f"{spec.name} has no second derivative"):
        torch.autograd.grad(output.sum(), source, create_graph=True)


@SPECS
def test_halves_of_a_packed_tensor_are_read_where_they_are(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = module_of(spec)._rows
    copied = []
    as_rows = rows.as_rows

    def recorded(tensor: Tensor) -> tuple[Tensor, int]:
        same, stride = as_rows(tensor)
        copied.append(same is not tensor)
        return same, stride

    inputs = drawn(spec)
    monkeypatch.setattr(rows, "as_rows", recorded)
    expected = spec.optimized(**inputs)
    first, second = list(inputs)[:2]
    halves = torch.cat([inputs[first], inputs[second]], dim=-1).unsqueeze(1).detach().chunk(2, dim=-1)
    got = spec.optimized(**{**inputs, first: halves[0], second: halves[1]})
    torch.testing.assert_close(got, _unsqueezed(expected), rtol=0, atol=0)
    assert copied == [False] * 4


def _unsqueezed(results: Any) -> Any:
    return results.unsqueeze(1) if isinstance(results, Tensor) else tuple(one.unsqueeze(1) for one in results)


BASE = torch.arange(4 * 6 * 8 * 10.0).view(4, 6, 8, 10)


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (BASE, 10),
        (BASE[..., :5], 10),
        (BASE[:, :, ::2], 20),
        (BASE[:1, :, :, 2:], 10),
        (BASE[:, :, :1, :5], 80),
        (BASE[:, :1], None),
        (BASE[::2], None),
        (BASE.transpose(1, 2), None),
        (BASE[..., ::2], None),
        (BASE.permute(3, 0, 1, 2), None),
        (BASE[:, :1].expand(4, 6, 8, 10), None),
        (BASE[:1, :1, :1].expand(4, 6, 8, 10), None),
        (BASE[..., :1].expand(4, 6, 8, 10), None),
        (BASE[0, 0, 0, ::2], None),
        (BASE[0, 0, 0], 10),
    ],
)
def test_rows_are_used_where_they_are_equally_far_apart(tensor: Tensor, stride: int | None) -> None:
    rows, got = module_of(SWIGLU)._rows.as_rows(tensor)
    assert (rows is tensor) == (stride is not None)
    assert torch.equal(rows, tensor)
    assert got == (stride or tensor.shape[-1])
    places = itertools.product(*map(range, rows.shape[:-1]))
    starts = [sum(at * step for at, step in zip(place, rows.stride(), strict=False)) for place in places]
    assert starts == [got * row for row in range(len(starts))]


@SPECS
def test_the_operator_is_sound_and_gives_what_the_short_way_gives(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    operator = getattr(torch.ops.kernbench, spec.name).default
    torch.library.opcheck(operator, tuple(inputs.values()))
    torch.testing.assert_close(operator(*inputs.values()), spec.optimized(**inputs), rtol=0, atol=0)


@SPECS
def test_compiled_gradients_are_those_of_the_short_way(spec: KernelSpec) -> None:
    inputs = drawn(spec)

    def first(results: Any) -> Tensor:
        return results if isinstance(results, Tensor) else results[0]

    compiled = torch.compile(spec.optimized, backend="aot_eager", fullgraph=True)
    expected = gradients(spec.optimized, inputs, first)
    torch.testing.assert_close(gradients(compiled, inputs, first), expected, rtol=0, atol=0)


@SPECS
def test_other_shapes_and_dtypes_are_refused_in_one_sentence(spec: KernelSpec) -> None:
    inputs = drawn(spec)
    second = list(inputs)[1]
    for wrong in (inputs[second][..., :-1], inputs[second].half()):
        with pytest.raises(ValueError, match=f"{spec.name} takes .*"):
            spec.optimized(**{**inputs, second: wrong})
    doubles = {name: leaf.double() if isinstance(leaf, Tensor) else leaf for name, leaf in inputs.items()}
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        spec.optimized(**doubles)
