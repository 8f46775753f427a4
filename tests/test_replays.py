"""Replayed graphs without a GPU, by graphs of CPU calls: what is captured, what runs before, and what is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_bench_backward import CASE, CPU, InPlace, Own, peer_of, reference, spec_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernbench.measurement import calls, replays
from kernbench.measurement.backward import backward_of
from kernbench.measurement.witness import WrongResult
from kernbench.spec import KernelSpec

LOG: list[str] = []


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.tape.append((function, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, output))))
        return output


class Graph:
    """Calls of operators, done again on the same tensors and into the same results."""

    capturing = False

    def __init__(self) -> None:
        self.tape: list[Any] = []
        self.name = "graph"

    def pool(self) -> str:
        self.name = "before"
        return "pool"

    @torch.no_grad()
    def replay(self) -> None:
        LOG.append(self.name)
        for function, args, kwargs, output in self.tape:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def captured(graph: Graph, *, stream: None, pool: str | None, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "global", "a wait in any thread has to end what is timed"
    Graph.capturing = True
    with Recorder(graph.tape):
        yield
    Graph.capturing = False


@pytest.fixture(autouse=True)
def graphs_of_cpu_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    LOG.clear()

    def mark(moment: list[float]) -> None:
        LOG.append("mark")
        moment.append(time.perf_counter())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(replays, "event", list)
    monkeypatch.setattr(replays, "mark", mark)
    monkeypatch.setattr(replays, "seconds_between", lambda begin, end: end[0] - begin[0])
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 2 * CASE["rows"] * 64 * 4)


def block_of(peer: Callable[..., Any], *, backward: bool, **changes: Any) -> Callable[[int], float]:
    spec: KernelSpec = spec_of(peers={"peer": peer}, **changes)
    if backward:
        spec = backward_of(spec, CASE, torch.float32, CPU)
    inputs = calls.InputSets(spec, CASE, torch.float32, CPU)
    assert not inputs.witness.unchecked
    return replays.GraphCalls(inputs, CPU, 1e-3, backward=backward).prepare(spec.peers["peer"])


def test_forward_calls_are_replayed_back_to_back() -> None:
    block = block_of(peer_of(Own), backward=False)
    LOG.clear()
    assert block(1) > 0
    assert ["graph", "mark", *["graph"] * 5, "mark", "graph"] == LOG


@pytest.mark.parametrize("function", [Own, InPlace])
def test_forward_runs_before_each_backward_and_is_not_timed(function: Any) -> None:
    block = block_of(peer_of(function), backward=True)
    LOG.clear()
    assert block(1) > 0
    assert ["before", "graph", *["before", "mark", "graph", "mark"] * 5, "before", "graph"] == LOG
    block(2)


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_wrong_in_a_graph_alone_is_seen(backward: bool) -> None:
    def skips(x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, ...]:
        scaled, added = reference(x, weight, scale)
        return (scaled * 1.01 if Graph.capturing else scaled), added

    with pytest.raises(WrongResult, match=r"^replayed in round 1, (output|gradient)"):
        block_of(skips, backward=backward)


def test_gradients_kept_from_the_capture_are_stale() -> None:
    class Kept(Own):
        kept: tuple[Tensor | None, ...] = ()

        @classmethod
        def backward(cls, ctx: Any, scaled: Tensor, added: Tensor) -> tuple[Tensor | None, ...]:
            if not Graph.capturing:
                cls.kept = super().backward(ctx, scaled, added)
                return cls.kept
            return tuple(None if one is None else one.clone() for one in cls.kept)

    with pytest.raises(WrongResult, match=r"^replayed in round 1, gradient"):
        block_of(peer_of(Kept), backward=True)


def test_copies_keep_their_strides_and_what_is_expanded_stays() -> None:
    packed, row = torch.arange(12.0).view(3, 4)[:, :2], torch.ones(1).expand(5)
    copies = replays._copied({"packed": packed, "row": row, "number": 3})
    assert copies["packed"].stride() == (4, 1)
    assert torch.equal(copies["packed"], packed)
    assert copies["packed"].data_ptr() != packed.data_ptr()
    assert copies["row"] is row
    assert copies["number"] == 3


def test_copies_of_many_calls_stay_within_the_cache_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = calls.InputSets(backward_of(spec_of(), CASE, torch.float32, CPU), CASE, torch.float32, CPU)

    def count(cache: int, free: int, seconds: float = 1e-6) -> int:
        monkeypatch.setattr(replays, "cache_bytes", lambda _: cache * 3 * inputs.bytes_per_set)
        monkeypatch.setattr(replays, "free_bytes", lambda _: free * 12 * inputs.bytes_per_set)
        return replays.GraphCalls(inputs, CPU, seconds, backward=True).count

    assert count(cache=1000, free=1000) == 200
    assert count(cache=50, free=1000) == 50
    assert count(cache=1, free=1000) == 10
    assert count(cache=1000, free=4) == 4
    assert count(cache=1000, free=0) == 1
    assert count(cache=1000, free=1000, seconds=3e-5) == 33
