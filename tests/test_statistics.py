"""Bootstrap intervals and paired ratios on synthetic rounds."""

import numpy
import pytest
import scipy.stats
from numpy.typing import NDArray

from kernbench.measurement.statistics import bootstrap_median, expanded_tail, paired_ratio, unpaired_ratio
from kernbench.record import Ratio

ROUNDS = 30
NOISE = 0.005
SEEDS = 100


def rounds(seed: int, slowdown: float = 1.0, noise: float = NOISE, drift: float = 0.0) -> Ratio:
    generator = numpy.random.default_rng(seed)
    trend = 1 + drift * numpy.linspace(0, 1, ROUNDS)
    before, after, again = (trend * generator.normal(1e-3, noise * 1e-3, ROUNDS) for _ in range(3))
    return paired_ratio(before.tolist(), (after * slowdown).tolist(), again.tolist(), steps_per_round=1)


def faster(ratio: Ratio) -> bool:
    return ratio.low > 1 and ratio.median - 1 > ratio.noise_floor


def slower(ratio: Ratio) -> bool:
    return ratio.high < 1 and 1 - ratio.median > ratio.noise_floor


def test_one_value_has_no_width() -> None:
    assert bootstrap_median([3.0]) == (3.0, 3.0, 3.0)


def test_the_interval_holds_the_median_and_repeats_with_its_seed() -> None:
    values = numpy.random.default_rng(1).lognormal(size=41).tolist()
    median, low, high = bootstrap_median(values)
    assert low < median < high
    assert median == numpy.median(values)
    assert (median, low, high) == bootstrap_median(values)


def test_the_interval_agrees_with_scipy() -> None:
    values = numpy.random.default_rng(2).normal(10, 1, 51)
    level = 1 - 2 * expanded_tail(51)
    theirs = scipy.stats.bootstrap(
        (values,), numpy.median, method="percentile", confidence_level=level, n_resamples=20_000, rng=0
    ).confidence_interval
    _, low, high = bootstrap_median(values.tolist())
    assert low == pytest.approx(theirs.low, abs=0.05)
    assert high == pytest.approx(theirs.high, abs=0.05)


def test_a_long_sample_is_resampled_in_chunks() -> None:
    values = numpy.random.default_rng(3).normal(1, 0.1, 30_000).tolist()
    median, low, high = bootstrap_median(values, resamples=200)
    assert 0.99 < low < median < high < 1.01


def test_the_tail_is_narrowed_as_published() -> None:
    assert expanded_tail(20) == pytest.approx(scipy.stats.norm.cdf(-((20 / 19) ** 0.5) * scipy.stats.t.ppf(0.995, 19)))
    assert expanded_tail(5) < expanded_tail(30) < 0.005 < expanded_tail(30) * 2


def _paired(kind: str, generator: numpy.random.Generator, count: int) -> NDArray[numpy.float64]:
    """Ratios of two identical arms, one row per race."""

    def arm() -> NDArray[numpy.float64]:
        shape = (count, ROUNDS)
        if kind == "heavy tails":
            return 1 + NOISE * generator.standard_t(2, shape)
        if kind == "two modes":
            return 1 + 2 * NOISE * (generator.random(shape) < 0.5) + generator.normal(0, NOISE / 10, shape)
        drift = numpy.linspace(1, 1.3, ROUNDS) if kind == "drift" else 1.0
        return drift * generator.normal(1, NOISE, shape)

    one, other = arm(), arm()
    if kind == "first is slower":
        first = generator.random(one.shape) < 0.5
        one, other = one * numpy.where(first, 1.01, 1), other * numpy.where(first, 1, 1.01)
    return one / other


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two modes", "drift", "first is slower"])
def test_intervals_of_identical_arms_hold_one_in_99_of_100(kind: str) -> None:
    races = _paired(kind, numpy.random.default_rng(5), 400)
    held = sum(low <= 1 <= high for _, low, high in (bootstrap_median(race.tolist(), resamples=1000) for race in races))
    # With 99 % coverage, fewer than 390 of 400 has a probability of 0.3 %, and the draws are seeded.
    assert held >= 390


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_senseless_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="figure"):
        bootstrap_median(values)


def test_identical_arms_show_no_change() -> None:
    quiet = sum(not faster(ratio) and not slower(ratio) for ratio in map(rounds, range(SEEDS)))
    assert quiet >= 95


@pytest.mark.parametrize(("slowdown", "found"), [(1.02, slower), (1 / 1.02, faster)])
def test_two_percent_is_found_in_half_a_percent_of_noise(slowdown: float, found: object) -> None:
    assert callable(found)
    assert sum(bool(found(rounds(seed, slowdown))) for seed in range(SEEDS)) >= 95


def test_drift_common_to_the_arms_cancels() -> None:
    for seed in range(10):
        steady, drifting = rounds(seed, 1.02), rounds(seed, 1.02, drift=0.5)
        assert drifting.median == pytest.approx(steady.median, rel=1e-12)
        assert drifting.noise_floor == pytest.approx(steady.noise_floor, rel=1e-9)


def test_the_noise_floor_is_the_far_end_of_the_identical_arms_interval() -> None:
    ratio = rounds(7)
    assert ratio.a_a is not None
    assert ratio.noise_floor == max(abs(end - 1) for end in ratio.a_a)
    assert ratio.low <= ratio.median <= ratio.high
    assert (ratio.rounds, ratio.steps_per_round, ratio.dropped_rounds) == (ROUNDS, 1, 0)


def test_a_single_round_makes_no_interval_but_a_ratio() -> None:
    ratio = paired_ratio([2.0], [1.0], [1.9], steps_per_round=4, dropped_rounds=2)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.noise_floor == pytest.approx(2 / 1.9 - 1)
    assert (ratio.steps_per_round, ratio.dropped_rounds) == (4, 2)


def test_separate_runs_have_an_interval_and_the_wider_side_is_the_floor() -> None:
    generator = numpy.random.default_rng(9)
    before, after = generator.normal(1.02, 0.01, 40), generator.normal(1.0, 0.002, 40)
    ratio = unpaired_ratio(before.tolist(), after.tolist())
    assert ratio.low < ratio.median < ratio.high
    assert ratio.median == pytest.approx(1.02, abs=0.01)
    _, low, high = bootstrap_median(before.tolist())
    assert ratio.noise_floor == pytest.approx((high - low) / 2 / numpy.median(before), rel=0.1)
    single = unpaired_ratio([2.0], [1.0])
    assert (single.median, single.low, single.high, single.noise_floor) == (2.0, 2.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [([], [], []), ([1.0], [1.0, 2.0], [1.0]), ([1.0], [0.0], [1.0]), ([1.0], [float("nan")], [1.0])],
)
def test_arms_that_cannot_be_paired_are_refused(before: list[float], after: list[float], again: list[float]) -> None:
    with pytest.raises(ValueError):
        paired_ratio(before, after, again, steps_per_round=1)
