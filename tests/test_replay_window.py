"""Traces that begin while earlier work is queued: that work has no launch in them, and is no reason to refuse."""

from pathlib import Path

import planted
import pytest
from kineto_builder import KinetoBuilder
from planted import COMPUTE, SIDE, Machine, forward

from kernbench.analysis.replay import replay
from kernbench.analysis.replaymodel import CannotReplayError, model
from kernbench.analysis.stalls import stalls
from kernbench.analysis.whatif import whatif
from kernbench.traces import trace

JITTER = [(0.0, 0), (0.05, 1), (0.15, 2)]
FIRST = 4


def read_first(machine: Machine) -> None:
    """Reads what the step before computed, then queues two milliseconds of work."""
    machine.item()
    machine.work(300)
    forward(machine, 40, 60)


def unread(machine: Machine) -> None:
    machine.work(300)
    forward(machine, 40, 60)


def on_two_streams(machine: Machine) -> None:
    """Waits for the whole device, where a stream that the step does not use is the last to end."""
    machine.synchronize_device()
    forward(machine, 20, 60)
    if len(machine.steps) < FIRST:
        machine.copy("HtoD (Pinned -> Device)", 1900, stream=SIDE)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("jitter", "seed"), JITTER)
def test_a_window_cut_from_a_running_queue_is_replayed_and_foretells(
    jitter: float, seed: int, steps: int, tmp_path: Path
) -> None:
    path = planted.window_of(read_first, tmp_path / "trace.json", first=FIRST, steps=steps, jitter=jitter, seed=seed)
    loaded = trace.load(path)
    assert (loaded.device.call < 0).sum() > 0.1 * len(loaded.device), "the window must begin within queued work"
    found = whatif(loaded, stalls(loaded, None))
    assert found is not None
    assert found.refused == ""
    assert found.error == pytest.approx(0, abs=0.02)
    scenario = planted.Scenario("read first", "host read", read_first, unread)
    true = planted.true_saving(scenario, jitter=jitter, seed=seed)
    predicted = max(sum(one.saving_seconds_per_step) / 2 for one in found.estimates if one.change == "without stall")
    step = planted.step_seconds(read_first, jitter=jitter, seed=seed)
    assert abs(predicted - true) <= max(0.2 * true, 0.03 * step)


@pytest.mark.parametrize("steps", [1, 3])
def test_queued_work_that_nothing_waits_for_only_comes_first(steps: int, tmp_path: Path) -> None:
    loaded = trace.load(planted.window_of(planted._device_bound, tmp_path / "t.json", first=FIRST, steps=steps))
    program = model(loaded)
    assert len(program.queued_ns) > 20
    assert program.pending_ns[0] == program.queued_ns[-1] > 0
    assert replay(program).done_ns[0] == pytest.approx(program.traced_ns, rel=1e-3)


def test_a_stream_that_only_earlier_work_uses_is_waited_for_too(tmp_path: Path) -> None:
    loaded = trace.load(planted.window_of(on_two_streams, tmp_path / "t.json", first=FIRST, steps=2))
    program = model(loaded)
    assert sorted(set(loaded.device.stream[loaded.device.call >= 0].tolist())) == [COMPUTE]
    assert len(program.pending_ns) == 2
    assert replay(program).done_ns[0] == pytest.approx(program.traced_ns, rel=1e-3)


def missing(builder: KinetoBuilder, numbers: set[int]) -> None:
    """Take the launches with these correlations out of the trace."""
    builder.events = [
        event
        for event in builder.events
        if event.get("cat") != "cuda_runtime" or event["args"]["correlation"] not in numbers
    ]


def test_launches_lost_after_others_still_refuse_the_replay(tmp_path: Path) -> None:
    machine = planted.simulate(planted._device_bound, steps=2)
    missing(machine.builder, set(range(30, 50)))
    loaded = trace.load(machine.builder.write(tmp_path / "lost.json"))
    with pytest.raises(CannotReplayError, match="the launches of 20 of 80 device events are missing"):
        model(loaded)


def test_launches_lost_at_the_beginning_of_a_recording_are_no_queue(tmp_path: Path) -> None:
    """The device had run dry between the kernels, so their launches fell into the window, and are lost."""

    def slow(machine: Machine) -> None:
        forward(machine, 40, 20, python=100)

    machine = planted.simulate(slow, steps=2)
    missing(machine.builder, set(range(1, 21)))
    loaded = trace.load(machine.builder.write(tmp_path / "lost.json"))
    with pytest.raises(CannotReplayError, match="launches of 20 of 80 device events are missing"):
        model(loaded)
