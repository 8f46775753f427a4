"""Phase 6: choosing a code takes one launch, which also writes it down, and of an acoustic one looks its embedding up.

Each operator stands here in plain PyTorch, and is a site that its kernel takes. Without them the functions at the end
do not run either: they belong to the same phase.

Shapes: V vocabulary, N codes that have an embedding, H width of the talker, M positions, G codes of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernbench.device import warn_once

from . import sampling
from .config import SamplingConfig
from .decoder import Decoder
from .syncfree import resident

KEY = "choices"
SAMPLED = "phase 6 of tts-decoder takes the most likely acoustic codes; where they are sampled, phase 0 chooses them"
_add_code, _keep_codes, _add_token = Decoder.add_code, Decoder.keep_codes, Decoder.add_token


@dataclass(frozen=True)
class Kept:
    """What the phase allocates once.

    Attributes:
        positions: each position twice, [M, 2] int64, so that each lies at an address divisible by 16.
        arrived: a counter of programs, [1] int32, zero between kernels.
    """

    positions: Tensor
    arrived: Tensor


def code_embedding(
    logits_V: Tensor, embedding_NH: Tensor, total_H: Tensor, codes_MG: Tensor, position_1: Tensor, group: int,
    forced_MG: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The most likely code, or a forced one that is not negative, into the table; its row, and the total with it."""
    code_1 = logits_V.argmax(-1, keepdim=True)
    if forced_MG is not None:
        forced_1 = forced_MG[:, group].index_select(0, position_1)
        code_1 = torch.where(forced_1 < 0, code_1, forced_1)
    codes_MG[:, group].index_copy_(0, position_1, code_1)
    row_H = embedding_NH.index_select(0, code_1)[0]
    return row_H, total_H + row_H


def next_token(
    logits_V: Tensor, added_RV: Tensor, early_M: Tensor, uniforms_MG: Tensor, codes_MG: Tensor, seen_V: Tensor,
    position_1: Tensor, arrived_1: Tensor, penalty: float, temperature: float, top_k: int, top_p: float,
    forced_MG: Tensor | None,
) -> Tensor:  # fmt: skip
    """The semantic token of the next position into the table, that of this one among those seen; the logits, wide.

    Args:
        added_RV: what suppression adds; ``early_M`` says which of the rows a position takes.
        arrived_1: a counter of programs, zero before and after.
        temperature: and those around it as in ``SamplingConfig``.
    """
    wide_1V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))[None]
    after_1 = position_1 + 1
    seen_V.index_fill_(0, codes_MG[:, 0].index_select(0, position_1), True)
    added_1V = added_RV.index_select(0, early_M.index_select(0, position_1))
    settings = SamplingConfig(top_k=top_k)
    token_1 = sampling.choose(
        sampling.penalize(wide_1V, seen_V[None], penalty) + added_1V,
        uniforms_MG[:, 0].index_select(0, after_1), settings, temperature, top_p,
    )  # fmt: skip
    if forced_MG is not None:
        forced_1 = forced_MG[:, 0].index_select(0, after_1)
        token_1 = torch.where(forced_1 < 0, token_1, forced_1)
    codes_MG[:, 0].index_copy_(0, after_1, token_1)
    return wide_1V[0]


def add_code(self: Decoder, logits_1V: Tensor, group: int, sum_11H: Tensor) -> tuple[Tensor, Tensor]:
    """``Decoder.add_code`` in one operator."""
    if _samples(self):
        warn_once(SAMPLED)
        return _add_code(self, logits_1V, group, sum_11H)
    embedding_NH = self.model.embeddings_in_order()[group - 1].weight
    row_H, total_H = code_embedding(
        logits_1V[0], embedding_NH, sum_11H[0, 0], self.codes_MG, _place(self), group, self.forced_MG
    )
    return row_H[None, None], total_H[None, None]


def keep_codes(self: Decoder) -> None:
    """``Decoder.keep_codes`` where they are kept already."""
    if _samples(self):
        _keep_codes(self)


def add_token(self: Decoder, logits_1V: Tensor) -> Tensor:
    """``Decoder.add_token`` in one operator, except for the prompt."""
    if self.position < self.config.prompt:
        return _add_token(self, logits_1V)
    kept, settings = resident(self), self.config.sampling
    kept.catch_up(self)
    kept.seen_through = self.position
    wide_V = next_token(
        logits_1V[0], kept.added_2V, kept.early_M, self.uniforms_MG, self.codes_MG, kept.seen_1V[0], _place(self),
        _kept(self).arrived, settings.penalty, settings.temperature, settings.top_k, settings.top_p, self.forced_MG,
    )  # fmt: skip
    return wide_V[None]


def _samples(decoder: Decoder) -> bool:
    return decoder.config.sampling.acoustic_temperature != 0.0


def _place(decoder: Decoder) -> Tensor:
    """The position, [1] int64 on the device; no copy and no launch."""
    if decoder.counters_2 is not None:
        return decoder.counters_2[:1]
    return _kept(decoder).positions[decoder.position, :1]


def _kept(decoder: Decoder) -> Kept:
    kept = decoder.kept.get(KEY)
    if not isinstance(kept, Kept):
        device = decoder.place.device
        counted = torch.arange(decoder.config.positions + 1, device=device)
        kept = Kept(counted[:, None].repeat(1, 2), torch.zeros(1, dtype=torch.int32, device=device))
        decoder.kept[KEY] = kept
    return kept
