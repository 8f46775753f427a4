"""Real steps with a fault, on a GPU: the cause named, the saving foretold before the fault is taken out and timed."""

from pathlib import Path

import planted_workload
import pytest
from planted_workload import SCENARIOS, Scenario

pytestmark = pytest.mark.gpu

RELATIVE, OF_STEP = 0.2, 0.03


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_cause_is_named_and_the_saving_foretold(scenario: Scenario, tmp_path: Path) -> None:
    found = planted_workload.outcome(scenario, tmp_path)
    shown = planted_workload.table([found])
    assert found.findings[0].cause == scenario.cause, shown
    if scenario.fixed is None:
        assert [finding.cause for finding in found.findings] == ["device-bound"], shown
        return
    assert found.whatif.refused == "", shown
    assert found.predicted is not None, shown
    off = abs(found.predicted - found.measured)
    assert off <= max(RELATIVE * found.measured, OF_STEP * found.faulty_seconds), shown
