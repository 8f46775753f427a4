"""Formatting of figures: digits, units and words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernbench.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0921, "92.1 ms"),
        (0.0999999, "100 ms"),
        (0.0009996, "1.00 ms"),
        (1.0, "1.00 s"),
        (3.1e-6, "3.10 µs"),
        (12e-9, "12.0 ns"),
        (0.0, "0 ms"),
        (-0.017, "-17.0 ms"),
        (100.0, "100 s"),
        (185.0, "3 min 5 s"),
        (None, "unknown"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


def test_ranges_share_the_larger_unit() -> None:
    assert units.seconds_range(0.091, 0.0934) == "91.0–93.4 ms"
    assert units.seconds_range(0.9e-3, 1.1e-3) == "0.900–1.10 ms"


@pytest.mark.parametrize(
    ("value", "text"),
    [(6.0, "6"), (1204.0, "1,204"), (6.5, "6.50"), (0.0, "0"), (None, "unknown")],
)
def test_counts_keep_whole_numbers_whole(value: float | None, text: str) -> None:
    assert units.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.404, "40 %"), (0.0324, "3.2 %"), (0.0004, "under 0.1 %"), (0.0, "0 %"), (1.05, "105 %"), (0.0996, "10 %")],
)
def test_shares(value: float, text: str) -> None:
    assert units.share(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1.23, "1.23x faster"),
        (0.92, "1.09x slower"),
        (1.0, "the same"),
        (1.004, "1.004x faster"),
        (12.34, "12.3x faster"),
        (math.nan, "unknown"),
        (0.0, "unknown"),
    ],
)
def test_ratios_in_words(ratio: float, text: str) -> None:
    assert units.faster(ratio) == text


def test_rates_are_decimal_and_sizes_binary() -> None:
    assert units.bytes_rate(3.98e12) == "3.98 TB/s"
    assert units.flops_rate(5.13e13) == "51.3 TFLOP/s"
    assert units.size(40 * 2**20) == "40.0 MiB"
    assert units.units_rate(11100, "tokens") == "11,100 tokens/s"


def test_errors_are_scientific_until_they_are_large() -> None:
    shown = [units.scientific(value) for value in (3.14e-7, 0.0, 9.0, 1e300, math.inf, None)]
    assert shown == ["3.1e-07", "0", "9.00", "1.00e+300", "inf", ""]


def test_moments_are_utc_and_damage_is_shown_as_it_stands() -> None:
    assert units.moment("2026-11-21T15:25:30+01:00") == "2026-11-21 14:25 UTC"
    assert units.moment("yesterday") == "yesterday"


@given(st.floats(min_value=1e-9, max_value=100.0))
def test_seconds_never_need_a_thousand_of_their_unit(value: float) -> None:
    amount, unit = units.seconds(value).split(" ")
    assert unit in ("s", "ms", "µs", "ns")
    assert 1 <= float(amount) < 1000
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    assert float(amount) * scale == pytest.approx(value, rel=0.0051)
