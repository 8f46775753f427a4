"""Phase 6: choosing a code takes one launch, which also writes it down and looks its embedding up.

Each operator stands here in plain PyTorch, and is a site that its kernel takes. Without them the functions at the end
do not run either: they belong to the same phase.

Shapes: V vocabulary, N codes that have an embedding, H width of the talker, M positions, G codes of a frame.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from kernbench.device import warn_once
from kernbench.errors import KernbenchError

from .decoder import Decoder

KEY = "choices"
SAMPLED = "phase 6 of tts-decoder takes the most likely acoustic codes; where they are sampled, phase 0 chooses them"
_add_code, _keep_codes = Decoder.add_code, Decoder.keep_codes


@dataclass(frozen=True)
class Kept:
    """What the phase allocates once: each position twice, [M, 2], so that each lies at an address divisible by 16."""

    positions: Tensor


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


def add_code(self: Decoder, logits_1V: Tensor, group: int, sum_11H: Tensor) -> tuple[Tensor, Tensor]:
    """``Decoder.add_code`` in one operator.

    Raises:
        KernbenchError: phase 0 is not in place, so that codes would be looked for on the host.
    """
    _check_phase()
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


def _check_phase() -> None:
    if not getattr(inspect.unwrap(Decoder.acoustic_code), "reads_nothing", False):
        raise KernbenchError(
            "phase 6 of tts-decoder leaves the codes on the device, where only phase 0 reads them: keep phase 0 first, "
            "or type --phases 0,6"
        )


def _samples(decoder: Decoder) -> bool:
    return decoder.config.sampling.acoustic_temperature != 0.0


def _place(decoder: Decoder) -> Tensor:
    """The position, [1] int64 on the device; no copy and no launch."""
    if decoder.counters_2 is not None:
        return decoder.counters_2[:1]
    kept = decoder.kept.get(KEY)
    if not isinstance(kept, Kept):
        counted = torch.arange(decoder.config.positions + 1, device=decoder.place.device)
        kept = decoder.kept[KEY] = Kept(counted[:, None].repeat(1, 2))
    return kept.positions[decoder.position, :1]
