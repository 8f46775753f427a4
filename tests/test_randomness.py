"""Random numbers that are wrong in one way each are found, and right ones raise no alarm over 200 seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from kernbench import philox
from kernbench.parity import kernelcheck, laws, randomness
from kernbench.parity.laws import Law
from kernbench.parity.subject import Subject
from kernbench.record import ParityResult
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Stochastic, Tolerance

CPU = torch.device("cpu:0")
Name = Literal["uniform", "normal", "bernoulli"]
NAMES: tuple[Name, ...] = ("uniform", "normal", "bernoulli")
PROBABILITY = 0.75
RAGGED = Case("ragged", size=4231)
SMALL = Case("small", size=1037)
Stream = Callable[[int, Tensor], Tensor]
"""Uniform numbers from a seed and offsets."""


def shaped(law: Name, first: Tensor, second: Tensor) -> Tensor:
    """Two streams of uniform numbers as draws of a law."""
    if law == "uniform":
        return first
    if law == "bernoulli":
        return (first < PROBABILITY).float()
    return (-2 * first.clamp(min=1e-7).log()).sqrt() * (2 * torch.pi * second).cos()


def kernel(law: Name, stream: Stream = philox.rand) -> Callable[[Tensor, int], Tensor]:
    """A kernel that fills a tensor, with draws from one stream or a wrong one."""

    def draw(x: Tensor, seed: int) -> Tensor:
        offset = torch.arange(x.numel())
        return shaped(law, stream(seed, offset), stream(seed, offset + 2**40)).to(x.dtype)

    return draw


def spec_of(law: Name, optimized: Callable[[Tensor, int], Tensor] | None = None) -> KernelSpec:
    probability = (lambda inputs: PROBABILITY) if law == "bernoulli" else None
    return KernelSpec(
        name=law,
        reference=kernel(law),
        optimized=optimized or kernel(law, lambda seed, offset: philox.rand(seed, offset)),
        make_inputs=lambda case, dtype, device, seed: {"x": torch.zeros(case["size"], dtype=dtype), "seed": 41 + seed},
        cases=(RAGGED, SMALL, Case("one", size=1), Case("none", size=0)),
        tolerance={"float32": Tolerance(), "bfloat16": Tolerance()},
        cost=lambda case, dtype: Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0),
        sizes={"size": Sizes(most=5000)},
        stochastic=Stochastic(seed="seed", law=law, draws=lambda inputs, output: output, probability=probability),
    )


def rows(spec: KernelSpec, *, seed: int = 0, case: Case = RAGGED, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """The reason of each row that fails, by mode."""
    subject = Subject(spec, case, dtype, CPU, seed)
    found = ((mode, body().row(spec.name, case.name, "", mode, 0.0)) for mode, body in randomness.bodies(subject))
    return {mode: row.reason for mode, row in found if not row.passed}


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "DRAWS", 2**13)


def test_kernels_that_draw_nothing_have_no_rows() -> None:
    spec = replace(spec_of("uniform"), stochastic=None)
    assert list(randomness.bodies(Subject(spec, RAGGED, torch.float32, CPU, 0))) == []


@pytest.mark.parametrize("law", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_stream_passes_at_every_size(law: Name, dtype: torch.dtype) -> None:
    for case in spec_of(law).cases:
        assert rows(spec_of(law), case=case, dtype=dtype) == {}


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("law", NAMES)
def test_no_alarm_over_200_seeds(law: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "STRANGE_SEEDS", ())
    spec = spec_of(law)
    alarms = {seed: failed for seed in range(200) if (failed := rows(spec, seed=seed * 10_007, case=SMALL))}
    assert alarms == {}


@pytest.mark.parametrize("law", NAMES)
def test_p_values_are_as_small_as_they_say(law: Name) -> None:
    """Over 300 streams no test falls below 5 % more often than an exact binomial bound lets it."""
    judge = Law(law, PROBABILITY)
    seeds = torch.arange(600)[:, None]
    draws = shaped(law, philox.rand(seeds, torch.arange(512)), philox.rand(seeds, torch.arange(512) + 2**40))
    table = draws.double().numpy().reshape(300, 2, 512)
    p_values = np.array([[item.p_value for item in evidence_of(judge, pair)] for pair in table])
    allowed = stats.binom.ppf(1 - 1e-4, 300, 0.05)
    assert ((p_values < 0.05).sum(axis=0) <= allowed).all()
    assert ((p_values < 0.5).sum(axis=0) >= 30).sum() >= p_values.shape[1] // 2


def evidence_of(judge: Law, draws: laws.Draws) -> list[laws.Evidence]:
    return [
        *judge.fit(draws, 0.0),
        *laws.at_lag(judge, draws, 1),
        *laws.at_lag(judge, draws, 64),
        *laws.agreement(judge, draws[:1], draws[1:], "seeds"),
    ]


def blocks_repeat(seed: int, offset: Tensor) -> Tensor:
    """Each program of 128 elements starts from the same offsets."""
    return philox.rand(seed, offset % 128 + (offset >> 40 << 40))


def one_block_repeats(seed: int, offset: Tensor) -> Tensor:
    """The fourth block has the offsets of the second."""
    return philox.rand(seed, torch.where(offset % 2**40 // 512 == 3, offset - 1024, offset))


def mirrored(seed: int, offset: Tensor) -> Tensor:
    """Every second number is one minus the one before."""
    drawn = philox.rand(seed, offset // 2)
    return torch.where(offset % 2 == 0, drawn, 1 - drawn)


WRONG: dict[str, tuple[Stream, str, str]] = {
    "seed ignored": (lambda seed, offset: philox.rand(3, offset), "other seeds", "the seed is ignored"),
    "seed from the element count": (
        lambda seed, offset: philox.rand(len(offset), offset),
        "other seeds",
        "32 seeds give the same draws: the seed is ignored",
    ),
    "element count added to the seed": (
        lambda seed, offset: philox.rand(seed + len(offset), offset),
        "independence",
        "the stream depends on the number of elements",
    ),
    "seed added to the offset": (
        lambda seed, offset: philox.rand(3, offset + seed),
        "other seeds",
        "4230 draws of seed 42, from number 0 on, repeat those of seed 41 from number 1 on",
    ),
    "seed cut to 32 bits": (
        lambda seed, offset: philox.rand(seed % 2**32, offset),
        "other seeds",
        "with seed -1 it does not draw what the reference draws",
    ),
    "seed of few bits": (
        lambda seed, offset: philox.rand(seed % 16, offset),
        "other seeds",
        "repeat those of seed",
    ),
    "all blocks alike": (
        blocks_repeat,
        "independence",
        "128 draws of seed 41, from number 128 on, repeat",
    ),
    "one block repeats": (one_block_repeats, "independence", "repeat those of the same launch from number 512 on"),
    "equal in pairs": (lambda seed, offset: philox.rand(seed, offset // 2), "independence", "draws 1 apart agree"),
}


@pytest.mark.parametrize("law", NAMES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_streams_are_found(name: str, law: Name) -> None:
    stream, mode, words = WRONG[name]
    failed = rows(spec_of(law, kernel(law, stream)))
    assert mode in failed
    assert words in failed[mode]


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_mirrored_neighbours_are_found_by_their_size(law: Name) -> None:
    def optimized(x: Tensor, seed: int) -> Tensor:
        uniform = mirrored(seed, torch.arange(x.numel()))
        return uniform if law == "uniform" else torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))

    assert "draws 1 apart agree" in rows(spec_of(law, optimized))["independence"]


def test_a_share_that_is_off_by_one_percent_is_found() -> None:
    def optimized(x: Tensor, seed: int) -> Tensor:
        return (philox.rand(seed, torch.arange(x.numel())) < PROBABILITY + 0.01).to(x.dtype)

    assert "of 135392 draws are ones, 0.75000 expected (p = " in rows(spec_of("bernoulli", optimized))["distribution"]


@pytest.mark.parametrize(
    ("law", "change", "words"),
    [
        ("uniform", lambda drawn: (drawn + 0.01).clamp(max=1 - 2**-24), "the mean of 135392 draws is 0.5"),
        ("uniform", lambda drawn: 0.5 + (drawn - 0.5) * 0.96, "the variance of"),
        ("uniform", lambda drawn: (drawn * 64).floor() / 64 + 1 / 128, "from the uniform distribution function"),
        ("uniform", lambda drawn: drawn + 0.1, "outside of [0, 1)"),
        ("normal", lambda drawn: drawn + 0.03, "the mean of"),
        ("normal", lambda drawn: drawn * 1.02, "the variance of"),
        ("normal", lambda drawn: drawn.sign(), "from the normal distribution function"),
        ("normal", lambda drawn: torch.where(drawn > 3.5, torch.nan, drawn), "are NaN or infinite"),
        ("bernoulli", lambda drawn: drawn * 1.5, "neither 0 nor 1"),
    ],
)
def test_wrong_distributions_are_found(law: Name, change: Callable[[Tensor], Tensor], words: str) -> None:
    right = kernel(law)
    assert words in rows(spec_of(law, lambda x, seed: change(right(x, seed))))["distribution"]


def test_launches_that_depend_on_more_than_the_seed_are_found() -> None:
    launches = itertools.count()
    counting = kernel("uniform", lambda seed, offset: philox.rand(seed + 2**33 * next(launches), offset))
    assert "two launches with seed 41 differ" in rows(spec_of("uniform", counting))["same seed"]

    def by_address(x: Tensor, seed: int) -> Tensor:
        return philox.rand(seed + x.data_ptr(), torch.arange(x.numel())).to(x.dtype)

    assert "two launches with seed 41 differ" in rows(spec_of("uniform", by_address))["same seed"]


def packed(seed: int, offset: Tensor) -> Tensor:
    """Four numbers a counter, as a kernel with rand4x packs them: as random, but not the reference's stream."""
    return torch.stack(philox.rand4x(seed, offset // 4)).gather(0, (offset % 4)[None])[0]


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("stream", [packed, lambda seed, offset: philox.rand(seed, offset + 1)], ids=["packed", "late"])
@pytest.mark.parametrize("law", NAMES)
def test_another_stream_is_random_and_fails_the_plain_comparison(law: Name, stream: Stream) -> None:
    spec = spec_of(law, kernel(law, stream))
    failed = rows(spec)
    assert failed.keys() <= {"other seeds"}
    assert "with seed -1 it does not draw what the reference draws" in failed["other seeds"]
    assert not plain(spec).passed
    assert plain(spec_of(law)).passed


def plain(spec: KernelSpec) -> ParityResult:
    return next(row for row in kernelcheck.check_kernel(spec, device=CPU, cases=["ragged"]) if row.mode == "plain")


def test_a_kernel_may_refuse_a_strange_seed() -> None:
    right = kernel("uniform")

    def optimized(x: Tensor, seed: int) -> Tensor:
        if seed < 0:
            raise ValueError("seeds count from zero")
        return right(x, seed)

    subject = Subject(spec_of("uniform", optimized), RAGGED, torch.float32, CPU, 0)
    finding = dict(randomness.bodies(subject))["other seeds"]()
    assert finding.passed
    assert finding.reason == "refused: seed -1, raised ValueError: seeds count from zero"


def test_seeds_may_be_tensors() -> None:
    def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {"x": torch.zeros(case["size"], dtype=dtype), "seed": torch.tensor(seed + 41, dtype=torch.int32)}

    spec = replace(spec_of("uniform"), make_inputs=inputs, reference=lambda x, seed: kernel("uniform")(x, seed))
    assert rows(spec) == {}
    ignored = replace(spec, optimized=kernel("uniform", lambda seed, offset: philox.rand(7, offset)))
    assert "the seed is ignored" in rows(ignored)["other seeds"]


def found_in(trials: int, tests: Callable[[np.random.Generator], list[laws.Evidence]]) -> int:
    generator = np.random.default_rng(2024)
    return sum(bool(randomness.verdict(tests(generator))) for _ in range(trials))


def power_of(name: str, generator: np.random.Generator) -> list[laws.Evidence]:
    """One trial of the smallest bias that the docstring of randomness promises to find."""
    count = randomness.DRAWS
    if name == "bernoulli":
        return Law("bernoulli").fit((generator.random(count) < 0.51).astype(float), 0.0)
    if name == "uniform":
        return Law("uniform").fit(generator.random(count) + 0.0065, 0.0)
    if name == "normal mean":
        return Law("normal").fit(generator.standard_normal(count) + 0.022, 0.0)
    if name == "normal variance":
        return Law("normal").fit(generator.standard_normal(count) * 1.016, 0.0)
    first = generator.standard_normal(count // 2)
    second = 0.05 * first + (1 - 0.05**2) ** 0.5 * generator.standard_normal(count // 2)
    found = list(laws.agreement(Law("normal"), first, second, "neighbours"))
    nothing = [laws.Evidence(1.0, "")] * (2 * len(randomness.LAGS))
    return [*found, *nothing]


@pytest.mark.parametrize("name", ["bernoulli", "uniform", "normal mean", "normal variance", "neighbours"])
def test_what_the_docstring_promises_is_found_in_99_of_100_runs(name: str) -> None:
    assert found_in(100, lambda generator: power_of(name, generator)) >= 98


def test_a_repeat_is_found_to_its_first_and_last_draw() -> None:
    drawn = np.random.default_rng(5).random(5000)
    drawn[3001:3101] = drawn[200:300]
    (found,) = laws.repeats(Law("uniform"), [drawn])
    assert (found.launch, found.earlier_launch) == (0, 0)
    assert (found.place, found.earlier, found.length) == (3001, 200, 100)


def test_a_run_of_equal_draws_is_no_repeat_of_itself() -> None:
    drawn = (np.random.default_rng(5).random(5000) < 0.5).astype(float)
    window = Law("bernoulli").window(5000)
    drawn[100 : 100 + window + 9] = 1.0
    assert laws.repeats(Law("bernoulli"), [drawn]) == []


def test_a_sure_outcome_repeats_and_agrees_without_alarm() -> None:
    def always(x: Tensor, seed: int) -> Tensor:
        return torch.ones_like(x)

    sure: Any = Stochastic(seed="seed", law="bernoulli", draws=lambda i, output: output, probability=lambda i: 1.0)
    spec = replace(spec_of("bernoulli", always), stochastic=sure, reference=lambda x, seed: torch.ones_like(x))
    assert rows(spec) == {}
