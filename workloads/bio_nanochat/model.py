"""The body of bio-nanochat: pre-norm blocks whose attention, feed-forward and experts carry synapses; or none at all.

Shapes: B batch, T tokens, C width, V vocabulary.
Source: specification, section 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Attention, Head, Linear, SynapticAttention, TopKAttention
from .config import BioConfig
from .moe import SynapticMoE, synaptic_linear
from .noise import Noise
from .presynaptic import State
from .synapses import Synapses, SynapticConfig

NORM_EPS = 1e-5
VANILLA_EPS = 1e-6
SOFTCAP = 15.0
INIT_STD = 0.02
GENOME_STD = 0.1
SEED_STRIDE = 1 << 20
"""Calls whose noise is that of one seed alone."""


class LayerNorm(nn.Module):
    """Layer norm with scale and shift, computed in the dtype of its input."""

    def __init__(self, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.scale = nn.Parameter(torch.ones(width, device=device, dtype=wide))
        self.shift = nn.Parameter(torch.zeros(width, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return functional.layer_norm(x, (x.shape[-1],), self.scale.to(x.dtype), self.shift.to(x.dtype), NORM_EPS)


class FeedForward(nn.Module):
    """Norm, synaptic linear layer, squared ReLU, synaptic linear layer."""

    def __init__(self, config: BioConfig, synapses: Synapses, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_multiple * config.width
        self.norm = LayerNorm(config.width, device=device, dtype=dtype)
        self.inner = synaptic_linear(config.width, hidden, config, synapses, device=device, dtype=dtype)
        self.outer = synaptic_linear(hidden, config.width, config, synapses, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        output: Tensor = self.outer(self.inner(self.norm(x)).relu().square())
        return output


class Block(nn.Module):
    """Attention, then a feed-forward or a mixture of experts, each on the normalized residual."""

    def __init__(self, config: BioConfig, synapses: Synapses, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_attention = LayerNorm(config.width, device=device, dtype=dtype)
        self.attention: SynapticAttention | TopKAttention
        if isinstance(synapses, SynapticConfig):
            self.attention = SynapticAttention(config, synapses, device=device, dtype=dtype)
        else:
            self.attention = TopKAttention(config, synapses, device=device, dtype=dtype)
        self.norm_mlp = LayerNorm(config.width, device=device, dtype=dtype)
        self.mlp: FeedForward | SynapticMoE
        if config.experts:
            self.mlp = SynapticMoE(config, synapses, device=device, dtype=dtype)
        else:
            self.mlp = FeedForward(config, synapses, device=device, dtype=dtype)

    def forward(
        self, x_BTC: Tensor, state: State | None, noise: Noise | None
    ) -> tuple[Tensor, State | None, Tensor | None]:
        """The residual after both, the synapses of profile P for the next layer, and the balance loss of experts."""
        if isinstance(self.attention, SynapticAttention):
            mixed_BTC, state = self.attention(self.norm_attention(x_BTC), state, noise)
        else:
            mixed_BTC = self.attention(self.norm_attention(x_BTC), noise)
        x_BTC = x_BTC + mixed_BTC
        if isinstance(self.mlp, SynapticMoE):
            y_BTC, balance = self.mlp(self.norm_mlp(x_BTC))
            return x_BTC + y_BTC, state, balance
        return x_BTC + self.mlp(self.norm_mlp(x_BTC)), state, None


class BioModel(nn.Module):
    """Embedding, blocks, untied head; no norm before the head and no softcap."""

    def __init__(self, config: BioConfig, synapses: Synapses, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.synapses = synapses
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.embedding = nn.Embedding(config.vocabulary, config.width, device=device, dtype=wide)
        self.blocks = nn.ModuleList(Block(config, synapses, device=device, dtype=dtype) for _ in range(config.layers))
        self.head = Head(config.width, config.vocabulary, device=device, dtype=dtype)
        self.register_buffer("draws", torch.zeros((), device=device, dtype=torch.int64))
        self.draws: Tensor
        self.counted_noise = False
        """Draw the noise of stochastic release as kernels do; see :class:`Noise`."""

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and the balance loss of all layers (0-dim, float32 or wider)."""
        x_BTC = self.embedding(tokens_BT).to(self.dtype)
        state: State | None = None
        balances = []
        for layer, block in enumerate(self.blocks):
            x_BTC, state, balance = block(x_BTC, state, self.noise(layer))
            if balance is not None:
                balances.append(balance)
        if self.training and torch.is_grad_enabled():
            self.draws.add_(1)
        total = torch.stack(balances).sum() if balances else self.embedding.weight.new_zeros(())
        return self.head(x_BTC), total

    def noise(self, layer: int) -> Noise | None:
        """What the release of a layer draws from in this call; None where nothing is trained."""
        if not (self.training and torch.is_grad_enabled()) or self.synapses.stochastic_train_frac <= 0:
            return None
        return Noise(self.draws * self.config.layers + layer, self.counted_noise)

    def mixtures(self) -> list[SynapticMoE]:
        """The mixtures of experts, by layer."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, SynapticMoE)]


class VanillaBlock(nn.Module):
    """Attention and squared-ReLU feed-forward, each on the residual over its root mean square."""

    def __init__(self, config: BioConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_multiple * config.width
        self.attention = Attention(config, device=device, dtype=dtype)
        self.inner = Linear(config.width, hidden, device=device, dtype=dtype)
        self.outer = Linear(hidden, config.width, device=device, dtype=dtype)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape and dtype as ``x_BTC``."""
        x_BTC = x_BTC + self.attention(rms_norm(x_BTC))
        output: Tensor = x_BTC + self.outer(self.inner(rms_norm(x_BTC)).relu().square())
        return output


class VanillaModel(nn.Module):
    """The same sizes without synapses: weightless norms, also of the embedding and before the head, and a softcap."""

    def __init__(self, config: BioConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.embedding = nn.Embedding(config.vocabulary, config.width, device=device, dtype=wide)
        self.blocks = nn.ModuleList(VanillaBlock(config, device=device, dtype=dtype) for _ in range(config.layers))
        self.head = Head(config.width, config.vocabulary, device=device, dtype=dtype)
        self.counted_noise = False

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and no balance loss."""
        x_BTC = rms_norm(self.embedding(tokens_BT).to(self.dtype))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = SOFTCAP * torch.tanh(self.head(rms_norm(x_BTC)) / SOFTCAP)
        return logits_BTV, self.embedding.weight.new_zeros(())

    def mixtures(self) -> list[SynapticMoE]:
        """None."""
        return []


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square, weightless."""
    return functional.rms_norm(x, (x.shape[-1],), eps=VANILLA_EPS)


def build_model(config: BioConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> BioModel | VanillaModel:
    """A model at its initial weights; equal seeds give equal numbers on every device and in every dtype."""
    if config.synapses is None:
        vanilla = VanillaModel(config, device=device, dtype=dtype)
        initialize(vanilla, seed)
        return vanilla
    model = BioModel(config, config.synapses, device=device, dtype=dtype)
    initialize(model, seed)
    with torch.no_grad():
        model.draws.fill_(seed * SEED_STRIDE)
    return model


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw all parameters, and the router's embeddings, on the host in float32.

    Synaptic weights and the head are truncated normal of std 0.02, the genome normal of std 0.1, and all else as torch
    starts it: the embedding normal of std 1, projections uniform within one over the root of their width.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = dict(model.named_parameters())
    drawn |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("mlp.embedding")}
    for name, tensor in drawn.items():
        value = initial_value(name, torch.empty(tensor.shape), generator)
        if value is not None:
            tensor.copy_(value)


def initial_value(name: str, value: Tensor, generator: torch.Generator) -> Tensor | None:
    """What a parameter starts from, drawn into ``value``; None where it starts as it was made."""
    part = name.split(".")[-2:]
    if part[-1] in ("slow", "fast") or part == ["head", "weight"]:
        return nn.init.trunc_normal_(value, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
    if part[-1] in ("gain_in", "gain_out"):
        return value.normal_(0, INIT_STD, generator=generator)
    if part[-1] == "genome":
        return value.normal_(0, GENOME_STD, generator=generator)
    if part == ["mlp", "embedding"]:
        return functional.normalize(value.normal_(generator=generator), dim=-1)
    if part == ["embedding", "weight"]:
        return value.normal_(generator=generator)
    if part[-1] != "weight":
        return None
    bound = value.shape[-1] ** -0.5
    return value.uniform_(-bound, bound, generator=generator)
