"""From logits to a code: penalty, suppression, temperature, top-k, top-p, and the draw.

Draws come from a counter-based stream that is computed beforehand, so the host and the device, and all phases, see the
same numbers. Ties are broken by the smaller id everywhere.

Shapes: V vocabulary, C candidates (the top k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernbench import philox

from .config import SamplingConfig, TtsConfig

SUPPRESSED = float("-inf")


def uniforms(config: TtsConfig, seed: int, device: torch.device) -> Tensor:
    """One uniform number per position and code, [positions + 1, groups] float32: Philox at position * groups + code."""
    rows = config.positions + 1
    offsets = torch.arange(rows * config.groups, device=device)
    return philox.rand(seed, offsets).view(rows, config.groups)


def penalize(logits_1V: Tensor, seen_1V: Tensor, penalty: float) -> Tensor:
    """Divide what is positive and multiply what is negative, for ids that were produced already.

    By a product with the inverse, which is what PyTorch makes of a division on a GPU, so that all devices round alike.
    """
    penalized = torch.where(logits_1V > 0, logits_1V * (1 / penalty), logits_1V * penalty)
    return torch.where(seen_1V, penalized, logits_1V)


def suppression(config: TtsConfig, end: int, *, early: bool, device: torch.device) -> Tensor:
    """What is added to the semantic logits, [1, V] float32; ``early`` suppresses the end token, too."""
    sampling = config.sampling
    added = torch.zeros(1, config.codec_vocabulary, device=device)
    added[:, sampling.suppress_from :] = SUPPRESSED
    added[:, end] = SUPPRESSED if early else 0.0
    return added


def choose(logits_1V: Tensor, uniform_1: Tensor, sampling: SamplingConfig, temperature: float, top_p: float) -> Tensor:
    """The code, [1] int64 beside the logits, without a read.

    The nucleus is what comes before the cumulated probability passes ``top_p``, and at least one candidate. Of it that
    candidate is drawn in whose share of the cumulated probability the uniform number falls.
    """
    if temperature == 0.0:
        return logits_1V.argmax(-1)
    ordered_1V, ids_1V = torch.sort(logits_1V, dim=-1, descending=True, stable=True)
    # In float64, so that libraries which round differently still draw the same.
    shares_1C = torch.softmax(ordered_1V[:, : sampling.top_k].to(torch.float64) / temperature, dim=-1)
    cumulated_1C = shares_1C.cumsum(-1)
    inside_1C = cumulated_1C - shares_1C < top_p
    mass_1C = torch.where(inside_1C, cumulated_1C, 0.0)
    total_1 = mass_1C.amax(-1, keepdim=True)
    # The last candidate is never passed, even where the product rounds up to the whole mass.
    passed_1C = inside_1C & (cumulated_1C <= uniform_1 * total_1) & (cumulated_1C < total_1)
    drawn_1 = passed_1C.sum(-1, keepdim=True)
    return ids_1V.gather(-1, drawn_1)[:, 0]
