"""What the Kasmina kernels share: which columns a seed owns, what it does there, and how statistics are cut up.

Seed s owns the columns from s * chunk on, chunk of them or as many as there are; columns after the last seed's belong
to nobody, and seeds after the last column own none. Statistics are taken of tiles of up to 64 rows and
:func:`width_of` columns. That width divides the chunk, so that a tile is of one seed, whatever the chunk is.

A choice is what a seed does in one forward pass, in one number: -1 if it passes its columns through, else its row of
the blueprint bank times four plus its operator, 0, 1 or 2. A row that the bank does not have is the one after its last.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

TABLES = ("alpha", "simple")
GRAFTING_TO_FINE_TUNING = 0b1111000
"""Lifecycles 3 to 6, a bit each: those in which a seed blends its blueprint in, as upstream's kernels have it."""
NEAR_ZERO = 1e-6
"""Smaller numbers count as zeros in the telemetry, as in upstream's PyTorch layer."""
MOST_WIDTH = 64
FEW = 2**12 if triton.knobs.runtime.interpret else 2**18
"""Up to so many elements, small tiles spread over more multiprocessors. The interpreter takes few for many."""

SWEPT = (100, 200, 500, 1000, 2000, 5000, 10_000)
"""Numbers of seeds that bench walks through; the bytes stay, so that a time which changes is the seeds'."""
SWEPT_ROWS, SWEPT_COLUMNS = 128, 640_000
SWEPT_FIXED = f"{SWEPT_ROWS} rows of about {SWEPT_COLUMNS:,} columns"


class Shape(NamedTuple):
    """How a pass cuts x up: the most rows of a tile, the elements of a program, and those of a thread.

    ``streams`` says that x leaves the caches before anything else does, and that y passes them by.
    """

    rows: int
    elements: int
    a_thread: int
    streams: bool = False


FORWARD, BACKWARD = "forward", "backward"
FORWARD_ROWS = 32
"""Of a tile in the forward pass: statistics are those of a tile, so its size must not depend on how x is rounded."""
SHAPES = {
    (FORWARD, 4): Shape(FORWARD_ROWS, 2048, 16),
    (FORWARD, 2): Shape(FORWARD_ROWS, 8192, 32, streams=True),
    (BACKWARD, 4): Shape(64, 4096, 32),
    (BACKWARD, 2): Shape(64, 4096, 32),
}
"""By pass, and bytes of a number of x, where there are many.

A program has as many bytes under way as fit beside six others on a multiprocessor, and a thread enough of them
to share the price of addresses, of what is looked up, and of reductions. The rows of the forward pass are those of its
statistics; the backward adds columns up over its own, and writes a number of each, so that fewer rows cost bytes.
"""
SMALL = {FORWARD: Shape(FORWARD_ROWS, 1024, 8), BACKWARD: Shape(64, 1024, 8)}
MOST_ROWS = 64


class Tiles(NamedTuple):
    """How statistics of x [batch, features] are cut up: tiles of rows x width, [parts, granules] of them in all."""

    rows: int
    width: int
    parts: int
    granules: int


class Grid(NamedTuple):
    """How x is handed to programs.

    Attributes:
        stacked: tiles that a program takes below each other.
        granules: and side by side.
        blocks: programs side by side.
        levels: programs below each other.
        warps: of a program.
        even: all programs have all of their rows and columns, so that nothing needs a mask.
        streams: as :class:`Shape` has it.
    """

    stacked: int
    granules: int
    blocks: int
    levels: int
    warps: int
    even: bool
    streams: bool


def width_of(chunk: int) -> int:
    """Columns of a tile, which is also called a granule: the largest power of two that divides the chunk, to 64."""
    return math.gcd(chunk, MOST_WIDTH)


def tiles_of(batch: int, features: int, seeds: int, chunk: int, direction: str = FORWARD) -> Tiles:
    """The tiles of the columns that seeds own; the last ones of a row or column may be cut off by the end of x."""
    rows = min(SMALL[direction].rows, int(triton.next_power_of_2(max(1, batch))))
    width = width_of(chunk)
    return Tiles(rows, width, triton.cdiv(batch, rows), triton.cdiv(min(features, seeds * chunk), width))


def swept_sizes(seeds: int) -> dict[str, int]:
    """Sizes of x in a sweep over seeds: chunks of whole granules that fill all columns."""
    chunk = max(1, round(SWEPT_COLUMNS / seeds / MOST_WIDTH)) * MOST_WIDTH
    return {"batch": SWEPT_ROWS, "features": seeds * chunk, "seeds": seeds, "chunk": chunk}


@lru_cache(maxsize=1024)
def plan_of(
    batch: int, features: int, seeds: int, chunk: int, itemsize: int, direction: str = FORWARD
) -> tuple[Tiles, Grid]:
    """The tiles of a pass, and programs for all of x, also for columns that nobody owns."""
    shape = SMALL[direction] if batch * features <= FEW else SHAPES[direction, itemsize]
    tiles = tiles_of(batch, features, seeds, chunk, direction)
    at_once = max(1, shape.elements // (tiles.rows * tiles.width))
    # Tiles side by side are put in order for a reduction, by way of shared memory, and those below each other are not.
    wide = tiles.width < MOST_WIDTH or direction == BACKWARD
    stacked = 1 if wide else min(at_once, int(triton.next_power_of_2(max(1, tiles.parts))))
    there = int(triton.next_power_of_2(max(1, triton.cdiv(features, tiles.width))))
    granules = min(there, at_once // stacked) if wide else 1
    rows, columns = stacked * tiles.rows, granules * tiles.width
    warps = max(1, min(8, rows * columns // (32 * shape.a_thread)))
    even = batch % rows == 0 == features % columns and tiles.granules * tiles.width == features
    blocks, levels = triton.cdiv(features, columns), triton.cdiv(batch, rows)
    return tiles, Grid(stacked, granules, blocks, levels, warps, even, shape.streams)


@triton.jit  # type: ignore[untyped-decorator]
def choice_of(  # type: ignore[no-untyped-def]
    lifecycle, blueprint, operator, seed, covered, bank_rows,
    lifecycle_stride, blueprint_stride, operator_stride, ACTIVE_STATES: tl.constexpr,
):  # fmt: skip
    """The choices of some seeds, shaped as ``seed``."""
    state = tl.load(lifecycle + seed * lifecycle_stride, mask=covered, other=-1)
    row = tl.load(blueprint + seed * blueprint_stride, mask=covered, other=0)
    kind = tl.load(operator + seed * operator_stride, mask=covered, other=0)
    active = (state >= 0) & (state < 32) & (((ACTIVE_STATES >> (state & 31)) & 1) == 1)
    row = tl.where((row >= 0) & (row < bank_rows), row, bank_rows)
    kind = tl.where((kind == 0) | (kind == 1), kind, 2)
    return tl.where(active, row * 4 + kind, -1)


@triton.jit
def weight_of(bank, choice, column, features, bank_rows, bank_stride):  # type: ignore[no-untyped-def]
    """The blueprints of some choices at some columns: NaN where the bank has none, and where none is chosen."""
    row = (choice >> 2).to(tl.int64)
    mask = (row >= 0) & (row < bank_rows) & (column < features)
    return tl.load(bank + row * bank_stride + column, mask=mask, other=float("nan"))


@triton.jit  # type: ignore[untyped-decorator]
def scale_and_shift(choice, a, weight, SIMPLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What choices do to x with alpha a and a blueprint's weight: x * scale + shift."""
    operator = choice & 3
    if SIMPLE:
        scale = tl.where(operator == 0, weight, tl.where(operator == 1, 1.0, 0.5))
        shift = tl.where(operator == 0, -0.0, tl.where(operator == 1, weight, 0.5 * weight))
    else:
        scale = tl.where(operator == 0, a * weight + (1.0 - a), tl.where(operator == 1, weight, 1.0))
        shift = tl.where(operator <= 1, -0.0, weight)
    return tl.where(choice >= 0, scale, 1.0), tl.where(choice >= 0, shift, -0.0)


@triton.jit  # type: ignore[untyped-decorator]
def sums_of_tiles(values, STACKED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the rows and columns of tiles [STACKED, ROWS, N, WIDTH], [STACKED, 1, N, 1]."""
    # One reduction, not one by rows and one by columns, so that threads wait for each other once.
    tiles = tl.reshape(tl.permute(values, (0, 2, 1, 3)), (STACKED, N, ROWS * WIDTH))
    return tl.reshape(tl.sum(tiles, 2), (STACKED, 1, N, 1))
