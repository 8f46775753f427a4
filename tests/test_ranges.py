"""NVTX ranges: pushed and popped in pairs, visible in a trace, gone when off."""

import builtins
import sys
import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernbench import ranges
from kernbench.errors import KernbenchError


@pytest.fixture(autouse=True)
def switched_off_afterwards() -> Iterator[None]:
    yield
    ranges.enable(False)


class Recorder:
    """Stands in for the nvtx package."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def push_range(self, name: Any) -> None:
        self.calls.append(name)

    def pop_range(self) -> None:
        self.calls.append("pop")


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Any:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "nvtx", recorder)
    ranges.enable()
    return recorder


def traced() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_off_is_one_shared_idle_context_under_200_nanoseconds() -> None:
    assert ranges.range("a") is ranges.range("b")
    best = min(timeit.repeat(lambda: ranges.range("a"), number=20_000, repeat=5)) / 20_000
    assert best < 200e-9


def test_range_reaches_nvtx_and_the_trace(nvtx: Any) -> None:
    with traced() as profiler, ranges.range("outer"), ranges.annotation("inner"):
        pass
    assert nvtx.calls == ["outer", "inner", "pop", "pop"]
    assert {"outer", "inner"} <= {event.name for event in profiler.events()}


def test_annotation_reaches_the_trace_while_off() -> None:
    with traced() as profiler, ranges.range("silent"), ranges.annotation("kernbench.step#0"):
        pass
    names = {event.name for event in profiler.events()}
    assert "kernbench.step#0" in names
    assert "silent" not in names


def test_range_closes_when_its_body_raises(nvtx: Any) -> None:
    with pytest.raises(KeyError), ranges.range("failing"):
        raise KeyError
    assert nvtx.calls == ["failing", "pop"]


def model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU()))


def hooks(module: Any) -> Any:
    return [
        (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._forward_hooks_always_called))
        for part in module.modules()
    ]


def test_modules_are_named_by_path_and_hooks_come_out_exactly(nvtx: Any) -> None:
    network = model()
    network.register_forward_hook(lambda *_: None)
    before = hooks(network)
    with ranges.annotate_modules(network):
        network(torch.ones(1, 2))
    assert nvtx.calls == ["Sequential", "0", "pop", "1", "1.0", "pop", "pop", "pop"]
    assert hooks(network) == before
    network(torch.ones(1, 2))
    assert len(nvtx.calls) == 8


def test_ranges_of_modules_close_when_a_forward_raises(nvtx: Any) -> None:
    network = model()
    handle = ranges.annotate_modules(network)
    with pytest.raises(RuntimeError):
        network(torch.ones(1, 3))
    assert nvtx.calls == ["Sequential", "0", "pop", "pop"]
    handle.remove()


def test_nothing_is_hooked_while_off() -> None:
    network = model()
    before = hooks(network)
    handle = ranges.annotate_modules(network)
    assert hooks(network) == before
    handle.remove()


def test_the_real_package_works() -> None:
    ranges.enable()
    assert ranges.enabled()
    with ranges.range("kernbench.step#0"):
        pass


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(KernbenchError, match="pip install nvtx"):
        ranges.enable()
    assert not ranges.enabled()
    assert builtins.range(3) == range(3)
