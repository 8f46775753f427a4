"""Phase 3: genes decoded where the router's logits are made, and where fatigue and energy move.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernbench.record import Prediction, ProfileRecord

from .genes import Phenotype
from .moe import SynapticMoE

CLAIM = "decoding fused with the fatigue and energy EMAs; gene_bias in the router kernel, without intermediate tensors"
PROMISE = (
    "A mixture's logits take one launch beside the two products, and its metabolism one; backward takes two. What "
    "decoded genes and added terms one by one goes: small launches, and no more than the time between them."
)


def predict(before: ProfileRecord) -> Prediction:
    """The time of this phase's hotspots, at most."""
    seconds = sum(spot.self_seconds_per_step for spot in before.hotspots if spot.phase == 3)
    basis = f"its hotspots take {seconds * 1e3:.3g} ms a step" if seconds else "no hotspot of this phase before"
    return Prediction(text=PROMISE, claim=CLAIM, basis=basis)


def adapt_router_genetics(
    op: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[SynapticMoE, Tensor], tuple[Tensor, Phenotype]]:
    """``SynapticMoE.route`` through ``op``, the ``router_genetics`` kernel in one of its implementations."""

    def route(self: SynapticMoE, x_NC: Tensor) -> tuple[Tensor, Phenotype]:
        logits_NE, genes = op(
            self.router(x_NC), x_NC, self.probe(x_NC), self.genome, self.embedding, self.energy, self.fatigue,
            self.metabolic,
        )  # fmt: skip
        return logits_NE, Phenotype(*genes.unbind())

    return route


def adapt_metabolism_update(op: Callable[..., None]) -> Callable[[SynapticMoE, Tensor, int, Phenotype], None]:
    """``SynapticMoE.metabolise`` through ``op``, the ``metabolism_update`` kernel, which decodes the genome itself."""

    @torch.no_grad()
    def metabolise(self: SynapticMoE, count_E: Tensor, tokens: int, genes: Phenotype) -> None:
        op(self.genome.detach(), count_E, self.fatigue, self.energy, tokens)

    return metabolise
