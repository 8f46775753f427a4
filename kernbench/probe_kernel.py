"""The smallest Triton kernel worth launching: it shows whether Triton works here, interpreted or compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def double(source_pointer, target_pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write twice the source; both are [size] fp32. One program handles BLOCK elements; grid is cdiv(size, BLOCK)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(target_pointer + offsets, 2 * tl.load(source_pointer + offsets, mask=mask), mask=mask)
