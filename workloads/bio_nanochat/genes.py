"""From genome to phenotype: the four rates that an expert's genes stand for, and the metabolism they govern.

Shapes: E experts, N tokens.
Source: specification, section 5.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Phenotype(NamedTuple):
    """What the genome [E, 4] is decoded to, [E] each."""

    fatigue_rate: Tensor
    energy_rate: Tensor
    camkii_gain: Tensor
    pp1_gain: Tensor


def decode(genome_EX: Tensor) -> Phenotype:
    """The phenotype of every expert, differentiable."""
    xi = genome_EX.unbind(-1)
    return Phenotype(
        fatigue_rate=0.01 * (2 * torch.sigmoid(xi[0]) + 0.1),
        energy_rate=0.005 * (2 * torch.sigmoid(xi[1]) + 0.1),
        camkii_gain=functional.softplus(xi[2] + 1),
        pp1_gain=functional.softplus(xi[3] + 0.5),
    )


def gene_bias(genes: Phenotype) -> Tensor:
    """What the router's logits gain by the genes, [E]: the only way of the loss to the genome."""
    return 0.05 * (genes.energy_rate - genes.fatigue_rate)


@torch.no_grad()
def metabolise(fatigue_E: Tensor, energy_E: Tensor, count_E: Tensor, tokens: int, genes: Phenotype) -> None:
    """Move fatigue towards each expert's share of ``tokens``, energy towards what it leaves; in place."""
    utilisation_E = count_E.clamp(min=1).to(fatigue_E.dtype) / tokens
    fatigue_E.copy_((1 - genes.fatigue_rate) * fatigue_E + genes.fatigue_rate * utilisation_E)
    energy_E.copy_((1 - genes.energy_rate) * energy_E + genes.energy_rate * (1 - utilisation_E))
