"""Phase 2: the scores of the experts on the device, and a log that the loop does not wait for.

Between ranks the scores are averaged on the device when they are logged: they are linear in what each rank counts, but
for two that follow from the others.

Shapes: N tokens, C width, E experts, k chosen of a token, M sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import parallel
from .moe import Routed, SynapticMoE
from .neuroscore import SAMPLED_SHARE, NeuroScore

Counts = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Update = Callable[..., None]


def adapt_router_counts(op: Counts) -> Callable[[SynapticMoE, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``SynapticMoE.account`` through ``op``, the ``router_counts`` kernel in one of its implementations."""

    def account(self: SynapticMoE, index_Nk: Tensor, gates_Nk: Tensor) -> tuple[Tensor, Tensor]:
        return op(index_Nk, gates_Nk, self.config.experts)

    return account


def adapt_neuroscore_update(op: Update) -> Callable[[NeuroScore, SynapticMoE], None]:
    """``NeuroScore.observe`` on the device, through ``op``, the ``neuroscore_update`` kernel."""

    @torch.no_grad()
    def observe(self: NeuroScore, mixture: SynapticMoE) -> None:
        routed = mixture.last
        if routed is None:
            return
        self.move_to(mixture.energy.device)
        op(
            routed.count, routed.mass, mixture.energy, self.contribution, self.frequency, self.efficiency,
            self.resilience, self.earlier, len(routed.x),
        )  # fmt: skip

    return observe


@torch.no_grad()
def report(self: NeuroScore, routed: Routed) -> None:
    """``NeuroScore.report`` that leaves the scores on the device, and their log to a thread."""
    self.specialisation.copy_(specialisation(routed, self.specialisation))
    self.log_later(averaged(torch.stack(self.vectors())))


def specialisation(routed: Routed, before_E: Tensor) -> Tensor:
    """``NeuroScore.sample`` for all experts at once: the means of their sampled tokens are one product."""
    x_MC = routed.x[::SAMPLED_SHARE].to(before_E.dtype)
    experts_E = torch.arange(len(before_E), device=x_MC.device)
    chosen_ME = (routed.index[::SAMPLED_SHARE].unsqueeze(-1) == experts_E).any(1).to(x_MC.dtype)
    count_E = chosen_ME.sum(0)
    own_EC = (chosen_ME.T @ x_MC) / count_E.clamp(min=1).unsqueeze(-1)
    found_E = 1 - torch.cosine_similarity(own_EC, x_MC.mean(0, keepdim=True), dim=1)
    return torch.where(count_E > 0, found_E, before_E)


def averaged(scores_VE: Tensor) -> Tensor:
    """The mean over all ranks, by one collective on the device; the scores themselves where there is one rank."""
    ranks = parallel.world()[1]
    if ranks > 1:
        torch.distributed.all_reduce(scores_VE)
        scores_VE /= ranks
    return scores_VE
