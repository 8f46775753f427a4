"""Where a timed kernel stands under measured roofs."""

from __future__ import annotations

import pytest

from kernbench.measurement.roofline import Held, place
from kernbench.record import Ceilings
from kernbench.spec import Cost

ROOFS = Ceilings(
    copy_bytes_per_second=1e12,
    matmul_flops_per_second={"float32": 1e13, "tf32": 8e13, "bfloat16": 1e14},
    launch_seconds=1e-9,
)


def test_the_nearer_roof_gives_the_share() -> None:
    memory = place(1e-3, Cost(flops=1e6, bytes_read=3e8, bytes_written=2e8), "float32", ROOFS)
    assert memory.bound == "memory"
    assert memory.share == pytest.approx(0.5)
    assert not memory.impossible
    assert memory.bytes_per_second == pytest.approx(5e11)
    compute = place(1e-3, Cost(flops=9e10, bytes_read=1e6, bytes_written=1e6), "bfloat16", ROOFS)
    assert compute.bound == "compute"
    assert compute.share == pytest.approx(0.9)
    assert place(1e-3, Cost(flops=9e10, bytes_read=0, bytes_written=0), "float16", ROOFS).share == pytest.approx(0.9)


def test_a_figure_above_its_roof_is_impossible_and_says_why() -> None:
    memory = place(1e-3, Cost(flops=0, bytes_read=1e9, bytes_written=1e8), "float32", ROOFS)
    assert memory.impossible
    assert "never moved" in memory.note
    assert "mostly reads" in memory.note
    compute = place(1e-3, Cost(flops=2e11, bytes_read=1, bytes_written=1), "bfloat16", ROOFS)
    assert compute.impossible
    assert "bfloat16 matrix-product roof" in compute.note
    assert not place(1e-3, Cost(flops=0, bytes_read=5.1e8, bytes_written=5e8), "float32", ROOFS).impossible


def test_float32_beyond_ieee_is_set_against_tf32() -> None:
    found = place(1e-3, Cost(flops=4e10, bytes_read=1, bytes_written=1), "float32", ROOFS)
    assert found.share == pytest.approx(0.5)
    assert "tf32" in found.note


def test_data_in_the_cache_has_no_memory_roof() -> None:
    cost = Cost(flops=1, bytes_read=2e9, bytes_written=1)
    assert place(1e-3, cost, "float32", ROOFS, in_cache=True).share is None
    assert place(1e-3, cost, "float32", Ceilings()).share is None


def test_a_cost_of_more_bytes_than_there_are_is_impossible_however_slow_it_is() -> None:
    visits = Cost(flops=0, bytes_read=6e6, bytes_written=1.3e6)
    slow = place(1.0, visits, "float32", ROOFS, held=Held(1e6, 50_000_000))
    assert slow.impossible
    assert slow.note == (
        "its cost counts 7.3 times the bytes that its tensors hold (7.3 MB of 1 MB): visits, not bytes that move"
    )
    assert not place(1.0, visits, "float32", ROOFS, held=Held(7.3e6, 0)).impossible
    assert place(1.0, visits, "float32", ROOFS, in_cache=True, held=Held(1e6, 0)).impossible


def test_the_reason_names_what_speaks_for_itself() -> None:
    cost = Cost(flops=0, bytes_read=5e5, bytes_written=5e5)
    cached = place(1e-7, cost, "float32", ROOFS, held=Held(1e6, 50_000_000))
    assert cached.impossible
    assert cached.note == (
        "above the measured copy roof: its 1 MB fit into the cache of 50 MB, where they may still have been"
    )
    unlaunched = place(1e-10, cost, "float32", ROOFS, held=Held(1e9, 50_000_000))
    assert "less than launching nothing takes (0.001 us)" in unlaunched.note
    unknown = place(1e-7, cost, "float32", ROOFS, held=Held(1e9, 50_000_000))
    assert "the clock is wrong" in unknown.note
