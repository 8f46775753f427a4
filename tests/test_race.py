"""How many steps make a block of a race: enough for the fastest side, and not too many for the slowest."""

from __future__ import annotations

import pytest

from kernbench.measurement.race import BLOCK_SECONDS, LONGEST_BLOCK_SECONDS, steps_per_round


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        pytest.param({"before": 0.02, "after": 0.02}, 3, id="equal sides"),
        pytest.param({"before": 0.02, "after": 0.005}, 10, id="a fast one"),
        pytest.param({"before": 0.125, "graph": 0.0025}, 4, id="fifty times as fast: the slow one takes half a second"),
        pytest.param({"before": 0.4, "graph": 0.0001}, 1, id="one step of the slow one"),
        pytest.param({"before": 3.0, "after": 2.0}, 1, id="longer than any block"),
        pytest.param({"before": 0.001, "slow": 2.0}, 50, id="a slow candidate does not shorten the baseline's block"),
    ],
)
def test_a_block_suits_the_fastest_side_as_far_as_the_slowest_allows(seconds: dict[str, float], steps: int) -> None:
    assert steps_per_round(seconds, "before") == steps
    filled = steps * min(seconds.values()) >= BLOCK_SECONDS
    assert filled or (steps + 1) * max(seconds.values()) > LONGEST_BLOCK_SECONDS
