"""The replay of a step recorded on one NVIDIA H200, against what was measured there without the reads.

``recorded/titan_mac_reads.json.gz`` is the side before of ``kernbench swap --phase 0 titan-mac``; the figures are those
of its record: seconds per unprofiled step, and the ratio that the race of both sides gave.
"""

from pathlib import Path

import pytest

from kernbench.analysis.replay import replay
from kernbench.analysis.replaymodel import model
from kernbench.analysis.whatif import typical, whatif
from kernbench.traces import trace
from kernbench.traces.trace import Trace

RECORDED = Path(__file__).parent / "recorded" / "titan_mac_reads.json.gz"
STEP_SECONDS, RATIO = 0.025636240005493168, 1.1304591933278543


@pytest.fixture(scope="module")
def recorded() -> Trace:
    return trace.load(RECORDED)


def test_a_recorded_step_is_replayed_with_and_without_its_own_latencies(recorded: Trace) -> None:
    program = model(recorded)
    assert replay(program).done_ns[-1] == pytest.approx(program.traced_ns, rel=0.002)
    assert replay(typical(program)).done_ns[-1] == pytest.approx(program.traced_ns, rel=0.02)


def test_the_saving_without_148_reads_is_foretold_within_three_points_of_the_step(recorded: Trace) -> None:
    found = whatif(recorded, unprofiled_seconds=STEP_SECONDS)
    assert found is not None
    assert found.baseline_seconds == pytest.approx(STEP_SECONDS, rel=0.01)
    (together,) = [estimate for estimate in found.estimates if estimate.change == "without all stalls"]
    assert together.share == pytest.approx(1 - 1 / RATIO, abs=0.03)
    alone = [estimate for estimate in found.estimates if estimate.change == "without stall"]
    assert sum(estimate.share for estimate in alone) < together.share, "reads hide each other's cost"
