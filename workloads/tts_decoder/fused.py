"""Phases 1 to 3: the transformer through fused kernels, one adapter for each site.

Shapes as in ``model``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .cache import KVCache
from .model import MLP, Attention, Mixed, Stack

AddRMSNorm = Callable[..., tuple[Tensor, Tensor]]


def adapt_add_rms_norm(op: AddRMSNorm) -> Callable[[Stack, Tensor, KVCache], Tensor]:
    """``Stack.forward`` that hands the sum of residual and branch from each norm to the next."""

    def forward(self: Stack, x_BTH: Tensor, cache: KVCache) -> Tensor:
        layers = self.in_order()
        following = [layer.input_layernorm for layer in layers[1:]] + [self.norm]
        first = layers[0].input_layernorm
        normed, residual = op(x_BTH, self.nothing(x_BTH), first.weight, first.eps)
        for index, (layer, after) in enumerate(zip(layers, following, strict=True)):
            mixed = layer.self_attn(normed, cache, index)
            norm = layer.post_attention_layernorm
            normed, residual = op(mixed, residual, norm.weight, norm.eps)
            normed, residual = op(layer.mlp(normed), residual, after.weight, after.eps)
        cache.advance(x_BTH.shape[1])
        return normed

    return forward


def adapt_swiglu(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[MLP, Tensor, Tensor], Tensor]:
    """``MLP.activate`` in one launch."""

    def activate(self: MLP, gate_BTI: Tensor, up_BTI: Tensor) -> Tensor:
        return op(gate_BTI, up_BTI)

    return activate


def adapt_qk_norm_rope_cache(op: Callable[..., Tensor]) -> Callable[..., Mixed]:
    """``Attention.rotate_and_store`` in one launch, into a cache that is allocated once."""

    def rotate_and_store(
        self: Attention, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cache: KVCache, layer: int
    ) -> Mixed:
        room = cache.reserve()
        q_BNTD = op(
            q_BTND, k_BTKD, v_BTKD, self.q_norm.weight, self.k_norm.weight, room.cos, room.sin,
            room.keys[layer], room.values[layer], cache.position(), self.config.eps,
        )  # fmt: skip
        return Mixed(q_BNTD, *cache.visible(layer, q_BTND.shape[1]))

    return rotate_and_store
