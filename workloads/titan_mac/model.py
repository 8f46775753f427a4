"""The TitanMAC decoder: pre-norm blocks, persistent tokens and one neural memory in one of three dataflows.

Shapes: B batch, T tokens, S positions (persistent and memory tokens first), D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import BlockAttention, WindowedAttention
from .config import TitanConfig
from .memory import NeuralMemory

NORM_EPS = 1e-5
INIT_STD = 0.02
NORMAL_INIT = (
    "embedding",
    "position",
    "persistent",
    "memory_proj",
    "gate_proj",
    "memory.key",
    "memory.value",
    "memory.query",
    "memory.inner",
    "memory.outer",
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in the input's dtype."""

    def __init__(self, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + NORM_EPS) * self.scale


class FeedForward(nn.Module):
    """Linear and exact GELU, of which :meth:`Block.hidden` is, and the second Linear."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.feed_forward, device=device, dtype=dtype)
        self.outer = nn.Linear(config.feed_forward, config.width, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """The width of the model back from that of the hidden layer."""
        output: Tensor = self.outer(hidden)
        return output


class Block(nn.Module):
    """Attention, then MLP, each on the normalized residual."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        attention = WindowedAttention if config.attention == "windowed" else BlockAttention
        self.norm_attention = RMSNorm(config.width, device=device, dtype=dtype)
        self.attention = attention(config, device=device, dtype=dtype)
        self.norm_mlp = RMSNorm(config.width, device=device, dtype=dtype)
        self.mlp = FeedForward(config, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as ``x_BSD``."""
        x_BSD = x_BSD + self.attention(self.qkv(x_BSD))
        output: Tensor = x_BSD + self.mlp(self.hidden(x_BSD))
        return output

    def qkv(self, x_BSD: Tensor) -> Tensor:
        """Queries, keys and values [B, S, 3 D] of the normalized residual, side by side."""
        output: Tensor = self.attention.qkv(self.norm_attention(x_BSD))
        return output

    def hidden(self, x_BSD: Tensor) -> Tensor:
        """The hidden layer of the MLP on the normalized residual, after its GELU."""
        return functional.gelu(self.mlp.inner(self.norm_mlp(x_BSD)))


class TitanMac(nn.Module):
    """Decoder language model; the head is tied to the token embedding."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width, device=device, dtype=dtype)
        self.position = nn.Embedding(config.length, config.width, device=device, dtype=dtype)
        self.persistent = nn.Parameter(torch.zeros(config.persistent, config.width, device=device, dtype=dtype))
        # In mal the odd layers are the memory and own no block.
        blocks = (config.layers + 1) // 2 if config.variant == "mal" else config.layers
        self.blocks = nn.ModuleList(Block(config, device=device, dtype=dtype) for _ in range(blocks))
        self.norm = RMSNorm(config.width, device=device, dtype=dtype)
        self.memory = NeuralMemory(config, device=device, dtype=dtype)
        self.memory_proj = nn.Linear(config.width, config.width, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(config.width, config.width, device=device, dtype=dtype)
        initialize(self, seed)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and the memory loss (0-dim); while training, the memory is written on the way."""
        x_BTD = self.embedding(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        dataflow = {"mag": self.memory_as_gate, "mac": self.memory_as_context, "mal": self.memory_as_layer}
        y_BTD, memory_loss = dataflow[self.config.variant](x_BTD)
        return functional.linear(self.norm(y_BTD), self.embedding.weight), memory_loss

    def memory_as_gate(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The memory, as it was before this step, gates the output of the blocks."""
        x_BSD = self.with_persistent(x_BTD)
        gate_BSD = torch.sigmoid(self.gate_proj(self.memory.retrieve(x_BSD)))
        y_BSD = self.through_blocks(x_BSD)
        memory_loss = self.memory.update(y_BSD)
        return (y_BSD * gate_BSD)[:, self.config.persistent :], memory_loss

    def memory_as_context(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Segment after segment: what the memory recalls of a segment stands before it, then the segment is written."""
        outputs, losses = [], []
        for segment_BTD in torch.split(x_BTD, self.config.segment, dim=1):
            query_BTD = segment_BTD.mean(dim=1, keepdim=True).expand(-1, self.config.memory_tokens, -1)
            recalled_BTD = self.memory_proj(self.memory.retrieve(query_BTD))
            y_BSD = self.through_blocks(self.with_persistent(torch.cat([recalled_BTD, segment_BTD], dim=1)))
            y_BTD = y_BSD[:, self.config.persistent + self.config.memory_tokens :]
            losses.append(self.memory.update(y_BTD))
            outputs.append(y_BTD * torch.sigmoid(self.gate_proj(self.memory.retrieve(y_BTD))))
        return torch.cat(outputs, dim=1), torch.stack(losses).mean()

    def memory_as_layer(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Even layers are blocks, odd layers add what the memory recalls; one write at the end."""
        y_BSD = self.with_persistent(x_BTD)
        for layer in range(self.config.layers):
            if layer % 2 == 0:
                y_BSD = self.blocks[layer // 2](y_BSD)
            else:
                y_BSD = y_BSD + self.memory_proj(self.memory.retrieve(y_BSD))
        memory_loss = self.memory.update(y_BSD)
        return y_BSD[:, self.config.persistent :], memory_loss

    def with_persistent(self, x_BTD: Tensor) -> Tensor:
        """The persistent tokens before ``x_BTD``."""
        return torch.cat([self.persistent.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)

    def through_blocks(self, x_BSD: Tensor) -> Tensor:
        """All blocks in turn."""
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return x_BSD


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw all parameters on the host in float32, so that every device and dtype starts from the same numbers.

    Embeddings, persistent tokens and the memory's projections and weights are normal with zero biases; the other layers
    have torch's default for linear layers: uniform within one over the root of the fan-in.
    """
    generator = torch.Generator().manual_seed(seed)
    fan_in = 1
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            continue
        values = torch.empty(parameter.shape)
        if name.startswith(NORMAL_INIT):
            values = values.zero_() if name.endswith("bias") else values.normal_(0, INIT_STD, generator=generator)
        else:
            # A bias follows its weight in the order of parameters and shares its bound.
            fan_in = parameter[0].numel() if parameter.dim() > 1 else fan_in
            values.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        parameter.copy_(values)
