"""Phase 4: the norm before attention with its projection, and the norm before the MLP with its first layer and GELU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernbench import promises
from kernbench.promises import Bound
from kernbench.record import Prediction, ProfileRecord

from .model import NORM_EPS, Block

NORM_LINEAR_CLAIM = "10-20 % for transformer blocks"
NORM_LINEAR_PROMISE = (
    "Norms cost what their projections leave unused; at best all kernels of theirs but the matrix products go."
)
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm")
"""The operators whose kernels stay."""

RmsNormLinear = Callable[..., Tensor]


def adapt_qkv(op: RmsNormLinear) -> Callable[[Block, Tensor], Tensor]:
    """``Block.qkv`` through ``op``, the ``rms_norm_linear`` kernel in one of its implementations."""

    def qkv(self: Block, x_BSD: Tensor) -> Tensor:
        return op(x_BSD, self.norm_attention.scale, self.attention.qkv.weight, None, NORM_EPS, False)

    return qkv


def adapt_hidden(op: RmsNormLinear) -> Callable[[Block, Tensor], Tensor]:
    """``Block.hidden`` through ``op``, the ``rms_norm_linear`` kernel in one of its implementations."""

    def hidden(self: Block, x_BSD: Tensor) -> Tensor:
        inner = self.mlp.inner
        return op(x_BSD, self.norm_mlp.scale, inner.weight, inner.bias, NORM_EPS, True)

    return hidden


def predict_fused_norm_linear(before: ProfileRecord) -> Prediction:
    """What the sites take besides their matrix products goes, at best."""
    spots = [spot for spot in before.hotspots if spot.phase == 4 and spot.op not in PRODUCTS]
    step = promises.step_seconds(before)
    bound = Bound(None, "no hotspot of this phase or no step time in the profile before")
    if spots and step:
        besides = sum(spot.self_seconds_per_step for spot in spots)
        basis = f"norms and GELU {besides * 1e3:.3g} ms of a step of {step * 1e3:.3g} ms, matrix products left out"
        bound = Bound(step / (step - besides) if besides < step else None, basis)
    return promises.promise(NORM_LINEAR_PROMISE, bound, claim=NORM_LINEAR_CLAIM)
