"""Phase 5: a training step as one CUDA graph, whatever other phases are in place; it takes those that read nothing.

Outside of the graph stays what comes now and then: the batch is copied to where the graph reads it, and after a replay
scores are logged and experts move, in place. AdamW counts its steps on the device, so that no number of the host
changes from step to step; where one does change, as a learning rate, the step is captured anew.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernbench.capturing import functions_at, has_hooks, on_stream, recorded
from kernbench.device import warn_once
from kernbench.errors import KernbenchError

from . import parallel
from .moe import Routed
from .neuroscore import NeuroScore
from .phases import BEYOND, PHASES
from .training import Training

NUMBER = 5
KEY = "graphs"
EAGER_STEPS = 3
"""Steps before the first capture: in them kernels are built, and optimizers make their state."""
UNCAPTURED = "phase 5 of bio-nanochat runs uncaptured here: a CUDA graph needs a CUDA device"
SEVERAL_RANKS = "phase 5 of bio-nanochat runs uncaptured on several ranks: no replay calls hooks that send gradients"
HOOKED = "phase 5 of bio-nanochat ran steps uncaptured: the model has hooks, which a replay would not call"

SITES = [swap.site for phase in (*PHASES, BEYOND) for swap in phase.swaps if isinstance(swap.site, tuple)]
"""Where a step may have other functions than at its capture."""

# As they are before any swap.
_batch = Training.batch
_advance = Training.advance
_observe = NeuroScore.observe


@dataclass
class Captured:
    """A graph, after a step without one, and what each replay leaves for the host to look at."""

    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None
    gradient_norm: float | Tensor = 0.0
    routed: list[Routed | None] = field(default_factory=list)


@dataclass
class Graphs:
    """All graphs of one run, with the tokens that they read and those that follow, [B, T] each.

    They share memory, for no two of them run at once.
    """

    tokens: Tensor
    following: Tensor
    captured: dict[Hashable, Captured] = field(default_factory=dict)
    eager_steps: int = 0
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)


def fixed_batch(self: Training, index: int) -> tuple[Tensor, Tensor]:
    """``Training.batch`` at the same address every time, where a graph reads it.

    Raises:
        KernbenchError: scores of experts would be read, because phase 2 is not in place.
    """
    refuse_reads(self)
    tokens_BT, next_BT = _batch(self, index)
    if not capturable(self):
        return tokens_BT, next_BT
    graphs = self.kept.get(KEY)
    if not isinstance(graphs, Graphs):
        graphs = self.kept[KEY] = Graphs(torch.empty_like(tokens_BT), torch.empty_like(next_BT))
    return graphs.tokens.copy_(tokens_BT), graphs.following.copy_(next_BT)


def refuse_reads(training: Training) -> None:
    """Raises KernbenchError where scores would be read from the device, which no graph can hold."""
    if training.scores and inspect.unwrap(NeuroScore.observe) is _observe:
        raise KernbenchError(
            f"phase {NUMBER} of bio-nanochat captures a step without host reads, and this preset scores its experts: "
            f"keep phase 2 first, or type --phases 0,2,{NUMBER}"
        )


def capturable(training: Training) -> bool:
    """Whether steps run where they can be captured; if not, that is said."""
    if training.device.type != "cuda":
        warn_once(UNCAPTURED)
        return False
    if parallel.world()[1] > 1:
        warn_once(SEVERAL_RANKS)
        return False
    return True


def advance(self: Training, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
    """``Training.advance`` by a replay, or where nothing can be captured by the same code as it stands."""
    if not capturable(self):
        return _advance(self, tokens_BT, next_BT)
    count_on_device(self.optimizers)
    if has_hooks(self.model):
        warn_once(HOOKED)
        return _advance(self, tokens_BT, next_BT)
    graphs: Graphs = self.kept[KEY]
    key = constants(self)
    captured = graphs.captured.get(key)
    if captured is None or graphs.eager_steps < EAGER_STEPS:
        graphs.captured[key] = Captured()
        graphs.eager_steps += 1
        return eager(self, graphs)
    if captured.graph is None:
        capture(self, graphs, captured)
    assert captured.graph is not None and captured.loss is not None
    captured.graph.replay()
    self.gradient_norm = captured.gradient_norm
    for mixture, routed in zip(self.model.mixtures(), captured.routed, strict=True):
        mixture.last = routed
    # The next replay writes its loss over this one.
    return captured.loss.clone()


def eager(training: Training, graphs: Graphs) -> Tensor:
    """A step before the capture."""
    with on_stream(graphs.stream), warnings.catch_warnings():
        # AdamW asks whether it is meant to be captured; soon it is.
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        return _advance(training, graphs.tokens, graphs.following)


def capture(training: Training, graphs: Graphs, captured: Captured) -> None:
    """Record a step without running it."""
    graph = torch.cuda.CUDAGraph()
    with recorded(graph, stream=graphs.stream, pool=graphs.pool):
        captured.loss = _advance(training, graphs.tokens, graphs.following)
    captured.gradient_norm = training.gradient_norm
    captured.routed = [mixture.last for mixture in training.model.mixtures()]
    captured.graph = graph


def count_on_device(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let AdamW keep its counts of steps beside its parameters, from now on; Muon counts nothing."""
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.AdamW) or all(group["capturable"] for group in optimizer.param_groups):
            continue
        for group in optimizer.param_groups:
            group["capturable"] = True
        for parameter, state in optimizer.state.items():
            state["step"] = state["step"].to(parameter.device)


def constants(training: Training) -> Hashable:
    """What is fixed in a graph: the functions that a step consists of, without what counts or annotates their calls,
    the rates of the optimizers, and where noise comes from."""
    rates = tuple(group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups)
    return functions_at(SITES), rates, training.model.counted_noise, training.model.training
