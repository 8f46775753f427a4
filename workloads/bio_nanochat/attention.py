"""Attention with a presynaptic organ: of profile P, of profile K, and without one.

Each ``attend`` is what a phase replaces. Shapes: B batch, T tokens, C width, H query heads, G key/value heads, D head
size, Q queries, K keys, N edges of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import presynaptic, topk
from .config import BioConfig
from .noise import Noise
from .presynaptic import State
from .synapses import SynapticConfig, TopKConfig

QK_EPS = 1e-6
ROTARY_BASE = 10_000.0


class Linear(nn.Module):
    """A product without a bias: weights [out, in] in float32 or wider, in the dtype of its input while multiplied."""

    def __init__(self, inputs: int, outputs: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """The last dimension of ``x`` multiplied, in its dtype."""
        return functional.linear(x, self.weight.to(x.dtype))


class Head(Linear):
    """The last product: of every token with every word of the vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V] of features [..., C]."""
        return super().forward(x)


def rotary_tables(config: BioConfig, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D / 2] in ``dtype``, rounded to bfloat16 as upstream keeps them."""
    half = config.head_size // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.length, dtype=torch.float64)[:, None] * frequency
    cosine, sine = (table.to(torch.bfloat16).to(device=device, dtype=dtype) for table in (angle.cos(), angle.sin()))
    return cosine, sine


def rotate(x_BHTD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the two halves of each head's features against each other."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def qk_norm(x: Tensor) -> Tensor:
    """x over its root mean square, weightless."""
    return functional.rms_norm(x, (x.shape[-1],), eps=QK_EPS)


class Attention(nn.Module):
    """Four projections, rotary embedding, QK norm and :meth:`attend` between them; this one is plain and causal."""

    def __init__(self, config: BioConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        shared = config.kv_heads * config.head_size
        self.query = Linear(config.width, config.width, device=device, dtype=dtype)
        self.key = Linear(config.width, shared, device=device, dtype=dtype)
        self.value = Linear(config.width, shared, device=device, dtype=dtype)
        self.output = Linear(config.width, config.width, device=device, dtype=dtype)
        cosine, sine = rotary_tables(config, device=device, dtype=dtype)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.cosine: Tensor
        self.sine: Tensor

    def heads(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated and normalized queries and keys, and values, [B, H, T, D] each; shared ones repeated."""
        q_BHTD, k_BGTD, v_BGTD = (self.split(part(x_BTC)) for part in (self.query, self.key, self.value))
        tokens = x_BTC.shape[1]
        cosine, sine = self.cosine[:tokens], self.sine[:tokens]
        q_BHTD, k_BGTD = qk_norm(rotate(q_BHTD, cosine, sine)), qk_norm(rotate(k_BGTD, cosine, sine))
        repeats = self.config.heads // self.config.kv_heads
        if repeats > 1:
            return q_BHTD, k_BGTD.repeat_interleave(repeats, dim=1), v_BGTD.repeat_interleave(repeats, dim=1)
        return q_BHTD, k_BGTD, v_BGTD

    def split(self, x_BTC: Tensor) -> Tensor:
        """[B, T, H D] as [B, H, T, D]."""
        batch, tokens, width = x_BTC.shape
        return x_BTC.view(batch, tokens, width // self.config.head_size, self.config.head_size).transpose(1, 2)

    def join(self, y_BHTD: Tensor) -> Tensor:
        """[B, H, T, D] as [B, T, C], through the last projection."""
        output: Tensor = self.output(y_BHTD.transpose(1, 2).flatten(2))
        return output

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Mix tokens; same shape and dtype as ``x_BTC``."""
        q_BHTD, k_BHTD, v_BHTD = self.heads(x_BTC)
        return self.join(functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True))


class SynapticAttention(Attention):
    """Attention of profile P: each key's synapse biases who listens to it, and what it released wears it out."""

    def __init__(
        self, config: BioConfig, synapses: SynapticConfig, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.synapses = synapses
        wide = torch.promote_types(dtype, torch.float32)
        # Of one element: torch.compile loses what is written into a 0-dim buffer of the CPU.
        self.register_buffer("mean_release", torch.zeros(1, device=device, dtype=wide))
        self.mean_release: Tensor

    def forward(self, x_BTC: Tensor, state: State | None, noise: Noise | None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Mix tokens; also the synapses, which the next layer goes on with."""
        q_BHTD, k_BHTD, v_BHTD = self.heads(x_BTC)
        if state is None:
            state = State.initial(q_BHTD, self.synapses)
        y_BHTD, state, used_BHK = self.attend(q_BHTD, k_BHTD, v_BHTD, state, noise)
        self.follow_release(used_BHK)
        return self.join(y_BHTD), state

    def attend(
        self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, state: State, noise: Noise | None
    ) -> tuple[Tensor, State, Tensor]:
        """Attention under the synapses' bias, the synapses after, and what was released by key [B, H, K]."""
        logits_BHQK, bias_BHQK, after, used_BHK = presynaptic.release(
            q_BHTD, k_BHTD, state, self.synapses, dock=self.config.dock, noise=noise
        )
        return torch.softmax(logits_BHQK + bias_BHQK, dim=-1) @ v_BHTD, after, used_BHK

    @torch.no_grad()
    def follow_release(self, used_BHK: Tensor) -> None:
        """Move the running mean of the release over all pairs of tokens."""
        pairs = used_BHK.numel() * used_BHK.shape[-1]
        self.mean_release.mul_(0.99).add_(used_BHK.sum(dtype=self.mean_release.dtype) * (0.01 / pairs))


class TopKAttention(Attention):
    """Attention of profile K: synapses act on the top-k keys of a query; their state lasts for one call."""

    def __init__(self, config: BioConfig, synapses: TopKConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.synapses = synapses
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("mean_release", torch.ones(1, device=device, dtype=wide))
        self.mean_release: Tensor

    def forward(self, x_BTC: Tensor, noise: Noise | None) -> Tensor:  # type: ignore[override]
        """Mix tokens; same shape and dtype as ``x_BTC``."""
        q_BHTD, k_BHTD, v_BHTD = self.heads(x_BTC)
        y_BHTD, _ = self.attend(q_BHTD, k_BHTD, v_BHTD, topk.EdgeState.initial(k_BHTD, self.synapses), noise)
        return self.join(y_BHTD)

    def attend(
        self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, state: topk.EdgeState, noise: Noise | None
    ) -> tuple[Tensor, topk.EdgeState]:
        """Attention with a bias on the chosen keys of each query, and the synapses after. Rule R4, steps 1 to 9."""
        config, tokens = self.synapses, q_BHTD.shape[2]
        visible_QK = presynaptic.causal_mask(tokens, q_BHTD)
        logits_BHQK = presynaptic.scores(q_BHTD, k_BHTD).masked_fill(~visible_QK, float("-inf"))
        drive_BHQN, index_BHQN = logits_BHQK.topk(min(config.attn_topk, tokens), dim=-1)
        if config.enable_presyn:
            edge_BHQN, state = topk.release(drive_BHQN, index_BHQN, state, self.mean_release, config, noise)
        else:
            edge_BHQN = torch.ones_like(drive_BHQN)
        gain_BHQN = config.lambda_loge * torch.log(config.epsilon + edge_BHQN)
        gain_BHQN = gain_BHQN.masked_fill(~torch.isfinite(drive_BHQN), 0.0)
        bias_BHQK = torch.zeros_like(logits_BHQK).scatter(-1, index_BHQN, gain_BHQN)
        place_T = torch.arange(tokens, device=q_BHTD.device)
        distance_QK = (place_T[:, None] - place_T[None, :]).abs().to(q_BHTD.dtype)
        barrier_QK = distance_QK * (config.barrier_strength / tokens)
        return torch.softmax(logits_BHQK + bias_BHQK - barrier_QK, dim=-1) @ v_BHTD, state
