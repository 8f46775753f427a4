"""Wrong and hostile kernels are all rejected, in words; a gate that lets one pass says so and fails."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gate_specs import AVERAGE, GATED, LIBRARY, NORM, gated_inputs, norm_inputs

from kernbench import registry
from kernbench.parity import compare, gate, hostile, kernelcheck
from kernbench.parity.finding import Finding
from kernbench.record import MutantResult, ParityResult
from kernbench.spec import Case, Inputs, KernelSpec, Tolerance, Values

CPU = torch.device("cpu")
ONLY_ON_A_GPU = {
    "works on another stream and does not wait for it": hostile.STREAMS,
    "writes each element twice at once": hostile.RACES,
}
EQUIVALENT = {
    ("norm", "float32"): {"leaves out pow in PowBackward0": "computes the same"},
    ("norm", "bfloat16"): {
        "leaves out pow in PowBackward0": "computes the same",
        "takes 38 for 37 in div in MeanBackward1": "below the",
        "adds one by one in bfloat16 in mean": "below the",
        "adds one by one in bfloat16 in sum in MulBackward0": "below the",
        "adds one by one in bfloat16 in sum in AddBackward0": "below the",
    },
    ("softmax", "float32"): {
        "takes -1.063e+30 for -1e+30 in masked_fill": "computes the same",
        "fills nothing in masked_fill in MaskedFillBackward0": "computes the same",
    },
    ("softmax", "bfloat16"): {
        "takes -1.063e+30 for -1e+30 in masked_fill": "computes the same",
        "fills nothing in masked_fill in MaskedFillBackward0": "computes the same",
    },
    ("linear", "bfloat16"): {"adds one by one in bfloat16 in sum in AddmmBackward0": "below the"},
}
"""What no comparison in this dtype can tell from the right kernel: x to the power of 1, other numbers as good as minus
infinity, and, in bfloat16, of which the last bit is worth 0.8 %, 38 for 37 and sums of 37 numbers."""
HOSTILE = {
    "skips the work above the size of the smallest case": "max error 1 exceeds",
    "answers with the result of its first call": "it keeps answers",
    "answers from a cache by the addresses of its inputs": "it keeps answers",
    "is right in its first 3 calls": "max error",
    "runs twice in its first call at a size, as when tuned on live data": "the first call is wrong and the second is",
    "replaces time.perf_counter": "replaces time.perf_counter while it runs",
    "replaces Event.elapsed_time": "replaces torch.cuda.Event.elapsed_time while it runs",
    "replaces torch.cuda.synchronize": "replaces torch.cuda.synchronize while it runs",
    "replaces torch.testing.assert_close": "replaces torch.testing.assert_close while it runs",
    "replaces torch.equal": "replaces torch.equal while it runs",
    "replaces torch.allclose": "replaces torch.allclose while it runs",
    "replaces kernbench.parity.compare.judge": "replaces kernbench.parity.compare.judge while it runs",
    "allows tf32 for everyone": "leaves the float32 matmul precision changed",
    "changes the default dtype": "leaves the default dtype changed",
    "seeds the random generator": "leaves the state of the random generator changed",
    "returns before a thread has the result": "changes after the call has returned",
    "returns a tensor that is computed on access": "may compute later",
    "returns memory that it has not written": "is NaN at 185 of 185 places",
    "writes into its inputs": "writes into x, weight, bias",
    "writes one element past the end": "writes 4 bytes past the end",
    "returns the same buffer every time": "the next call overwrites output of an earlier one",
    "gives other bits in every call": "two calls on equal inputs differ",
    "takes the incoming gradient for ones": "gradient of x max error",
    "takes the incoming gradient of its first backward pass": "gradient of x max error",
}


def graded(spec: KernelSpec, dtype: str = "float32", seed: int = 0) -> Finding:
    def check(wrong: KernelSpec) -> Iterator[ParityResult]:
        return kernelcheck.check_cases(wrong, device=CPU, dtypes=[dtype], seed=seed)

    return gate.grade(spec, device=CPU, dtype=getattr(torch, dtype), seed=seed, check=check)


def passing(spec: KernelSpec) -> Iterator[ParityResult]:
    """A check that looks at nothing, though it calls the kernel."""
    for case in spec.cases:
        with torch.no_grad():
            spec.optimized(**spec.make_inputs(case, torch.float32, CPU, 0))
        yield ParityResult(kernel=spec.name, case=case.name, dtype="float32", mode="plain", passed=True)


def only_altered(spec: KernelSpec, dtype: str = "float32", seed: int = 0) -> list[MutantResult]:
    finding = gate.grade(spec, device=CPU, dtype=getattr(torch, dtype), seed=seed, check=lambda _: iter(()))
    return [result for result in finding.graded if result.kind != "hostile"]


def bare(name: str) -> str:
    return re.sub(r"( at \S+)? \(call.*", "", name)


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_wrong_kernel_is_killed_or_listed_with_the_reason(name: str, dtype: str) -> None:
    finding = graded(LIBRARY[name], dtype)
    assert finding.reason == ""
    killed, total = finding.mutants or (0, 0)
    assert killed == total == sum(result.outcome == "killed" for result in finding.graded)
    assert total >= 30
    assert all(result.reason for result in finding.graded)
    by_outcome = {
        outcome: {bare(result.name): result.reason for result in finding.graded if result.outcome == outcome}
        for outcome in ("survived", "needs a GPU", "equivalent")
    }
    assert by_outcome["survived"] == {}
    assert by_outcome["needs a GPU"] == ONLY_ON_A_GPU
    expected = EQUIVALENT.get((name, dtype), {})
    assert by_outcome["equivalent"].keys() == expected.keys()
    assert all(reason in by_outcome["equivalent"][what] for what, reason in expected.items())


def test_every_result_on_the_list_is_among_the_wrong_ones() -> None:
    names = {result.name for result in only_altered(NORM) if result.kind == "result"}
    assert names >= {
        "no-op", "copied input", "tail not written", "result of another call", "transposed", "off by one element",
        "output times 1.02", "no gradient of x", "zero gradient of x", "transposed gradient of x",
    }  # fmt: skip


def test_every_hostile_kernel_is_rejected_for_what_it_does() -> None:
    spec = replace(NORM, cases=NORM.cases[:1])
    found = {result.name: result for result in graded(spec).graded if result.kind == "hostile"}
    assert found.keys() == HOSTILE.keys() | ONLY_ON_A_GPU.keys()
    for name, reason in HOSTILE.items():
        assert found[name].outcome == "killed"
        assert reason in found[name].reason, (name, found[name].reason)


def test_what_hostile_kernels_do_to_arguments_they_may_write_is_seen_too() -> None:
    found = {result.name: result.reason for result in graded(AVERAGE).graded if result.kind == "hostile"}
    assert "writes 4 bytes past the end of state[0]" in found["writes one element past the end"]
    assert "it keeps answers" in found["answers from a cache by the addresses of its inputs"]
    assert "changes after the call has returned" in found["returns before a thread has the result"]
    assert "returns a tensor that is computed on access" not in found


def test_a_check_that_looks_at_nothing_is_found_out_and_nothing_stays_changed() -> None:
    before = (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_rng_state())
    functions = (time.perf_counter, torch.testing.assert_close, torch.equal, torch.allclose, compare.judge)
    threads = threading.active_count()
    finding = gate.grade(NORM, device=CPU, dtype=torch.float32, seed=0, check=passing)
    survivors = [result for result in finding.graded if result.outcome == "survived"]
    assert {result.name for result in survivors} == HOSTILE.keys()
    assert {result.reason for result in survivors} == {"every row of parity passes"}
    assert re.match(r"lets 24 of \d+ wrong kernels pass: skips the work .*; and 21 more", finding.reason)
    assert before[:2] == (torch.get_default_dtype(), torch.get_float32_matmul_precision())
    assert torch.equal(before[2], torch.get_rng_state())
    assert functions == (time.perf_counter, torch.testing.assert_close, torch.equal, torch.allclose, compare.judge)
    assert threading.active_count() == threads


def test_a_hostile_kernel_that_raises_into_the_check_does_not_leave_it_changed() -> None:
    def failing(spec: KernelSpec) -> Iterator[ParityResult]:
        spec.optimized(**spec.make_inputs(spec.cases[0], torch.float32, CPU, 0))
        raise KeyboardInterrupt
        yield

    perf_counter = time.perf_counter
    for kernel in hostile.KERNELS:
        if kernel.needs_gpu or kernel.needs:
            continue
        setting = hostile.Setting(NORM, CPU, 100)
        with pytest.raises(KeyboardInterrupt), hostile.contained(setting):
            next(failing(replace(NORM, optimized=kernel.kernel(setting))))
        assert time.perf_counter is perf_counter
        assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("floor_ulp", "least"), [(1e6, 1), (1e7, 20)])
def test_a_tolerance_that_lets_wrong_kernels_pass_fails_the_row(floor_ulp: float, least: int) -> None:
    results = only_altered(replace(NORM, tolerance={"float32": Tolerance(floor_ulp=floor_ulp)}))
    survivors = [result for result in results if result.outcome == "survived"]
    assert len(survivors) >= least
    finding = gate.finding(results)
    assert finding.reason.startswith(f"lets {len(survivors)} of ")
    assert not finding.row("norm", "", "float32", "gate", 0.0).passed
    altered = next(result for result in survivors if result.kind == "altered")
    assert re.search(r"differs by \S+ where \S+ can be resolved, and the tolerance lets it", altered.reason)


def test_inputs_that_tell_nothing_fail_the_row() -> None:
    def zeros(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {name: torch.zeros_like(value) for name, value in norm_inputs(case, dtype, device, seed).items()}

    fixed = {name: Values(fixed=True) for name in ("x", "weight", "bias")}
    blind = replace(NORM, make_inputs=zeros, values=fixed, differentiable=False)
    finding = gate.finding(only_altered(blind))
    assert re.match(r"its inputs tell only 1 of \d\d altered kernels from the right one", finding.reason)
    assert not finding.row("norm", "", "float32", "gate", 0.0).passed
    assert gate.finding([]).reason


def test_zeros_that_are_not_all_there_may_be_are_redrawn() -> None:
    def zeros(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {name: torch.zeros_like(value) for name, value in norm_inputs(case, dtype, device, seed).items()}

    results = only_altered(replace(NORM, make_inputs=zeros, differentiable=False))
    assert {result.outcome for result in results if result.kind == "altered"} == {"killed"}
    assert any("with values redrawn" in result.reason for result in results)


def test_a_flag_that_no_case_draws_false_is_a_survivor_and_one_that_is_drawn_is_none() -> None:
    (survivor,) = [result for result in only_altered(GATED) if result.outcome == "survived"]
    assert bare(survivor.name) == "always takes the first of where"
    assert survivor.reason == "it shows only on ragged with mask and open turned round, which no case draws: add one"

    def drawn(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return gated_inputs(case, dtype, device, seed) | {"open": torch.tensor(case.name != "larger")}

    assert not [result for result in only_altered(replace(GATED, make_inputs=drawn)) if result.outcome == "survived"]
    fixed = replace(GATED, values={"open": Values(fixed=True)})
    assert not [result for result in only_altered(fixed) if result.outcome == "survived"]


def test_a_wrong_epsilon_shows_on_tiny_numbers_alone() -> None:
    def large(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return norm_inputs(case, dtype, device, seed) | {"x": norm_inputs(case, dtype, device, seed)["x"] * 1e3}

    results = only_altered(replace(NORM, make_inputs=large))
    epsilon = next(result for result in results if result.name.startswith("takes 0.0001 for 1e-05"))
    assert (epsilon.outcome, epsilon.reason.split(":")[0]) == ("killed", "ragged times 0.0001")


def test_without_a_small_case_the_row_says_what_to_do() -> None:
    large = (Case("ragged", large=True, rows=5, dim=37),)
    finding = graded(replace(NORM, cases=large))
    assert finding.reason == "has no case small enough to grade the gate on; add one that is not large"


def test_grading_is_the_same_every_time() -> None:
    assert only_altered(NORM) == only_altered(NORM)


@pytest.mark.parametrize("name", LIBRARY)
def test_no_seed_makes_the_gate_fail_a_right_kernel(name: str) -> None:
    for seed in random.Random(name).sample(range(10**6), 3):
        for dtype in ("float32", "bfloat16"):
            finding = gate.finding(only_altered(LIBRARY[name], dtype, seed))
            assert finding.reason == "", (dtype, seed)


def test_fused_adamw_is_graded() -> None:
    spec = registry.kernel("fused_adamw").declaration
    assert isinstance(spec, KernelSpec)
    finding = graded(spec)
    assert finding.reason == ""
    killed, total = finding.mutants or (0, 0)
    assert killed == total > 100


@pytest.mark.gpu
def test_on_a_gpu_every_hostile_kernel_is_rejected() -> None:
    device = torch.device("cuda:0")

    def check(wrong: KernelSpec) -> Iterator[ParityResult]:
        return kernelcheck.check_cases(wrong, device=device, dtypes=["float32"])

    for spec in (NORM, AVERAGE):
        finding = gate.grade(spec, device=device, dtype=torch.float32, seed=0, check=check)
        assert finding.reason == ""
        assert {result.outcome for result in finding.graded if result.kind == "hostile"} == {"killed"}
