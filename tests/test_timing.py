"""What the timers measure, when warm-up ends, and how arms are interleaved."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from kernbench import bench, device
from kernbench.errors import KernbenchError
from kernbench.measurement import timing
from kernbench.measurement.statistics import paired_ratio
from kernbench.record import Clocks

CPU = torch.device("cpu", 0)
HOT = Clocks(throttle_reasons=["hardware thermal slowdown"])
FREE = Clocks()
CAPPED = Clocks(throttle_reasons=["software power cap"])


def busy(seconds: float) -> None:
    """Work of a known length, whatever else the machine does (unless it takes the core away)."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_steps_run_in_order_with_the_collector_off_and_it_is_restored() -> None:
    seen: list[tuple[int, bool]] = []
    seconds = bench.time_steps(lambda i: seen.append((i, gc.isenabled())), first=5, count=3, device=CPU)
    assert seen == [(5, False), (6, False), (7, False)]
    assert len(seconds) == 3
    assert gc.isenabled()


def test_the_collector_is_restored_after_a_failed_step_and_stays_off_where_it_was_off() -> None:
    def fail(_: int) -> None:
        raise RuntimeError("step")

    for timer in (bench.time_steps, bench.timed_block):
        with pytest.raises(RuntimeError, match="step"):
            timer(fail, first=0, count=1, device=CPU)
        assert gc.isenabled()
    gc.disable()
    try:
        bench.timed_block(lambda _: None, first=0, count=1, device=CPU)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_timer_costs_less_than_two_percent_of_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)

    def step(_: int) -> None:
        busy(2e-4)

    def bare() -> float:
        start = time.perf_counter()
        for index in range(5):
            step(index)
        return time.perf_counter() - start

    def harness() -> float:
        return sum(bench.time_steps(step, first=0, count=5, device=CPU))

    def block() -> float:
        return 5 * bench.timed_block(step, first=0, count=5, device=CPU)

    # The shortest of many interleaved millisecond repeats, as another process may take the core away in most of them.
    loop, timed, blocked = (
        min(repeats) for repeats in zip(*((bare(), harness(), block()) for _ in range(60)), strict=True)
    )
    assert timed == pytest.approx(loop, rel=0.02)
    assert blocked == pytest.approx(loop, rel=0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(timing, "_perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    yield advance


def test_times_are_those_of_the_clock(clock: Callable[[float], None]) -> None:
    assert bench.time_steps(lambda i: clock(i), first=1, count=3, device=CPU) == [1.0, 2.0, 3.0]
    assert bench.timed_block(lambda i: clock(i), first=1, count=3, device=CPU) == 2.0


@pytest.mark.parametrize(
    ("durations", "ran"),
    [
        ([9.0, 3.0, 2.0, 1.5, 1.01, 1.0, 1.0, 1.02, 5.0], 8),
        ([1.0] * 20, 4),
        ([float(2**i) for i in range(20)], 10),
    ],
    ids=["falls to a plateau", "is there at once", "never settles"],
)
def test_warm_up_ends_on_a_plateau_or_gives_up(
    clock: Callable[[float], None], durations: Sequence[float], ran: int
) -> None:
    seen: list[int] = []

    def step(index: int) -> None:
        seen.append(index)
        clock(durations[index])

    assert bench.warm_up(step, CPU, most=10) == ran
    assert seen == list(range(ran))


def test_every_round_runs_every_arm_in_an_order_of_its_own() -> None:
    log: list[tuple[str, int]] = []

    def arm(name: str) -> Callable[[int], float]:
        def block(number: int) -> float:
            log.append((name, number))
            return number + {"a": 0.1, "b": 0.2, "c": 0.3}[name]

        return block

    def run(seed: int) -> list[tuple[str, int]]:
        log.clear()
        bench.interleave({name: arm(name) for name in "abc"}, rounds=12, seed=seed, clocks=lambda: None)
        return list(log)

    first = run(0)
    assert [number for _, number in first] == [number for number in range(12) for _ in range(3)]
    orders = ["".join(name for name, _ in first[start : start + 3]) for start in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2
    assert run(0) == first
    assert run(1) != first


def test_figures_keep_their_arm_and_round_whatever_the_order() -> None:
    done: list[int] = []
    rounds: list[tuple[int, dict[str, float]]] = []
    arms, clocks, dropped = bench.interleave(
        {"before": lambda r: r + 1.0, "after": lambda r: r + 2.0},
        rounds=4,
        progress=done.append,
        on_round=lambda number, figures: rounds.append((number, dict(figures))),
        clocks=lambda: None,
    )
    assert [(arm.name, arm.seconds) for arm in arms] == [("before", [1, 2, 3, 4]), ("after", [2, 3, 4, 5])]
    assert (clocks, dropped, done) == ([], 0, [1, 1, 1, 1])
    assert rounds[2] == (2, {"before": 3.0, "after": 4.0})


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ([FREE, CAPPED, HOT, CAPPED, CAPPED], [0.0, 3.0]),
        ([HOT, FREE, FREE, FREE, FREE], [1.0, 2.0, 3.0]),
        ([FREE, FREE, FREE, FREE, HOT], [0.0, 1.0, 2.0]),
    ],
    ids=["in the middle", "before the first", "after the last"],
)
def test_a_round_between_throttled_readings_is_dropped_from_all_arms_and_counted(
    told: list[Clocks], kept: list[float]
) -> None:
    readings = iter(told)
    result = bench.interleave({"a": float, "b": lambda r: r + 10.0}, rounds=4, clocks=lambda: next(readings))
    assert [arm.seconds for arm in result.arms] == [kept, [number + 10 for number in kept]]
    assert result.clocks == told[1:]
    assert result.dropped_rounds == 4 - len(kept)
    assert result.warning == ""
    assert next(readings, None) is None


def test_many_dropped_rounds_are_said_in_words() -> None:
    readings = iter([FREE, HOT, FREE, HOT, FREE, FREE])
    result = bench.interleave({"a": float}, rounds=5, clocks=lambda: next(readings))
    assert result.warning == ("4 of 5 rounds were dropped, as the device was held down (hardware thermal slowdown)")


def test_what_a_kernel_patches_later_is_not_what_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(torch.cuda, "Event", None)
    monkeypatch.setattr(torch.cuda, "synchronize", None)

    def step(_: int) -> None:
        until = time.monotonic() + 2e-3
        while time.monotonic() < until:
            pass

    assert 1e-3 < bench.timed_block(step, first=0, count=1, device=CPU) < 1
    assert sum(bench.time_steps(step, first=0, count=2, device=CPU)) > 0


def test_a_device_held_down_in_every_round_is_an_error() -> None:
    with pytest.raises(KernbenchError, match="all 2 rounds .hardware thermal slowdown.; let it cool"):
        bench.interleave({"a": float}, rounds=2, clocks=lambda: HOT)


def test_an_interrupt_gets_through() -> None:
    def interrupted(number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        bench.race({"a": interrupted}, device=CPU, rounds=3)
    assert gc.isenabled()


def test_a_planted_two_percent_is_found_and_identical_arms_show_nothing(clock: Callable[[float], None]) -> None:
    noise = random.Random(0)

    def arm(seconds: float) -> Callable[[int], float]:
        def block(number: int) -> float:
            # One figure of noise a block, and a machine that slows down by 30 % over the race.
            pace = noise.gauss(1, 0.005) * (1 + 0.01 * number)
            return bench.timed_block(lambda _: clock(pace * seconds), first=number * 5, count=5, device=CPU)

        return block

    arms, _, _ = bench.interleave({"before": arm(1.02), "after": arm(1.0), "again": arm(1.02)}, rounds=30)
    seconds = {one.name: one.seconds for one in arms}
    ratio = paired_ratio(seconds["before"], seconds["after"], seconds["again"], steps_per_round=5)
    assert ratio.median == pytest.approx(1.02, abs=0.005)
    assert ratio.low > 1
    assert ratio.median - 1 > ratio.noise_floor
    assert ratio.a_a is not None
    assert ratio.a_a[0] <= 1 <= ratio.a_a[1]


@pytest.mark.gpu
def test_steps_timed_by_events_add_up_to_the_wall_clock() -> None:
    chosen = torch.device("cuda", 0)
    values = torch.randn(1 << 26, device=chosen)

    def step(_: int) -> None:
        values.add_(1)

    bench.warm_up(step, chosen)
    wall = 100 * bench.timed_block(step, first=0, count=100, device=chosen)
    events = sum(bench.time_steps(step, first=0, count=100, device=chosen))
    assert events == pytest.approx(wall, rel=0.03)


@pytest.mark.gpu
def test_the_steps_are_timed_with_one_wait() -> None:
    chosen = torch.device("cuda", 0)
    values = torch.randn(64, device=chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.time_steps(lambda _: values.add_(1), first=0, count=10, device=chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_planted_slowdown_is_found_on_a_gpu_and_identical_arms_show_nothing() -> None:
    chosen = torch.device("cuda", 0)

    def arm(elements: int) -> Callable[[int], float]:
        values = torch.randn(elements, device=chosen)
        return lambda number: bench.timed_block(lambda _: values.mul_(1.0), first=0, count=50, device=chosen)

    size = 1 << 27
    arms, clocks, dropped = bench.interleave(
        {"before": arm(size), "after": arm(int(size * 1.02)), "again": arm(size)},
        rounds=30,
        clocks=lambda: device.read_clocks(chosen),
    )
    seconds = {one.name: one.seconds for one in arms}
    ratio = paired_ratio(seconds["before"], seconds["after"], seconds["again"], steps_per_round=50)
    print(ratio, clocks[-1:], dropped)
    assert ratio.high < 1
    assert 1 - ratio.median > ratio.noise_floor
    assert ratio.median == pytest.approx(1 / 1.02, abs=0.005)
    assert ratio.a_a is not None
    assert ratio.a_a[0] - 0.002 <= 1 <= ratio.a_a[1] + 0.002
    assert len(clocks) == 30
