"""How many operators the baseline's forward pass calls, beside what the specification counted upstream."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bio_parts import module, training
from torch.utils._python_dispatch import TorchDispatchMode

NEAR = 0.15
"""Operators that compute the same are written in more or fewer calls."""


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def forward_calls(config: Any) -> int:
    built = training(config, dtype=torch.float32)
    built.model.counted_noise = False
    built.step(0)
    with Calls() as calls:
        built.model(built.text.batch(0)[0])
    count: int = calls.count
    return count


def off() -> Any:
    quiet = module("synapses").TopKConfig(enable_presyn=False, enable_hebbian=False)
    return dataclasses.replace(module("config").PRESETS["tiny-k-dense"], synapses=quiet)


@pytest.mark.parametrize(
    ("preset", "upstream"),
    [("tiny-dense", 669), ("tiny", 1705), ("tiny-k-dense", 641), ("both organs off", 305)],
)
def test_the_baseline_calls_about_as_many_operators_as_upstream(preset: str, upstream: int) -> None:
    """Two layers at T = 64, training. Specification, section 9."""
    config = off() if preset == "both organs off" else module("config").PRESETS[preset]
    assert forward_calls(config) == pytest.approx(upstream, rel=NEAR)


def test_the_presynaptic_organ_calls_about_as_many_operators_as_upstream() -> None:
    """One layer of profile P with its stochastic branch: 125 calls. Specification, section 2.3."""
    presynaptic, synapses = module("presynaptic"), module("synapses").SynapticConfig()
    q, k = torch.randn(2, 4, 4, 64, 32).unbind()
    noise = module("noise").Noise(torch.tensor(0))
    with Calls() as calls:
        state = presynaptic.State.initial(q, synapses)
        presynaptic.release(q, k, state, synapses, dock="qk", noise=noise)
    assert calls.count == pytest.approx(125, rel=NEAR)


def test_experts_in_groups_take_as_many_calls_however_many_they_are() -> None:
    syncfree = module("syncfree")
    counts = []
    for experts in (4, 16):
        config = dataclasses.replace(module("config").PRESETS["tiny"], experts=experts, width=32)
        mixture = training(config, dtype=torch.float32).model.blocks[0].mlp
        x = torch.randn(64, 32)
        genes = mixture.phenotype()
        top, index = mixture.score(x, genes).topk(2)
        with Calls() as calls:
            syncfree.dispatch(mixture, x, index, torch.softmax(top, -1), genes)
        counts.append(calls.count)
    assert counts[0] == counts[1]
