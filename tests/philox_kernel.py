"""A kernel that stores what every generator of Triton draws, for test_philox."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    integers, uniforms, normals, count, seed, first, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program draws BLOCK offsets into integers, uniforms and normals [4, count]; grid is count / BLOCK."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = index + first
    if WIDE:
        offset = index.to(tl.int64) + first
    i0, i1, i2, i3 = tl.randint4x(seed, offset)
    tl.store(integers + index, i0.to(tl.int32, bitcast=True))
    tl.store(integers + count + index, i1.to(tl.int32, bitcast=True))
    tl.store(integers + 2 * count + index, i2.to(tl.int32, bitcast=True))
    tl.store(integers + 3 * count + index, i3.to(tl.int32, bitcast=True))
    tl.store(uniforms + index, tl.rand(seed, offset))
    u0, u1, u2, u3 = tl.rand4x(seed, offset)
    tl.store(uniforms + count + index, u1)
    tl.store(uniforms + 2 * count + index, u2)
    tl.store(uniforms + 3 * count + index, u3)
    tl.store(normals + index, tl.randn(seed, offset))
    n0, n1, n2, n3 = tl.randn4x(seed, offset)
    tl.store(normals + count + index, n1)
    tl.store(normals + 2 * count + index, n2)
    tl.store(normals + 3 * count + index, n3)
