"""Phase 5: a transformer for one position of one sequence, five operators a layer, and the projections around it.

Each operator stands here in plain PyTorch, and is a site that its kernel takes. Without them the functions at the
end do not run either: they belong to the same phase.

Shapes: H width, N query heads, K heads of keys and values, D features a head, F = D / 2 frequencies, M most positions,
I inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import KVCache
from .model import Stack
from .rotary import rotate
from .speech import SpeechModel


def norm_row(x_H: Tensor, nothing_H: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """RMS norm of one row; ``nothing_H`` is zeros, the residual of an operator that adds one."""
    wide = x_H.to(torch.promote_types(x_H.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_H.dtype) * weight_H


def norm_linear(x_H: Tensor, norm_weight_H: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, then a matrix [outputs, H]."""
    return functional.linear(norm_row(x_H, x_H, norm_weight_H, eps), weight)


def attention(
    qkv: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, cos_MF: Tensor, sin_MF: Tensor,
    keys_KMD: Tensor, values_KMD: Tensor, position_1: Tensor, eps: float, arrived_N: Tensor,
) -> Tensor:  # fmt: skip
    """Norms, rotation, cache write, and attention over positions 0 to ``position_1``: [(N + 2 K) D] to [N D].

    ``arrived_N`` are counters for programs that share a head, zero before and after.
    """
    heads, most, features = keys_KMD.shape
    narrow = heads * features
    q, k, v = torch.split(qkv, [qkv.numel() - 2 * narrow, narrow, narrow])
    cos, sin = cos_MF.index_select(0, position_1), sin_MF.index_select(0, position_1)
    queries = rotate(norm_row(q.view(-1, features), q, q_weight_D, eps), cos, sin)
    keys_KMD.index_copy_(1, position_1, rotate(norm_row(k.view(-1, features), k, k_weight_D, eps), cos, sin)[:, None])
    values_KMD.index_copy_(1, position_1, v.view(heads, 1, features))
    seen = torch.arange(most, device=qkv.device) <= position_1
    grouped = queries.view(heads, -1, features)
    return functional.scaled_dot_product_attention(grouped, keys_KMD, values_KMD, attn_mask=seen[None]).flatten()


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """A matrix [outputs, inputs], and what was there before."""
    return functional.linear(x, weight) + residual


def gate_up(x_H: Tensor, norm_weight_H: Tensor, gate_up_weight: Tensor, eps: float) -> Tensor:
    """RMS norm, both projections [2 I, H], and silu(gate) * up: [I]."""
    gate, up = norm_linear(x_H, norm_weight_H, gate_up_weight, eps).chunk(2)
    return functional.silu(gate) * up


def adapt_norm_row(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """``norm_row`` through ``add_rms_norm``."""

    def normed(x_H: Tensor, nothing_H: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return op(x_H, nothing_H, weight_H, eps)[0]

    return normed


def decode_one(self: Stack, x_11H: Tensor, cache: KVCache) -> Tensor:
    """``Stack.decode_one`` row by row."""
    x_H = _through_layers(self, x_11H[0, 0], cache)
    return norm_row(x_H, self.nothing(x_H), self.norm.weight, self.norm.eps)[None, None]


def logits_after_one(self: Stack, x_11H: Tensor, cache: KVCache, head: nn.Linear) -> Tensor:
    """``Stack.logits_after_one``, with the last norm in the head's operator."""
    x_H = _through_layers(self, x_11H[0, 0], cache)
    return norm_linear(x_H, self.norm.weight, head.weight, self.norm.eps)[None]


def logits_after_two(self: Stack, first_11H: Tensor, second_11H: Tensor, cache: KVCache, head: nn.Linear) -> Tensor:
    """``Stack.logits_after_two`` one after the other: twice the weights, but a third of the launches."""
    _through_layers(self, first_11H[0, 0], cache)
    return self.logits_after_one(second_11H, cache, head)


def into_predictor(self: SpeechModel, x_11H: Tensor) -> Tensor:
    """``SpeechModel.into_predictor``, with the bias as what was there before."""
    layer = self.predictor_input
    if not isinstance(layer, nn.Linear):
        return x_11H
    return linear_add(x_11H[0, 0], layer.weight, layer.bias)[None, None]


def into_logits(self: SpeechModel, hidden_11H: Tensor) -> Tensor:
    """``SpeechModel.into_logits``, with nothing that was there before."""
    weight = self.codec_head.weight
    return linear_add(hidden_11H[0, 0], weight, self.talker.nothing(weight[:, 0]))[None]


def _through_layers(stack: Stack, x_H: Tensor, cache: KVCache) -> Tensor:
    room, position_1 = cache.reserve(), cache.position()
    for layer, keys, values in zip(stack.in_order(), room.keys, room.values, strict=True):
        mixer, mlp, eps = layer.self_attn, layer.mlp, stack.config.eps
        qkv = norm_linear(x_H, layer.input_layernorm.weight, mixer.qkv_weight, eps)
        mixed = attention(
            qkv, mixer.q_norm.weight, mixer.k_norm.weight, room.cos, room.sin, keys[0], values[0], position_1, eps,
            room.arrived,
        )  # fmt: skip
        x_H = linear_add(mixed, mixer.o_proj.weight, x_H)
        inner = gate_up(x_H, layer.post_attention_layernorm.weight, mlp.gate_up_weight, eps)
        x_H = linear_add(inner, mlp.down_proj.weight, x_H)
    cache.advance(1)
    return x_H
