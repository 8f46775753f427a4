"""bio-nanochat's phase 5: a step without reads as one CUDA graph; without a GPU the same step, said aloud."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from bio_parts import module, small, training
from test_bio_gpu import no_waiting
from test_bio_phases import assert_same, plan, run
from test_bio_reads import counted

from kernbench import device
from kernbench import swap as swaps
from kernbench.errors import KernbenchError
from kernbench.parity import compare

OTHERS = (0, 1, 2, 3, 4)


@pytest.mark.parametrize("preset", ["tiny-structure", "tiny-muon"])
def test_with_genes_and_moves_on_the_device_nothing_is_read(preset: str) -> None:
    assert counted(preset, {0: "python", 2: "eager", 3: "eager", 4: "eager", 5: "python"}) == {}


def test_the_controller_reads_where_its_phase_is_not_in_place() -> None:
    assert counted("tiny-structure", {0: "python", 2: "eager", 3: "eager"})["structure"] > 0


@pytest.mark.parametrize("changes", [{"experts": 3, "optimizer": "muon"}, {"step": "forward"}, {}], ids=str)
def test_without_a_gpu_it_says_so_and_changes_nothing(changes: dict[str, Any]) -> None:
    device.WARNINGS.clear()
    expected, losses = run(small(**changes), 3, 0, 2)
    assert device.WARNINGS == []
    found, again = run(small(**changes), 3, 0, 2, 5)
    assert device.WARNINGS == ["phase 5 of bio-nanochat runs uncaptured here: a CUDA graph needs a CUDA device"]
    assert again == losses
    assert_same(found, expected, rtol=0.0)


def test_it_asks_for_the_phases_that_read_nothing() -> None:
    with pytest.raises(KernbenchError, match="phase 5 of bio-nanochat needs phase 0 in place: keep it first"):
        run(small(), 1, 5)
    with pytest.raises(KernbenchError, match="keep phase 2 first"):
        run(small(experts=3), 1, 0, 5)


def test_whatever_is_fixed_in_a_graph_makes_another_one() -> None:
    constants, built = module("graph").constants, training(small(experts=3))
    bare = constants(built)
    with plan(0).applied(built):
        first = constants(built)
        with swaps.annotated(plan().workload, built, plan(0)):
            assert constants(built) == first
        built.optimizers[0].param_groups[0]["lr"] *= 2
        slower = constants(built)
        built.model.counted_noise = False
    assert len({bare, first, slower, constants(built)}) == 4


def test_hooks_are_seen() -> None:
    has_hooks, built = module("graph").has_hooks, training(small())
    assert not has_hooks(built.model)
    hook = built.model.head.register_forward_hook(lambda *_: None)
    assert has_hooks(built.model)
    hook.remove()
    built.parameters[0].register_hook(lambda _: None)
    assert has_hooks(built.model)


def test_adamw_counts_beside_its_parameters_from_then_on() -> None:
    built = training(small(experts=3, optimizer="muon"))
    built.step(0)
    counts = [state["step"] for state in built.optimizers[0].state.values()]
    module("graph").count_on_device(built.optimizers)
    assert counts
    for group in built.optimizers[0].param_groups:
        assert group["capturable"]
    for parameter, state in built.optimizers[0].state.items():
        assert state["step"].device == parameter.device
        assert state["step"] == 1
    assert "capturable" not in built.optimizers[1].param_groups[0]


def test_a_loaded_state_leaves_no_graph_of_the_one_before() -> None:
    built = training(small())
    built.kept["graphs"] = object()
    built.load_state_dict(compare.clone(built.state_dict()))
    assert built.kept == {}


def on_gpu(numbers: tuple[int, ...], steps: int, preset: str = "small-moe", **changes: Any) -> Any:
    """A run whose 7 or more steps replay graphs, with logs and moves of experts between; 2 layers of the preset."""
    config = dataclasses.replace(module("config").PRESETS[preset], layers=2, batch=2, log_every=3, **changes)
    dtype = torch.bfloat16
    built = module("training").Training(config, device=torch.device("cuda:0"), dtype=dtype, seed=0, data=None)
    with plan(*numbers, use="triton").applied(built):
        for index in range(steps):
            built.step(index)
    return built


def graphs_of(built: Any) -> int:
    return sum(one.graph is not None for one in built.kept["graphs"].captured.values())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("others", [(0, 2), OTHERS], ids=str)
def test_a_replay_is_the_same_step(others: tuple[int, ...], optimizer: str) -> None:
    """Bit for bit, if AdamW counts its steps in the same place; noise is torch's without phase 1."""
    plain, graphed = (small_run(others, optimizer=optimizer), on_gpu((*others, 5), 9, optimizer=optimizer))
    assert graphs_of(graphed) == 1
    assert graphed.losses() == plain.losses()
    expected = compare.leaves(compare.clone(plain.state_dict()), "")
    found = compare.leaves(compare.clone(graphed.state_dict()), "")
    differing = [name for name, leaf in expected.items() if not compare.same_leaf(found[name], leaf)]
    assert differing == []
    assert float(graphed.gradient_norm) == float(plain.gradient_norm)


def small_run(others: tuple[int, ...], **changes: Any) -> Any:
    """The same without graphs, its AdamW told from the start to count on the device."""
    config = dataclasses.replace(module("config").PRESETS["small-moe"], layers=2, batch=2, log_every=3, **changes)
    built = module("training").Training(
        config, device=torch.device("cuda:0"), dtype=torch.bfloat16, seed=0, data=None
    )  # fmt: skip
    module("graph").count_on_device(built.optimizers)
    with plan(*others, use="triton").applied(built), warnings.catch_warnings():
        # Not every torch asks why an optimizer that can be captured is not.
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        for index in range(9):
            built.step(index)
    return built


@pytest.mark.gpu
def test_experts_move_and_logs_are_written_between_replays() -> None:
    lively = module("config").LIVELY
    plain, graphed = (on_gpu(numbers, 10, structure=lively) for numbers in (OTHERS, (*OTHERS, 5)))
    assert graphs_of(graphed) == 1
    assert plain.controller.state_dict()["moves"] > 0
    assert len(graphed.controller.state_dict()["lineage"]) > 0
    for score in graphed.scores:
        score.log.flush()
        assert [entry["step"] for entry in score.log_entries] == [3, 6, 9]
    # Rounding may decide whom a move takes, so that only what comes before the first one is held together.
    assert graphed.losses()[:2] == pytest.approx(plain.losses()[:2], rel=1e-2)
    assert graphed.losses()[-1] < graphed.losses()[0]


@pytest.mark.gpu
def test_another_learning_rate_is_captured_anew() -> None:
    built = on_gpu((0, 2), 0)
    with plan(0, 2, 5, use="triton").applied(built):
        for index in range(5):
            built.step(index)
        # Without its graph, which would keep the step before out of the next capture.
        before = built.model.head.weight.detach().clone()
        built.optimizers[0].param_groups[0]["lr"] = 0.0
        for index in range(5, 8):
            built.step(index)
    assert graphs_of(built) == 2
    assert torch.equal(built.model.head.weight, before)


@pytest.mark.gpu
def test_a_replay_waits_for_nothing() -> None:
    built = on_gpu((), 0)
    with plan(*OTHERS, 5, use="triton").applied(built):
        for index in range(6):
            built.step(index)
        torch.cuda.synchronize()
        with no_waiting():
            for index in range(6, 12):
                built.step(index)
    assert graphs_of(built) == 1
