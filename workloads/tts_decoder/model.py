"""The transformer of talker and code predictor, with its cache, as the upstream implementations write it.

Shapes: B batch, T new positions, S positions seen, H width, N query heads, K heads of keys and values, D features a
head, I inner width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import KVCache
from .config import StackConfig
from .rotary import multimodal_tables, rotate, rotation_tables


class Place(NamedTuple):
    """Where tensors live."""

    device: torch.device
    dtype: torch.dtype


class Mixed(NamedTuple):
    """What attention mixes: queries [B, N, T, D], keys and values [B, K, S, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), cast back to the dtype of x, times a weight."""

    def __init__(self, width: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=place.device, dtype=place.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def linear(inputs: int, outputs: int, place: Place, *, bias: bool = False) -> nn.Linear:
    """A linear layer whose memory is not initialized yet."""
    return nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=place.dtype).to_empty(device=place.device)


def in_one_piece(*layers: nn.Linear) -> Tensor:
    """Move the weights of some layers with equal inputs into one tensor, [sum of outputs, inputs], and return it.

    The layers keep working: each weight becomes a view of its rows.
    """
    packed = torch.cat([layer.weight.detach() for layer in layers])
    parts = torch.split(packed, [layer.out_features for layer in layers])
    for layer, rows in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(rows)
    return packed


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys; the tables of the rotation are rebuilt in every call."""

    def __init__(self, config: StackConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        width, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = linear(config.hidden, width, place)
        self.k_proj = linear(config.hidden, narrow, place)
        self.v_proj = linear(config.hidden, narrow, place)
        self.o_proj = linear(width, config.hidden, place)
        self.q_norm = RMSNorm(config.head_dim, config.eps, place)
        self.k_norm = RMSNorm(config.head_dim, config.eps, place)
        self.qkv_weight = in_one_piece(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x_BTH: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Mix positions; same shape as ``x_BTH``."""
        by_head = (*x_BTH.shape[:2], -1, self.config.head_dim)
        q_BTND, k_BTKD, v_BTKD = (project(x_BTH).view(by_head) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = self.rotate_and_store(q_BTND, k_BTKD, v_BTKD, cache, layer)
        output: Tensor = self.o_proj(self.attend(mixed, cache.bias(layer, x_BTH.shape[1])).transpose(1, 2).flatten(2))
        return output

    def rotate_and_store(self, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cache: KVCache, layer: int) -> Mixed:
        """Norm and rotate queries and keys, and put keys and values behind those of the cache."""
        positions_T = torch.arange(cache.length, cache.length + q_BTND.shape[1], device=q_BTND.device)
        if self.config.sections:
            cos_TF, sin_TF = multimodal_tables(self.config, positions_T.expand(3, -1), q_BTND.dtype)
        else:
            cos_TF, sin_TF = rotation_tables(self.config, positions_T, q_BTND.dtype)
        q_BNTD = rotate(self.q_norm(q_BTND).transpose(1, 2), cos_TF, sin_TF)
        k_BKTD = rotate(self.k_norm(k_BTKD).transpose(1, 2), cos_TF, sin_TF)
        keys, values = cache.append(layer, k_BKTD, v_BTKD.transpose(1, 2))
        return Mixed(q_BNTD, keys, values)

    def attend(self, mixed: Mixed, bias_TS: Tensor | None) -> Tensor:
        """Causal attention [B, N, T, D] over the cache, keys and values repeated for their groups of queries."""
        queries, keys, values = mixed
        group = self.config.heads // self.config.kv_heads
        return functional.scaled_dot_product_attention(
            queries,
            repeated(keys, group),
            repeated(values, group),
            attn_mask=bias_TS,
            is_causal=bias_TS is None and queries.shape[2] > 1,
        )


def repeated(x_BKSD: Tensor, group: int) -> Tensor:
    """Each head ``group`` times in a row: [B, K * group, S, D]."""
    return x_BKSD[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: StackConfig, place: Place) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden, config.intermediate, place)
        self.up_proj = linear(config.hidden, config.intermediate, place)
        self.down_proj = linear(config.intermediate, config.hidden, place)
        self.gate_up_weight = in_one_piece(self.gate_proj, self.up_proj)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Same shape as ``x_BTH``."""
        output: Tensor = self.down_proj(self.activate(self.gate_proj(x_BTH), self.up_proj(x_BTH)))
        return output

    def activate(self, gate_BTI: Tensor, up_BTI: Tensor) -> Tensor:
        """SwiGLU."""
        return functional.silu(gate_BTI) * up_BTI


class Layer(nn.Module):
    """Attention, then MLP, each on the normalized residual."""

    def __init__(self, config: StackConfig, place: Place) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps, place)
        self.self_attn = Attention(config, place)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps, place)
        self.mlp = MLP(config, place)

    def forward(self, x_BTH: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Same shape as ``x_BTH``."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), cache, layer)
        output: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return output


class Stack(nn.Module):
    """Layers and a final norm."""

    def __init__(self, config: StackConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, place) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps, place)
        self.zeros: dict[torch.Size, Tensor] = {}

    def in_order(self) -> list[Layer]:
        """The layers, as what they are."""
        return cast(list[Layer], list(self.layers))

    def nothing(self, like: Tensor) -> Tensor:
        """Zeros of that shape, never to be written: the residual before the first layer."""
        if like.shape not in self.zeros:
            self.zeros[like.shape] = torch.zeros_like(like)
        return self.zeros[like.shape]

    def forward(self, x_BTH: Tensor, cache: KVCache) -> Tensor:
        """Hidden states of T further positions, which the cache then holds."""
        for index, layer in enumerate(self.layers):
            x_BTH = layer(x_BTH, cache, index)
        cache.advance(x_BTH.shape[1])
        output: Tensor = self.norm(x_BTH)
        return output

    def decode_one(self, x_11H: Tensor, cache: KVCache) -> Tensor:
        """Hidden state of one further position of one sequence."""
        output: Tensor = self(x_11H, cache)
        return output

    def logits_after_one(self, x_11H: Tensor, cache: KVCache, head: nn.Linear) -> Tensor:
        """What ``head`` makes of the hidden state of one further position, [1, V]."""
        logits_11V: Tensor = head(self.decode_one(x_11H, cache))
        return logits_11V[:, 0]

    def logits_after_two(self, first_11H: Tensor, second_11H: Tensor, cache: KVCache, head: nn.Linear) -> Tensor:
        """What ``head`` makes of the hidden state of the second of two further positions, [1, V]."""
        hidden_12H = self(torch.cat([first_11H, second_11H], dim=1), cache)
        logits_11V: Tensor = head(hidden_12H[:, 1:])
        return logits_11V[:, 0]
