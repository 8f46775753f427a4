"""Generated inputs find kernels that are wrong on them alone, say so in few words, and leave right ones alone."""

import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch.nn import functional

from kernbench import device, registry
from kernbench.errors import KernbenchError
from kernbench.parity import examples, generated, patterns
from kernbench.parity.examples import Domain, Filling, Theme
from kernbench.parity.roundoff import Roundoff
from kernbench.parity.subject import Subject
from kernbench.spec import Case, Cost, KernelSpec, Sizes, Tolerance, Values

device.resolve("auto")
CPU = torch.device("cpu")
ADAMW = registry.kernel("fused_adamw").declaration
BLOCK = 64
MOST = 200


def cost(case, dtype):
    elements = math.prod(max(1, size) for size in case.sizes.values())
    return Cost(flops=elements, bytes_read=elements * dtype.itemsize, bytes_written=elements * dtype.itemsize)


def x_inputs(case, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(case["rows"], case["dim"], generator=generator).to(device, dtype).requires_grad_()}


def xw_inputs(case, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.rand(case["dim"], generator=generator) + 0.5
    return x_inputs(case, dtype, device, seed) | {"weight": weight.to(device, dtype).requires_grad_()}


def declared(reference, optimized, make_inputs=x_inputs, **options):
    options = {
        "cases": (Case("ragged", rows=5, dim=37),),
        "tolerance": {"float32": Tolerance()},
        "sizes": {"rows": Sizes(most=9), "dim": Sizes(least=1, most=MOST, block=BLOCK)},
    } | options
    return KernelSpec(
        name="toy", reference=reference, optimized=optimized, make_inputs=make_inputs, cost=cost, **options
    )


def found(spec, *, seed=0, seconds=60.0, count=40, dtype=torch.float32, begin=None):
    subject = Subject(spec, spec.cases[0], dtype, CPU, seed)
    return generated.check(subject, seconds=seconds, examples=count, begin=begin)


def passed(finding):
    return finding.row("toy", "generated", "float32", "generated", 0.0).passed


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def blocked_rms_norm(x, weight):
    padded = functional.pad(x, (0, -x.shape[-1] % 8))
    squares = padded.square().unflatten(-1, (-1, 8)).sum(-2).sum(-1, keepdim=True)
    return x / torch.sqrt(squares / x.shape[-1] + 1e-5) * weight


def softmax(x):
    return torch.softmax(x, -1)


def softmax_in_base_two(x):
    powers = torch.exp2((x - x.amax(-1, keepdim=True)) * math.log2(math.e))
    padded = functional.pad(powers, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return powers / padded.sum(-2).sum(-1, keepdim=True)


class OwnNorm(torch.autograd.Function):
    """Layer norm with the gradient written out, as a kernel has it."""

    @staticmethod
    def forward(ctx, x, weight):
        centred = (
            x
            - functional.pad(x, (0, -x.shape[-1] % 4)).unflatten(-1, (-1, 4)).sum(-2).sum(-1, keepdim=True)
            / x.shape[-1]
        )
        inverse = 1 / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        ctx.save_for_backward(centred * inverse, inverse, weight)
        return centred * inverse * weight

    @staticmethod
    def backward(ctx, gradient):
        normal, inverse, weight = ctx.saved_tensors
        scaled = gradient * weight
        mean, slope = scaled.mean(-1, keepdim=True), (scaled * normal).mean(-1, keepdim=True)
        return (scaled - mean - normal * slope) * inverse, (gradient * normal).sum(0)


def layer_norm(x, weight):
    return functional.layer_norm(x, x.shape[-1:], weight, None, 1e-5)


def cumulated(x):
    return x.cumsum(-1)


def cumulated_by_blocks(x):
    blocks = functional.pad(x, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16)).cumsum(-1)
    before = functional.pad(blocks[..., -1].cumsum(-1)[..., :-1], (1, 0))
    return (blocks + before[..., None]).flatten(-2)[..., : x.shape[-1]]


RIGHT = {
    "rms_norm": declared(rms_norm, blocked_rms_norm, xw_inputs, differentiable=True),
    "softmax": declared(softmax, softmax_in_base_two, differentiable=True, values={"x": Values(nonfinite=True)}),
    "layer_norm": declared(layer_norm, lambda x, weight: OwnNorm.apply(x, weight), xw_inputs, differentiable=True),
    "cumsum": declared(cumulated, cumulated_by_blocks, differentiable=True),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("seed", [0, 1000])
def test_a_right_kernel_that_computes_in_another_order_passes(name, seed):
    finding = found(RIGHT[name], seed=seed)
    assert passed(finding), finding.reason
    assert finding.reason == ""
    assert finding.examples == 40


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_right_kernel_that_computes_in_float32_passes_in_short_dtypes(dtype):
    def wide(x, weight):
        wider = torch.promote_types(x.dtype, torch.float32)
        return blocked_rms_norm(x.to(wider), weight.to(wider)).to(x.dtype)

    spec = declared(rms_norm, wide, xw_inputs, differentiable=True, tolerance={dtype: Tolerance()})
    finding = found(spec, dtype=getattr(torch, dtype))
    assert passed(finding), finding.reason


def fails_on_nothing(x):
    if x.numel() == 0:
        raise RuntimeError("grid of zero programs")
    return softmax_in_base_two(x)


def first_block_only(x):
    out = softmax(x).clone()
    out[:, BLOCK:] = 0
    return out


def largest(x):
    return x.amax(-1)


def sums_the_largest(x):
    return torch.where(x == x.amax(-1, keepdim=True), x, 0).sum(-1)


def takes_rows_for_dense(x):
    if x.stride(0) == 0:
        x = x.as_strided(x.shape, (0, 1)) * torch.arange(1, 1 + len(x))[:, None]
    return x * 2


def without_maximum(x):
    powers = torch.exp(x)
    return powers / powers.sum(-1, keepdim=True)


def swallows_nan(x):
    return torch.where(x.isnan(), -math.inf, x).amax(-1)


def power_of_two(x):
    whole = 2 ** (x.shape[-1].bit_length() - 1)
    return x[..., :whole].sum(-1)


def writes_its_input(x):
    doubled = x * 2
    if x.shape[-1] > BLOCK:
        x[0, 0] += 1
    return doubled


class Doubled(torch.autograd.Function):
    """Takes the incoming gradient for row-major."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        if gradient.dim() == 2 and gradient.stride(0) == 1 and gradient.shape[0] > 1 and gradient.shape[1] > 1:
            return gradient.as_strided(gradient.shape, (gradient.shape[1], 1)) * 2
        return gradient * 2


def drops_subnormal_scale(x):
    return torch.where(x.abs() < 1e-30, 0.0, x * 2)


NAN_ALLOWED = {"values": {"x": Values(nonfinite=True)}}
ROWS = {"sizes": {"rows": Sizes(least=1, most=9), "dim": Sizes(least=1, most=MOST, block=BLOCK)}}
WRONG = [
    (declared(softmax, fails_on_nothing), r"^rows=0, dim=1: raised RuntimeError: grid of zero programs \[seed \d\]$"),
    (declared(softmax, first_block_only), r"^rows=1, dim=65: output max error .* exceeds .* \(eager's own is .*\)"),
    (declared(largest, sums_the_largest), r"^rows=1, dim=2, x (tied|all equal): output max error"),
    (declared(lambda x: x * 2, takes_rows_for_dense), r"^rows=2, dim=\d, x expanded: output max error 1 "),
    (declared(softmax, without_maximum), r"^rows=1, dim=1, x (large|huge|near overflow|with one huge el.*): output is"),
    (declared(largest, swallows_nan, **NAN_ALLOWED), r"^rows=1, dim=\d, x with a NaN: output is -inf where .* nan"),
    (declared(lambda x: x.sum(-1), power_of_two), r"^rows=1, dim=3: output max error"),
    (declared(lambda x: x * 2, lambda x: Doubled.apply(x), differentiable=True),
     r"^rows=2, dim=2, incoming gradient transposed: gradient of x max error"),
    (declared(lambda x: x * 2, writes_its_input, **ROWS), r"^rows=1, dim=65: writes into x, which it does not declare"),
    (declared(lambda x: x * 2, drops_subnormal_scale), r"^rows=1, dim=\d+, x tiny: output max error"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "words"), WRONG, ids=[spec.optimized.__name__ for spec, _ in WRONG])
def test_a_kernel_that_is_wrong_on_such_inputs_alone_is_found_and_the_example_is_small(spec, words):
    finding = found(spec, count=80)
    assert not passed(finding)
    assert re.search(words, finding.reason), finding.reason
    row = finding.row("toy", "generated", "float32", "generated", 0.0)
    assert row.reason == finding.reason
    assert row.examples == finding.examples


def test_what_is_written_past_the_end_of_an_argument_is_found():
    def overruns(state):
        state.mul_(2)
        if state.storage_offset():
            state.as_strided((1,), (1,), state.storage_offset() + state.numel()).fill_(1.0)

    def state_inputs(case, dtype, device, seed):
        return {"state": x_inputs(case, dtype, device, seed)["x"].detach()}

    def double(state):
        state.mul_(2)

    spec = declared(double, overruns, state_inputs, mutates=("state",))
    assert re.search(r"state offset: writes past an end of an argument", found(spec, count=80).reason)
    assert passed(found(replace(spec, optimized=lambda state: double(state))))


def test_a_mutated_argument_comes_in_no_layout_but_one_without_gaps():
    domain = Domain(ADAMW, torch.float32, CPU, 0)
    assert domain.layouts["params"] == ("contiguous", "offset")
    assert domain.layouts["grads"] == tuple(examples.LAYOUTS)
    assert domain.patterns["steps"] == (patterns.PLAIN,)
    assert set(patterns.NONFINITE) <= set(domain.patterns["grads"])
    assert not set(patterns.NONFINITE) & set(domain.patterns["params"])


def test_fused_adamw_passes():
    finding = found(ADAMW, count=12)
    assert passed(finding), finding.reason
    assert finding.examples == 12


def test_fused_adamw_that_loses_a_nan_or_a_tail_is_found():
    spec = ADAMW

    def loses_nan(grads, **inputs):
        return spec.reference(grads=[grad.nan_to_num() for grad in grads], **inputs)

    def loses_tail(params, **inputs):
        kept = [param.reshape(-1)[1024:].clone() for param in params]
        spec.reference(params=params, **inputs)
        for param, old in zip(params, kept, strict=True):
            param.reshape(-1)[1024:] = old

    assert "grads" in found(replace(spec, optimized=loses_nan), count=200).reason
    assert re.search(r"params\[\d\] max error", found(replace(spec, optimized=loses_tail), count=200).reason)


def test_layouts_may_be_refused_and_the_example_goes_on_without_them():
    def dense_only(x):
        if not x.is_contiguous():
            raise ValueError("x must be contiguous")
        return softmax_in_base_two(x)

    finding = found(declared(softmax, dense_only))
    assert passed(finding)
    assert finding.reason.startswith("refused x ")
    assert "x must be contiguous" in finding.reason

    def wrong_too(x):
        return dense_only(x) * 1.01

    assert re.match(r"rows=1, dim=\d+: output max error", found(declared(softmax, wrong_too)).reason)


def test_declared_sizes_may_not_be_refused_and_inferred_ones_may():
    def even_only(x):
        if x.shape[-1] % 2:
            raise ValueError("dim must be even")
        return softmax_in_base_two(x)

    reason = found(declared(softmax, even_only)).reason
    assert reason.startswith("rows=0, dim=1: raised ValueError: dim must be even")
    inferred = found(declared(softmax, even_only, sizes={}))
    assert passed(inferred)
    assert re.match(r"refused \d+ of 40: dim must be even", inferred.reason)
    assert passed(
        found(declared(softmax, even_only, sizes=ROWS["sizes"] | {"dim": Sizes(least=2, most=64, multiple_of=2)}))
    )

    def never(x):
        raise ValueError("not today")

    refused = found(declared(softmax, never, sizes={}))
    assert not passed(refused)
    assert refused.reason == "refused all of 40 generated inputs: not today"


def test_a_reference_that_raises_on_ordinary_numbers_of_declared_sizes_is_a_failure():
    spec = declared(lambda x: x.amax(0), lambda x: x.amax(-2))
    assert found(spec).reason.startswith("rows=0, dim=1: the reference raised IndexError: amax()")


def test_sizes_and_values_stay_inside_the_declaration():
    seen = []

    def spying(x):
        seen.append((tuple(x.shape), x.detach().clone()))
        return x * 2

    sizes = {"rows": Sizes(least=2, most=9), "dim": Sizes(least=8, most=96, multiple_of=8, block=32)}
    values = {"x": Values(least=-1.0, most=2.0)}
    assert passed(found(declared(lambda x: x * 2, spying, sizes=sizes, values=values), count=60))
    shapes = {shape for shape, _ in seen}
    assert all(2 <= rows <= 9 and 8 <= dim <= 96 and dim % 8 == 0 for rows, dim in shapes)
    assert max(dim for _, dim in shapes) > 40
    assert len(shapes) > 15
    assert {dim for _, dim in shapes} >= {8, 32, 40}
    assert all(float(x.min()) >= -1.0 and float(x.max()) <= 2.0 for _, x in seen)
    assert any(float(x.max()) == 2.0 for _, x in seen)


def test_a_switch_among_the_sizes_stands_mostly_as_in_the_cases():
    words = []
    found(replace(ADAMW, optimized=lambda **inputs: ADAMW.reference(**inputs)), count=100, begin=words.append)
    patterned = [said for said in words if "grads" in said]
    skipped = sum("skip=1" in said for said in patterned)
    assert 0 < skipped < len(patterned) / 2


def test_sizes_that_no_one_declared_are_those_that_small_cases_span():
    spec = declared(softmax, softmax_in_base_two, sizes={}, cases=(
        Case("ragged", rows=5, dim=37), Case("empty", rows=0, dim=64), Case("big", large=True, rows=10**6, dim=4096),
    ))  # fmt: skip
    domain = Domain(spec, torch.float32, CPU, 0)
    assert domain.bounds("rows") == Sizes(least=0, most=5)
    assert domain.bounds("dim") == Sizes(least=1, most=64)
    assert {1, 31, 33, 37, 63, 64} <= set(domain.sizes["dim"])


def test_every_size_pattern_and_layout_has_its_turn():
    words = []
    found(RIGHT["softmax"], count=60, begin=words.append)
    for name in patterns.PATTERNS:
        assert name == patterns.PLAIN or any(f"x {name}" in said for said in words), name
    for name in examples.LAYOUTS:
        assert name == "contiguous" or any(f"x {name}" in said for said in words), name
        assert name == "contiguous" or any(f"incoming gradient {name}" in said for said in words), name
    sizes = [tuple(map(int, re.findall(r"=(\d+)", said))) for said in words]
    assert any(rows == 0 for rows, _ in sizes)
    assert any(dim > BLOCK for _, dim in sizes)
    assert any(dim & (dim - 1) for _, dim in sizes)


def test_the_same_seed_gives_the_same_examples_and_another_seed_others():
    runs = []
    for seed in (3, 3, 4):
        words = []
        found(RIGHT["softmax"], seed=seed, count=30, begin=words.append)
        runs.append(words)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_what_is_drawn_does_not_depend_on_what_is_loaded_or_on_the_profile(monkeypatch):
    runs = []
    for profile in ("default", "ci"):
        words = []
        hypothesis.settings.load_profile(profile)
        found(RIGHT["softmax"], count=10, begin=words.append)
        runs.append(words)
        random.seed(99)
    hypothesis.settings.load_profile("default")
    assert runs[0] == runs[1]

    def scanned():
        raise AssertionError("the source of all loaded modules is searched for numbers to draw")

    monkeypatch.setattr(hypothesis.internal.conjecture.providers, "_get_local_constants", scanned)
    assert passed(found(RIGHT["softmax"], count=60))


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found(RIGHT["softmax"], count=60)
    found(WRONG[1][0], count=60)
    assert list(tmp_path.iterdir()) == []
    assert not Path(".hypothesis").exists()


def test_time_is_kept_and_the_examples_that_ran_are_counted():
    def slow(x):
        time.sleep(0.05)
        return softmax_in_base_two(x)

    started = time.perf_counter()
    finding = found(declared(softmax, slow), seconds=0.5, count=1000)
    assert time.perf_counter() - started < 5.0
    assert passed(finding)
    assert 1 <= finding.examples <= 10
    assert found(RIGHT["softmax"], seconds=0.0).examples == 1


def test_a_failure_is_made_smaller_for_a_bounded_time():
    def slow_and_wrong(x):
        time.sleep(0.2)
        return softmax(x) + (x.shape[-1] > 1)

    started = time.perf_counter()
    finding = found(declared(softmax, slow_and_wrong), seconds=0.1, count=1000)
    assert time.perf_counter() - started < 0.1 + generated.SHRINKING + 8.0
    assert finding.examples < 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sizes": {"dim": Sizes(least=65, most=100, multiple_of=64)}},
            "no multiple of 64 lies from 65 to 100, the sizes it gives for dim",
        ),
        (
            {"sizes": {}, "cases": (Case("big", large=True, rows=5, dim=37),)},
            "all its cases with rows are large; give sizes=",
        ),
    ],
)
def test_a_declaration_that_allows_no_inputs_is_an_error(options, words):
    with pytest.raises(KernbenchError, match=words):
        found(declared(softmax, softmax_in_base_two, **options))


def test_an_interrupt_and_a_fault_of_our_own_are_no_results(monkeypatch):
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(declared(softmax, interrupted))
    monkeypatch.setattr(generated.Trial, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found(RIGHT["softmax"])


def test_an_eager_that_differs_from_call_to_call_is_said():
    calls = iter(range(10**6))

    def unsteady(x):
        return x + next(calls) % 2 * 1e-6

    reason = found(declared(unsteady, lambda x: x + 1)).reason
    assert "and differs from call to call" in reason


def test_one_argument_alone_is_near_the_ends_of_its_dtype():
    spec = RIGHT["rms_norm"]
    domain = Domain(spec, torch.float32, CPU, 0)
    drawn = []
    strategy = strategies.one_of([domain.examples(theme, 0) for theme in (Theme("mixed"), Theme("values", "huge"))])
    settings = hypothesis.settings(max_examples=300, database=None, deadline=None)
    hypothesis.seed(0)(settings(hypothesis.given(strategy)(lambda example: drawn.append(example))))()
    extreme = [sum(filling.pattern in patterns.EXTREME for _, filling in example.fillings) for example in drawn]
    assert max(extreme) == 1
    assert [example.extreme for example in drawn] == [bool(count) for count in extreme]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", patterns.FINITE)
def test_patterns_keep_shape_and_dtype_are_finite_and_repeat(name, dtype):
    drawn = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    filled, again = (patterns.fill(drawn, name, Values(), torch.Generator().manual_seed(2)) for _ in range(2))
    assert (filled.shape, filled.dtype) == (drawn.shape, drawn.dtype)
    assert bool(filled.isfinite().all())
    assert torch.equal(filled, again)
    assert name == patterns.PLAIN or not torch.equal(filled, drawn)
    for empty in (torch.empty(0, dtype=dtype), torch.empty(3, 0, dtype=dtype)):
        assert patterns.fill(empty, name, Values(), torch.Generator()).shape == empty.shape
    assert patterns.fill(torch.tensor(1.5, dtype=dtype), name, Values(), torch.Generator()).shape == ()


def test_patterns_are_what_they_are_called():
    drawn = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    info = torch.finfo(torch.float32)

    def of(name, values=Values()):  # noqa: B008 - Values is immutable
        return patterns.fill(drawn, name, values, torch.Generator().manual_seed(3))

    assert len(of("all equal").unique()) == 1
    assert len(of("tied").unique()) <= 8
    assert float(of("alternating").double().sum()) == 0.0
    assert bool(torch.signbit(of("negative zero")).all())
    assert float(of("subnormal").abs().max()) < info.tiny < float(of("tiny").abs().max()) < 1e-35
    assert math.isfinite(float(of("large").square().sum()))
    assert math.isinf(float(of("huge").square().sum()))
    assert info.max / 4 < float(of("near overflow").abs().max()) <= info.max
    assert int(of("with a NaN").isnan().sum()) == 1
    assert int(of("with both infinities and a NaN").isinf().sum()) == 2
    assert float(of("huge", Values(least=0.0)).min()) == 0.0
    assert math.isnan(float(of("with a NaN", Values(least=0.0)).sum()))
    short = patterns.fill(drawn.abs().half(), "near overflow", Values(least=0.0, most=1e6), torch.Generator())
    assert float(short.max()) == 32768.0


def test_without_a_gpu_no_bfloat16_number_is_subnormal():
    """Triton's interpreter casts them wrongly, and a right kernel would be blamed for it."""
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for name in ("tiny", "subnormal"):
        filled = patterns.fill(drawn, name, Values(), torch.Generator())
        assert not ((filled != 0) & (filled.abs() < torch.finfo(torch.bfloat16).tiny)).any()
        assert bool(filled.any()) == (name == "tiny")


def test_a_pattern_may_stand_in_one_tensor_of_a_list():
    inputs = {"grads": [torch.randn(3), torch.arange(3), torch.randn(3)], "scale": 2.0}
    example = examples.Example((("rows", 1),), (("grads", Filling("zero", only=3)),), 0)
    filled = example.filled(inputs, {})
    assert str(example) == "rows=1, grads[3] zero"
    assert torch.equal(filled["grads"][0], inputs["grads"][0])
    assert torch.equal(filled["grads"][1], inputs["grads"][1])
    assert not filled["grads"][2].any()
    assert filled["scale"] == 2.0


def test_roundings_of_something_constant_show():
    """The gradient of x / |x| is zero for every x of one element, but not what rounding leaves of it."""

    def gradient(share):
        x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        with Roundoff(share, 0):
            return float(torch.autograd.grad((x * torch.rsqrt(x.square().sum())).sum(), x)[0])

    assert abs(gradient(0.0)) < 1e-15
    assert 1e-9 < abs(gradient(1e-6)) < 1e-5
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with Roundoff(1e-3, 0):
        views, copies = x.view(3, 1), x.clone()
        assert torch.equal(views[:, 0], x)
        assert torch.equal(copies, x)
        moved = x + 1
        x.mul_(2.0)
    assert bool((moved != torch.tensor([1.0, 2.0, 3.0])).all())
    assert float(x[0]) == 0.0
    assert float(x[1]) != 2.0
