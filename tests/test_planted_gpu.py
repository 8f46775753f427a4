"""Real steps with a fault, on a GPU: the cause named, the saving foretold before the fault is taken out and timed."""

from pathlib import Path

import planted_workload
import pytest
from planted_workload import SCENARIOS, Scenario

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_cause_is_named_and_the_saving_foretold(scenario: Scenario, tmp_path: Path) -> None:
    found = planted_workload.outcome(scenario, tmp_path)
    shown = planted_workload.table([found])
    assert found.named, shown
    assert found.foretold, shown
