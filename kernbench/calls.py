"""Times single calls of a kernel: on rotating inputs, with a cleared cache, and replayed from a CUDA graph.

On a GPU all of it acts on the current device, which the caller makes the inputs' own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from kernbench.ceilings import cache_bytes, free_bytes
from kernbench.spec import Case, Inputs, KernelSpec
from kernbench.timing import collector_off, event

AS_CALLED = "cold, as called"
MOST_SETS = 8
WARM_UP_CALLS = 3
LEAST_CALLS = 3
MOST_CALLS = 50
BLOCK_SECONDS = 5e-3

# 256 MB is what triton.testing.do_bench clears; more only where twice the cache is more.
LEAST_CLEAR_BYTES = 256 << 20

# A CUDA stream takes about 1000 launches before the host has to wait; at 3 us or more a launch, this much host work
# stays below that.
QUEUE_SECONDS = 2.5e-3
GRAPH_SECONDS = 2e-4
GRAPH_CALLS = (10, 200)
REPLAYS = 5
CALIBRATION_CYCLES = 10_000_000


class InputSets:
    """Several equal-sized inputs of one case, taken in turn so that a small case does not stay in the cache.

    Arguments written in place go back to their first values between blocks. The state of a ``stateful`` kernel does
    not: it moves on from call to call as in real use, which its speed does not depend on.
    """

    def __init__(self, spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        first = _detached(spec, spec.make_inputs(case, dtype, device, 0))
        self.bytes_per_set = sum(_storages(first).values())
        kept = () if spec.stateful else spec.mutates
        bytes_with_copies = self.bytes_per_set + sum(_storages({name: first[name] for name in kept}).values())
        wanted = math.ceil(2 * cache_bytes(device) / max(1, self.bytes_per_set))
        affordable = 1 + free_bytes(device) // 4 // max(1, bytes_with_copies)
        count = max(1, min(wanted, affordable, MOST_SETS))
        others = (_detached(spec, spec.make_inputs(case, dtype, device, seed)) for seed in range(1, count))
        self.sets = [first, *others]
        self.exceeds_cache = count * self.bytes_per_set >= 2 * cache_bytes(device)
        self._kept = [(tensor, tensor.clone()) for one in self.sets for name in kept for tensor in _tensors(one[name])]

    def __getitem__(self, index: int) -> Inputs:
        return self.sets[index % len(self.sets)]

    def restore(self) -> None:
        """Undo what calls wrote into their arguments."""
        for tensor, saved in self._kept:
            tensor.copy_(saved)


class HostCalls:
    """Calls timed on the CPU. ``prepare`` warms an implementation up; the block it returns gives seconds per call."""

    def __init__(self, inputs: InputSets) -> None:
        self.inputs = inputs
        self.cache = "cold" if inputs.exceeds_cache else "warm"

    def prepare(self, call: Callable[..., Any]) -> Callable[[int], float]:
        for index in range(WARM_UP_CALLS):
            call(**self.inputs[index])
        estimate = self._seconds(call, 1)
        count = int(min(MOST_CALLS, max(LEAST_CALLS, BLOCK_SECONDS / estimate)))

        def block(_: int) -> float:
            self.inputs.restore()
            return self._seconds(call, count)

        return block

    def host_seconds(self, call: Callable[..., Any]) -> float | None:
        """None: on the CPU the host does the work itself."""
        return None

    def _seconds(self, call: Callable[..., Any], count: int) -> float:
        seconds = []
        with collector_off():
            for index in range(count):
                inputs = self.inputs[index]
                start = time.perf_counter()
                call(**inputs)
                seconds.append(time.perf_counter() - start)
        return median(seconds)


class ColdCalls:
    """Calls timed by events on a GPU, each after the L2 cache was overwritten, with the launches queued ahead.

    The device is first kept busy for as long as the host needs to queue a run of calls, so that an event pair holds
    device time only. Clearing writes, as triton.testing.do_bench does: a call pays for the dirty lines it finds in the
    cache and leaves its own behind, so for kernels that read and write alike the two cancel.

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

    def prepare(self, call: Callable[..., Any]) -> Callable[[int], float]:
        for index in range(max(WARM_UP_CALLS, len(self.inputs.sets))):
            call(**self.inputs[index])
        torch.cuda.synchronize(self.device)
        host = self.host_seconds(call)
        estimate = self._seconds(call, LEAST_CALLS, host)
        count = int(min(MOST_CALLS, max(LEAST_CALLS, BLOCK_SECONDS / max(estimate, 1e-6))))

        def block(_: int) -> float:
            self.inputs.restore()
            return self._seconds(call, count, host)

        return block

    def host_seconds(self, call: Callable[..., Any]) -> float:
        """What the host needs to launch one call, not waiting for it."""
        seconds = []
        for index in range(LEAST_CALLS):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            call(**self.inputs[index])
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return median(seconds)

    def _seconds(self, call: Callable[..., Any], count: int, host_seconds: float) -> float:
        marks: list[tuple[Any, Any]] = [(event(), event()) for _ in range(count)]
        run_length = int(min(count, max(1, QUEUE_SECONDS / host_seconds)))
        with collector_off():
            for start in range(0, count, run_length):
                run = range(start, min(start + run_length, count))
                if self.queued:
                    self._occupy(1.5 * len(run) * host_seconds + 1e-4)
                for index in run:
                    self.scratch.zero_()
                    marks[index][0].record()
                    call(**self.inputs[index])
                    marks[index][1].record()
                torch.cuda.synchronize(self.device)
        return median(float(begin.elapsed_time(end)) for begin, end in marks) / 1e3

    def _occupy(self, seconds: float) -> None:
        _spin(int(seconds * self.cycles_per_second))

    def _calibrate(self) -> float:
        _spin(CALIBRATION_CYCLES)
        begin, end = event(), event()
        begin.record()
        _spin(CALIBRATION_CYCLES)
        end.record()
        torch.cuda.synchronize(self.device)
        return CALIBRATION_CYCLES / (float(begin.elapsed_time(end)) / 1e3)


class GraphCalls:
    """Calls replayed back to back from a CUDA graph on one set of inputs: no launch cost, and a hot cache."""

    cache = "graph"

    def __init__(self, inputs: InputSets, device: torch.device, seconds: float) -> None:
        self.inputs = inputs
        self.device = device
        least, most = GRAPH_CALLS
        self.count = int(min(most, max(least, GRAPH_SECONDS / seconds)))

    def prepare(self, call: Callable[..., Any]) -> Callable[[int], float]:
        call(**self.inputs[0])
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.count):
                call(**self.inputs[0])

        def block(_: int) -> float:
            self.inputs.restore()
            begin, end = event(), event()
            with collector_off():
                graph.replay()
                begin.record()
                for _ in range(REPLAYS):
                    graph.replay()
                end.record()
                torch.cuda.synchronize(self.device)
            return float(begin.elapsed_time(end)) / 1e3 / (REPLAYS * self.count)

        block(0)
        return block

    def host_seconds(self, call: Callable[..., Any]) -> float | None:
        """None: a replay launches nothing from the host."""
        return None


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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storages(inputs: Any) -> dict[int, int]:
    """Bytes of each distinct storage behind the tensors, so that views of one buffer count once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(inputs)}
