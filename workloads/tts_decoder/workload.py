"""TTS decoder: the talker and the code predictor of Qwen3-TTS, decoding one utterance frame by frame.

The unswapped code is what the source document found in its Rust program, in ordinary PyTorch. Decisions on the open
issues of the specification's section 10, and on what it leaves open:

| matter | decision |
|---|---|
| 1. DGX A100 or GB10, 4. dates, 5. the unused crate, 6. what never landed | history; nothing depends on it |
| 2. 33 norms and about 700 launches ignore the predictor | all 16 transformer passes of a frame are here, and counted |
| 3. "95 % of theoretical" | not used; the share of the floor is weight and cache bytes at the measured copy speed |
| 7. server options | out of scope: one sequence |
| 8. launches were never counted | counted in the trace |
| rotation: position uploaded once a layer (Rust), tables interleaved once a layer (PyTorch) | tables rebuilt in every |
| | layer from an arange on the device; no upload, so no stall that upstream did not count |
| acoustic codes: argmax (Rust) or sampled (PyTorch) | argmax; ``acoustic_temperature`` samples |
| random numbers | Philox, one number per position and code, computed beforehand on every side |
| end of speech | suppressed in the presets, so that every frame is timed; it is looked for all the same |
| a full cache | the utterance begins again after its prompt |
| prompt | think tokens, padding and text in parallel, then the codec's begin token; the text left over trails |
| codec decoder, speaker encoder | out of scope, as in the specification |
"""

from __future__ import annotations

import torch

from kernbench.workload import Workload

from .config import PRESETS, TtsConfig
from .decoder import Decoder
from .model import Place
from .speech import SpeechModel, randomize
from .text import read_text, tokenize


def build(*, preset: TtsConfig, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Decoder:
    """A decoder after its prompt; ``data`` is the text to speak, by default Python's documentation topics."""
    place = Place(device, dtype)
    text = tokenize(read_text(data), None, vocabulary=preset.text_vocabulary, most=preset.positions)
    model = SpeechModel(preset, place)
    randomize(model, seed=seed)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return Decoder(model, preset, place, seed=seed, text_ids=text.ids)


WORKLOAD = Workload(
    name="tts-decoder",
    unit="frames",
    summary="TTS decoder frame: 28-layer talker and 15 passes of the code predictor, batch 1",
    presets=PRESETS,
    build=build,
    source="Custom CUDA kernels plan of a Rust Qwen3-TTS; layout after QwenLM/Qwen3-TTS",
)
