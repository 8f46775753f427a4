"""Phase 4: a step as one CUDA graph, but for the controller's round, which comes only now and then.

Shapes: B batch, F pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernbench.capturing import functions_at, on_stream, recorded
from kernbench.device import warn_once

from . import together
from .layer import KasminaLayer
from .training import Training

EAGER_STEPS = 3
"""Steps before a capture: in them kernels are built, and libraries allocate what they work with."""
UNCAPTURED = "phase 4 of kasmina runs uncaptured here: a CUDA graph needs a CUDA device"
SITES: tuple[tuple[Any, str], ...] = (
    (KasminaLayer, "forward"),
    *((together, name) for name in ("blend", "move", "measure", "alphas", "finish")),
)
"""What a captured step consists of; with something else in place, it is captured anew."""

# As it is before any swap.
_run_batch = Training.run_batch


@dataclass
class Captured:
    """A graph, after some steps without one; what it reads, and what it leaves."""

    eager_steps: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: tuple[Tensor, ...] = ()
    loss: Tensor | None = None
    output: Tensor | None = None
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)


@dataclass(frozen=True)
class Standing:
    """The graph of the last step, with what stood at the sites and where the schedules' memory lay: most steps find
    both as they were, and need not look through what counts calls."""

    functions: tuple[Callable[..., Any], ...]
    memory: Tensor
    captured: Captured


def run_batch(self: Training, images_BF: Tensor, classes_B: Tensor) -> Tensor | None:
    """``Training.run_batch`` by a replay, or where there is no GPU by the same code as it stands."""
    if images_BF.device.type != "cuda":
        warn_once(UNCAPTURED)
        return _run_batch(self, images_BF, classes_B)
    captured = captured_of(self, images_BF.device)
    if captured.eager_steps < EAGER_STEPS:
        captured.eager_steps += 1
        with on_stream(captured.stream):
            return _run_batch(self, images_BF, classes_B)
    if captured.graph is None:
        _capture(self, captured, images_BF, classes_B)
    assert captured.graph is not None
    # A forward pass alone reads no classes, and ``inputs`` has none then.
    for target, source in zip(captured.inputs, (images_BF, classes_B), strict=False):
        target.copy_(source)
    captured.graph.replay()
    self.output_BH = captured.output
    # The graph writes the next loss over this one.
    return None if captured.loss is None else captured.loss.clone()


def captured_of(self: Training, device: torch.device) -> Captured:
    """The graph of what is in place, captured or yet to be: by the functions that a step consists of, without what
    counts their calls, and by where the schedules' memory lies."""
    schedules = self.model.kasmina.schedules
    functions = tuple([getattr(owner, name) for owner, name in SITES])
    standing: Standing | None = self.standing
    if standing is None or standing.functions != functions or standing.memory is not schedules.rows_SK:
        memory = schedules.on_device(device)
        captured = self.captured.setdefault((memory.data_ptr(), *functions_at(SITES)), Captured())
        self.standing = standing = Standing(functions, memory, captured)
    return standing.captured


def _capture(self: Training, captured: Captured, images_BF: Tensor, classes_B: Tensor) -> None:
    images_BF = images_BF.clone()
    captured.inputs = (images_BF,)
    if self.output_BH is None:
        classes_B = classes_B.clone()
        captured.inputs = (images_BF, classes_B)
    graph = torch.cuda.CUDAGraph()
    with recorded(graph, stream=captured.stream):
        captured.loss = _run_batch(self, images_BF, classes_B)
    captured.graph, captured.output = graph, self.output_BH
