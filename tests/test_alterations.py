"""Wrong kernels are derived from any reference, one for each way in which kernels are known to be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gate_specs import AVERAGE, GATHERED, LIBRARY, LINEAR, NORM, spec
from torch import Tensor
from torch.nn import functional

from kernbench.parity import compare, kernelcheck, mistakes, trials
from kernbench.parity.alterations import Alteration, Detached, Reseeded, Tape, reseeded
from kernbench.parity.trials import Trial
from kernbench.record import ParityResult
from kernbench.spec import Case, Inputs, KernelSpec, Values

CPU = torch.device("cpu")
FLOAT32 = torch.float32


def first_trial(declared: KernelSpec, dtype: torch.dtype = FLOAT32) -> Trial:
    return next(trials.of(declared, declared.cases, dtype, CPU, 0))


def altered(declared: KernelSpec, *, backward: bool = False, dtype: torch.dtype = FLOAT32) -> dict[str, Alteration]:
    trial = first_trial(declared, dtype)
    if backward:
        trial = trials.backward_of(trial)
    return {alteration.name: alteration for alteration in trial.tape.alterations(0, backward=backward)}


def of(reference: Callable[..., Any], **inputs: Tensor) -> KernelSpec:
    """A declaration around a reference of one's own, in float32."""

    def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    return spec("own", reference, lambda **given: reference(**given), make_inputs)


def names(reference: Callable[..., Any], **inputs: Tensor) -> list[str]:
    return [re.sub(r" at \S+ \(call.*", "", name) for name in altered(of(reference, **inputs))]


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        (lambda x: x + x.flip(0), {"drops the first term of add", "drops the second term of add", "leaves out flip"}),
        (lambda x: torch.lerp(x, x * 2, 0.5), {"takes self for lerp", "takes 0.5312 for 0.5 in lerp"}),
        (lambda x: torch.addcmul(x, x, x, value=0.5), {"drops the second term of addcmul"}),
        (lambda x: x / (x.abs() + 1e-6), {"takes 1e-05 for 1e-06 in add", "leaves 1e-06 out of add", "leaves out abs"}),
        (lambda x: x / (x.abs() + torch.tensor(1e-6)), {"adds ten times the small number in add"}),
        (lambda x: functional.layer_norm(x, (6,), None, None, 1e-5), {"takes 0.0001 for 1e-05 in layer_norm"}),
        (lambda x: torch.where(x > 0, x, -x), {"always takes the first of where", "always takes the second of where"}),
        (lambda x: torch.where(x > 0, x, -x), {"takes ge for gt", "leaves out neg"}),
        (lambda x: x.masked_fill(x > 0, 7.0), {"fills nothing in masked_fill", "takes 7.438 for 7 in masked_fill"}),
        (lambda x: torch.relu(x) + x.clamp(max=1), {"leaves out relu", "leaves out clamp", "takes 2 for 1 in clamp"}),
        (lambda x: torch.maximum(x, x.flip(0)), {"always takes the first of maximum"}),
        (lambda x: x.tril(), {"leaves out tril", "takes the next diagonal in tril"}),
        (lambda x: x.sum(-1), {"leaves the last element out of sum", "adds one by one in bfloat16 in sum"}),
        (lambda x: x.amax(0), {"leaves the last element out of amax"}),
        (lambda x: x.max(), {"leaves the last element out of max"}),
        (lambda x: torch.softmax(x, -1), {"leaves the last element out of softmax", "computes softmax in bfloat16"}),
        (lambda x: x.cumsum(-1), {"shifts cumsum by one"}),
        (lambda x: x.var(-1, correction=0), {"divides by the other count in var"}),
        (lambda x: x[1:], {"starts one place off in slice"}),
        (lambda x: x[:, 0] * torch.arange(4), {"takes the next place in select", "counts from one in arange"}),
        (lambda x: x.roll(1, 0), {"rolls one place more"}),
        (lambda x: torch.cat([x, x * 2]), {"turns the order of cat round"}),
        (lambda x, square: x @ square, {"takes rows for columns of mat2 in mm", "leaves the last element out of mm"}),
        (lambda x, square: x @ square, {"rounds the operands of mm to tf32", "wraps round in mat2 of mm"}),
        (lambda square: square.t() @ square, {"leaves out t"}),
        (lambda square: torch.einsum("ij,jk->ik", square, square), {"rounds the operands of bmm to tf32"}),
        (
            lambda square: functional.scaled_dot_product_attention(*[square[None, None]] * 3),
            {"leaves the last element out of scaled_dot_product_flash_attention_for_cpu"},
        ),
        (lambda x, index: x[index], {"takes the next row in index", "takes the indices in reverse in index"}),
        (lambda x, index: x.index_select(0, index), {"takes the next row in index_select"}),
        (lambda x, index: x.gather(0, index[:, None]), {"takes the next row in gather"}),
        (lambda x, index: functional.embedding(index, x), {"takes the next row in embedding"}),
        (lambda x, index: x.index_add(0, index, x), {"takes the indices in reverse in index_add"}),
        (lambda x: torch._foreach_mul([x, x], 2.0)[1], {"leaves the last tensor out of foreach_mul"}),
    ],
)  # fmt: skip
def test_every_way_to_be_wrong_is_derived_from_the_reference(reference: Any, what: set[str]) -> None:
    given = {"x": X, "square": SQUARE, "index": INDEX}
    inputs = {name: given[name] for name in reference.__code__.co_varnames[: reference.__code__.co_argcount]}
    assert what <= set(names(reference, **inputs))


def test_every_kind_of_the_list_occurs_in_the_library() -> None:
    kinds = set()
    for declared in LIBRARY.values():
        backward = altered(declared, backward=True) if declared.differentiable else {}
        kinds |= {alteration.kind for alteration in (*altered(declared).values(), *backward.values())}
    assert kinds == {
        "dropped term", "wrong epsilon", "wrong constant", "missing mask", "transposed index", "int32 offset",
        "off by one", "tf32", "accumulation",
    }  # fmt: skip


def test_a_name_says_what_where_and_which_call() -> None:
    assert "leaves 1e-05 out of add at gate_specs.py:42 (call 1 of 2)" in altered(NORM)
    assert "drops the second term of add in PowBackward0 (call 3 of 3, backward)" in altered(NORM, backward=True)


def test_a_reference_that_is_a_function_of_torch_itself_is_altered_too() -> None:
    declared = of(torch.softmax, input=X)
    declared = replace(declared, reference=lambda input: torch.softmax(input, -1))
    assert altered(declared)
    silu = of(functional.silu, input=X)
    assert [name for name in altered(silu) if name.startswith("leaves out silu")] == ["leaves out silu (call 1 of 1)"]


def test_of_many_calls_at_one_place_the_last_the_first_and_a_middle_one_are_altered() -> None:
    def looped(x: Tensor) -> Tensor:
        for turn in range(50):
            x = x + torch.full((6,), float(turn + 1))
        return x

    found = [name for name in altered(of(looped, x=X)) if name.startswith("drops the second")]
    numbers = [re.findall(r"call (\d+) of 50", name)[0] for name in found]
    assert numbers == ["50", "1", "26"]


def test_no_kind_takes_over_and_the_seed_decides_which_are_left_out() -> None:
    source = "\n".join(["def many(x):", *[f"    x = x + {n}.5 * x.flip(0)" for n in range(60)], "    return x"])
    namespace: dict[str, Any] = {}
    exec(compile(source, "many.py", "exec"), namespace)
    tape = first_trial(of(namespace["many"], x=X)).tape
    chosen = tape.alterations(0)
    counts = [sum(item.kind == kind for item in chosen) for kind in ("dropped term", "int32 offset", "wrong constant")]
    assert max(counts) == 24
    assert [item.name for item in chosen] == [item.name for item in tape.alterations(0)]
    assert {item.name for item in chosen} != {item.name for item in tape.alterations(1)}


@pytest.mark.parametrize("name", LIBRARY)
def test_an_altered_reference_computes_something_else_and_the_reference_stays_right(name: str) -> None:
    declared = LIBRARY[name]
    trial = first_trial(declared)
    same = []
    for alteration in trial.tape.alterations(0):
        got = alteration.run(
            lambda function: trial.subject.call(function, compare.clone(trial.inputs)), declared.reference, trial.tape
        )
        assert got is not None
        assert got.keys() == trial.truth.eager.keys()
        if all(compare.same_leaf(leaf, trial.truth.eager[key]) for key, leaf in got.items()):
            same.append(alteration.what)
    assert same == (["takes -1.063e+30 for -1e+30 in masked_fill"] if name == "softmax" else [])
    again = trial.subject.call(declared.reference, compare.clone(trial.inputs))
    assert all(compare.same_leaf(again[key], leaf) for key, leaf in trial.truth.eager.items())


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_written_otherwise_are_not_killed(name: str, dtype: torch.dtype) -> None:
    declared = LIBRARY[name]
    for seed in range(3):
        for trial in trials.of(declared, declared.cases, dtype, CPU, seed):
            if not trial.fair:
                continue
            got = trial.subject.call(declared.optimized, compare.clone(trial.inputs))
            assert trial.judge(got) == "", trial.label


def test_operators_in_place_leave_their_wrong_result_in_the_argument() -> None:
    declared = AVERAGE
    trial = first_trial(declared)
    alteration = next(item for item in trial.tape.alterations(0) if item.what == "drops the second term of add")
    inputs = compare.clone(trial.inputs)
    state = inputs["state"][0].clone()
    assert alteration.of(declared.reference, trial.tape)(**inputs) is None
    assert torch.equal(inputs["state"][0], state * 0.9)


def test_an_alteration_of_the_backward_pass_leaves_the_forward_pass_alone() -> None:
    trial = trials.backward_of(first_trial(LINEAR))
    alteration = next(item for item in trial.tape.alterations(0, backward=True) if item.what == "leaves out t")
    assert (trial.rejects(alteration) or "").startswith("gradient of ")
    rejected = first_trial(LINEAR).rejects(alteration)
    assert rejected is None, "there is no such call in a forward pass"


def test_a_missing_gradient_is_missing_for_that_input_alone() -> None:
    trial = trials.backward_of(first_trial(NORM))
    assert trial.backward is not None
    got = trial.backward(Detached("weight").of(NORM.reference, trial.tape), compare.clone(trial.inputs))
    assert [key for key, leaf in got.items() if leaf is None] == ["gradient of weight"]
    assert trial.rejects(Detached("weight")) == "gradient of weight is no tensor, eager gives a tensor"


def test_an_altered_reference_is_rejected_by_the_rows_of_parity_as_a_kernel_is() -> None:
    trial = first_trial(NORM)
    for alteration in trial.tape.alterations(0)[::5]:
        wrong = replace(NORM, optimized=alteration.of(NORM.reference, trial.tape))
        rows: list[ParityResult] = list(
            kernelcheck.check_cases(wrong, device=CPU, dtypes=["float32"], cases=["ragged"])
        )
        assert not rows[0].passed, alteration.name


def test_what_does_not_fit_is_no_kernel() -> None:
    def sliced(x: Tensor) -> Tensor:
        return x[0:1].reshape(2, 3)

    def summed(x: Tensor) -> Tensor:
        return x.reshape(-1)[torch.arange(x.numel())]

    assert altered(of(sliced, x=X))
    trial = first_trial(of(summed, x=X))
    counted = next(item for item in trial.tape.alterations(0) if item.what == "counts from one in arange")
    assert trial.rejects(counted) is None


def test_other_seeds_of_a_stochastic_kernel() -> None:
    def noise(x: Tensor, seed: int) -> Tensor:
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)

    later, none = reseeded("seed")
    assert isinstance(later, Reseeded)
    tape = Tape({}, {}, {})
    assert torch.equal(later.of(noise, tape)(x=X, seed=3), noise(X, 4))
    assert torch.equal(none.of(noise, tape)(x=X, seed=3), noise(X, 0))


def test_random_operators_and_those_with_an_out_argument_are_left_alone() -> None:
    def drawn(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        out = torch.empty_like(x)
        torch.add(x, 1.0, out=out)
        return out + torch.rand_like(x)

    assert {name.split(" of ")[0] for name in names(drawn, x=X)} <= {
        "drops the first term",
        "drops the second term",
        "wraps round in self",
    }


def test_tf32_keeps_ten_bits_of_mantissa() -> None:
    ulp = 2.0**-10
    given = torch.tensor([1.0, 1 + ulp, 1 + ulp / 4, 1 + ulp * 0.75, -3e38, 0.0, float("inf"), float("nan")])
    expected = torch.tensor([1.0, 1 + ulp, 1.0, 1 + ulp, -3e38, 0.0, float("inf"), float("nan")])
    rounded = mistakes.tf32(given)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.allclose(rounded[:-1], expected[:-1], rtol=2**-11, atol=0)
    assert torch.equal(rounded[:4], expected[:4])
    assert rounded.dtype == torch.float32


def test_scaled_and_redrawn_inputs_stay_inside_the_contract() -> None:
    declared = replace(NORM, values={"x": Values(least=0.0, most=2.0), "weight": Values(fixed=True)})
    own = declared.make_inputs(declared.cases[0], FLOAT32, CPU, 0)
    for trial in trials.of(declared, declared.cases, FLOAT32, CPU, 0):
        if "times" in trial.label or "redrawn" in trial.label or "whole" in trial.label:
            assert float(trial.inputs["x"].min()) >= 0.0
            assert float(trial.inputs["x"].max()) <= 2.0
            assert torch.equal(trial.inputs["weight"], own["weight"])
    labels = [trial.label for trial in trials.of(GATHERED, GATHERED.cases, FLOAT32, CPU, 0)]
    assert labels == [
        "ragged", "larger", "ragged with another seed", "ragged times 0.0001", "ragged times 1e-08",
        "ragged times 1000", "ragged times 0", "ragged with values redrawn", "ragged with values redrawn",
        "ragged with whole numbers",
    ]  # fmt: skip
