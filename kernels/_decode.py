"""What the kernels for one row share: tiles and their tables, rows of weights kept in flight, launches that overlap.

One row makes every product a matrix-vector product, so a frame takes as long as its weights take to arrive, if nothing
else makes the memory wait. A program multiplies whole rows of the weight. It asks for its tiles of weights, which no
kernel of a frame changes, before it waits for the kernel in front, whose result it multiplies them with: weights of one
kernel arrive while the one in front still computes. Source: CUDA programming guide, programmatic dependent launch.

Cast order, that of an unfused model: the normalised value is rounded, multiplied by the norm's weight and rounded; a
product is summed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Tolerance

from . import _rows, _shared
from ._rows import DTYPES, INTERPRETED

TOLERANCE = {str(dtype).removeprefix("torch."): Tolerance() for dtype in DTYPES}
PLAIN, LATE, EARLY = 0, 1, 2
"""When the next kernel may start: once this one has ended, all its programs wait no more, or all have started."""
LARGEST_INNER = 2**16
"""Columns of a weight: a program keeps the row that it multiplies with in registers."""


MOST_ROWS = 2**30
"""Rows of a weight: they are counted in 32 bits, a few tiles beyond the end included."""


class Tiles(NamedTuple):
    """How a matrix-vector product is cut into programs; numbers only, so that an operator can take it.

    Attributes:
        rows: of the weight, or pairs of them, that a tile has; a power of two.
        columns: of a tile, a power of two; 256 times ``warps`` makes each thread load 16 bytes of bfloat16 a row.
        warps: of a program.
        steps: tiles of rows that a program does one after another.
        ahead: tiles asked for before the first is used; those of the first ``ahead`` arrive before the wait.
        overlap: ``PLAIN``, ``LATE`` or ``EARLY``; less than an H100 launches plainly in any case.
        evict: weights leave the L2 cache before anything else does.
    """

    rows: int
    columns: int
    warps: int
    steps: int = 1
    ahead: int = 8
    overlap: int = EARLY
    evict: int = 1

    def fitted(self, inner: int) -> Tiles:
        """The same for a weight with ``inner`` columns, which may be fewer than those of a tile.

        Raises:
            ValueError: there are more columns than registers can hold.
        """
        if inner > LARGEST_INNER:
            raise ValueError(f"one row of at most {LARGEST_INNER} numbers can be multiplied, and this one has {inner}")
        columns = min(self.columns, triton.next_power_of_2(inner))
        columns = max(columns, triton.next_power_of_2(-(-inner // MOST_CHUNKS)))
        return self._replace(columns=columns, ahead=min(self.ahead, self.steps * -(-inner // columns)))


MOST_CHUNKS = 16
MOST_INTERPRETED = 16
"""Programs of the interpreter, which takes about as long for one of many rows as for one of few."""
TILE_BYTES = 2**14
"""Of weights in a program: 132 multiprocessors with four programs each ask for 8.6 MB at once."""
CONFIGURATIONS = tuple(
    Tiles(rows, 256 * warps, warps, steps, ahead)
    for warps in (2, 4, 8)
    for rows in (1, 2, 4, 8, 16)
    for steps, ahead in ((1, 8), (2, 1), (2, 2), (4, 1), (4, 2))
    # 128 bytes a thread in flight are 32 registers, twice as many are too many beside what they become.
    if 16 * rows * ahead <= 256 or ahead == 8
)
"""What is worth measuring on a GPU, for any weight; ``overlap`` and ``evict`` are to be varied on the best of them."""


def linear_tiles(rows: int, inner: int, itemsize: int, table: Mapping[tuple[int, int], Tiles], pair: int = 1) -> Tiles:
    """Tiles of the table for a weight [pair * rows, inner] of 2-byte numbers, else by rule, that fit ``inner``."""
    found = table.get((rows, inner)) if itemsize == 2 else None
    if found is None:
        warps = 4 if inner <= 1024 or itemsize > 2 else 8
        columns = min(triton.next_power_of_2(inner), 256 * warps)
        chunks = min(8, -(-inner // columns))
        fitting = max(1, TILE_BYTES // (pair * columns * chunks * itemsize))
        found = Tiles(min(8, 2 ** (fitting.bit_length() - 1)), columns, warps)
    return found.fitted(inner)


class Plan(NamedTuple):
    """A launch but for its tensors; ``compiled_in`` is what a kernel is compiled for, in the order of its arguments."""

    programs: int
    compiled_in: tuple[int, ...]
    warps: int
    overlap: int


def linear_plan(
    rows: int,
    inner: int,
    itemsize: int,
    tiles: Sequence[int] | None,
    table: Mapping[tuple[int, int], Tiles],
    pair: int = 1,
) -> Plan:
    """For a weight [pair * rows, inner], with ROWS, COLUMNS, CHUNKS, STEPS, AHEAD, EVEN and EVICT compiled in.

    Raises:
        ValueError: the weight has more rows or columns than are counted here.
    """
    if pair * rows >= MOST_ROWS:
        raise ValueError(f"a weight with fewer than {MOST_ROWS} rows can be multiplied, and this one has {pair * rows}")
    chosen = Tiles(*tiles).fitted(inner) if tiles else linear_tiles(rows, inner, itemsize, table, pair)
    if not tiles and INTERPRETED.value:
        fewest = triton.next_power_of_2(-(-rows // (chosen.steps * MOST_INTERPRETED)))
        chosen = chosen._replace(rows=max(chosen.rows, fewest))
    chunks = -(-inner // chosen.columns)
    even = inner == chunks * chosen.columns
    return Plan(
        -(-rows // (chosen.rows * chosen.steps)),
        (chosen.rows, chosen.columns, chunks, chosen.steps, chosen.ahead, even, bool(chosen.evict)),
        chosen.warps,
        chosen.overlap,
    )


@triton.jit  # type: ignore[untyped-decorator]
def started(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """At a program's start: the next kernel may start as well, if it may so early."""
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """All kernels in front have ended below this line: what they wrote is read there, and nothing is written above."""
    if OVERLAP > 0:
        tl.extra.cuda.gdc_wait()
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def round_to(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, float32, rounded to DTYPE and float32 again."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # Of these values a cast to bfloat16 is exact, in the interpreter too.
        return _shared.nearest_bfloat16(x)
    return x.to(DTYPE).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def vectors(x, inner, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [inner] as CHUNKS vectors [COLUMNS] of float32, zero beyond the end."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        found = found + (tl.load(x + column, mask=column < inner, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return found


@triton.jit  # type: ignore[untyped-decorator]
def normalised(values, factors, inner, eps, CHUNKS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors over their common root mean square, times factors, rounded to DTYPE after each."""
    squares = values[0] * values[0]
    for chunk in tl.static_range(1, CHUNKS):
        squares += values[chunk] * values[chunk]
    scale = tl.rsqrt(tl.sum(squares) / inner + eps)
    found = ()
    for chunk in tl.static_range(CHUNKS):
        found = found + (round_to(round_to(values[chunk] * scale, DTYPE) * factors[chunk], DTYPE),)  # type: ignore[assignment]
    return found


@triton.jit  # type: ignore[untyped-decorator]
def weight_tile(  # type: ignore[no-untyped-def]
    weight, row, count, inner, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """Chunk CHUNK of the rows row [ROWS], those below count, of weight [count, inner]; zero beyond."""
    column = CHUNK * COLUMNS + tl.arange(0, COLUMNS)
    pointer = weight + row[:, None].to(tl.int64) * inner + column[None, :]
    mask = (row < count)[:, None]
    if not EVEN:
        mask = mask & (column < inner)[None, :]
    POLICY: tl.constexpr = "evict_first" if EVICT else ""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit  # type: ignore[untyped-decorator]
def asked_for(  # type: ignore[no-untyped-def]
    weight, row, count, inner, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The first AHEAD tiles of a program in the order of their use: chunks of a step, whose rows are STRIDE apart."""
    queue = ()
    for place in tl.static_range(AHEAD):
        rows = row + (place // CHUNKS) * STRIDE
        queue = queue + (weight_tile(weight, rows, count, inner, COLUMNS, place % CHUNKS, EVEN, EVICT),)  # type: ignore[assignment]
    return queue


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    queue, x, weight, row, count, inner, STEP: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Rows of step STEP times the vectors x, float32, and the queue with what was asked for instead of its tiles."""
    WIDEST: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = COLUMNS if COLUMNS < WIDEST else WIDEST
    total = tl.zeros([row.shape[0], COLUMNS // RUN], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        product = queue[0].to(tl.float32) * x[chunk][None, :]
        # A thread adds up what it has loaded at once before anything is exchanged, which keeps fewer registers.
        total += tl.sum(tl.reshape(product, [row.shape[0], COLUMNS // RUN, RUN]), 2)
        queue = queue[1:]
        if STEP * CHUNKS + chunk + AHEAD < STEPS * CHUNKS:
            rows = row + ((STEP * CHUNKS + chunk + AHEAD) // CHUNKS) * STRIDE
            following = (chunk + AHEAD) % CHUNKS
            queue = queue + (weight_tile(weight, rows, count, inner, COLUMNS, following, EVEN, EVICT),)
    return tl.sum(total, 1), queue


def launch(kernel: Any, plan: Plan, device: torch.device, *tensors: Any) -> None:
    """Launches a kernel with its tensors, what it is compiled for, and the overlap that the device is capable of."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, plan, torch.device("cuda", torch.cuda.current_device()), *tensors)
    else:
        overlap = plan.overlap if _rows.overlaps() else PLAIN
        options = _rows.overlapping(overlap != PLAIN)
        kernel[(plan.programs,)](*tensors, *plan.compiled_in, overlap, num_warps=plan.warps, **options)


def check(kernel: str, first: Tensor, shapes: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Contiguous tensors of these shapes, of one dtype and on one device with ``first``.

    Raises:
        ValueError: one is not, or has no elements.
    """
    dtype, device = first.dtype, first.device
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype == dtype and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
            continue
        raise ValueError(
            f"{kernel} takes {name} contiguous, {list(shape)}, {dtype}, on {device}; it is {list(tensor.shape)} with "
            f"strides {list(tensor.stride())}, {tensor.dtype}, on {tensor.device}"
        )
    if dtype not in DTYPES or not all(tensor.numel() for tensor, _ in shapes.values()):
        raise ValueError(f"{kernel} takes float32, bfloat16 and float16, at least one number of each; it got {dtype}")


def check_tables(
    kernel: str, device: torch.device, tables: Mapping[str, Tensor], position: Tensor, column: int
) -> None:
    """Contiguous int64 tables of one shape [M, G] with this column, and a position [1] int64, all on the device.

    Raises:
        ValueError: one is not.
    """
    shape = next(iter(tables.values())).shape
    for name, (tensor, wanted) in {
        **{name: (table, shape) for name, table in tables.items()},
        "position": (position, (1,)),
    }.items():
        fits = tensor.shape == wanted and tensor.dtype == torch.int64 and tensor.device == device
        if not fits or not tensor.is_contiguous():
            raise ValueError(
                f"{kernel} takes {name} contiguous, {list(wanted)}, int64, on {device}; it is {list(tensor.shape)} "
                f"with strides {list(tensor.stride())}, {tensor.dtype}, on {tensor.device}"
            )
    if len(shape) != 2 or not shape[0] or not 0 <= column < shape[1]:
        raise ValueError(f"{kernel} takes tables [positions, codes] with a column {column}; they are {list(shape)}")


def check_counters(kernel: str, device: torch.device, counters: Tensor, count: int) -> None:
    """At least ``count`` counters, int32, contiguous and on the device.

    Raises:
        ValueError: they are not.
    """
    fits = counters.dim() == 1 and counters.numel() >= count and counters.dtype == torch.int32
    if not fits or counters.device != device or not counters.is_contiguous():
        raise ValueError(
            f"{kernel} takes counters [{count} or more], int32, contiguous, on {device}; they are "
            f"{list(counters.shape)} with strides {list(counters.stride())}, {counters.dtype}, on {counters.device}"
        )


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``kernbench::`` of a schema, without what ``custom_op`` adds, which takes longer than a launch."""
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    for key, function in {"CPU": implementation, "CUDA": implementation, "Meta": fake}.items():
        _LIBRARY.impl(name, function, key)  # type: ignore[no-untyped-call]
    return getattr(torch.ops.kernbench, name).default
