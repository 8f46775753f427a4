"""Triton helpers that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_bfloat16(x):  # type: ignore[no-untyped-def]
    """The bfloat16 value nearest to x, even on ties, still as float32, so that a cast of it is exact.

    For the interpreter alone: there a cast to bfloat16 cuts off the bits that hardware rounds by, and over many
    updates of a parameter that is a bias.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)
