"""The host reads of a bio-nanochat step against the specification's table, and none where phase 0 promises it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bio_parts import module

from kernbench import request as asked
from kernbench.analysis import stalls
from kernbench.measurement import measure
from kernbench.request import Request


def counted(preset: str, phases: dict[int, str]) -> Counter[str]:
    """Reads of one steady step that would wait for a GPU, by file of the workload."""
    request = Request(command="test", preset=preset, device="cpu")
    settings = asked.settings(request, "bio-nanochat")
    log = measure.watch(settings, asked.plan(settings.workload, phases))
    counts: Counter[str] = Counter()
    for stall in stalls.stalls(None, log):
        if stall.klass == "would-sync":
            counts[Path(stall.file).stem] += round(stall.count_per_step)
    return counts


def expected(preset: str) -> dict[str, int]:
    """Reads by file, of the specification's section 9: all experts used, L layers, E experts.

    Profile P reads nothing in a dense forward pass, 4 E L in one with experts. Profile K adds 4 L where release is
    stochastic, so in training; with gradients off, 7 for each of a layer's two synaptic linears, of every expert.
    Outside of the forward pass the loop reads loss and gradient norm, and the scores of every mixture 3 tensors.
    """
    config: Any = module("config").PRESETS[preset]
    layers, experts = config.layers, config.experts
    top_k = type(config.synapses).__name__ == "TopKConfig"
    found = {"training": 2 if config.step == "train" else 1}
    if experts:
        found |= {"moe": 4 * experts * layers, "neuroscore": 3 * layers}
    if top_k and config.step == "train":
        found["topk"] = 4 * layers
        # The table counts the forward pass; backward, the gather and both sides of the store read their masks again.
        found["training"] += 3 * layers
    if top_k and config.step == "forward":
        found["postsynaptic_topk"] = 14 * max(experts, 1) * layers
    return found


PRESETS = ("tiny", "tiny-dense", "tiny-k", "tiny-k-forward")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_baseline_reads_what_the_specification_says(preset: str) -> None:
    assert counted(preset, {}) == expected(preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_reads_only_the_scores_are_left(preset: str) -> None:
    found = counted(preset, {0: "python"})
    assert set(found) <= {"neuroscore"}
    assert found["neuroscore"] == expected(preset).get("neuroscore", 0)


def test_with_the_scores_on_the_device_nothing_is_read() -> None:
    assert counted("tiny", {0: "python", 2: "eager"}) == {}
