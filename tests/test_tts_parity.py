"""Parity of decoding: what right phases pass, and what each comparison is there to catch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_tts_decoder import CPU, decoder, module, small, workload
from torch import Tensor

from kernbench import registry, swap
from kernbench.errors import WorkloadFailed
from kernbench.parity import phasecheck
from kernbench.record import ParityResult
from kernbench.workload import Phase, Swap

NAMES = ("teacher-forced logits", "greedy codes", "sampled codes", "end of speech")


def checked(*swaps: Swap, steps: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, ParityResult]:
    """Rows of a phase that makes these swaps, on the small model."""
    declared = dataclasses.replace(
        workload(),
        presets={"small": small()},
        phases=(Phase(number=9, title="on trial", swaps=swaps, predicts=""),),
    )
    plans = [swap.plan(declared, numbers, use={}, kernels=lambda name: pytest.fail(name)) for numbers in ([], [9])]
    rows = phasecheck.check_phase(
        declared, *plans, preset="small", device=CPU, seed=0, data=None, dtype=dtype, steps=steps
    )
    return {row.case: row for row in rows}


def of_phase(number: int) -> tuple[Swap, ...]:
    found: tuple[Swap, ...] = workload().phases_numbered([number])[0].swaps
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_phases_pass(dtype: torch.dtype) -> None:
    rows = checked(*of_phase(0), dtype=dtype)
    assert tuple(rows) == ("1 step", "10 steps", *NAMES)
    assert all(row.passed for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["greedy codes"].reason == rows["sampled codes"].reason == "all 32 frames have the same codes"
    assert "cosine" in rows["teacher-forced logits"].reason
    assert "against float64" in rows["teacher-forced logits"].reason
    assert rows["end of speech"].reason.startswith("token ")


def test_other_rounding_passes_and_tells_how_long_codes_agree() -> None:
    attention, original = module("model").Attention, module("model").Attention.attend

    def attend(self: Any, mixed: Any, bias: Tensor | None) -> Tensor:
        found: Tensor = original(self, mixed, bias)
        return found * (1 + 2**-8)

    rows = checked(Swap(site=(attention, "attend"), use=attend), dtype=torch.bfloat16)
    assert all(rows[name].passed for name in NAMES), [rows[name].reason for name in NAMES]
    assert any("frames" in rows[name].reason for name in NAMES[1:3])


def test_wrong_logits_fail() -> None:
    attention, original = module("model").Attention, module("model").Attention.attend

    def attend(self: Any, mixed: Any, bias: Tensor | None) -> Tensor:
        found: Tensor = original(self, mixed, bias)
        return found * 1.02

    rows = checked(Swap(site=(attention, "attend"), use=attend))
    assert not rows["teacher-forced logits"].passed
    assert not rows["10 steps"].passed


def test_another_choice_from_the_same_logits_fails() -> None:
    decoder_type = module("decoder").Decoder

    def second_best(self: Any, logits: Tensor, group: int) -> Tensor:
        code = logits.topk(2).indices[:, 1 if self.position == 20 and group == 2 else 0]
        self.frames[self.position][group] = int(code)
        return code

    rows = checked(Swap(site=(decoder_type, "acoustic_code"), use=second_best))
    for name in ("greedy codes", "sampled codes"):
        assert not rows[name].passed
        assert "frame 4, code 2" in rows[name].reason
        assert "choose from the same logits" in rows[name].reason
    # Fixed codes hide what was chosen, and nothing else is wrong.
    assert rows["teacher-forced logits"].passed


def test_another_stream_fails_sampled_codes_alone() -> None:
    sampling, original = module("sampling"), module("sampling").choose

    def choose(logits: Tensor, uniform: Tensor, settings: Any, temperature: float, top_p: float) -> Tensor:
        found: Tensor = original(logits, 1 - uniform, settings, temperature, top_p)
        return found

    rows = checked(Swap(site=(sampling, "choose"), use=choose))
    assert rows["greedy codes"].passed
    assert not rows["sampled codes"].passed


def test_speech_that_goes_on_after_its_end_fails() -> None:
    decoder_type = module("decoder").Decoder

    def never(self: Any) -> bool:
        self.end_token = -1
        return False

    rows = checked(Swap(site=(decoder_type, "ended"), use=never))
    assert not rows["end of speech"].passed
    assert "after 32" in rows["end of speech"].reason


def test_a_side_that_raises_is_a_failed_row() -> None:
    decoder_type = module("decoder").Decoder

    def read_codes(self: Any) -> list[list[int]]:
        raise RuntimeError("lost the codes")

    rows = checked(Swap(site=(decoder_type, "read_codes"), use=read_codes))
    assert rows["comparison"].reason == "raised RuntimeError: lost the codes"
    assert not rows["comparison"].passed


def test_a_side_before_that_raises_is_the_workloads_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_codes(self: Any) -> list[list[int]]:
        raise RuntimeError("lost the codes")

    monkeypatch.setattr(module("decoder").Decoder, "read_codes", read_codes)
    with pytest.raises(WorkloadFailed, match="failed before the swap: raised RuntimeError: lost the codes"):
        checked(*of_phase(0)[:1])


def test_fixed_codes_are_the_same_in_every_dtype_and_inside_the_vocabularies() -> None:
    checks: Any = module("checks")
    built = [decoder(dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    for one in built:
        checks.feed_fixed_codes(one)
    assert torch.equal(built[0].forced_MG, built[1].forced_MG)
    assert int(built[0].forced_MG.max()) < 256
    assert int(built[0].forced_MG.min()) >= 0


def test_presets_for_a_gpu_default_to_bfloat16() -> None:
    declared = workload()
    assert [declared.default_dtype(preset) for preset in declared.presets] == ["float32", "bfloat16", "bfloat16"]


def test_kernels_that_take_no_float64_are_held_against_the_unswapped_model() -> None:
    declared = dataclasses.replace(workload(), presets={"small": small()})
    kernels = {name: found.declaration for name, found in registry.kernels().items()}
    plans = [swap.plan(declared, numbers, use={1: "triton"}, kernels=kernels.__getitem__) for numbers in ([1], [0, 1])]
    found = phasecheck.check_phase(declared, *plans, preset="small", device=CPU, seed=0, data=None, steps=2)
    rows = {row.case: row for row in found}
    assert all(row.passed for row in rows.values()), [row.reason for row in rows.values()]
    # A row that passes has a reason where there was no oracle.
    assert rows["1 step"].reason == rows["2 steps"].reason == ""
    assert "against float64" in rows["teacher-forced logits"].reason
