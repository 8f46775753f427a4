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
LIFECYCLE, BLUEPRINT, EPOCHS, STRATEGY, PARENT = (tl.constexpr(column) for column in range(5))
"""Columns of a seed's state [S, 8]; updates of it have values for the first four."""
TRAINING, GRAFTING, STABILIZATION, FINE_TUNING = (tl.constexpr(life) for life in (2, 3, 4, 6))
"""Those of a seed's eleven lifecycles that its bookkeeping tells apart."""
MOST_WIDTH = 64
FEW = 2**12 if triton.knobs.runtime.interpret else 2**18
"""Up to so many elements, small tiles spread over more multiprocessors. The interpreter takes few for many."""
LONG_ROW = 2**20
"""Bytes from which on a row of x is long."""

SWEPT = (100, 200, 500, 1000, 2000, 5000, 10_000)
"""Numbers of seeds that bench walks through; the bytes stay, so that a time which changes is the seeds'."""
SWEPT_ROWS, SWEPT_COLUMNS = 128, 640_000
SWEPT_FIXED = f"{SWEPT_ROWS} rows of about {SWEPT_COLUMNS:,} columns"


class Shape(NamedTuple):
    """How a pass cuts x up: the elements of a program, and those of a thread.

    ``streams`` says that x leaves the caches before anything else does, and that y passes them by.
    """

    elements: int
    a_thread: int
    streams: bool = False


FORWARD, BACKWARD = "forward", "backward"
ROWS = 64
"""Most of a tile."""
FEW_ELEMENTS = Shape(1024, 8)
LONG_ROWS = Shape(4096, 32)
SHAPES = {
    (FORWARD, 4): Shape(4096, 16),
    (FORWARD, 2): Shape(4096, 32, streams=True),
    (BACKWARD, 4): Shape(4096, 32),
    (BACKWARD, 2): Shape(4096, 32),
}
"""By pass, and bytes of a number of x, where there are many elements and rows are not long.

A program has as many bytes under way as fit beside six others on a multiprocessor, and a thread enough of them
to share the price of addresses, of what is looked up, and of reductions. The rows of the forward pass are those of its
statistics, which do not depend on how x is rounded; the backward adds columns up over its own, and writes a number of
each, so that fewer rows cost bytes. Why float32 wants half as many elements a thread unless rows are long, which makes
3 % of the time at 4096 x 8192 and costs 6 % at 128 x 640,000, is measured and not explained.
"""


class Tiles(NamedTuple):
    """How statistics of x [batch, features] are cut up: tiles of rows x width, [parts, granules] of them in all."""

    rows: int
    width: int
    parts: int
    granules: int


class Grid(NamedTuple):
    """How x is handed to programs: each takes a tile of some granules side by side; ``blocks`` of them make a part.

    ``even`` says that all programs have all of their rows and columns, so that nothing needs a mask; ``streams`` is
    that of the shape.
    """

    granules: int
    blocks: int
    warps: int
    even: bool
    streams: bool


def width_of(chunk: int) -> int:
    """Columns of a tile, which is also called a granule: the largest power of two that divides the chunk, to 64."""
    return math.gcd(chunk, MOST_WIDTH)


def shape_of(batch: int, features: int, itemsize: int, direction: str) -> Shape:
    """How a pass cuts up x of these sizes."""
    if batch * features <= FEW:
        return FEW_ELEMENTS
    long = itemsize == 4 and features * itemsize >= LONG_ROW
    return LONG_ROWS if long else SHAPES[direction, itemsize]


def tiles_of(batch: int, features: int, seeds: int, chunk: int) -> Tiles:
    """The tiles of the columns that seeds own; the last ones of a row or column may be cut off by the end of x."""
    rows, width = min(ROWS, int(triton.next_power_of_2(max(1, batch)))), width_of(chunk)
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
    shape = shape_of(batch, features, itemsize, direction)
    tiles = tiles_of(batch, features, seeds, chunk)
    there = int(triton.next_power_of_2(max(1, triton.cdiv(features, tiles.width))))
    granules = min(there, max(1, shape.elements // (tiles.rows * tiles.width)))
    columns = granules * tiles.width
    warps = max(1, min(8, tiles.rows * columns // (32 * shape.a_thread)))
    even = batch % tiles.rows == 0 == features % columns and tiles.granules * tiles.width == features
    return tiles, Grid(granules, triton.cdiv(features, columns), warps, even, shape.streams)


@triton.jit  # type: ignore[untyped-decorator]
def choice_of(  # type: ignore[no-untyped-def]
    lifecycle, blueprint, operator, seed, covered, bank_rows,
    lifecycle_stride, blueprint_stride, operator_stride, ACTIVE_STATES: tl.constexpr,
):  # fmt: skip
    """The choices of some seeds, [1, N, 1]."""
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
def sum_of_granule(tile, ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the rows and columns of each granule of a tile [ROWS, N, WIDTH], [1, N, 1]."""
    # One reduction, not one by rows and one by columns, so that threads wait for each other once.
    return tl.reshape(tl.sum(tl.reshape(tl.permute(tile, (1, 0, 2)), (N, ROWS * WIDTH)), 1), (1, N, 1))
