"""Phase 4: the whole frame as one CUDA graph, with the position advanced on the device.

The graph holds predictor, talker and sampling. What is left to the host in a frame is one launch of it, and the look
for the end token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.capturing import functions_at, recorded
from kernbench.device import warn_once

from . import choices, onerow
from .decoder import Decoder
from .model import MLP, Attention, Mixed, Stack
from .speech import SpeechModel
from .syncfree import resident

KEY = "graph"
EAGER_FRAMES = 2
"""Frames before a capture: in them kernels are built, and libraries allocate what they work with."""
UNCAPTURED = "tts-decoder's frame runs uncaptured, whatever is called CUDA graph: that needs a CUDA device"
SITES: tuple[tuple[Any, str], ...] = (
    (Decoder, "acoustic_code"),
    (Decoder, "semantic_code"),
    (Decoder, "add_code"),
    (Decoder, "keep_codes"),
    (Decoder, "add_token"),
    (Stack, "forward"),
    (Stack, "decode_one"),
    (Stack, "logits_after_one"),
    (Stack, "logits_after_two"),
    (SpeechModel, "into_predictor"),
    (SpeechModel, "into_logits"),
    (MLP, "activate"),
    (Attention, "rotate_and_store"),
    (Attention, "attend"),
    *((onerow, name) for name in ("norm_row", "norm_linear", "attention", "linear_add", "gate_up")),
    (choices, "code_embedding"),
    (choices, "next_token"),
)
"""What a captured frame consists of; with something else in place, it is captured anew."""


@dataclass
class Captured:
    """A graph, after some frames without one, and the logits it leaves."""

    eager_frames: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None
    acoustic_logits: list[Tensor] = field(default_factory=list)


@dataclass
class Counting:
    """The position and the one after on the device, and what the host knows of them."""

    counters_2: Tensor
    counted: int = -1
    captured: dict[tuple[Any, ...], Captured] = field(default_factory=dict)


def run_frame(self: Decoder) -> None:
    """``Decoder.run_frame``: the next frame by a replay, or where there is no GPU by the same code as it stands."""
    resident(self).catch_up(self)
    kept = _counting(self)
    with _on_device(self, kept):
        if self.place.device.type == "cuda":
            _captured_frame(self, kept)
        else:
            warn_once(UNCAPTURED)
            _frame(self)
    self.position += 1
    kept.counted = self.position
    self.talker_cache.counted_to(self.position)
    resident(self).seen_through = self.position - 1


def attend(self: Attention, mixed: Mixed, bias_TS: Tensor | None) -> Tensor:
    """``Attention.attend`` with the queries of a group as rows, so that nothing is repeated for them."""
    queries, keys, values = mixed
    if queries.shape[2] > 1:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias_TS, is_causal=bias_TS is None, enable_gqa=True
        )
    grouped = queries.reshape(1, self.config.kv_heads, -1, self.config.head_dim)
    return functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias_TS).reshape(queries.shape)


def _counting(decoder: Decoder) -> Counting:
    kept = decoder.kept.get(KEY)
    if not isinstance(kept, Counting):
        zeros = torch.zeros(2, dtype=torch.int64, device=decoder.place.device)
        kept = decoder.kept[KEY] = Counting(zeros)
    if kept.counted != decoder.position:
        kept.counters_2.copy_(decoder.talker_cache.reserve().positions[decoder.position])
        kept.counters_2[1:].add_(1)
    return kept


@contextmanager
def _on_device(decoder: Decoder, kept: Counting) -> Iterator[None]:
    """Positions are counted on the device; whatever happens, the host counts again after."""
    decoder.counters_2 = kept.counters_2
    kept.counted = -1
    decoder.talker_cache.count_on_device()
    try:
        yield
    finally:
        decoder.counters_2 = None
        decoder.talker_cache.count_on_host()


def _frame(decoder: Decoder) -> None:
    decoder.frame()
    assert decoder.counters_2 is not None
    decoder.counters_2.add_(1)


def _captured_frame(decoder: Decoder, kept: Counting) -> None:
    captured = kept.captured.setdefault(functions_at(SITES), Captured())
    if captured.eager_frames < EAGER_FRAMES:
        captured.eager_frames += 1
        _frame(decoder)
        return
    if captured.graph is None:
        graph = torch.cuda.CUDAGraph()
        with recorded(graph):
            _frame(decoder)
        captured.graph = graph
        captured.logits, captured.acoustic_logits = decoder.logits_1V, decoder.acoustic_logits
    assert captured.logits is not None
    captured.graph.replay()
    decoder.logits_1V, decoder.acoustic_logits = captured.logits, captured.acoustic_logits
