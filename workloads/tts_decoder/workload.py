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

from pathlib import Path

import torch

from kernbench.device import warn_once
from kernbench.workload import Peer, Phase, Swap, Workload

from . import checkpoint, checks, choices, graph, onerow, peers, predictions, syncfree
from .config import PRESETS, TtsConfig
from .decoder import Decoder
from .fused import adapt_add_rms_norm, adapt_qk_norm_rope_cache, adapt_swiglu
from .model import MLP, Attention, Place, Stack
from .speech import SpeechModel, randomize
from .text import BYTES, text_to_speak, tokenize

AT_THE_END = 10**9
"""Codes are read when an utterance is done, which no race of steps reaches."""

BYTES_SPOKEN = f"tts-decoder reads its text as {BYTES}"
OTHER_TOKENS = "; the checkpoint was trained on other tokens"


def build(
    *,
    preset: TtsConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    data: str | None,
    weights: str | None = None,
) -> Decoder:
    """A decoder after its prompt.

    Args:
        data: the text to speak, by default Python's documentation topics.
        weights: the folder of a checkpoint; random weights without one.
    """
    place = Place(device, dtype)
    folder = None if weights is None else Path(weights)
    text = tokenize(text_to_speak(data), folder, vocabulary=preset.text_vocabulary, most=preset.positions)
    model = SpeechModel(preset, place)
    if folder is None:
        randomize(model, seed=seed)
    else:
        checkpoint.load(model, folder)
    if text.tokenizer == BYTES and (folder is not None or data is not None):
        warn_once(BYTES_SPOKEN + (OTHER_TOKENS if folder is not None else ""))
    for weight in model.parameters():
        weight.requires_grad_(False)
    return Decoder(model, preset, place, seed=seed, text_ids=text.ids)


WORKLOAD = Workload(
    name="tts-decoder",
    unit="frames",
    summary="TTS decoder frame: 28-layer talker and 15 passes of the code predictor, batch 1",
    presets=PRESETS,
    build=build,
    phases=(
        Phase(
            number=0,
            title="sync-free sampling",
            flag="TTS_SYNC_FREE",
            claim=predictions.SYNC_CLAIM,
            predicts=predictions.SYNC_PROMISE,
            predict=predictions.predict_no_syncs,
            swaps=(
                Swap(site=(Decoder, "acoustic_code"), use=syncfree.acoustic_code),
                Swap(site=(Decoder, "semantic_code"), use=syncfree.semantic_code),
                Swap(site=(Decoder, "ended"), use=syncfree.ended),
                Swap(site=(Decoder, "read_codes"), use=syncfree.read_codes, every=AT_THE_END),
            ),
        ),
        Phase(
            number=1,
            title="fused residual and RMS norm",
            flag="TTS_FUSED_NORM",
            claim=predictions.NORM_CLAIM,
            predicts=predictions.NORM_PROMISE,
            predict=predictions.predict_fused_norm,
            swaps=(Swap(site=(Stack, "forward"), kernel="add_rms_norm", adapt=adapt_add_rms_norm),),
        ),
        Phase(
            number=2,
            title="fused SwiGLU",
            flag="TTS_FUSED_SWIGLU",
            claim=predictions.SWIGLU_CLAIM,
            predicts=predictions.SWIGLU_PROMISE,
            predict=predictions.predict_fused_swiglu,
            swaps=(Swap(site=(MLP, "activate"), kernel="swiglu", adapt=adapt_swiglu),),
        ),
        Phase(
            number=3,
            title="fused RoPE with QK norm and cache write",
            flag="TTS_FUSED_ROPE",
            claim=predictions.ROPE_CLAIM,
            predicts=predictions.ROPE_PROMISE,
            predict=predictions.predict_fused_rope,
            swaps=(
                Swap(site=(Attention, "rotate_and_store"), kernel="qk_norm_rope_cache", adapt=adapt_qk_norm_rope_cache),
            ),
        ),
        Phase(
            number=4,
            needs=(0, 3),
            title="CUDA graph of the frame",
            flag="TTS_CUDA_GRAPH",
            predicts=predictions.GRAPH_PROMISE,
            predict=predictions.predict_graph,
            swaps=(
                Swap(site=(Decoder, "run_frame"), use=graph.run_frame),
                Swap(site=(Attention, "attend"), use=graph.attend),
            ),
        ),
        Phase(
            number=5,
            title="kernels for one row",
            flag="TTS_ONE_ROW",
            predicts=predictions.ONE_ROW_PROMISE,
            predict=predictions.predict_one_row,
            swaps=(
                Swap(site=(Stack, "decode_one"), use=onerow.decode_one),
                Swap(site=(Stack, "logits_after_one"), use=onerow.logits_after_one),
                Swap(site=(Stack, "logits_after_two"), use=onerow.logits_after_two),
                Swap(site=(SpeechModel, "into_predictor"), use=onerow.into_predictor),
                Swap(site=(SpeechModel, "into_logits"), use=onerow.into_logits),
                Swap(site=(onerow, "norm_row"), kernel="add_rms_norm", adapt=onerow.adapt_norm_row),
                Swap(site=(onerow, "norm_linear"), kernel="decode_norm_linear"),
                Swap(site=(onerow, "attention"), kernel="decode_attention"),
                Swap(site=(onerow, "linear_add"), kernel="decode_linear_add"),
                Swap(site=(onerow, "gate_up"), kernel="decode_gate_up"),
            ),
        ),
        Phase(
            number=6,
            needs=(0,),
            title="one launch to choose a code",
            flag="TTS_CHOICES",
            predicts=predictions.CHOICES_PROMISE,
            predict=predictions.predict_choices,
            swaps=(
                Swap(site=(Decoder, "add_code"), use=choices.add_code),
                Swap(site=(Decoder, "keep_codes"), use=choices.keep_codes),
                Swap(site=(Decoder, "add_token"), use=choices.add_token),
                Swap(site=(choices, "code_embedding"), kernel="decode_code_embedding"),
                Swap(site=(choices, "next_token"), kernel="decode_token"),
            ),
        ),
    ),
    peers=(
        Peer(name="CUDA graph", prepare=peers.capture),
        Peer(name="torch.compile + CUDA graph", prepare=peers.compile_and_capture),
    ),
    dtypes={"0.6b": "bfloat16", "1.7b": "bfloat16"},
    steady=checks.feed_fixed_codes,
    compare=checks.compare,
    source="Custom CUDA kernels plan of a Rust Qwen3-TTS; layout after QwenLM/Qwen3-TTS",
)
