"""Phase 4: experts merge, split and are reset on the device: one kernel decides, another makes the moves.

No decision is read: the moves of a call are data for the kernel that makes them, and the log reads them when asked for.
The first rank's health and similarities go to all ranks by one broadcast, from which each decides the same.

Shapes: E experts, M moves that can be made in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernbench.record import Prediction, ProfileRecord

from . import parallel
from .moe import SynapticMoE
from .structure import (
    EMPTIED,
    EMPTIED_K,
    ENZYMES,
    HALVED_K,
    HALVED_P,
    MIXED,
    NOISE_STRIDE,
    NOISY,
    StructuralController,
    health_of,
    row_states,
    tensors_of,
)
from .synapses import TopKConfig

CLAIM = "split and merge as masked copy kernels, optimizer states patched without Python loops"
PROMISE = (
    "A call of the controller reads nothing: two kernels a mixture decide and move, whatever the number of experts and "
    "optimizer states. Between calls the step stays as it is."
)
KEPT, SHARED, ENZYME, AVERAGED = range(4)
"""What a merging parent takes of the child, as the kernel ``expert_moves`` names it."""
COPIED, DRAWN, EMPTY, HALF, RESTED, ERASED, TURNED = range(7)
"""What a child becomes, likewise."""


def predict(before: ProfileRecord) -> Prediction:
    """A promise without a figure: how often the controller is called is a setting."""
    return Prediction(text=PROMISE, claim=CLAIM, basis="the controller acts too seldom for a step to show it")


class Decided(NamedTuple):
    """Moves [M, 4] as ``expert_moves`` takes them, and what the winners of merges keep [M]; both on the device."""

    moves: Tensor
    shares: Tensor


class Part(NamedTuple):
    """A tensor with a leading E, what a merging parent takes of the child, what that becomes, and its noise."""

    tensor: Tensor
    take: int
    become: int
    noise: float = 0.0


def adapt_expert_decisions(
    op: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[StructuralController, SynapticMoE], Decided]:
    """``StructuralController.decide`` through ``op``, the ``expert_decisions`` kernel; equal on every rank."""

    @torch.no_grad()
    def decide(self: StructuralController, mixture: SynapticMoE) -> Decided:
        config = self.config
        health, similar, fatigue = shared(
            health_of(mixture), mixture.embedding @ mixture.embedding.T, mixture.fatigue, agree=config.ddp_broadcast
        )
        if self.made is None:
            self.made = torch.full((), self.moves, dtype=torch.int64, device=health.device)
        limits = [
            config.merge_cosine_threshold, config.merge_health_max, config.split_health_min, config.reset_health_max
        ]  # fmt: skip
        resets = config.resets_per_call if isinstance(mixture.synapses, TopKConfig) else 0
        most = [config.merges_per_call, config.splits_per_call, resets]
        stride = NOISE_STRIDE * len(health)
        weighted = config.use_util_weighting
        return Decided(*op(health, similar, fatigue, self.made, limits, most, weighted, self.seed * (1 << 20), stride))

    return decide


def adapt_expert_moves(
    op: Callable[..., None],
) -> Callable[[StructuralController, int, SynapticMoE, list[torch.optim.Optimizer], int], None]:
    """``StructuralController.apply`` through ``op``, the ``expert_moves`` kernel: all tensors and states at once."""

    @torch.no_grad()
    def apply(
        self: StructuralController, layer: int, mixture: SynapticMoE, optimizers: list[torch.optim.Optimizer], step: int
    ) -> None:
        decided: Decided = self.decide(mixture)  # type: ignore[assignment]
        columns = zip(*parts(self, mixture, optimizers), strict=True)
        op(*map(list, columns), decided.moves, decided.shares)
        self.waiting.append((layer, step, decided.moves))

    return apply


def shared(*statistics: Tensor, agree: bool) -> list[Tensor]:
    """The first rank's statistics, contiguous, on every rank by one broadcast; one's own where there is one rank."""
    if not agree or parallel.world()[1] == 1:
        return [one.contiguous() for one in statistics]
    flat = torch.cat([one.reshape(-1) for one in statistics])
    torch.distributed.broadcast(flat, 0)
    split = torch.split(flat, [one.numel() for one in statistics])
    # Clones, because a piece of the middle starts at any address.
    return [piece.view(one.shape).clone() for piece, one in zip(split, statistics, strict=True)]


def parts(
    controller: StructuralController, mixture: SynapticMoE, optimizers: list[torch.optim.Optimizer]
) -> Iterator[Part]:
    """All that belongs to the experts, in the order in which noise is drawn: the tensors of ``absorb``, ``clone`` and
    ``patch``, with what these do to them."""
    config = controller.config
    top_k = isinstance(mixture.synapses, TopKConfig)
    emptied = (*EMPTIED, *EMPTIED_K) if top_k else EMPTIED
    halved = HALVED_K if top_k else HALVED_P
    for name, tensor in tensors_of(mixture):
        take = SHARED if name in MIXED else ENZYME if name in ENZYMES else KEPT
        become = DRAWN if name in NOISY else EMPTY if name in emptied else HALF if name in halved else COPIED
        yield Part(tensor.detach(), take, become, config.noise_linear if become == DRAWN else 0.0)
    router = mixture.router.weight
    yield Part(router.detach(), AVERAGED, DRAWN, config.noise_router)
    yield Part(mixture.embedding, KEPT, TURNED, config.noise_embedding)
    yield Part(mixture.fatigue, KEPT, EMPTY)
    yield Part(mixture.energy, KEPT, RESTED)
    inherit = config.patch == "inherit"
    for optimizer in optimizers:
        for parameter in (*mixture.inner.parameters(), *mixture.outer.parameters()):
            for _, state in row_states(optimizer, parameter):
                yield Part(state, KEPT, COPIED if inherit else EMPTY)
        for _, state in row_states(optimizer, router):
            yield Part(state, KEPT, COPIED if inherit else ERASED)
