"""What workloads that capture their step in a CUDA graph share: what a graph holds for, where steps run before it is
recorded, and how that is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernbench.measurement.timing import collector_off


def functions_at(sites: Iterable[tuple[Any, str]]) -> tuple[Callable[..., Any], ...]:
    """What stands at sites (owner, name), without what counts or annotates calls; a graph of others is another one."""
    return tuple(inspect.unwrap(getattr(owner, name)) for owner, name in sites)


def has_hooks(model: nn.Module) -> bool:
    """Whether something is to be called in a step that a replay would not call."""
    modules = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return modules or any(parameter._backward_hooks for parameter in model.parameters())


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on ``stream``, after all that is queued on the current stream and before what will be.

    Steps before a capture run where it will be made, so that what autograd remembers of a stream is of that one.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def recorded(
    graph: torch.cuda.CUDAGraph, *, stream: torch.cuda.Stream | None = None, pool: Any = None, alone: bool = False
) -> Iterator[None]:
    """Record work into ``graph`` instead of running it.

    Garbage is not collected meanwhile: a graph that is freed while another one is recorded ends the recording.

    Args:
        alone: nothing else uses the device; a wait in any thread ends the recording. Else other threads, as one that
            reads clocks or waits for a log, may use it.
    """
    mode = "global" if alone else "thread_local"
    with collector_off(), torch.cuda.graph(graph, stream=stream, pool=pool, capture_error_mode=mode):
        yield
