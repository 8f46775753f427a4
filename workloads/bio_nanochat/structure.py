"""The controller of structure: experts that are alike merge, healthy ones split into the weakest, dead ones are reset.

The number of experts never changes: whoever is overwritten becomes a noisy copy of another. Decisions read the device,
weights are copied tensor by tensor and expert by expert, as upstream does. Noise comes from Philox streams, so that
masked copy kernels can draw the same.

Upstream's ranks call different collectives here, and wait for each other forever. These agree on the first rank's
moves, by one broadcast, and each makes them on its own.

Shapes: E experts.
Source: specification, section 7; by reading only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernbench import philox

from . import parallel
from .config import StructureConfig
from .moe import SynapticMoE
from .synapses import TopKConfig

KINDS = ("merge", "split", "reset")
FEW = 1e-6
EVEN_SHARE, FIXED_SHARE, ENZYME_SHARE = 0.5, 0.6, 0.9
NOISE_STRIDE = 8
"""Streams of noise that one move may draw from; the move's number times this is its first."""
ENZYMES = ("camkii", "pp1", "gate", "bdnf", "accumulated")
MIXED = ("slow", "fast", "bias", "trace_in", "trace_out", "hebbian", "fast_gain", "slow_gain", "gain_in", "gain_out")
NOISY = ("slow", "fast", "bias")
EMPTIED = ("hebbian", "fast_gain", "slow_gain")
HALVED_P, EMPTIED_K = ("trace_in", "trace_out"), ("trace_in", "trace_out")
HALVED_K = ("gain_in", "gain_out")


class Move(NamedTuple):
    """One decision: ``child`` becomes a noisy copy of ``parent``.

    Of a merge, ``share`` is what the parent first keeps of itself, beside what it takes of the child.
    """

    kind: str
    parent: int
    child: int
    share: float = 1.0


@dataclass
class StructuralController:
    """Decides for every mixture of a model when it is called; ``lineage`` keeps (layer, kind, parent, child, step)."""

    config: StructureConfig
    seed: int
    last_step: int | None = None
    moves: int = 0
    lineage: list[tuple[int, str, int, int, int]] = field(default_factory=list)
    # Where decisions stay on the device: layer, step and [kind, parent, child, seed] of each, and how many were made.
    waiting: list[tuple[int, int, Tensor]] = field(default_factory=list)
    made: Tensor | None = None

    def step(self, mixtures: list[SynapticMoE], optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Act on every layer, if it is time for that."""
        if not self.due(step):
            return
        self.last_step = step
        for layer, mixture in enumerate(mixtures):
            self.apply(layer, mixture, optimizers, step)

    def due(self, step: int) -> bool:
        """Whether the controller acts after ``step`` steps."""
        config = self.config
        if not config.every or step % config.every or step < config.warmup_steps:
            return False
        return self.last_step is None or step - self.last_step >= config.min_step_interval

    @torch.no_grad()
    def apply(self, layer: int, mixture: SynapticMoE, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Merge, split and reset the experts of one layer."""
        # After a phase was taken out, moves are counted on the host again.
        self.settle()
        self.made = None
        for move in self.agreed(self.decide(mixture), mixture.energy.device):
            if move.kind == "merge":
                absorb(mixture, move.parent, move.child, move.share)
            first = self.seed * (1 << 20) + self.moves * NOISE_STRIDE * len(mixture.energy)
            clone(mixture, move, self.config, first)
            patch(mixture, move, optimizers, self.config)
            self.moves += 1
            self.lineage.append((layer, move.kind, move.parent, move.child, step))

    def decide(self, mixture: SynapticMoE) -> list[Move]:
        """The moves of one layer, in the order in which they are made; reads the device."""
        config = self.config
        health = health_of(mixture).tolist()
        touched: set[int] = set()
        pairs = list(self.alike(mixture, health, touched))
        moves = [Move("merge", *pair, self.share(mixture, *pair)) for pair in pairs]
        weak = sorted(range(len(health)), key=lambda e: health[e])
        strong = [e for e in reversed(weak) if health[e] >= config.split_health_min]
        moves += take("split", strong, weak, touched, config.splits_per_call)
        if isinstance(mixture.synapses, TopKConfig):
            dead = [e for e in weak if health[e] <= config.reset_health_max]
            resets = [Move("reset", weak[-1], e) for e in dead if e not in touched and e != weak[-1]]
            moves += resets[: config.resets_per_call]
        return moves

    def alike(self, mixture: SynapticMoE, health: list[float], touched: set[int]) -> Iterator[tuple[int, int]]:
        """Winner and loser of the most similar disjoint pairs of poor health."""
        config, merged = self.config, 0
        similar_EE = mixture.embedding @ mixture.embedding.T
        above_M2 = torch.nonzero((similar_EE > config.merge_cosine_threshold).triu(1))
        pairs = [(similar_EE[i, j].item(), i, j) for i, j in above_M2.tolist()]
        for _, i, j in sorted(pairs, reverse=True):
            poor = max(health[i], health[j]) <= config.merge_health_max
            if poor and not {i, j} & touched and merged < config.merges_per_call:
                touched |= {i, j}
                merged += 1
                yield (i, j) if health[i] >= health[j] else (j, i)

    def agreed(self, moves: list[Move], device: torch.device) -> list[Move]:
        """The moves of the first rank on all of them, so that equal weights stay equal."""
        config = self.config
        if not config.ddp_broadcast:
            return moves
        most = config.merges_per_call + config.splits_per_call + config.resets_per_call
        rows = [[float(KINDS.index(kind)), *map(float, rest)] for kind, *rest in moves]
        received = parallel.from_first_rank(rows, most, len(Move._fields), device)
        return [Move(KINDS[int(row[0])], int(row[1]), int(row[2]), row[3]) for row in received]

    def share(self, mixture: SynapticMoE, parent: int, child: int) -> float:
        """What the winner keeps of itself."""
        if not self.config.use_util_weighting:
            return FIXED_SHARE
        winner, loser = (mixture.fatigue[expert].item() for expert in (parent, child))
        return winner / (winner + loser) if winner + loser > FEW else EVEN_SHARE

    def settle(self) -> None:
        """Read the decisions that were left on the device, so that ``lineage`` and ``moves`` have them too."""
        waiting, self.waiting = self.waiting, []
        for layer, step, decided in waiting:
            made = [(KINDS[kind - 1], parent, child) for kind, parent, child, _ in decided.tolist() if kind]
            self.moves += len(made)
            self.lineage += [(layer, *move, step) for move in made]

    def state_dict(self) -> dict[str, Any]:
        """When it acted last, how often, and on whom."""
        self.settle()
        return {"last_step": self.last_step, "moves": self.moves, "lineage": list(self.lineage)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.waiting, self.made = [], None
        self.last_step, self.moves = state["last_step"], state["moves"]
        self.lineage = [tuple(entry) for entry in state["lineage"]]


def take(kind: str, strong: list[int], weak: list[int], touched: set[int], most: int) -> list[Move]:
    """The strongest copied into the weakest, each expert in at most one move."""
    moves: list[Move] = []
    for parent in strong:
        child = next((e for e in weak if e not in touched and e != parent), None)
        if len(moves) < most and parent not in touched and child is not None:
            touched |= {parent, child}
            moves.append(Move(kind, parent, child))
    return moves


def health_of(mixture: SynapticMoE) -> Tensor:
    """Health of every expert, [E] in [0, 1]: rested and fed in profile P, used and fed in profile K."""
    if isinstance(mixture.synapses, TopKConfig):
        return (mixture.fatigue * mixture.energy).clamp(0, 1)
    return ((1 - mixture.fatigue) * (0.5 + 0.5 * mixture.energy)).clamp(0, 1)


def tensors_of(mixture: SynapticMoE) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the experts with a leading E, by name within their layer."""
    for linear in (mixture.inner, mixture.outer):
        yield from linear.named_parameters()
        yield from linear.named_buffers()


def absorb(mixture: SynapticMoE, winner: int, loser: int, share: float) -> None:
    """Let the winner take its share of the loser; enzymes nine to one. The genome is not touched."""
    for name, tensor in tensors_of(mixture):
        if name in MIXED:
            tensor[winner].mul_(share).add_((1 - share) * tensor[loser])
        elif name in ENZYMES:
            tensor[winner].mul_(ENZYME_SHARE).add_((1 - ENZYME_SHARE) * tensor[loser])
    router = mixture.router.weight
    router[winner].add_(router[loser]).mul_(0.5)


def clone(mixture: SynapticMoE, move: Move, config: StructureConfig, first: int) -> None:
    """Overwrite the child by a noisy copy of the parent with no fast state, rested and fed.

    Args:
        first: the seed of the first noisy tensor; the others follow, one after the other.
    """
    parent, child = move.parent, move.child
    emptied, halved = (
        ((*EMPTIED, *EMPTIED_K), HALVED_K) if isinstance(mixture.synapses, TopKConfig) else (EMPTIED, HALVED_P)
    )
    stream = first
    for name, tensor in tensors_of(mixture):
        tensor[child].copy_(tensor[parent])
        if name in NOISY:
            tensor[child].add_(config.noise_linear * normal(tensor[child], stream))
            stream += 1
        elif name in emptied:
            tensor[child].zero_()
        elif name in halved:
            tensor[child].mul_(0.5)
    router = mixture.router.weight
    router[child].copy_(router[parent]).add_(config.noise_router * normal(router[child], stream))
    place = mixture.embedding[parent]
    drawn = normal(place, stream + 1)
    tangent = drawn - (drawn @ place) * place
    mixture.embedding[child].copy_(functional.normalize(place + config.noise_embedding * tangent, dim=0))
    mixture.fatigue[child].zero_()
    mixture.energy[child].fill_(1.0)


def normal(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of the shape of ``like``; number n in row-major order is word n mod 4 of Philox block
    n div 4, int64."""
    block = torch.arange(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words = torch.stack(philox.randn4x(seed, block, dtype=like.dtype), 1)
    return words.flatten()[: like.numel()].view(like.shape)


def patch(mixture: SynapticMoE, move: Move, optimizers: list[torch.optim.Optimizer], config: StructureConfig) -> None:
    """The optimizers' state of what was overwritten: zero, or the parent's; of the router, whole or by row.

    Step counters are one for all experts of a tensor, so they stay; upstream, with a tensor per expert, zeroes them.
    """
    experts: list[nn.Parameter] = [*mixture.inner.parameters(), *mixture.outer.parameters()]
    for optimizer in optimizers:
        for parameter in experts:
            for _, entry in row_states(optimizer, parameter):
                if config.patch == "inherit":
                    entry[move.child].copy_(entry[move.parent])
                else:
                    entry[move.child].zero_()
        for _, entry in row_states(optimizer, mixture.router.weight):
            if config.patch == "inherit":
                entry[move.child].copy_(entry[move.parent])
            else:
                entry.zero_()


def row_states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an optimizer keeps for a parameter, of its shape."""
    for name, entry in optimizer.state.get(parameter, {}).items():
        if isinstance(entry, Tensor) and entry.shape == parameter.shape:
            yield name, entry
