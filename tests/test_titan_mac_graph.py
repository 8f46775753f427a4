"""TitanMAC's phase 6: the step as one CUDA graph; without a GPU the same step, said aloud."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_titan_mac import VARIANTS, module, small, training
from test_titan_mac_phases import assert_same_state, bits, flat, run, workload

from kernbench import device, swap
from kernbench import request as asked
from kernbench.errors import KernbenchError
from kernbench.workload import Fault

GPU = torch.device("cuda:0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_gpu_it_says_so_and_changes_nothing(variant: str) -> None:
    device.WARNINGS.clear()
    config = small(variant=variant, meta_update_freq=4)
    plain, graphed = run(config, (0,), 9), run(config, (0, 6), 9)
    assert device.WARNINGS == ["phase 6 of titan-mac runs uncaptured here: a CUDA graph needs a CUDA device"]
    before, after = flat(plain.state_dict()), flat(graphed.state_dict())
    assert before.keys() == after.keys()
    assert all(torch.equal(bits(tensor), bits(after[path])) for path, tensor in before.items())
    assert graphed.losses() == plain.losses()


@pytest.mark.parametrize(("variant", "optimizer"), [*((variant, "adamw") for variant in VARIANTS), ("mac", "cms")])
def test_all_phases_together_train_like_the_baseline(variant: str, optimizer: str) -> None:
    config = small(variant=variant, optimizer=optimizer, layers=2, meta_update_freq=4)
    numbers = tuple(phase.number for phase in workload().phases)
    assert numbers == (0, 1, 2, 3, 4, 5, 6)
    before, after = (run(config, arm, 11) for arm in ((), numbers))
    # AdamW's kernel takes float32 learning rates, which a float64 run sees.
    assert after.losses() == pytest.approx(before.losses(), rel=1e-6 if optimizer == "adamw" else 1e-10)
    assert_same_state(after, before, rtol=1e-4 if optimizer == "adamw" else 1e-8)


def test_it_asks_for_phase_0() -> None:
    with pytest.raises(KernbenchError, match="needs phase 0 in place: keep it first, or name all: swap --phase 6 "):
        asked.plan(workload(), {6: "python"})


def test_what_the_count_decides_makes_graphs_of_their_own() -> None:
    due = module("graph")._due
    plain = training(small(controller_update_freq=2)).optimizer
    levels = training(small(optimizer="cms")).optimizer
    found = []
    for plain.calls in range(1, 5):
        levels.calls = plain.calls * 25
        found.append((due(plain), due(levels)))
    assert [one for one, _ in found] == [(False,), (True,), (False,), (True,)]
    assert [one for _, one in found] == [(True, 1, True), (True, 2, True), (True, 1, True), (True, 3, True)]


def test_other_functions_in_place_make_another_graph() -> None:
    graph = module("graph")
    in_place = partial(graph.functions_at, graph.SITES)
    bare = in_place()
    plan = asked.plan(workload(), {0: swap.PYTHON})
    built = training(small())
    with plan.applied(built):
        first = in_place()
        with swap.annotated(workload(), built, plan):
            annotated = in_place()
    assert bare != first
    assert first == annotated
    assert in_place() == bare


def test_hooks_are_seen() -> None:
    has_hooks = module("graph").has_hooks
    for fault in workload().faults:
        built = training(small())
        assert not has_hooks(built.model)
        fault.inject(built)
        assert has_hooks(built.model)


@contextlib.contextmanager
def in_place(built: Any, numbers: tuple[int, ...]) -> Iterator[None]:
    with asked.plan(workload(), dict.fromkeys(numbers, "triton")).applied(built):
        yield


def on_gpu(numbers: tuple[int, ...], steps: int, fault: Fault | None = None, **changes: Any) -> Any:
    """A run of the tiny preset; the fault comes at steps 7 and 11, when graphs replay."""
    config = dataclasses.replace(workload().presets["tiny"], meta_update_freq=5, **changes)
    built = workload().build(preset=config, device=GPU, dtype=torch.float32, seed=0, data=None)
    with in_place(built, numbers):
        for index in range(steps):
            if fault is not None and index in (7, 11):
                fault.inject(built)
            built.step(index)
    return built


def graphs_of(built: Any) -> int:
    return sum(one.graph is not None for one in built.kept["graph"].captured.values())


def assert_same_bits(after: Any, before: Any) -> None:
    states = flat(before.state_dict()), flat(after.state_dict())
    assert all(torch.equal(bits(tensor), bits(states[1][path])) for path, tensor in states[0].items())
    assert after.losses() == before.losses()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("others", [(0,), (0, 2), (0, 1, 2, 3, 4)], ids=str)
def test_a_replay_is_the_same_step(variant: str, others: tuple[int, ...]) -> None:
    plain, graphed = on_gpu(others, 14, variant=variant), on_gpu((*others, 6), 14, variant=variant)
    assert_same_bits(graphed, plain)
    assert graphs_of(graphed) == 1


@pytest.mark.gpu
def test_cms_has_a_graph_for_each_combination() -> None:
    changes: dict[str, Any] = {"optimizer": "cms", "base_lr": 1.0, "weight_decay": 0.0}
    plain, graphed = on_gpu((0, 5), 32, **changes), on_gpu((0, 5, 6), 32, **changes)
    assert_same_bits(graphed, plain)
    # Ordinary steps, those that train the network, and those of the tenth besides.
    assert graphs_of(graphed) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("fault", workload().faults, ids=lambda fault: fault.name)
def test_a_bad_step_is_skipped_between_replays(fault: Fault) -> None:
    plain, graphed = on_gpu((0, 2), 14, fault), on_gpu((0, 2, 6), 14, fault)
    states = fault.protects(plain), fault.protects(graphed)
    assert all(torch.equal(bits(tensor), bits(states[1][name])) for name, tensor in states[0].items())
    assert graphs_of(graphed) == 1


@pytest.mark.gpu
def test_a_replay_waits_for_nothing() -> None:
    built = on_gpu((), 0)
    with in_place(built, (0, 2, 6)):
        for index in range(6):
            built.step(index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(6, 12):
                built.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(built.losses()) == 12


@pytest.mark.gpu
def test_loaded_state_is_captured_anew() -> None:
    first = on_gpu((0, 2, 6), 8)
    second = on_gpu((0, 2, 6), 6)
    with in_place(second, (0, 2, 6)):
        second.load_state_dict(first.state_dict())
        after = [float(second.step(index)) for index in range(8, 14)]
    with in_place(first, (0, 2)):
        expected = [float(first.step(index)) for index in range(8, 14)]
    assert after == expected
