"""The order in which codes are chosen: numbers as integers that compare alike, and one with its id in a single word.

NaN is the largest, as torch.argmax and torch.sort have it, both zeros are equal, and of equal numbers the smaller id
comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order(x, inside):  # type: ignore[no-untyped-def]
    """int32 in the order of x, float32; below all numbers where not inside."""
    # The sum turns a negative zero into a positive one.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(x == x, ordered, 0x7FFFFFFF)
    return tl.where(inside, ordered, -0x80000000)


@triton.jit
def with_id(ordered, id):  # type: ignore[no-untyped-def]
    """int64 that is larger for a larger int32, and of equal ones for the smaller id, from 0 to 2^31 - 1."""
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - id.to(tl.int64))


@triton.jit
def id_of(joined):  # type: ignore[no-untyped-def]
    """The id that :func:`with_id` put in, int64."""
    return 0x7FFFFFFF - (joined & 0x7FFFFFFF)
