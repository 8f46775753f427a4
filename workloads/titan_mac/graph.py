"""Phase 6: a training step as one CUDA graph, whatever other phases are in place; it takes phase 0 alone.

Outside of the graph stays what comes now and then. The batch is copied to where the graph reads it. The meta update
runs before its step, of which it sees nothing; the log is written after. What else depends on the count of steps makes
a graph of its own for each combination: whether the controller is asked, and in CMS mode which levels are due and
whether the network is trained.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernbench.capturing import functions_at, has_hooks, on_stream, recorded
from kernbench.device import warn_once

from .adamw import DeviceState
from .cms import TRAIN_EVERY, active_levels
from .optimizer import DeepNestedOptimizer
from .phases import step_on_device
from .plan import PHASES
from .training import Training

NUMBER = 6
KEY = "graph"
EAGER_STEPS = 3
"""Steps before the first capture: in them kernels are built, and libraries allocate what they work with."""
UNCAPTURED = "phase 6 of titan-mac runs uncaptured here: a CUDA graph needs a CUDA device"
HOOKED = "phase 6 of titan-mac ran steps uncaptured: the model has hooks, which a replay would not call"

SITES = [swap.site for phase in PHASES for swap in phase.swaps if isinstance(swap.site, tuple)]
"""Where a step may have other functions than at its capture."""

# As they are before any swap.
_batch = Training.batch
_advance = Training.advance


@dataclass
class Captured:
    """A graph, after a step without one, and the loss that it leaves."""

    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None


@dataclass
class Graphs:
    """All graphs of one run. They share memory, for no two of them run at once and none reads what another left."""

    tokens: Tensor
    captured: dict[Hashable, Captured] = field(default_factory=dict)
    eager_steps: int = 0
    # What the graphs were captured with: another AdamW state, as after loading one, has other addresses.
    state: DeviceState | None = None
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)


def fixed_batch(self: Training, index: int) -> Tensor:
    """``Training.batch`` at the same address every time, where there is a GPU."""
    tokens_BT = _batch(self, index)
    if tokens_BT.device.type != "cuda":
        return tokens_BT
    graphs = self.kept.get(KEY)
    if not isinstance(graphs, Graphs):
        graphs = self.kept[KEY] = Graphs(torch.empty_like(tokens_BT, memory_format=torch.contiguous_format))
    return graphs.tokens.copy_(tokens_BT)


def advance(self: Training, tokens_BT: Tensor) -> Tensor:
    """``Training.advance`` by a replay, or where there is no GPU by the same code as it stands."""
    if tokens_BT.device.type != "cuda":
        warn_once(UNCAPTURED)
        return _advance(self, tokens_BT)
    graphs: Graphs = self.kept[KEY]
    self.optimizer.count_call()
    if has_hooks(self.model):
        warn_once(HOOKED)
        return _launch(self, tokens_BT)
    if graphs.state is not self.optimizer.device_state:
        graphs.captured.clear()
        graphs.state = self.optimizer.device_state
    key = (_due(self.optimizer), functions_at(SITES))
    captured = graphs.captured.get(key)
    if captured is None or graphs.eager_steps < EAGER_STEPS:
        graphs.captured[key] = Captured()
        graphs.eager_steps += 1
        with on_stream(graphs.stream):
            return _launch(self, graphs.tokens)
    if captured.graph is None:
        graph = torch.cuda.CUDAGraph()
        with recorded(graph, stream=graphs.stream, pool=graphs.pool):
            captured.loss = _launch(self, graphs.tokens)
        captured.graph = graph
    captured.graph.replay()
    assert captured.loss is not None
    # The next replay writes its loss over this one.
    return captured.loss.clone()


def _launch(self: Training, tokens_BT: Tensor) -> Tensor:
    """What a step launches, after its call is counted; returns the loss, detached."""
    self.optimizer.zero_grad()
    loss = self.loss(tokens_BT)
    loss.backward()  # type: ignore[no-untyped-call]
    loss = loss.detach()
    step_on_device(self.optimizer, loss)
    return loss


def _due(optimizer: DeepNestedOptimizer) -> Hashable:
    """What this call's count decides on the host."""
    calls = optimizer.calls
    controlled = calls % optimizer.config.controller_update_freq == 0
    return (controlled, *((active_levels(calls), calls % TRAIN_EVERY == 0) if optimizer.momenta else ()))
