"""Right kernels, which parity must pass: each mode once, and many seeds without a false alarm.

``KERNBENCH_FALSE_ALARM_SEEDS`` sets how many seeds the false-alarm tests draw: by default 200 on a GPU, 6 without one.
The number counts for each kernel: ``KERNBENCH_FALSE_ALARM_SEEDS=200 pytest tests/test_exemplars.py -k alarm``. A seed
runs the rows "plain" and "gradient" of one small case in one dtype, the next seed the next of either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kernbench import device, registry
from kernbench.errors import KernbenchError
from kernbench.parity import kernelcheck, randomness
from kernbench.parity.casecheck import CaseCheck
from kernbench.parity.subject import Subject
from kernbench.record import ParityResult
from kernbench.spec import Case, KernelSpec

DEVICE = device.resolve("auto")
EXEMPLARS = Path(__file__).parent / "exemplars"
NAMES = sorted(path.stem for path in (EXEMPLARS / "kernels").glob("[!_]*.py"))
SHIPPED = sorted(path.stem for path in (registry.builtin().root / "kernels").glob("[!_]*.py"))
DTYPES = ("float32", "bfloat16", "float16")
SEEDS = {"cuda": 200, "cpu": 6}


@cache
def specs() -> dict[str, KernelSpec]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNBENCH_WORKSPACE", str(EXEMPLARS))
        return {name: found.declaration for name, found in registry.kernels().items()}


def wrong(rows: Iterator[ParityResult]) -> list[str]:
    return [f"{row.kernel}, {row.case}, {row.dtype}, {row.mode}: {row.reason}" for row in rows if not row.passed]


def seeds() -> range:
    """The seeds of a false-alarm test, far from the few that other tests use."""
    named = os.environ.get("KERNBENCH_FALSE_ALARM_SEEDS", str(SEEDS[DEVICE.type]))
    if not named.isdigit() or not int(named):
        raise KernbenchError(f"KERNBENCH_FALSE_ALARM_SEEDS is {named!r}; give a number of seeds")
    return range(5000, 5000 + int(named))


def test_each_exemplar_is_one_declaration_of_its_file() -> None:
    assert set(NAMES) == specs().keys() - set(SHIPPED)
    for spec in (specs()[name] for name in NAMES):
        assert spec.tolerance.keys() == set(DTYPES)
        assert spec.sizes.keys() == {size for case in spec.cases for size in case.sizes}
        assert {case.large for case in spec.cases} == {True, False}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the test below runs all modes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_parity_passes_in_the_interpreter(name: str, dtype: str) -> None:
    cases = [case for case in specs()[name].cases if not case.large]
    rows = list(kernelcheck.check_kernel(specs()[name], device=DEVICE, dtypes=[dtype], cases=cases))
    assert len(rows) >= len(cases)
    assert wrong(iter(rows)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_parity_passes_on_a_gpu(name: str) -> None:
    rows = list(kernelcheck.check_kernel(specs()[name], device=DEVICE, cases=specs()[name].cases))
    assert {"plain", "compile", "graph"} <= {row.mode for row in rows}
    assert wrong(iter(rows)) == []


def rows_of_chance(spec: KernelSpec, seed: int) -> Iterator[ParityResult]:
    """The rows whose outcome depends on the numbers that are drawn, in turn for each small case and dtype."""
    small = [case for case in spec.cases if not case.large]
    dtypes = list(spec.tolerance)
    case, dtype = small[seed // len(dtypes) % len(small)], dtypes[seed % len(dtypes)]
    check = CaseCheck(spec, case, getattr(torch, dtype), DEVICE, seed)
    yield check.plain().row(spec.name, case.name, dtype, f"plain of seed {seed}", 0.0)
    if spec.differentiable:
        yield check.gradient().row(spec.name, case.name, dtype, f"gradient of seed {seed}", 0.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the test below runs more seeds")
@pytest.mark.parametrize("name", [*SHIPPED, *NAMES])
def test_no_false_alarm_in_the_interpreter(name: str) -> None:
    assert [words for seed in seeds() for words in wrong(rows_of_chance(specs()[name], seed))] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SHIPPED, *NAMES])
def test_no_false_alarm_on_a_gpu(name: str) -> None:
    assert [words for seed in seeds() for words in wrong(rows_of_chance(specs()[name], seed))] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dropout", "gaussian_noise"])
def test_random_numbers_of_the_kernels_are_random(name: str, dtype: str) -> None:
    spec = specs()[name]
    subject = Subject(spec, next(case for case in spec.cases if case.ragged), getattr(torch, dtype), DEVICE, 3)
    rows = [body().row(name, "ragged", dtype, mode, 0.0) for mode, body in randomness.bodies(subject)]
    assert [row.mode for row in rows] == ["same seed", "other seeds", "distribution", "independence"]
    assert wrong(iter(rows)) == []


REFUSED: dict[str, dict[str, Any]] = {
    "broadcast_add": {"y": torch.zeros(5, 7)},
    "dropout": {"p": 1.5},
    "gather_rows": {"index": torch.zeros(3, dtype=torch.int32)},
    "gaussian_noise": {"x": torch.zeros(3, dtype=torch.float64)},
    "linear": {"bias": torch.zeros(5)},
    "masked_softmax": {"mask": torch.zeros(5, 7)},
    "rms_norm": {"weight": torch.zeros(5)},
    "running_average": {"average": torch.zeros(5)},
    "scatter_add": {"index": torch.zeros(3, dtype=torch.int32)},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_in_a_sentence(name: str) -> None:
    spec = specs()[name]
    inputs = spec.make_inputs(next(case for case in spec.cases if case.ragged), torch.float32, DEVICE, 0)
    strange = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in REFUSED[name].items()
    }
    with pytest.raises(ValueError, match=f"^{name} takes"):
        spec.optimized(**{**inputs, **strange})


@pytest.mark.parametrize("name", NAMES)
def test_every_size_may_be_the_least(name: str) -> None:
    spec = specs()[name]
    least = {size: known.least for size, known in spec.sizes.items()}
    for sizes in (least, *({**dict.fromkeys(least, 3), size: few} for size, few in least.items())):
        check = CaseCheck(spec, Case("least", large=False, **sizes), torch.float32, DEVICE, 0)
        assert check.plain().reason == ""
        if spec.differentiable:
            assert check.gradient().reason == ""
