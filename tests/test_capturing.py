"""Steps before a capture are queued between what was and what will be on the current stream; while a graph is recorded
the collector, which might free another one, rests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernbench.capturing import on_stream, recorded


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_each_stream_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    streams = [Stream("main", log)]
    side: Any = Stream("side", log)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        streams.append(chosen)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def step() -> str:
        with on_stream(side):
            log.append(f"step on {streams[-1].name}")
            return "loss"

    assert step() == "loss"
    assert log == ["side waits for main", "step on side", "main waits for side"]


@contextmanager
def graph_of_this_machine(graph: Any, **options: Any) -> Iterator[None]:
    """In place of torch's, which needs a GPU."""
    yield


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_while_a_graph_is_recorded(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", graph_of_this_machine)
    was = gc.isenabled()
    try:
        gc.enable() if before else gc.disable()
        with pytest.raises(ValueError, match="in the step"), recorded(object()):  # type: ignore[arg-type]
            assert not gc.isenabled()
            raise ValueError("in the step")
        assert gc.isenabled() == before
    finally:
        gc.enable() if was else gc.disable()


@pytest.mark.gpu
def test_a_graph_that_became_garbage_does_not_end_the_next_recording() -> None:
    """It lies in a cycle, and the collector would come by in the middle."""
    x = torch.zeros(4, device="cuda")
    for _ in range(3):
        cycle: list[Any] = [torch.cuda.CUDAGraph()]
        cycle.append(cycle)
        with recorded(cycle[0]):
            x.add_(1)
        del cycle
        graph = torch.cuda.CUDAGraph()
        with recorded(graph):
            x.add_(1)
            _ = [[number] for number in range(200_000)]
            x.add_(1)
        graph.replay()
    assert x.tolist() == [6.0] * 4
