"""Times calls of a kernel that are replayed from a CUDA graph, so that launching them costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernbench.capturing import recorded
from kernbench.measurement.backward import Backward, ready
from kernbench.measurement.calls import InputSets
from kernbench.measurement.ceilings import cache_bytes, free_bytes
from kernbench.measurement.timing import collector_off, event, mark, seconds_between, synchronize
from kernbench.measurement.witness import Allowance, checked_call
from kernbench.parity import compare
from kernbench.spec import Inputs

GRAPH_SECONDS = 2e-4
GRAPH_CALLS = (10, 200)
REPLAYS = 5


class GraphCalls:
    """Calls replayed back to back from a CUDA graph on one set of inputs: no launch cost, and a hot cache.

    After every block the graph runs once more on fresh values, and its last call is compared.

    The calls of a backward have a set of their own each, copied from the one and led through forward by another graph
    that runs before each replay and is not timed: a backward may write over what it has read.
    """

    cache = "graph"

    def __init__(self, inputs: InputSets, device: torch.device, seconds: float, *, backward: bool = False) -> None:
        self.inputs = inputs
        self.device = device
        self.backward = backward
        least, most = GRAPH_CALLS
        if backward:
            # One replay is timed at a time, so it is longer; the copies, and what forward saves, stay in the cache if
            # they can, and in memory.
            per_call = 3 * max(1, inputs.bytes_per_set)
            most = min(most, max(least, cache_bytes(device) // per_call), max(1, free_bytes(device) // 4 // per_call))
            least = min(least, most)
            seconds /= REPLAYS
        self.count = int(min(most, max(least, GRAPH_SECONDS / seconds)))

    def prepare(self, call: Callable[..., Any], allowance: Allowance | None = None) -> Callable[[int], float]:
        witness = self.inputs.witness
        witness.reset()
        checked_call(witness, call, "before it was captured in a graph", allowance=allowance)
        synchronize(self.device)
        before, graph, output = self._captured(call)
        # Calls of a backward have arguments of their own.
        in_place = witness.in_place(output) if before is None else ()

        def block(number: int) -> float:
            self.inputs.restore()
            seconds = self._seconds(before, graph)
            if not witness.unchecked:
                witness.load()
                witness.poison(output)
                _replay(before)
                graph.replay()
                got = witness.take(output)
                where = f"replayed in round {number + 1}"
                witness.check(got, where, calls=self.count, in_place=in_place, allowance=allowance)
            return seconds

        block(0)
        return block

    def host_seconds(self, call: Callable[..., Any]) -> float | None:
        """None: a replay launches nothing from the host."""
        return None

    def peak_bytes(self, call: Callable[..., Any]) -> int | None:
        """None: a replay allocates nothing."""
        return None

    def _captured(self, call: Callable[..., Any]) -> tuple[torch.cuda.CUDAGraph | None, torch.cuda.CUDAGraph, Any]:
        """The graph that has to run before, if any, the one to time, and what its last call returned."""
        inputs = self.inputs.witness.inputs
        graph, output = torch.cuda.CUDAGraph(), None
        if not isinstance(call, Backward):
            with recorded(graph, alone=True):
                for _ in range(self.count):
                    output = call(**inputs)
            return None, graph, output
        before = torch.cuda.CUDAGraph()
        with recorded(before, alone=True):
            runs = [ready(call, _copied(inputs)) for _ in range(self.count)]
        with recorded(graph, pool=before.pool(), alone=True):
            for run in runs:
                output = run()
        return before, graph, output

    def _seconds(self, before: torch.cuda.CUDAGraph | None, graph: torch.cuda.CUDAGraph) -> float:
        """Seconds per call. What has to run before runs again for each replay, outside of what is timed."""
        blocks = REPLAYS if before is not None else 1
        marks = [(event(), event()) for _ in range(blocks)]
        with collector_off():
            _replay(before)
            graph.replay()
            for begin, end in marks:
                _replay(before)
                mark(begin)
                for _ in range(REPLAYS // blocks):
                    graph.replay()
                mark(end)
            synchronize(self.device)
        return sum(seconds_between(begin, end) for begin, end in marks) / (REPLAYS * self.count)


def _replay(graph: torch.cuda.CUDAGraph | None) -> None:
    if graph is not None:
        graph.replay()


def _copied(inputs: Inputs) -> Inputs:
    copies: Inputs = compare.map_tensors(inputs, _copy)
    return copies


def _copy(tensor: Tensor) -> Tensor:
    """The tensor with its strides in memory of its own; one that overlaps itself as it is, for nobody can write it."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
