"""Phase 0: the same training with nothing read from the device: experts in groups, guards as selections, counts drawn
densely, and a loss that stays where it is until it is asked for.

Shapes: N tokens, C width, E experts, k chosen of a token, M = N k rows in the order of experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import topk
from .genes import Phenotype
from .grouping import Groups, grouped_product
from .moe import EXPERT_CALCIUM, SynapticMoE
from .noise import Noise
from .postsynaptic import Plastic, Signals, SynapticLinear, bounded, effective, move_enzymes
from .postsynaptic_topk import MEAN_LIMIT, TRACE_RATE, TopKLinear, TopKPlastic, hebbian_change
from .postsynaptic_topk import move_enzymes as move_enzymes_topk
from .synapses import TopKConfig
from .training import LOSSES_KEPT, Training

FOLLOWED = ("trace_in", "trace_out", "camkii", "pp1", "bdnf", "accumulated")
"""State of profile K that moves with every call, small beside the weights."""


def step(self: Training, index: int) -> Tensor:
    """``Training.step`` that leaves the loss on the device until somebody asks, and never waits."""
    self.seed_noise(index)
    loss = self.advance(*self.batch(index))
    self.waiting_losses[index % LOSSES_KEPT].copy_(loss)
    self.recent.append((index, None))
    self.after_step()
    return loss


def clip_gradients(self: Training) -> Tensor:
    """``Training.clip_gradients`` that leaves the norm on the device."""
    return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)


def dispatch(self: SynapticMoE, x_NC: Tensor, index_Nk: Tensor, gates_Nk: Tensor, genes: Phenotype) -> Tensor:
    """``SynapticMoE.dispatch`` for all experts at once, on tokens in the order of experts."""
    groups = Groups.of(index_Nk, self.config.experts)
    signals = Signals(EXPERT_CALCIUM, self.energy, genes.camkii_gain.detach(), genes.pp1_gain.detach())
    h_MH = call(self.inner, groups.sorted_rows(x_NC), groups, signals)
    y_MC = call(self.outer, h_MH.relu().square(), groups, signals)
    return (groups.by_token(y_MC) * gates_Nk.unsqueeze(-1).to(y_MC.dtype)).sum(1)


def call(linear: SynapticLinear | TopKLinear, x_MI: Tensor, groups: Groups, signals: Signals) -> Tensor:
    """A layer of all experts on rows in their order, with its consolidation; experts without a row keep every bit."""
    if isinstance(linear, SynapticLinear):
        return call_synaptic(linear, x_MI, groups, signals)
    return call_topk(linear, x_MI, groups, signals)


def call_synaptic(linear: SynapticLinear, x_MI: Tensor, groups: Groups, signals: Signals) -> Tensor:
    """Profile P: ``SynapticLinear.call`` of every expert."""
    plastic = linear.plastic()
    y_MO = grouped_product(x_MI, effective(plastic).to(x_MI.dtype), groups)
    y_MO = y_MO + groups.one_hot(x_MI.dtype) @ plastic.bias.to(x_MI.dtype)
    with torch.no_grad():
        wide = plastic.hebbian.dtype
        consolidate(linear, plastic, groups.means(x_MI, wide), groups.means(y_MO, wide), signals, groups.count > 0)
    return y_MO


@torch.no_grad()
def consolidate(
    linear: SynapticLinear, plastic: Plastic, mean_EI: Tensor, mean_EO: Tensor, signals: Signals, used_E: Tensor
) -> None:
    """``SynapticLinear.consolidate`` of the used experts: the others decay by one and move by zero."""
    config, wide = linear.config, mean_EI.dtype
    take_E11 = used_E.to(wide).view(-1, 1, 1)
    decay_E11 = torch.full_like(take_E11, config.rho_elig).masked_fill(take_E11 == 0, 1.0)
    plastic.trace_in.mul_(decay_E11).add_(config.eta_elig * take_E11 * mean_EI.unsqueeze(2))
    plastic.trace_out.mul_(decay_E11).add_(config.eta_elig * take_E11 * mean_EO.unsqueeze(1))
    rate_E11 = config.eta_fast * take_E11 * bounded(plastic, linear.limit)
    plastic.hebbian.mul_(decay_E11).baddbmm_(rate_E11 * plastic.trace_in, plastic.trace_out)
    enzymes = plastic._replace(camkii=plastic.camkii.clone(), pp1=plastic.pp1.clone(), gate=plastic.gate.clone())
    move_enzymes(enzymes, by_expert(signals))
    for now, moved in ((plastic.camkii, enzymes.camkii), (plastic.pp1, enzymes.pp1), (plastic.gate, enzymes.gate)):
        keep(now, moved, used_E)


def by_expert(signals: Signals) -> Signals:
    """Signals as columns [E, 1], to go with what every expert has one or a row of."""
    return Signals(*(value.reshape(-1, 1) if isinstance(value, Tensor) else value for value in signals))


def keep(state: Tensor, new: Tensor, ok_E: Tensor) -> None:
    """Write ``new`` into ``state`` for the experts that are ``ok``."""
    state.copy_(torch.where(ok_E.view(-1, *[1] * (state.dim() - 1)), new, state))


def call_topk(linear: TopKLinear, x_MI: Tensor, groups: Groups, signals: Signals) -> Tensor:
    """Profile K: ``TopKLinear.call`` of every expert."""
    plastic = linear.plastic()
    one_hot_ME = groups.one_hot(x_MI.dtype)
    drive = signals.calcium * signals.energy
    drive_E = drive.clamp(0, 1) if isinstance(drive, Tensor) else torch.full_like(plastic.bias[:, 0], drive)
    drive_M1 = one_hot_ME @ drive_E.to(x_MI.dtype).unsqueeze(-1)
    slow, fast, bias = (weight.to(x_MI.dtype) for weight in (plastic.slow, plastic.fast, plastic.bias))
    y_MO = grouped_product(x_MI, slow, groups) + grouped_product(x_MI, fast, groups) * drive_M1 + one_hot_ME @ bias
    if not linear.config.enable_hebbian:
        return y_MO
    gain_EO = (1 + plastic.fast_gain + plastic.slow_gain).to(x_MI.dtype)
    low_rank = (plastic.gain_in @ plastic.gain_out).to(x_MI.dtype)
    y_MO = y_MO * (one_hot_ME @ gain_EO) + grouped_product(y_MO, low_rank, groups)
    if not torch.is_grad_enabled():
        wide = plastic.slow.dtype
        seen = Seen(groups.means(x_MI, wide), groups.means(y_MO, wide), groups.means(y_MO.abs(), wide))
        learn_all(linear, plastic, seen, signals, groups.count > 0)
    return y_MO


class Seen(NamedTuple):
    """Mean inputs [E, I], mean outputs and mean absolute outputs [E, O] of a call."""

    x: Tensor
    y: Tensor
    size: Tensor


def learn(self: TopKLinear, plastic: TopKPlastic, x: Tensor, y: Tensor, signals: Signals) -> None:
    """``TopKLinear.learn`` with its guards as selections, and the logged value left on the device."""
    wide = plastic.slow.dtype
    x_EI, y_EO, size_EO = (value.flatten(0, -2).mean(0, dtype=wide).unsqueeze(0) for value in (x, y, y.abs()))
    one = TopKPlastic(*(entry.unsqueeze(0) for entry in plastic))
    learn_all(self, one, Seen(x_EI, y_EO, size_EO), signals, torch.ones_like(x_EI[:, 0], dtype=torch.bool))


def learn_all(linear: TopKLinear, plastic: TopKPlastic, seen: Seen, signals: Signals, used_E: Tensor) -> None:
    """The online update of every expert that was used and whose figures are numbers; in place."""
    config = linear.config
    ok_E = used_E & ~torch.isnan(seen.x.sum(1) + seen.y.sum(1))
    moved = plastic._replace(**{name: getattr(plastic, name).clone() for name in FOLLOWED})
    moved.trace_in.mul_(config.post_trace_decay).add_(TRACE_RATE * seen.x.unsqueeze(2))
    moved.trace_out.mul_(config.post_trace_decay).add_(TRACE_RATE * seen.y.unsqueeze(1))
    move_enzymes_topk(moved, seen.size.clamp(0, MEAN_LIMIT), by_expert(signals), config)
    moved.accumulated.masked_fill_(torch.isnan(moved.accumulated).any(1, keepdim=True), 0.0)
    change = hebbian_change(moved, config)
    for name in FOLLOWED:
        keep(getattr(plastic, name), getattr(moved, name), ok_E)
    ok_E = ok_E & torch.isfinite(change.weight).flatten(1).all(1)
    ok_E11 = ok_E.view(-1, 1, 1)
    fast_decay_E11 = torch.full_like(ok_E11, config.post_fast_decay, dtype=plastic.fast.dtype).masked_fill(~ok_E11, 1.0)
    weight = change.weight.masked_fill(~ok_E11, 0.0)
    plastic.fast.mul_(fast_decay_E11).add_(config.post_fast_lr * weight)
    plastic.slow.add_(config.post_slow_lr * weight)
    keep(plastic.fast_gain, plastic.fast_gain * config.post_fast_decay + config.post_fast_lr * change.gain, ok_E)
    keep(plastic.last_change, weight.flatten(1).norm(dim=1, keepdim=True), ok_E)
    keep(plastic.slow_gain, plastic.slow_gain + change.slow_gain, ok_E & torch.isfinite(change.slow_gain).all(1))


@torch.no_grad()
def arrange(self: SynapticMoE, share_E: Tensor) -> None:
    """``SynapticMoE.arrange`` with the diagonal written at once, in place of one by one."""
    self.move_embedding(torch.diag_embed(share_E.to(self.embedding.dtype)))


def draw_counts(edges: topk.Edges, config: TopKConfig, noise: Noise) -> Tensor:
    """``topk.draw_counts`` for every edge, of which the drawn rows are taken."""
    drawn_BHQ = topk.drawn_rows(edges, config, noise)
    trials = topk.trial_noise(edges.expected, config, noise)
    counts_BHQN = topk.sample_counts(edges.probability, edges.pool, trials, config).to(edges.expected.dtype)
    return torch.where(drawn_BHQ.unsqueeze(-1), counts_BHQN * edges.valid, edges.expected)
