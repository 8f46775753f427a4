"""What is timed beside the phases speaks the same codes; and what only a GPU shows of the captured frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tts_decoder import decoder, module, small, stepped, workload
from test_tts_phases import NUMBERS, plan
from torch._dynamo.testing import CompileCounter

FRAMES = 8


def test_the_captured_peer_speaks_the_baselines_codes() -> None:
    expected, built = decoder(), decoder()
    module("peers").capture(built)
    assert stepped(built, FRAMES) == stepped(expected, FRAMES)
    assert torch.allclose(built.logits_1V, expected.logits_1V, atol=1e-5)
    built.step(2)
    assert built.read_codes() == expected.read_codes()[:3]


def test_the_compiled_peer_is_compiled_once_for_each_number_of_positions() -> None:
    torch._dynamo.reset()
    # A race names the device with its index, which is another one to the compiler.
    device = torch.device("cpu", 0)
    expected = decoder()
    built = workload().build(preset=small(), device=device, dtype=torch.float32, seed=3, data=None)
    counter = CompileCounter()
    module("peers").compile_and_capture(built, backend=counter)
    assert stepped(built, FRAMES) == stepped(expected, FRAMES)
    # Two positions and one for the predictor, one for the talker; nothing breaks a graph.
    assert counter.frame_count == 3


def on_gpu(numbers: tuple[int, ...], *, dtype: torch.dtype = torch.float32, preset: Any = None) -> Any:
    config = preset or small()
    built = workload().build(preset=config, device=torch.device("cuda", 0), dtype=dtype, seed=3, data=None)
    with plan(*numbers, use="triton").applied(built):
        stepped(built, FRAMES)
    return built


@pytest.mark.gpu
def test_a_captured_frame_speaks_the_same_codes() -> None:
    """In float32 with products in float32, where rounding is far below the distance of two codes."""
    expected = on_gpu((0,)).codes_MG
    for numbers in ((0, 3, 4), NUMBERS[:-1], NUMBERS):
        built = on_gpu(numbers)
        assert any(item.graph is not None for item in built.kept["graph"].captured.values())
        assert torch.equal(built.codes_MG, expected)


@pytest.mark.gpu
def test_a_captured_frame_can_be_sent_back() -> None:
    built = workload().build(preset=small(), device=torch.device("cuda", 0), dtype=torch.float32, seed=3, data=None)
    with plan(*NUMBERS, use="triton").applied(built):
        once = stepped(built, FRAMES)
        for index in (3, 4, 2, 7):
            built.step(index)
        assert built.read_codes() == once


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [NUMBERS[:-1], NUMBERS], ids=str)
def test_a_steady_frame_allocates_nothing_and_waits_for_nothing(numbers: tuple[int, ...]) -> None:
    built = workload().build(preset=small(), device=torch.device("cuda", 0), dtype=torch.bfloat16, seed=3, data=None)
    with plan(*numbers, use="triton").applied(built):
        stepped(built, 5)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(5, 12):
                built.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_speech_on_a_gpu_ends_at_the_same_frame() -> None:
    config = small(end_after=2)
    device = torch.device("cuda", 0)

    def build() -> Any:
        return workload().build(preset=config, device=device, dtype=torch.float32, seed=3, data=None)

    codes = build().generate(20)
    last = next(index for index in range(19, 2, -1) if codes[index][0] not in [frame[0] for frame in codes[:index]])
    built = build()
    built.end_token = codes[last][0]
    with plan(*NUMBERS, use="triton").applied(built):
        assert built.generate(20) == codes[:last]


@pytest.mark.gpu
def test_the_compiled_peer_on_a_gpu() -> None:
    expected = on_gpu((0,))
    built = workload().build(preset=small(), device=torch.device("cuda", 0), dtype=torch.float32, seed=3, data=None)
    module("peers").compile_and_capture(built)
    assert stepped(built, FRAMES) == expected.codes_MG[16 : 16 + FRAMES].tolist()
