"""Ten simulated scenarios with a fault whose cause and cost are known: found, named, and foretold."""

from pathlib import Path

import planted
import pytest
from planted import SCENARIOS, Scenario

from kernbench.analysis.communication import communication
from kernbench.analysis.findings import findings, headline
from kernbench.analysis.replay import replay
from kernbench.analysis.replaymodel import model
from kernbench.analysis.stalls import stalls
from kernbench.analysis.whatif import whatif
from kernbench.record import Finding, WhatIf
from kernbench.traces import trace
from kernbench.traces.trace import Trace

FAULTY = [scenario for scenario in SCENARIOS if scenario.fixed is not None]
# Jitter of a device's and a host's durations, as a share, and the seed of it.
JITTER = [(0.0, 0), (0.05, 1), (0.15, 2), (0.3, 3)]
RELATIVE, OF_STEP = 0.2, 0.03


def loaded(step: planted.Step, folder: Path, jitter: float, seed: int, name: str = "trace.json.gz") -> Trace:
    return trace.load(planted.trace_of(step, folder / name, jitter=jitter, seed=seed))


def replayed(one: Trace) -> WhatIf:
    found = whatif(one, stalls(one, None))
    assert found is not None
    assert found.error is not None
    assert abs(found.error) < 0.02, "rules alone reproduce what was simulated by the same rules"
    return found


def found_in(scenario: Scenario, step: planted.Step, folder: Path, jitter: float, seed: int) -> list[Finding]:
    ranks = [
        loaded(other, folder, jitter, seed + 10 + number, f"rank{number}.json.gz")
        for number, other in enumerate((step, *scenario.others))
    ]
    return findings(ranks[0], replayed(ranks[0]), communication=communication(ranks))


@pytest.mark.parametrize(("jitter", "seed"), JITTER)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_cause_is_named_first(scenario: Scenario, jitter: float, seed: int, tmp_path: Path) -> None:
    found = found_in(scenario, scenario.step, tmp_path, jitter, seed)
    assert found[0].cause == scenario.cause, [one.sentence for one in found]


@pytest.mark.parametrize(("jitter", "seed"), JITTER)
@pytest.mark.parametrize("scenario", FAULTY, ids=lambda scenario: scenario.name)
def test_the_cause_is_not_named_where_it_is_not(scenario: Scenario, jitter: float, seed: int, tmp_path: Path) -> None:
    assert scenario.fixed is not None
    one = loaded(scenario.fixed, tmp_path, jitter, seed)
    assert scenario.cause not in [found.cause for found in findings(one, replayed(one))]


@pytest.mark.parametrize(("jitter", "seed"), JITTER)
def test_a_healthy_trace_is_healthy_in_one_line(jitter: float, seed: int, tmp_path: Path) -> None:
    one = loaded(SCENARIOS[-1].step, tmp_path, jitter, seed)
    found = findings(one, replayed(one))
    assert [finding.cause for finding in found] == ["device-bound"]
    assert headline(one, found).startswith("Healthy")
    assert [estimate for estimate in replayed(one).estimates if estimate.share >= OF_STEP] == []


@pytest.mark.parametrize(("jitter", "seed"), JITTER)
@pytest.mark.parametrize(
    "scenario", [scenario for scenario in FAULTY if scenario.change], ids=lambda scenario: scenario.name
)
def test_the_saving_is_foretold(scenario: Scenario, jitter: float, seed: int, tmp_path: Path) -> None:
    """Both within 20 % of the true saving and within 3 points of the step, which the simulator alone tells."""
    estimates = replayed(loaded(scenario.step, tmp_path, jitter, seed)).estimates
    changes = [estimate.change for estimate in estimates]
    # A single stall is all stalls.
    change = "without stall" if scenario.change == "without all stalls" not in changes else scenario.change
    (found,) = [estimate for estimate in estimates if estimate.change == change]
    predicted = sum(found.saving_seconds_per_step) / 2
    step, saving = planted.step_seconds(scenario.step), planted.true_saving(scenario)
    assert predicted == pytest.approx(saving, rel=RELATIVE)
    assert predicted / step == pytest.approx(saving / step, abs=OF_STEP)


@pytest.mark.parametrize(("jitter", "seed"), JITTER)
def test_the_lag_of_a_slow_rank_is_what_its_absence_saves(jitter: float, seed: int, tmp_path: Path) -> None:
    (scenario,) = [scenario for scenario in SCENARIOS if scenario.others]
    ranks = [
        loaded(step, tmp_path, jitter, seed + number, f"rank{number}.json.gz")
        for number, step in enumerate((scenario.step, *scenario.others))
    ]
    found = communication(ranks)
    assert found is not None
    assert found.slowest_rank == 1
    assert found.lag_seconds_per_step == pytest.approx(planted.true_saving(scenario), rel=RELATIVE)


def test_the_simulated_trace_is_replayed_to_the_nanosecond(tmp_path: Path) -> None:
    """The simulator and the replay were written apart; they agree on when the last kernel of a step ends."""
    for number, scenario in enumerate(SCENARIOS):
        program = model(loaded(scenario.step, tmp_path, 0.1, number))
        assert replay(program).done_ns[-1] == pytest.approx(program.traced_ns, rel=0.002), scenario.name
