"""The presynaptic organ of profile K: rule R4, release at the top-k keys of each query, scattered to the keys' state.

Shapes: B batch, H heads, Q queries, K keys, N chosen keys of a query (edges); state is by key, [B, H, K].
Source: specification, section 2.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .noise import Noise
from .synapses import TopKConfig

AMPLITUDE_REST, AMPLITUDE_LIMIT, POOL_LIMIT = 1.2, 2.0, 30.0
DRAWN, TRIALS = 0, 1
"""Streams of the noise: which rows are stochastic, and their trials."""


class EdgeState(NamedTuple):
    """The synapses of one layer, [B, H, K] each, with vesicles in flight for ``delay`` calls."""

    calcium: Tensor
    buffer: Tensor
    pool: Tensor
    reserve: Tensor
    primed: Tensor
    clamp: Tensor
    energy: Tensor
    amplitude: Tensor
    delay: tuple[Tensor, ...]

    @classmethod
    def initial(cls, like_BHKD: Tensor, config: TopKConfig) -> EdgeState:
        """A layer's synapses before the first call."""
        shape = like_BHKD.shape[:3]
        values = (
            0.0, 0.0, config.init_rrp, config.init_reserve, config.init_snare, config.init_clamp, config.init_energy,
            config.init_amp,
        )  # fmt: skip
        delay = tuple(like_BHKD.new_zeros(shape) for _ in range(config.endo_delay))
        calcium, buffer, pool, reserve, primed, clamp, energy, amplitude = (
            like_BHKD.new_full(shape, value) for value in values
        )
        return cls(calcium, buffer, pool, reserve, primed, clamp, energy, amplitude, delay)


def release(
    drive_BHQN: Tensor,
    index_BHQN: Tensor,
    state: EdgeState,
    mean: Tensor,
    config: TopKConfig,
    noise: Noise | None,
) -> tuple[Tensor, EdgeState]:
    """Steps 2 to 8: what each edge releases over its running mean, and the synapses after.

    Args:
        drive_BHQN: logits of the chosen keys, -inf where a query has fewer.
        index_BHQN: the chosen keys, int64.
        mean: buffer of one element, the running mean of what was released; updated in place, in evaluation too.
        noise: None for deterministic release.
    """
    valid_BHQN = torch.isfinite(drive_BHQN)
    drive_BHQN = drive_BHQN.masked_fill(~valid_BHQN, 0.0)
    probability_BHQN = release_probability(drive_BHQN, index_BHQN, state, config)
    pool_BHQN = at_edges(state.pool, index_BHQN)
    released_BHQN = probability_BHQN * pool_BHQN * valid_BHQN
    if noise is not None and config.stochastic_train_frac > 0:
        edges = Edges(released_BHQN, probability_BHQN, pool_BHQN, valid_BHQN)
        released_BHQN = draw_counts(edges, config, noise)
    edge_BHQN = released_BHQN * at_edges(state.amplitude, index_BHQN)
    after = settle(drive_BHQN, index_BHQN, released_BHQN, valid_BHQN, state, config)
    with torch.no_grad():
        mean.mul_(0.99).add_(0.01 * edge_BHQN.abs().mean().clamp(min=1e-3).to(mean.dtype))
    return edge_BHQN / (mean.to(edge_BHQN.dtype) + 1e-6), after


def at_edges(state_BHK: Tensor, index_BHQN: Tensor) -> Tensor:
    """The state of the chosen keys, [B, H, Q, N]."""
    return state_BHK.gather(2, index_BHQN.flatten(2)).view(index_BHQN.shape)


def release_probability(drive_BHQN: Tensor, index_BHQN: Tensor, state: EdgeState, config: TopKConfig) -> Tensor:
    """Steps 2 to 4: calcium at the edge, through three sensors and the clamp."""
    calcium = config.tau_c * at_edges(state.calcium, index_BHQN) + config.alpha_c * functional.softplus(drive_BHQN)
    sensed = (
        0.8 * torch.sigmoid(config.syt1_slope * (calcium - 0.55))
        + 0.2 * torch.sigmoid(config.syt7_slope * (calcium - 0.25))
        + config.doc2_gain * torch.sigmoid(4 * (calcium - 0.12))
    )
    clamped = 2 * (at_edges(state.clamp, index_BHQN) + config.complexin_bias)
    opened = torch.sigmoid(8 * (calcium - config.cpx_thresh) - clamped)
    return (sensed * opened * at_edges(state.primed, index_BHQN)).clamp(0, 0.999)


class Edges(NamedTuple):
    """The chosen edges of all queries, [B, H, Q, N] each: what they release on average, with which probability from how
    many vesicles, and whether there is such a key."""

    expected: Tensor
    probability: Tensor
    pool: Tensor
    valid: Tensor


def draw_counts(edges: Edges, config: TopKConfig, noise: Noise) -> Tensor:
    """Step 5: vesicle counts instead of their expectation on rows drawn at random; it reads the device."""
    drawn_BHQ = drawn_rows(edges, config, noise)
    if not drawn_BHQ.any():
        return edges.expected
    drawn_BHQN = drawn_BHQ.unsqueeze(-1).expand_as(edges.expected)
    probability, pool = edges.probability[drawn_BHQN], edges.pool[drawn_BHQN]
    # Counted numbers belong to their edges; others are drawn for the edges that want one.
    if noise.counted:
        trials = trial_noise(edges.expected, config, noise)[drawn_BHQN]
    else:
        trials = trial_noise(probability, config, noise)
    counts = sample_counts(probability, pool, trials, config)
    released_BHQN = edges.expected.clone()
    released_BHQN[drawn_BHQN] = counts.to(released_BHQN.dtype)
    return released_BHQN * edges.valid


def drawn_rows(edges: Edges, config: TopKConfig, noise: Noise) -> Tensor:
    """Which queries release counts, [B, H, Q]."""
    shape = tuple(edges.expected.shape[:3])
    return noise.uniform(shape, DRAWN, edges.expected) < config.stochastic_train_frac


def trial_noise(like_BHQN: Tensor, config: TopKConfig, noise: Noise) -> Tensor:
    """The random numbers of every edge: one normal, or a uniform for each trial in a last dimension."""
    if config.stochastic_mode == "normal_reparam":
        return noise.normal(tuple(like_BHQN.shape), TRIALS, like_BHQN)
    return noise.uniform((*like_BHQN.shape, config.stochastic_count_cap), TRIALS, like_BHQN)


def sample_counts(probability: Tensor, pool: Tensor, noise: Tensor, config: TopKConfig) -> Tensor:
    """Counts of released vesicles, differentiable in the probability.

    Args:
        probability, pool: of any one shape.
        noise: numbers of :func:`trial_noise` for them.
    """
    cap = config.stochastic_count_cap
    vesicles = pool.clamp(0, cap).round()
    p = probability.clamp(1e-6, 1 - 1e-6)
    noise = noise.to(p.dtype)
    if config.stochastic_mode == "normal_reparam":
        spread = (vesicles * p * (1 - p) + 1e-6).sqrt()
        return torch.minimum((vesicles * p + spread * noise).clamp(min=0), vesicles)
    trial_C = torch.arange(cap, device=p.device)
    held = trial_C < vesicles.unsqueeze(-1)
    if config.stochastic_mode == "straight_through":
        p_C = p.unsqueeze(-1).expand_as(noise)
        hard = (noise < p_C).to(p.dtype)
        return ((hard - p_C.detach() + p_C) * held).sum(-1)
    uniform = noise.clamp(1e-6, 1 - 1e-6)
    logit = (torch.logit(p).unsqueeze(-1) + uniform.log() - torch.log1p(-uniform)) / config.stochastic_tau
    soft = torch.sigmoid(logit)
    hard = (soft > 0.5).to(p.dtype)
    return ((hard - soft.detach() + soft) * held).sum(-1)


def settle(
    drive_BHQN: Tensor,
    index_BHQN: Tensor,
    released_BHQN: Tensor,
    valid_BHQN: Tensor,
    state: EdgeState,
    config: TopKConfig,
) -> EdgeState:
    """Steps 6 and 7: what the edges released and were driven by, summed at their keys, and the new state."""
    index_BHE = index_BHQN.flatten(2)

    def at_keys(edges_BHQN: Tensor) -> Tensor:
        return torch.zeros_like(state.pool).scatter_add(2, index_BHE, edges_BHQN.flatten(2).to(state.pool.dtype))

    released = at_keys(released_BHQN)
    driven = at_keys(drive_BHQN * valid_BHQN)
    reached = at_keys(valid_BHQN.to(drive_BHQN.dtype)) > 0
    calcium = config.tau_c * state.calcium + config.alpha_c * functional.softplus(driven) * reached
    pool = (state.pool - released).clamp(min=0)
    reserve, delay = state.reserve, state.delay
    if delay:
        reserve = reserve + delay[0]
        delay = (*delay[1:], config.rec_rate * released)
    taken = config.prime_rate * reserve.clamp(max=1)
    primed = state.primed * (1 - config.unprime_per_release * released) + config.nsf_recover * (1 - state.primed)
    clamp = 0.995 * state.clamp + 0.005 - config.unprime_per_release * released
    amplitude = state.amplitude + config.amp_load * (AMPLITUDE_REST - state.amplitude)
    amplitude = amplitude - config.amp_leak * state.amplitude
    energy = state.energy + config.energy_fill * (config.energy_max - state.energy) - config.energy_use * released
    return EdgeState(
        calcium=calcium,
        buffer=state.buffer,
        pool=(pool + taken).clamp(0, POOL_LIMIT),
        reserve=(reserve - taken).clamp(min=0),
        primed=primed.clamp(0, 1),
        clamp=clamp.clamp(0, 1),
        energy=energy.clamp(0, config.energy_max),
        amplitude=amplitude.clamp(0, AMPLITUDE_LIMIT),
        delay=delay,
    )
