"""A mixture of experts that tire: routing by token, genes and metabolism, and experts with synapses of their own.

The loop over experts and its reads are upstream's. Experts' tensors are stacked, so the loop takes rows of them; an
expert without a token has a gradient of zero, not none.

Shapes: N tokens (B times T), C width, E experts, k chosen of a token, Z features of the router's embedding.
Source: specification, section 5; by reading only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import genes as genetics
from .attention import Linear
from .config import BioConfig
from .genes import Phenotype
from .postsynaptic import Signals, SynapticLinear
from .postsynaptic_topk import TopKLinear
from .synapses import Synapses, TopKConfig

EXPERT_CALCIUM = 1.0


@dataclass(frozen=True)
class Routed:
    """What the metrics want to know of the last call, without gradients.

    Attributes:
        x, index, gates: inputs [N, C], experts [N, k] and their gates [N, k].
        count, mass: tokens and gates of each expert, added up, [E].
    """

    x: Tensor
    index: Tensor
    gates: Tensor
    count: Tensor
    mass: Tensor


def synaptic_linear(
    inputs: int, outputs: int, config: BioConfig, synapses: Synapses, *, device: torch.device, dtype: torch.dtype
) -> SynapticLinear | TopKLinear:
    """The linear layer of a profile, for all experts where there are some."""
    experts = config.experts
    if isinstance(synapses, TopKConfig):
        return TopKLinear(inputs, outputs, synapses, experts=experts, device=device, dtype=dtype)
    limit = config.hebbian_limit
    return SynapticLinear(inputs, outputs, synapses, experts=experts, limit=limit, device=device, dtype=dtype)


class SynapticMoE(nn.Module):
    """Router, experts, and what each expert has left."""

    def __init__(self, config: BioConfig, synapses: Synapses, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.synapses = synapses
        self.metabolic = synapses.enable_metabolism if isinstance(synapses, TopKConfig) else True
        wide = torch.promote_types(dtype, torch.float32)
        experts, hidden = config.experts, config.hidden_multiple * config.width
        self.router = Linear(config.width, experts, device=device, dtype=dtype)
        self.probe = Linear(config.width, synapses.router_embed_dim, device=device, dtype=dtype)
        self.inner = synaptic_linear(config.width, hidden, config, synapses, device=device, dtype=dtype)
        self.outer = synaptic_linear(hidden, config.width, config, synapses, device=device, dtype=dtype)
        self.genome = nn.Parameter(torch.zeros(experts, synapses.xi_dim, device=device, dtype=wide))
        self.register_buffer("fatigue", torch.zeros(experts, device=device, dtype=wide))
        self.register_buffer("energy", torch.ones(experts, device=device, dtype=wide))
        self.register_buffer("embedding", torch.zeros(experts, synapses.router_embed_dim, device=device, dtype=wide))
        self.fatigue: Tensor
        self.energy: Tensor
        self.embedding: Tensor
        self.last: Routed | None = None

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the chosen experts, and the balance loss (0-dim)."""
        x_NC = x_BTC.flatten(0, 1)
        logits_NE, genes = self.route(x_NC)
        top_Nk, index_Nk = logits_NE.topk(self.config.chosen, dim=-1)
        gates_Nk = torch.softmax(top_Nk, dim=-1)
        y_NC = self.dispatch(x_NC, index_Nk, gates_Nk, genes)
        count_E, mass_E = self.account(index_Nk, gates_Nk)
        tokens = len(x_NC)
        balance = self.config.experts * (mass_E / tokens * (count_E.to(mass_E.dtype) / tokens)).sum()
        if self.metabolic:
            self.metabolise(count_E, tokens, genes)
        self.arrange(mass_E.detach() / tokens)
        self.last = Routed(x_NC.detach(), index_Nk, gates_Nk.detach(), count_E, mass_E.detach())
        return y_NC.view(x_BTC.shape), balance

    def route(self, x_NC: Tensor) -> tuple[Tensor, Phenotype]:
        """The router's logits [N, E], and the genes that the experts live by."""
        genes = self.phenotype()
        return self.score(x_NC, genes), genes

    def phenotype(self) -> Phenotype:
        """The genes of every expert, decoded anew each call."""
        return genetics.decode(self.genome)

    def score(self, x_NC: Tensor, genes: Phenotype) -> Tensor:
        """The router's logits [N, E], in float32 or wider: router, genes, embedding and metabolism."""
        logits_NE: Tensor = self.router(x_NC).to(self.fatigue.dtype) + genetics.gene_bias(genes)
        mean_N1 = x_NC.mean(-1, keepdim=True, dtype=logits_NE.dtype)
        logits_NE = logits_NE + 0.02 * mean_N1 * (1 + self.embedding.norm(dim=-1))
        probe_NZ = functional.normalize(self.probe(x_NC).to(logits_NE.dtype), dim=-1)
        logits_NE = logits_NE + 0.02 * (probe_NZ @ functional.normalize(self.embedding, dim=-1).T)
        if self.metabolic:
            # Copies: both move before backward comes by.
            logits_NE = logits_NE + 0.1 * self.energy.clone() - 0.1 * self.fatigue.clone()
        return logits_NE

    def dispatch(self, x_NC: Tensor, index_Nk: Tensor, gates_Nk: Tensor, genes: Phenotype) -> Tensor:
        """The gated outputs of each token's experts added up, expert after expert."""
        y_NC = torch.zeros_like(x_NC)
        all_N = torch.arange(len(x_NC), device=x_NC.device)
        inner, outer = self.inner.rows(), self.outer.rows()
        genes = Phenotype(*(gene.detach() for gene in genes))
        for expert in range(self.config.experts):
            mask_Nk = index_Nk == expert
            chosen_N = mask_Nk.any(dim=-1)
            if not chosen_N.any():
                continue
            place_M = torch.nonzero(chosen_N).squeeze(-1)
            signals = Signals(EXPERT_CALCIUM, self.energy[expert], genes.camkii_gain[expert], genes.pp1_gain[expert])
            h_MH = self.inner.call(inner[expert], x_NC.index_select(0, place_M), signals)  # type: ignore[arg-type]
            out_MC = self.outer.call(outer[expert], h_MH.relu().square(), signals)  # type: ignore[arg-type]
            gate_M = gates_Nk.masked_select(mask_Nk)
            # Upstream reads four times for an expert, so the rows to add to are selected a second time.
            y_NC = y_NC.index_add(0, all_N.masked_select(chosen_N), out_MC * gate_M.unsqueeze(-1).to(out_MC.dtype))
        return y_NC

    def account(self, index_Nk: Tensor, gates_Nk: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each expert got [E], int64, and the gates they came with, summed [E]."""
        experts_E = torch.arange(self.config.experts, device=index_Nk.device)
        count_E = (index_Nk.unsqueeze(-1) == experts_E).sum((0, 1))
        zero_E = gates_Nk.new_zeros(self.config.experts)
        return count_E, zero_E.scatter_add(0, index_Nk.flatten(), gates_Nk.flatten())

    def metabolise(self, count_E: Tensor, tokens: int, genes: Phenotype) -> None:
        """Fatigue and energy after a call."""
        genetics.metabolise(self.fatigue, self.energy, count_E, tokens, genes)

    @torch.no_grad()
    def arrange(self, share_E: Tensor) -> None:
        """Move the router's embeddings after a call in which each expert had this share of the gates. Section 5.3.

        The first term is zero everywhere, as upstream has it: its factors never stand in the same place.
        """
        own_EE = self.embedding.new_zeros(self.config.experts, self.config.experts)
        for expert in range(self.config.experts):
            own_EE[expert, expert] = share_E[expert]
        self.move_embedding(own_EE)

    def move_embedding(self, own_EE: Tensor) -> None:
        """One step by the shares on the diagonal of ``own_EE``."""
        similar_EE = self.embedding @ self.embedding.T
        push = self.synapses.router_contrastive_push
        pull_EE = own_EE * (similar_EE - 1) - (1 - own_EE) * (similar_EE + 0.3) * push
        pull_EE = pull_EE - pull_EE.mean()
        moved_EZ = self.embedding - self.synapses.router_contrastive_lr * (pull_EE @ self.embedding)
        self.embedding.copy_(functional.normalize(moved_EZ, dim=-1))
