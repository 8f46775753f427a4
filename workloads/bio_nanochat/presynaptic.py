"""The presynaptic organ of profile P: rule R1, one step of the synapses' state per call, dense and by key.

Every key owns a synapse. Queries drive calcium into it; calcium, priming and clamp decide how likely it releases; what
all queries together would release is scaled to what its pool holds; what was released biases attention. A synapse
hears all queries of the sequence, also those after the one that is biased: the rule looks ahead.

Cast order: everything is in the dtype of q, as upstream leaves it to its activations.

Shapes: B batch, H heads, Q queries and K keys (both T tokens), D head size; state is by key, [B, H, K].
Source: specification, sections 2.1 and 2.3.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .noise import Noise
from .synapses import Synapses, SynapticConfig

Dock = Literal["qk", "upstream"]
DRIVE_LIMIT = 20.0
ENERGY_LIMIT = 1.6
ROWS, ENTRIES = 0, 1
"""Streams of the noise: which rows are perturbed, and by how much each of their entries."""


class State(NamedTuple):
    """The synapses of one call, [B, H, K] each; upstream's keys are C, BUF, RRP, RES, PR, CL and E."""

    calcium: Tensor
    buffer: Tensor
    pool: Tensor
    reserve: Tensor
    primed: Tensor
    clamp: Tensor
    energy: Tensor

    @classmethod
    def initial(cls, q_BHQD: Tensor, config: Synapses) -> State:
        """What the first layer starts from. Specification, section 2.1."""
        shape = q_BHQD.shape[:3]
        values = (0.0, 0.0, 0.8, 0.2, 0.6, config.complexin_bias, 0.8)
        return cls(*(q_BHQD.new_full(shape, value) for value in values))


class Rested(NamedTuple):
    """The state between two releases: pools recovered, calcium risen, nothing used yet."""

    calcium: Tensor
    buffer: Tensor
    pool: Tensor
    reserve: Tensor
    primed: Tensor
    energy: Tensor


def scores(q_BHQD: Tensor, k_BHKD: Tensor) -> Tensor:
    """q k^T over the root of D, unmasked, [B, H, Q, K]."""
    product_BHQK: Tensor = (q_BHQD @ k_BHKD.transpose(-2, -1)) * q_BHQD.shape[-1] ** -0.5
    return product_BHQK


def causal_mask(tokens: int, like: Tensor) -> Tensor:
    """Which query sees which key, bool [Q, K]."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).tril()


def rest(state: State, influx: Tensor, config: Synapses) -> Rested:
    """Steps 2 to 4: calcium with its buffer, then recovery of priming, pool, reserve and energy."""
    bound = config.alpha_buf_on * state.calcium * (1 - state.buffer)
    freed = config.alpha_buf_off * state.buffer
    calcium = math.exp(-1 / config.tau_c) * state.calcium + config.alpha_ca * influx - bound + freed
    primed = math.exp(-1 / config.tau_prime) * state.primed + config.alpha_prime * (1 - state.primed)
    pool = math.exp(-1 / config.tau_rrp) * state.pool + config.alpha_refill * state.reserve
    energy = math.exp(-1 / config.tau_energy) * state.energy + config.energy_in
    return Rested(
        calcium=calcium.clamp(min=0),
        buffer=(math.exp(-1 / config.tau_buf) * state.buffer + bound - freed).clamp(0, 1),
        pool=pool.clamp(0, 1),
        reserve=(state.reserve * (1 - config.alpha_refill)).clamp(0, 1),
        primed=primed.clamp(0, 1),
        energy=energy.clamp(0, ENERGY_LIMIT),
    )


def fire(rested: Rested, clamp: Tensor, config: Synapses) -> Tensor:
    """Probability of release before docking: fast and slow calcium sensor, priming and clamp. Steps 6 and 7."""
    calcium = rested.calcium
    sensor = 0.7 * calcium / (calcium + config.syt_fast_kd) + 0.3 * calcium / (calcium + config.syt_slow_kd)
    return torch.sigmoid(3 * sensor + 2 * rested.primed - 2 * (clamp + config.complexin_bias))


def settle(rested: Rested, clamp: Tensor, used: Tensor, config: Synapses) -> State:
    """The state after ``used`` was released. Step 10."""
    reserve = (rested.reserve + used).clamp(0, 1)
    spent = config.energy_cost_rel * used + config.energy_cost_pump * (1 - reserve)
    return State(
        calcium=rested.calcium,
        buffer=rested.buffer,
        pool=(rested.pool - used).clamp(0, 1),
        reserve=reserve,
        primed=(rested.primed - config.alpha_unprime * used).clamp(0, 1),
        clamp=clamp,
        energy=(rested.energy - spent).clamp(0, ENERGY_LIMIT),
    )


def amplitude(state: State, config: Synapses) -> Tensor:
    """How much a released vesicle counts, by the energy that is left. Step 11."""
    return config.qmax * torch.sigmoid(config.q_beta * (state.energy - 0.5))


def docking(q_BHQD: Tensor, k_BHKD: Tensor, scores_BHQK: Tensor, dock: Dock) -> Tensor:
    """How well query and key dock, sigma of their product; "upstream" takes them transposed. Step 5.

    Upstream multiplies position i's key with position j's query, by a product [B, H, Q, K, D] that is then reduced.
    """
    if dock == "qk":
        return torch.sigmoid(scores_BHQK)
    product = k_BHKD.unsqueeze(3) * q_BHQD.unsqueeze(2)
    return torch.sigmoid(product.sum(-1) * q_BHQD.shape[-1] ** -0.5)


def perturb(raw_BHQK: Tensor, visible_QK: Tensor, noise: Noise, config: SynapticConfig) -> Tensor:
    """Noise on the release of some rows, drawn anew each call. Step 8.

    Entries that their query does not see stay zero; upstream perturbs them too, and so depletes pools by queries that
    come before the key.
    """
    drawn_BHQ = noise.uniform(tuple(raw_BHQK.shape[:3]), ROWS, raw_BHQK) < config.stochastic_train_frac
    uniform_BHQK = noise.uniform(tuple(raw_BHQK.shape), ENTRIES, raw_BHQK)
    moved_BHQK = raw_BHQK + (uniform_BHQK.to(raw_BHQK.dtype) - 0.5) / max(1, config.stochastic_quanta)
    return torch.where(drawn_BHQ.unsqueeze(-1) & visible_QK, moved_BHQK.clamp(0, 1), raw_BHQK)


def release(
    q_BHQD: Tensor, k_BHKD: Tensor, state: State, config: SynapticConfig, *, dock: Dock, noise: Noise | None
) -> tuple[Tensor, Tensor, State, Tensor]:
    """Rule R1: what attention's logits gain, and the synapses after.

    Args:
        noise: what stochastic release draws from, None for a deterministic one.

    Returns:
        Masked logits and bias [B, H, Q, K], the new state, and what was released by key [B, H, K].
    """
    tokens = q_BHQD.shape[2]
    scores_BHQK = scores(q_BHQD, k_BHKD)
    visible_QK = causal_mask(tokens, q_BHQD)
    logits_BHQK = scores_BHQK.masked_fill(~visible_QK, float("-inf"))
    drive_BHQK = functional.softplus(logits_BHQK.clamp(-DRIVE_LIMIT, DRIVE_LIMIT)) * visible_QK
    place_T = torch.arange(tokens, device=q_BHQD.device)
    seen_K = (tokens - place_T).to(q_BHQD.dtype)
    rested = rest(state, drive_BHQK.sum(2) / seen_K, config)
    fire_BHK = fire(rested, state.clamp, config)
    probability_BHQK = fire_BHK.unsqueeze(2) * docking(q_BHQD, k_BHKD, scores_BHQK, dock) * visible_QK
    raw_BHQK = (probability_BHQK * rested.pool.unsqueeze(2)).clamp(0, 1)
    if noise is not None and config.stochastic_train_frac > 0:
        raw_BHQK = perturb(raw_BHQK, visible_QK, noise, config)
    share_BHK = (rested.pool / raw_BHQK.sum(2).clamp(min=config.epsilon)).clamp(max=1)
    released_BHQK = raw_BHQK * share_BHK.unsqueeze(2)
    used_BHK = released_BHQK.sum(2)
    after = settle(rested, state.clamp, used_BHK, config)
    amplitude_BHK = amplitude(after, config).clamp(min=config.epsilon)
    distance_QK = (place_T[:, None] - place_T[None, :]).abs().to(q_BHQD.dtype)
    barrier_QK = distance_QK * (config.barrier_strength / max(1, tokens))
    bias_BHQK = torch.log(released_BHQK * amplitude_BHK.unsqueeze(2) + config.epsilon) - barrier_QK
    return logits_BHQK, bias_BHQK, after, used_BHK
