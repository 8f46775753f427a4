"""NeuroScore: what each expert contributes, at what cost, how steadily, and how special its tokens are.

The unswapped score lives on the CPU and brings indices, gates and energy there in every step and layer, as upstream.

Where upstream inverts the meaning of a score, guards stand: an expert without a sampled token keeps its
specialisation, and one without a token is not made more resilient by contributing nothing.

Shapes: N tokens, C width, E experts, k chosen of a token.
Source: specification, section 6; by reading only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import asynclog
from .asynclog import AsyncLog
from .moe import Routed, SynapticMoE

DECAY = 0.99
SAMPLE_EVERY = 100
SAMPLED_SHARE = 10
"""Every tenth token is looked at for specialisation."""
SMALL = 1e-6
TOP = 5
NAMES = ("contribution", "frequency", "specialisation", "efficiency", "resilience", "earlier")


class NeuroScore:
    """Scores of one mixture of experts, [E] each in float32 or wider, and what was logged of them."""

    def __init__(self, experts: int, *, every: int, dtype: torch.dtype, tag: str = "experts") -> None:
        self.every = every
        self.tag = tag
        self.board = asynclog.writer()
        self.log: AsyncLog | None = None
        self.steps = 0
        self.contribution = torch.zeros(experts, dtype=dtype)
        self.frequency = torch.zeros(experts, dtype=dtype)
        self.specialisation = torch.zeros(experts, dtype=dtype)
        self.efficiency = torch.zeros(experts, dtype=dtype)
        self.resilience = torch.zeros(experts, dtype=dtype)
        self.earlier = torch.zeros(experts, dtype=dtype)
        self.log_entries: list[dict[str, Any]] = []

    def vectors(self) -> tuple[Tensor, ...]:
        """All scores, in the order of ``NAMES``."""
        return tuple(getattr(self, name) for name in NAMES)

    def move_to(self, device: torch.device) -> None:
        """Keep the scores there from now on, if they are not there already."""
        if self.contribution.device != device:
            for name in NAMES:
                setattr(self, name, getattr(self, name).to(device))

    def observe(self, mixture: SynapticMoE) -> None:
        """Follow the last call of ``mixture``."""
        if mixture.last is None:
            return
        self.move_to(torch.device("cpu"))
        index_Nk, gates_Nk = mixture.last.index.cpu(), mixture.last.gates.cpu()
        energy_E = mixture.energy.cpu()
        self.follow(index_Nk, gates_Nk.to(self.contribution.dtype), energy_E)

    def count(self, mixture: SynapticMoE) -> None:
        """Count a step that was observed, and log it if it is time for that."""
        if mixture.last is None:
            return
        self.steps += 1
        if self.steps % self.every == 0:
            self.report(mixture.last)

    def report(self, routed: Routed) -> None:
        """Look at the tokens too, and log all scores."""
        self.sample(routed)
        self.write(self.tag, summary(self.steps, torch.stack(self.vectors())))

    def write(self, tag: str, entry: dict[str, Any]) -> None:
        """Keep a summary, and write it where the environment asks for that."""
        self.log_entries.append(entry)
        if self.board is not None:
            self.board(tag, entry)

    def log_later(self, scores_VE: Tensor) -> None:
        """Write a summary of these scores as soon as they are on the host; a thread waits for that."""
        if self.log is None:
            self.log = AsyncLog(summary, self.write)
        self.log.put(self.tag, self.steps, scores_VE)

    def follow(self, index_Nk: Tensor, gates_Nk: Tensor, energy_E: Tensor) -> None:
        """Move contribution, frequency, efficiency and resilience; all on the CPU."""
        tokens, experts = len(index_Nk), len(self.contribution)
        count_E = torch.bincount(index_Nk.flatten(), minlength=experts).to(gates_Nk.dtype)
        mass_E = torch.bincount(index_Nk.flatten(), weights=gates_Nk.flatten(), minlength=experts).to(gates_Nk.dtype)
        self.contribution.mul_(DECAY).add_((1 - DECAY) / tokens * mass_E)
        self.frequency.mul_(DECAY).add_((1 - DECAY) / tokens * count_E)
        self.efficiency.copy_(self.contribution / (energy_E + SMALL))
        steadiness_E = 1 / ((self.contribution - self.earlier).abs() + SMALL)
        alive_E = self.contribution > SMALL
        moved_E = DECAY * self.resilience + (1 - DECAY) * steadiness_E
        self.resilience.copy_(torch.where(alive_E, moved_E, self.resilience))
        self.earlier.copy_(self.contribution)

    def sample(self, routed: Routed) -> None:
        """How far the mean token of each expert points away from the mean of all, over a tenth of the tokens."""
        x_MC = routed.x[::SAMPLED_SHARE].to(self.specialisation.dtype)
        index_Mk = routed.index[::SAMPLED_SHARE]
        mean_C = x_MC.mean(0)
        found = []
        for expert in range(len(self.specialisation)):
            mask_M = (index_Mk == expert).any(dim=-1)
            if mask_M.any():
                own_C = x_MC[mask_M].mean(0)
                found.append(1 - torch.cosine_similarity(own_C, mean_C, dim=0))
            else:
                found.append(self.specialisation[expert].to(x_MC.device))
        self.specialisation.copy_(torch.stack(found).cpu())

    def state_dict(self) -> dict[str, Any]:
        """All scores and the count of steps."""
        return {"steps": self.steps, **dict(zip(NAMES, self.vectors(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.steps = state["steps"]
        for name in NAMES:
            getattr(self, name).copy_(state[name])


def summary(step: int, scores_VE: Tensor) -> dict[str, Any]:
    """What a log shows of all scores, on the host: Gini of the frequencies, means, histograms, and the best experts."""
    vectors = dict(zip(NAMES[:-1], scores_VE.double(), strict=False))
    best = vectors["efficiency"].argsort(descending=True)[:TOP]
    return {
        "step": step,
        "gini": gini(vectors["frequency"]),
        **{f"mean {name}": float(values.mean()) for name, values in vectors.items()},
        "histograms": {name: values.tolist() for name, values in vectors.items()},
        "best": [(int(expert), *(float(values[expert]) for values in vectors.values())) for expert in best],
    }


def gini(values_E: Tensor) -> float:
    """0 where all are equal, near 1 where one has all; 0 where all are zero."""
    ordered = values_E.sort().values
    total = float(ordered.sum())
    if total <= 0:
        return 0.0
    rank = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
    return float((2 * rank - len(ordered) - 1).mul(ordered).sum()) / (len(ordered) * total)
