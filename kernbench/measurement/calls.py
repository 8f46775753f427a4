"""Times single calls of a kernel: on rotating inputs, and with a cleared cache; see ``replays`` for CUDA graphs.

One call of every block is checked as it is timed, see ``witness``. On a GPU all of it acts on the current device, which
the caller makes the inputs' own.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from kernbench.capturing import recorded
from kernbench.measurement.backward import Backward, ready
from kernbench.measurement.ceilings import cache_bytes, free_bytes
from kernbench.measurement.timing import collector_off, event, mark, now, seconds_between, synchronize
from kernbench.measurement.witness import (
    Allowance,
    Witness,
    WrongResult,
    checked_call,
    move_versions,
    slower_when_checked,
    tensors,
)
from kernbench.parity.compare import Leaves
from kernbench.spec import Case, Inputs, KernelSpec

AS_CALLED = "cold, as called"
MOST_SETS = 8
WARM_UP_CALLS = 3
LEAST_CALLS = 3
LEAST_IN_BLOCK = 6
"""With one checked call and its controls, two are left."""
MOST_CALLS = 50
MOST_BLOCKS = 100
BLOCK_SECONDS = 5e-3

# 256 MB is what triton.testing.do_bench clears; more only where twice the cache is more.
LEAST_CLEAR_BYTES = 256 << 20

# A CUDA stream takes about 1000 launches before the host has to wait; at 3 us or more a launch, this much host work
# stays below that.
QUEUE_SECONDS = 2.5e-3
REPLAYS = 5
PAIRS = 100
CALIBRATION_CYCLES = 10_000_000

# No call takes no time: one that seems to is shorter than the clock can tell.
HOST_RESOLUTION = 1e-7
EVENT_RESOLUTION = 32e-9


class InputSets:
    """Several equal-sized inputs of one case, taken in turn so that a small case does not stay in the cache.

    Arguments written in place go back to their first values between blocks, for a backward all of them: libraries write
    gradients over what they have read. The state of a ``stateful`` kernel does not: it moves on from call to call as in
    real use, which its speed does not depend on.
    """

    def __init__(
        self,
        spec: KernelSpec,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int = 0,
        run_reference: bool = True,
    ) -> None:
        """``seed`` chooses the calls to check; without ``run_reference`` there is nothing to check them by."""

        def make(number: int) -> Inputs:
            return _detached(spec, spec.make_inputs(case, dtype, device, number))

        first = make(0)
        self.bytes_per_set = _bytes_of(first)
        backward = isinstance(spec.reference, Backward)
        written = tuple(first) if backward else spec.mutates
        self.written_bytes = _bytes_of([first[name] for name in written])
        kept = () if spec.stateful else written
        bytes_with_copies = self.bytes_per_set + (0 if spec.stateful else self.written_bytes)
        wanted = math.ceil(2 * cache_bytes(device) / max(1, self.bytes_per_set))
        affordable = 1 + free_bytes(device) // 4 // max(1, bytes_with_copies)
        count = max(1, min(wanted, affordable, MOST_SETS))
        self.sets = [first, *map(make, range(1, count))]
        self.exceeds_cache = count * self.bytes_per_set >= 2 * cache_bytes(device)
        self._kept = [(tensor, tensor.clone()) for one in self.sets for name in kept for tensor in tensors(one[name])]
        chosen = random.Random(seed).randrange(count)
        self.witness = Witness(spec, self.sets[chosen], make, dtype, device, seed=chosen, run_reference=run_reference)
        self.witness.owns(self.sets)

    @property
    def bytes_per_call(self) -> float | None:
        """The most that one call can move: its tensors read once, those it writes or returns written once.

        For a backward, what forward saved takes the place of what is written: no more than the tensors hold.
        """
        returned = self.witness.result_bytes()
        return None if returned is None else float(self.bytes_per_set + self.written_bytes + returned)

    def __getitem__(self, index: int) -> Inputs:
        return self.sets[index % len(self.sets)]

    def given(self, index: int, places: Sequence[int]) -> Inputs:
        """The inputs of a block's call: loaded if it is in ``places``, with fresh values if it is the first of them."""
        return self.witness.load(usual=index != places[0]) if index in places else self[index]

    def restore(self) -> None:
        """Undo what calls wrote into their arguments."""
        for tensor, saved in self._kept:
            tensor.copy_(saved)


class Block:
    """One block of an implementation's calls: seconds per call, and the checked call's result compared.

    ``time`` takes the places of the calls to load inputs for, the first of them the one to check; it returns the
    seconds of each call, and the result of that one.
    """

    def __init__(
        self,
        witness: Witness,
        count: int,
        time: Callable[[Sequence[int]], tuple[list[float], Leaves]],
        allowance: Allowance | None,
        resolution: float,
    ) -> None:
        self.witness = witness
        self.count = count
        self.time = time
        self.allowance = allowance
        self.resolution = resolution
        self.checked: deque[tuple[float, list[float]]] = deque(maxlen=MOST_BLOCKS)

    def __call__(self, number: int) -> float:
        places = self.witness.places(self.count)
        seconds, got = self.time(places)
        if places:
            where = f"in timed call {places[0] + 1} of round {number + 1}"
            self.witness.check(got, where, allowance=self.allowance)
            self.checked.append((seconds[places[0]], [seconds[place] for place in places[1:]]))
            if reason := slower_when_checked(self.checked, self.resolution):
                raise WrongResult(reason)
        # Loaded inputs are nearer, and a host that has just loaded them is colder, than where nothing is checked.
        return median([took for place, took in enumerate(seconds) if place not in places] or seconds)


class HostCalls:
    """Calls timed on the CPU. ``prepare`` warms an implementation up; the block it returns gives seconds per call."""

    def __init__(self, inputs: InputSets) -> None:
        self.inputs = inputs
        self.cache = "cold" if inputs.exceeds_cache else "warm"

    def prepare(self, call: Callable[..., Any], allowance: Allowance | None = None) -> Callable[[int], float]:
        self.inputs.witness.reset()
        for index in range(max(WARM_UP_CALLS, len(self.inputs.sets))):
            self.inputs.witness.poison(call(**self.inputs[index]))
        checked_call(self.inputs.witness, call, "after warm-up", allowance=allowance)
        count = _calls_of_a_block(median(self._seconds(call, 1, ())[0]))

        def time(places: Sequence[int]) -> tuple[list[float], Leaves]:
            self.inputs.restore()
            return self._seconds(call, count, places)

        return Block(self.inputs.witness, count, time, allowance, HOST_RESOLUTION)

    def host_seconds(self, call: Callable[..., Any]) -> float | None:
        """None: on the CPU the host does the work itself."""
        return None

    def peak_bytes(self, call: Callable[..., Any]) -> int | None:
        """None: torch's allocator for the CPU does not count."""
        return None

    def _seconds(self, call: Callable[..., Any], count: int, places: Sequence[int]) -> tuple[list[float], Leaves]:
        seconds = []
        witness = self.inputs.witness
        got: Leaves = {}
        with collector_off():
            for index in range(count):
                inputs = self.inputs.given(index, places)
                move_versions(inputs)
                run = ready(call, inputs)
                start = now()
                output = run()
                seconds.append(max(now() - start, HOST_RESOLUTION))
                if index in places[:1]:
                    got = witness.take(output)
                witness.poison(output)
        return seconds, got


class ColdCalls:
    """Calls timed by events on a GPU, each after the L2 cache was overwritten, with the launches queued ahead.

    The device is first kept busy for as long as the host needs to queue a run of calls, so that an event pair holds
    device time only. Clearing writes, as triton.testing.do_bench does: a call pays for the dirty lines it finds in the
    cache and leaves its own behind, so for kernels that read and write alike the two cancel.

    An event pair holds some microseconds that are not the call's: the device records the first, starts the work anew,
    and records the second. They are measured on a call that does next to nothing, as what its pair shows beyond its
    time in a replayed graph, and taken off.

    With ``queued`` off nothing is queued ahead, as in a program that calls and waits for nothing else: an event pair
    then holds what the host needs to launch, where that is longer than the work.
    """

    def __init__(self, inputs: InputSets, device: torch.device, *, queued: bool = True) -> None:
        self.inputs = inputs
        self.device = device
        self.queued = queued
        self.cache = "cold" if queued else AS_CALLED
        size = max(LEAST_CLEAR_BYTES, 2 * cache_bytes(device))
        self.scratch = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.cycles_per_second = self._calibrate()
        # What an event pair adds to the time of the work between its events, and how far such times scatter.
        self.pair_seconds, self.scatter = self._calibrate_pair() if queued else (0.0, 0.0)

    def prepare(self, call: Callable[..., Any], allowance: Allowance | None = None) -> Callable[[int], float]:
        self.inputs.witness.reset()
        for index in range(max(WARM_UP_CALLS, len(self.inputs.sets))):
            self.inputs.witness.poison(call(**self.inputs[index]))
        checked_call(self.inputs.witness, call, "after warm-up", allowance=allowance)
        synchronize(self.device)
        pace = self._pace(call)
        count = _calls_of_a_block(median(self._seconds(call, LEAST_CALLS, pace, ())[0]))

        def time(places: Sequence[int]) -> tuple[list[float], Leaves]:
            self.inputs.restore()
            return self._seconds(call, count, pace, places)

        return Block(self.inputs.witness, count, time, allowance, self.scatter)

    def host_seconds(self, call: Callable[..., Any]) -> float:
        """What the host needs to launch one call, not waiting for it."""
        seconds = []
        for index in range(LEAST_CALLS):
            run = ready(call, self.inputs[index])
            synchronize(self.device)
            start = now()
            run()
            seconds.append(now() - start)
        synchronize(self.device)
        return median(seconds)

    def peak_bytes(self, call: Callable[..., Any]) -> int | None:
        """The most that a call holds at one time beside what it is given; of a backward, with the forward before it.

        None where nothing is queued: that is the same calls again, which hold as much.
        """
        if not self.queued:
            return None
        synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call(**self.inputs[0])
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _pace(self, call: Callable[..., Any]) -> float:
        """What the host needs to queue one call and all that goes with it."""
        seconds = []
        for index in range(LEAST_CALLS):
            marks = event(), event()
            synchronize(self.device)
            start = now()
            self._queue(call, self.inputs[index], marks)
            seconds.append(now() - start)
        synchronize(self.device)
        return median(seconds)

    def _queue(
        self, call: Callable[..., Any], inputs: Inputs, marks: tuple[Any, Any], *, check: bool = False
    ) -> Leaves:
        move_versions(inputs)
        run = ready(call, inputs)
        self.scratch.zero_()
        if not self.queued:
            # Else the host would launch while the device still clears the cache, and the launch would cost nothing.
            synchronize(self.device)
        mark(marks[0])
        output = run()
        mark(marks[1])
        got = self.inputs.witness.take(output) if check else {}
        self.inputs.witness.poison(output)
        return got

    def _seconds(
        self, call: Callable[..., Any], count: int, pace: float, places: Sequence[int]
    ) -> tuple[list[float], Leaves]:
        marks: list[tuple[Any, Any]] = [(event(), event()) for _ in range(count)]
        run_length = int(min(count, max(1, QUEUE_SECONDS / pace)))
        got: Leaves = {}
        with collector_off():
            for start in range(0, count, run_length):
                run = range(start, min(start + run_length, count))
                if self.queued:
                    # Loading and taking a checked call's values costs the host about as much as queuing a call.
                    loads = sum(place in run for place in places)
                    self._occupy(1.5 * (len(run) + 2 * loads) * pace + 1e-4)
                for index in run:
                    inputs = self.inputs.given(index, places)
                    got = self._queue(call, inputs, marks[index], check=index in places[:1]) or got
                synchronize(self.device)
        return [max(seconds_between(begin, end) - self.pair_seconds, EVENT_RESOLUTION) for begin, end in marks], got

    def _occupy(self, seconds: float) -> None:
        _spin(int(seconds * self.cycles_per_second))

    def _calibrate(self) -> float:
        _spin(CALIBRATION_CYCLES)
        begin, end = event(), event()
        mark(begin)
        _spin(CALIBRATION_CYCLES)
        mark(end)
        synchronize(self.device)
        return CALIBRATION_CYCLES / seconds_between(begin, end)

    def _calibrate_pair(self) -> tuple[float, float]:
        """What an event pair adds to the time of the work between its events, and how far such times scatter."""
        least = torch.zeros(1, device=self.device)
        marks = [(event(), event()) for _ in range(PAIRS)]

        def queue() -> float:
            start = now()
            for begin, end in marks:
                self.scratch[:1024].zero_()
                mark(begin)
                least.add_(1)
                mark(end)
            return now() - start

        # Kernels are loaded when they first run, which takes the host far longer than the device is kept busy; pairs
        # would then hold launches, and times of short kernels come out as nothing.
        queue()
        synchronize(self.device)
        pace = queue()
        synchronize(self.device)
        self._occupy(max(QUEUE_SECONDS, 2 * pace))
        queue()
        synchronize(self.device)
        seconds = sorted(seconds_between(begin, end) for begin, end in marks)
        graph = torch.cuda.CUDAGraph()
        with recorded(graph, alone=True):
            for _ in range(PAIRS):
                least.add_(1)
        graph.replay()
        begin, end = event(), event()
        mark(begin)
        for _ in range(REPLAYS):
            graph.replay()
        mark(end)
        synchronize(self.device)
        alone = seconds_between(begin, end) / (REPLAYS * PAIRS)
        return max(0.0, median(seconds) - alone), seconds[PAIRS * 9 // 10] - seconds[PAIRS // 10]


def _calls_of_a_block(seconds: float) -> int:
    return int(min(MOST_CALLS, max(LEAST_IN_BLOCK, BLOCK_SECONDS / max(seconds, 1e-6))))


def _spin(cycles: int) -> None:
    """Keep the current stream busy for that many clock cycles."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _detached(spec: KernelSpec, inputs: Inputs) -> Inputs:
    """Inputs that ask for no gradient: what is timed is the forward pass, and nothing is kept for a backward."""
    return {name: _without_gradient(value) for name, value in inputs.items()} if spec.differentiable else inputs


def _without_gradient(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, list):
        return [_without_gradient(item) for item in value]
    if type(value) is tuple:
        return tuple(_without_gradient(item) for item in value)
    return value


def _bytes_of(inputs: Any) -> int:
    """Bytes of all storages behind the tensors, so that views of one buffer count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(inputs)}
    return sum(storages.values())
