"""Parts that the kernels of presynaptic attention share: rows, products, and the special functions they count."""

from __future__ import annotations

import triton
import triton.language as tl

from . import _rows

INTERPRETED = _rows.INTERPRETED
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
DRIVE_LIMIT = tl.constexpr(20.0)
LANES = tl.constexpr(8)
"""Columns of a tile of products that lie in different threads; sums over the others need no exchange."""
LEAST = tl.constexpr(1e-37)
"""Keeps a sum of two exponentials off zero, where both of them vanish."""


@triton.jit
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x in one special-function operation: without care for subnormal results, unlike tl.exp2."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def log2(x):  # type: ignore[no-untyped-def]
    """Logarithm of a normal number, to 2^-22, in one special-function operation."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def reciprocal(x):  # type: ignore[no-untyped-def]
    """1 / x to one ulp, in one special-function operation; tl.fdiv takes four more for operands near the ends."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def sigma_and_slope(s, scale):  # type: ignore[no-untyped-def]
    """sigma(L) and its derivative, of products s; of one whose exponential overflows they are zeros, as they should."""
    sigma = reciprocal(1.0 + exp2(s * -scale))
    return sigma, sigma - sigma * sigma


@triton.jit
def add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Of a few numbers: a key's own, not a pair's."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def dot(left, right, total=None):  # type: ignore[no-untyped-def]
    """left @ right and what is added to it; float32 is multiplied as such, and the interpreter has no bfloat16."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def store(pointer, x, mask):  # type: ignore[no-untyped-def]
    """x, float32, rounded to what pointer points to."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        x = _rows.narrow(x, dtype)
    tl.store(pointer, x.to(dtype), mask=mask)


@triton.jit
def store_mixed(y, rest, offsets, mixed, mask):  # type: ignore[no-untyped-def]
    """mixed, float32, rounded to y, and what rounding left to rest where there is one."""
    dtype: tl.constexpr = y.dtype.element_ty
    rounded = _rows.narrow(mixed, dtype)
    tl.store(y + offsets, rounded, mask=mask)
    if rest is not None:
        tl.store(rest + offsets, _rows.narrow(mixed - rounded.to(tl.float32), dtype), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def place(tokens, heads, ROWS: tl.constexpr, LAST_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Batch, head, both in one, and first row of this program's ROWS; those with the most work come first."""
    blocks = (tokens + ROWS - 1) // ROWS
    pairs = tl.num_programs(0) // blocks
    block = tl.program_id(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    if LAST_FIRST:
        block = blocks - 1 - block
    return pair // heads, pair % heads, pair, block * ROWS


@triton.jit  # type: ignore[untyped-decorator]
def pointers(base, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the first ROWS rows from base on, [ROWS, COLUMNS]."""
    row = tl.arange(0, ROWS).to(tl.int64)
    return base + row[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def rows(block, first, stride, tokens, DIM: tl.constexpr, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows from first on of what block points to, [ROWS, COLUMNS]; zeros beyond tokens, unless ALL are there."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    block += tl.cast(first, tl.int64) * stride
    row = (first + tl.arange(0, ROWS) < tokens)[:, None]
    column = (tl.arange(0, COLUMNS) < DIM)[None, :]
    if ALL:
        tile = tl.load(block) if DIM == COLUMNS else tl.load(block, mask=column, other=0.0)
    elif DIM == COLUMNS:
        tile = tl.load(block, mask=row, other=0.0)
    else:
        tile = tl.load(block, mask=row & column, other=0.0)
    return tile
