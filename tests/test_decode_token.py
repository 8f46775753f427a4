"""The kernel that chooses a semantic token: the codes of phase 0 from the same stream, ties, NaN, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decode_kernels import DEVICE, module, spec
from test_tts_decoder import module as workload_module
from test_tts_decoder import workload
from torch import Tensor

from kernbench.spec import Case, Inputs

PLACES, GROUPS = 8, 4


def inputs_of(codes: int = 60, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    case = Case("small", codes=codes, places=PLACES, groups=GROUPS, top_k=50, percent=90, tenths=9, forced=0)
    inputs: Inputs = spec("decode_token").make_inputs(case, dtype, DEVICE, seed)
    return {**inputs, **changes}


def chosen(inputs: Inputs, **options: Any) -> int:
    """By the kernel; nothing else of the codes changes."""
    before, after = inputs["codes"].clone(), int(inputs["position"]) + 1
    spec("decode_token").optimized(**inputs, **options)
    token = int(inputs["codes"][after, 0])
    before[after, 0] = token
    assert torch.equal(inputs["codes"], before)
    assert not inputs["arrived"].any(), "the counter is zero again"
    return token


def of_phase_0(inputs: Inputs) -> int:
    """By the workload's own functions, as phase 0 calls them."""
    sampling, position = workload_module("sampling"), int(inputs["position"])
    seen = inputs["seen"].clone()
    seen[inputs["codes"][position, 0]] = True
    x = sampling.penalize(inputs["logits"].float()[None], seen[None], inputs["penalty"])
    x = x + inputs["added"][inputs["early"][position]]
    settings = dataclasses.replace(workload().presets["tiny"].sampling, top_k=inputs["top_k"])
    uniform = inputs["uniforms"][position + 1, :1]
    return int(sampling.choose(x, uniform, settings, inputs["temperature"], inputs["top_p"]))


def test_it_draws_what_phase_0_draws() -> None:
    """40 draws with one program each take the interpreter some seconds."""
    tokens = []
    for seed in range(40):
        inputs = inputs_of(
            seed=seed, temperature=(0.9, 0.3, 2.5, 0.0)[seed % 4], top_k=(50, 7, 1, 60, 200)[seed % 5],
            top_p=(0.9, 1.0, 0.35)[seed % 3], penalty=(1.05, 1.0, 1.7)[seed % 3],
            dtype=(torch.float32, torch.bfloat16)[seed % 2],
        )  # fmt: skip
        if seed % 8 < 2:
            inputs["uniforms"].fill_((0.0, 1 - 2**-24)[seed % 2])
        expected = of_phase_0(inputs)
        tokens.append(chosen(inputs, ranks=(64, 4)))
        assert tokens[-1] == expected, f"seed {seed}"
    assert len(set(tokens)) > 12


@pytest.mark.gpu
def test_it_draws_what_phase_0_draws_on_a_gpu() -> None:
    parted = []
    for seed in range(1000):
        inputs = inputs_of(3072, seed=seed, dtype=torch.bfloat16, temperature=(0.9, 0.5, 1.3)[seed % 3])
        expected = of_phase_0(inputs)
        if chosen(inputs) != expected:
            parted.append(seed)
    assert parted == []


@pytest.mark.parametrize("ranks", [(8, 4), (16, 4), (64, 4)])
def test_programs_that_share_the_ids_place_them_alike(ranks: tuple[int, int]) -> None:
    inputs = inputs_of(59, seed=5, dtype=torch.bfloat16)
    inputs["logits"] = (inputs["logits"] * 2).round() / 2
    assert len(inputs["logits"].unique()) < 40, "many are equal"
    assert chosen(inputs, ranks=ranks) == of_phase_0(inputs_of(59, seed=5, logits=inputs["logits"]))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "places",
    [
        {8: 30.0, 9: 30.0, 40: 30.0},
        {8: float("inf"), 9: float("inf")},
        {8: float("inf"), 30: float("nan"), 31: -float("nan")},
        dict.fromkeys(range(60), float("-inf")),
        dict.fromkeys(range(60), -0.0) | {7: 0.0},
    ],
)
def test_equal_logits_infinities_and_nan_are_ordered_as_by_torch(temperature: float, places: dict[int, float]) -> None:
    inputs = inputs_of(temperature=temperature, top_p=1.0)
    for place, value in places.items():
        inputs["logits"][place] = value
    inputs["early"].zero_()
    inputs["uniforms"].fill_(0.5)
    assert chosen(inputs) == of_phase_0(inputs)


def test_the_token_at_the_position_is_seen_at_once_and_for_good() -> None:
    """It is the best by less than the penalty, which so makes another one of it."""
    inputs = inputs_of(temperature=0.0, penalty=1.5)
    inputs["seen"].zero_()
    inputs["logits"].fill_(1.0)
    inputs["logits"][20], inputs["logits"][4] = 3.0, 2.5
    inputs["codes"][int(inputs["position"]), 0] = 20
    assert chosen(inputs, ranks=(16, 4)) == 4
    assert inputs["seen"].nonzero().flatten().tolist() == [20]


def test_a_forced_token_is_written_instead() -> None:
    forced = torch.full((PLACES, GROUPS), -1, device=DEVICE)
    inputs = inputs_of(seed=1, forced=forced)
    drawn = chosen(inputs)
    forced[int(inputs["position"]) + 1, 0] = 57
    assert drawn != 57
    assert chosen(inputs) == 57
    forced[int(inputs["position"]) + 1, 0] = -1
    assert chosen(inputs) == drawn


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logits", lambda x: x[::2], "takes logits contiguous"),
        ("added", lambda x: x[:, 1:], "takes added contiguous"),
        ("uniforms", lambda x: x[1:], "takes uniforms contiguous"),
        ("codes", lambda x: x.int(), "takes codes contiguous"),
        ("early", lambda x: x[1:], r"early \[8\] int64"),
        ("seen", lambda x: x.byte(), r"seen \[60\] bool"),
        ("arrived", lambda x: x.long(), "takes counters"),
        ("position", lambda x: x[None], "takes position contiguous"),
        ("penalty", lambda x: 0.0, "a positive penalty"),
        ("temperature", lambda x: -1.0, "a temperature from 0 on"),
        ("top_k", lambda x: 0, "a top_k from 1 to 1024"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Callable[[Any], Any], words: str) -> None:
    inputs = inputs_of()
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=words):
        spec("decode_token").optimized(**inputs)


def test_float64_reaches_the_kernel_as_its_bits() -> None:
    bits = module("decode_token")._bits
    for number in (0.9, 1.0, 1e-3):
        again: Tensor = torch.tensor(bits(number)).view(torch.float64)
        assert float(again) == number
