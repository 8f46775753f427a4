"""What declarations of the rotating kernels cannot say: refusals, places beyond the cache, graphs, second gradients."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import device, registry
from kernbench.spec import Case, Inputs, KernelSpec

DEVICE = device.resolve("auto")
ROPE, NORM, CACHE = (registry.kernel(name).declaration for name in ("rope", "qk_norm_rope", "qk_norm_rope_cache"))


def inputs_of(spec: KernelSpec, name: str = "ragged", dtype: torch.dtype = torch.float32) -> Inputs:
    case = next(case for case in spec.cases if case.name == name)
    return spec.make_inputs(case, dtype, DEVICE, 0)


@pytest.mark.parametrize("spec", [ROPE, CACHE], ids=lambda spec: spec.name)
def test_tokens_are_swept_at_sizes_that_are_built_as_cases(spec: KernelSpec) -> None:
    (swept,) = spec.sweeps
    assert (swept.size, swept.values) == ("tokens", (1, 16, 512, 16384))
    for tokens in swept.values:
        case = swept.case(tokens)
        assert case["tokens"] == tokens
        assert case.sizes in [declared.sizes for declared in spec.cases]


@pytest.mark.parametrize("spec", [ROPE, NORM, CACHE], ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": lambda q: q.double()}, "takes float32, bfloat16 and float16"),
        ({"k": lambda k: k.half()}, "one dtype, head dimension and device; k is"),
        ({"cos": lambda cos: cos.half()}, "takes cos and sin both of torch.float32"),
        ({"sin": lambda sin: sin[:, :-1]}, r"takes cos and sin \[positions, 11\]"),
        ({"cos": lambda cos: cos[:1], "sin": lambda sin: sin[:1]}, "token|tables of 1 positions"),
        ({"q": lambda q: q[0]}, "takes q and k|takes q, k and v"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(spec: KernelSpec, changed: dict[str, Any], words: str) -> None:
    inputs = inputs_of(spec)
    with pytest.raises(ValueError, match=f"{spec.name} .*({words})"):
        spec.optimized(**inputs | {name: change(inputs[name]) for name, change in changed.items()})


@pytest.mark.parametrize("spec", [ROPE, NORM], ids=lambda spec: spec.name)
def test_tables_that_need_a_gradient_are_refused(spec: KernelSpec) -> None:
    inputs = inputs_of(spec)
    inputs["sin"].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient for cos and sin"):
        spec.optimized(**inputs)


def test_the_cache_kernel_says_that_it_has_no_gradient() -> None:
    inputs = inputs_of(CACHE)
    inputs["k"].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        CACHE.optimized(**inputs)
    with torch.no_grad():
        CACHE.optimized(**inputs)


def test_caches_of_other_strides_are_refused() -> None:
    inputs = inputs_of(CACHE)
    inputs["value_cache"] = inputs["value_cache"].transpose(1, 2).contiguous().transpose(1, 2).expand(2, 1, -1, -1)
    inputs["key_cache"] = inputs["key_cache"].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match="equal strides"):
        CACHE.optimized(**inputs)


@pytest.mark.parametrize("position", [-3, 9, 100, 2**40])
def test_beyond_the_cache_nothing_is_written_and_queries_are_nan(position: int) -> None:
    inputs = inputs_of(CACHE)
    length, tokens = inputs["key_cache"].shape[2], inputs["q"].shape[1]
    before = {name: inputs[name].clone() for name in CACHE.mutates}
    inputs["position"].fill_(position)
    rotated = CACHE.optimized(**inputs)
    inside = [0 <= position + token < length for token in range(tokens)]
    assert rotated.isnan().all(dim=(0, 1, 3)).tolist() == [not here for here in inside]
    assert not rotated[:, :, inside].isnan().any()
    written = [place in range(position, position + tokens) for place in range(length)]
    for name, old in before.items():
        assert ((inputs[name] != old).any(dim=(0, 1, 3))).tolist() == written


def test_a_token_at_a_time_fills_the_cache_as_all_at_once() -> None:
    """The position is read on the device: one tensor, advanced in place, serves every call."""
    whole, stepwise = inputs_of(CACHE), inputs_of(CACHE)
    whole["position"].zero_()
    stepwise["position"].zero_()
    expected, found = CACHE.optimized(**whole), []
    for token in range(whole["q"].shape[1]):
        given = {name: stepwise[name][:, token : token + 1] for name in ("q", "k", "v")}
        found.append(CACHE.optimized(**stepwise | given))
        stepwise["position"] += 1
    assert torch.equal(torch.cat(found, dim=2), expected)
    assert all(torch.equal(stepwise[name], whole[name]) for name in CACHE.mutates)


@pytest.mark.gpu
def test_one_captured_token_is_replayed_for_all_positions() -> None:
    whole, captured = inputs_of(CACHE, dtype=torch.bfloat16), inputs_of(CACHE, dtype=torch.bfloat16)
    whole["position"].zero_()
    expected = CACHE.optimized(**whole)
    token = captured | {name: captured[name][:, :1].clone() for name in ("q", "k", "v")}
    CACHE.optimized(**token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated = CACHE.optimized(**token)
        captured["position"] += 1
    captured["position"].zero_()
    found = []
    for index in range(whole["q"].shape[1]):
        for name in ("q", "k", "v"):
            token[name].copy_(captured[name][:, index : index + 1])
        graph.replay()
        found.append(rotated.clone())
    assert torch.equal(torch.cat(found, dim=2), expected)
    length = whole["q"].shape[1]
    assert all(torch.equal(captured[name][:, :, :length], whole[name][:, :, :length]) for name in CACHE.mutates)


def test_views_of_a_packed_projection_are_rotated_where_they_are() -> None:
    """Halves of one projection: strides that no dense tensor has; results lie in memory as [B, T, H, D]."""
    dim, heads = 16, (3, 1)
    packed = torch.randn(2, 5, sum(heads) * dim, device=DEVICE)
    q, k = (part.view(2, 5, -1, dim).transpose(1, 2) for part in packed.tensor_split([dim * heads[0]], 2))
    cos, sin = torch.rand(5, dim // 2, device=DEVICE), torch.rand(5, dim // 2, device=DEVICE)
    found = ROPE.optimized(q, k, cos, sin)
    for got, expected in zip(found, ROPE.reference(q, k, cos, sin), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.transpose(1, 2).is_contiguous()


def test_rope_has_second_derivatives() -> None:
    inputs = inputs_of(ROPE)

    def curvature(function: Any) -> tuple[Tensor, ...]:
        leaves = [inputs[name].detach().clone().requires_grad_() for name in ("q", "k")]
        outputs = function(*leaves, inputs["cos"], inputs["sin"])
        cubes = torch.cat([output.flatten() for output in outputs]).pow(3).sum()
        first = torch.autograd.grad(cubes, leaves, create_graph=True)
        return torch.autograd.grad(torch.cat([gradient.flatten() for gradient in first]).square().sum(), leaves)

    for got, expected in zip(curvature(ROPE.optimized), curvature(ROPE.reference), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_gives_gradients(output: int) -> None:
    for spec in (ROPE, NORM):
        gradients = []
        for function in (spec.optimized, spec.reference):
            inputs = inputs_of(spec)
            function(**inputs)[output].square().sum().backward()
            used = ("q", "k")[output]
            gradients.append(inputs[used].grad)
            other = inputs[("k", "q")[output]].grad
            assert other is None or not other.any()
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["token", "ragged"])
def test_operators_are_what_torch_compile_takes_them_for(name: str) -> None:
    rope, norm, cache = inputs_of(ROPE, name), inputs_of(NORM, name), inputs_of(CACHE, name)
    operators = torch.ops.kernbench
    torch.library.opcheck(operators.rope.default, (*rope.values(), False))
    torch.library.opcheck(operators.qk_norm_rope.default, tuple(norm.values()))
    torch.library.opcheck(operators.qk_norm_rope_cache.default, tuple(cache.values()))


def test_sizes_of_the_talker_are_one_tile_for_a_token() -> None:
    """A single token of the talker is three programs: queries, keys, values."""
    module = sys.modules[CACHE.optimized.__module__]
    case = Case("talker", batch=1, tokens=1, query_heads=16, key_heads=8, dim=128, spare=3, wide=0)
    inputs = CACHE.make_inputs(case, torch.float32, DEVICE, 0)
    plan = module._planned(*(inputs[name] for name in ("q", "k", "v", "key_cache")))
    assert plan.grid == (3,)


def before_partial_rotation(ctx: Any, q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None) -> None: ...


def with_partial_rotation(
    ctx: Any,
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    position_ids: Any = None,
    unsqueeze_dim: int = 1,
    rotary_dim: Any = None,
) -> None: ...


@pytest.mark.parametrize(("forward", "told"), [(before_partial_rotation, ()), (with_partial_rotation, (None, 1, 22))])
def test_liger_is_told_to_rotate_whole_heads(monkeypatch: pytest.MonkeyPatch, forward: Any, told: Any) -> None:
    """Tables of half the width of a head make its newer versions rotate half of the head."""
    given: list[tuple[Any, ...]] = []

    class LigerRopeFunction:
        @staticmethod
        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
            given.append((cos.shape, sin.shape, more))
            return q, k

    LigerRopeFunction.forward = forward  # type: ignore[attr-defined]
    stand_in = ModuleType("liger_kernel.ops.rope")
    stand_in.LigerRopeFunction = LigerRopeFunction  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rope", stand_in)
    peer = ROPE.peers["liger"]
    assert callable(peer)
    peer(**inputs_of(ROPE))
    assert given == [((1, 7, 11), (1, 7, 11), told)]
