"""How time is taken: single steps, blocks of steps, the warm-up before them, and interleaved rounds of several arms."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from kernbench import nvml
from kernbench.errors import KernbenchError
from kernbench.record import Arm, Clocks

Step = Callable[[int], object]
ReadClocks = Callable[[], Clocks | None]

# Bound before any kernel is loaded: one that replaces these functions does not change what is measured.
_perf_counter = time.perf_counter
_synchronize = torch.cuda.synchronize
_Event = torch.cuda.Event
_record = torch.cuda.Event.record
_elapsed_time = torch.cuda.Event.elapsed_time

PLATEAU_STEPS = 4
PLATEAU_SPREAD = 0.05
LEAST_WARM_UP_STEPS = 3
MOST_WARM_UP_STEPS = 20


class Interleaved(NamedTuple):
    """Seconds per step of each arm, in the order given; clocks of every round, dropped ones too; rounds dropped."""

    arms: list[Arm]
    clocks: list[Clocks]
    dropped_rounds: int

    @property
    def warning(self) -> str:
        """In words that more rounds were dropped than kept, empty if not."""
        return too_many_dropped(self.clocks, self.dropped_rounds)


def too_many_dropped(clocks: Sequence[Clocks], dropped: int) -> str:
    """In words that more than half of the rounds were dropped, empty if not.

    Args:
        clocks: what the device said after each round, the dropped ones too.
    """
    if 2 * dropped <= len(clocks):
        return ""
    return f"{dropped} of {len(clocks)} rounds were dropped, as the device was held down ({_held_down(clocks)})"


def _held_down(clocks: Sequence[Clocks]) -> str:
    return ", ".join(sorted(frozenset[str]().union(*map(nvml.slowdowns, clocks))))


def event() -> Any:
    """A CUDA event that takes time."""
    return _Event(enable_timing=True)  # type: ignore[no-untyped-call]


def mark(at: Any) -> None:
    """Have the current stream record an event when it gets here."""
    _record(at)


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds from one event to another, both past."""
    return float(_elapsed_time(begin, end)) / 1e3


def now() -> float:
    """The host's clock in seconds."""
    return _perf_counter()


def time_steps(step: Step, *, first: int, count: int, device: torch.device) -> list[float]:
    """Seconds of each of ``count`` steps from index ``first`` on, unprofiled and without a garbage collection.

    On a GPU events mark the borders of the steps and the host waits once, after the last one, so that it may run ahead
    as far as the steps themselves let it.
    """
    gc.collect()
    if device.type != "cuda":
        with collector_off():
            marks = [now()]
            for index in range(first, first + count):
                step(index)
                marks.append(now())
        return [end - begin for begin, end in pairwise(marks)]
    with torch.cuda.device(device), collector_off():
        events = [event() for _ in range(count + 1)]
        synchronize(device)
        mark(events[0])
        for index in range(count):
            step(first + index)
            mark(events[index + 1])
        synchronize(device)
    return [seconds_between(begin, end) for begin, end in pairwise(events)]


def timed_block(step: Step, *, first: int, count: int, device: torch.device) -> float:
    """Wall seconds per step over one block of steps: the device is idle before it, and its work is done at the end."""
    with collector_off():
        synchronize(device)
        start = now()
        for index in range(first, first + count):
            step(index)
        synchronize(device)
        return (now() - start) / count


def warm_up(
    step: Step,
    device: torch.device,
    *,
    first: int = 0,
    least: int = LEAST_WARM_UP_STEPS,
    most: int = MOST_WARM_UP_STEPS,
    agree: Callable[[float], float] = float,
) -> int:
    """Run steps until the last few take the same time within 5 %, at most ``most``; how many ran.

    Args:
        agree: makes one figure of what a step took on several ranks, which have to run equally many.
    """
    seconds: list[float] = []
    while len(seconds) < most:
        seconds.append(agree(timed_block(step, first=first + len(seconds), count=1, device=device)))
        if len(seconds) >= max(least, PLATEAU_STEPS):
            last = seconds[-PLATEAU_STEPS:]
            if max(last) - min(last) < PLATEAU_SPREAD * median(last):
                break
    return len(seconds)


def interleave(
    arms: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    on_round: Callable[[int, Mapping[str, float]], None] | None = None,
    clocks: ReadClocks | None = None,
) -> Interleaved:
    """Run one block of every arm per round, in an order drawn anew each round, so that drift becomes noise of all arms.

    A round before or after which the device was held down by heat or its power supply is dropped from all arms and
    counted.

    Args:
        arms: by name: runs the arm's block of round r, returns seconds per step.
        progress: called with 1 after each round.
        on_round: called with the round and its figures, also for a round that is dropped.
        clocks: asked before the first round and after each; without it no round is dropped.

    Raises:
        KernbenchError: every round was dropped.
    """
    order = list(arms)
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    seen: list[Clocks] = []
    dropped = 0
    gc.collect()
    # What is told after one round stands before the next: nothing runs on the device in between.
    before = clocks() if clocks is not None else None
    for number in range(rounds):
        generator.shuffle(order)
        figures = {name: arms[name](number) for name in order}
        after = clocks() if clocks is not None else None
        if after is not None:
            seen.append(after)
        slowed = nvml.slowdowns(before) | nvml.slowdowns(after)
        before = after
        if slowed:
            dropped += 1
        else:
            for name, figure in figures.items():
                seconds[name].append(figure)
        if on_round is not None:
            on_round(number, figures)
        if progress is not None:
            progress(1)
    if dropped and dropped == rounds:
        raise KernbenchError(
            f"the device was held down in all {rounds} rounds ({_held_down(seen)}); let it cool and run again"
        )
    return Interleaved([Arm(name=name, seconds=figures) for name, figures in seconds.items()], seen, dropped)


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector out of a timed region; it is left as it was found."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all its work; the CPU always has."""
    if device.type == "cuda":
        _synchronize(device)
