"""The product of rms_norm_linear and layer_norm_linear on a Hopper GPU, written in Gluon for its warp groups.

    z = r * (x @ folded^T - mean * sums^T) + constant^T

with folded = round(weight * scale), sums its sums over K, constant = weight @ shift + bias: the rows of x go to the
tensor cores as they are, and their norm is applied to the result. One warp loads tiles of x and folded through the copy
engine; two warp groups multiply; two warps read the tiles of x in shared memory too, for the statistics of its rows,
which therefore cost no pass over x. Programs stay and take one tile after another, so that loading goes on while a
result is stored.

Shapes: R rows, K inner, N outputs.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

# Renamed between Triton 3.6 and 3.9.
if hasattr(tma, "async_load"):
    load_tile, store_tile = tma.async_load, tma.async_store
else:
    load_tile, store_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

if "functions_and_args" not in inspect.signature(gl.warp_specialize).parameters:
    raise ImportError("its warp_specialize takes other arguments")

MEASURING_WARPS = gl.constexpr(2)
"""With the one that loads and the eight that multiply no more than twelve, or none could have the registers for it."""


@gluon.jit  # type: ignore[untyped-decorator]
def _load(  # type: ignore[no-untyped-def]
    x, folded, x_tiles, folded_tiles, full, empty, row_blocks, blocks, inner,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: asks for tiles of x and folded as places for them become empty.

    The kernel that folds may still be running at first; tiles of x need not wait for it.
    """
    steps = inner // BLOCK_K
    early = gl.minimum(steps, STAGES)
    block_row, block = gl.program_id(0) // blocks, gl.program_id(0) % blocks
    for step in range(early):
        mbarrier.expect(full.index(step), x.block_type.nbytes + folded.block_type.nbytes)
        load_tile(x, [block_row * BLOCK_M, step * BLOCK_K], full.index(step), x_tiles.index(step))
    gdc_wait()
    for step in range(early):
        load_tile(folded, [block * BLOCK_N, step * BLOCK_K], full.index(step), folded_tiles.index(step))
    for count in range(early, steps * gl.cdiv(row_blocks * blocks - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + count // steps * gl.num_programs(0)
        block_row, block = tile // blocks, tile % blocks
        start = count % steps * BLOCK_K
        stage = count % STAGES
        mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), x.block_type.nbytes + folded.block_type.nbytes)
        load_tile(x, [block_row * BLOCK_M, start], full.index(stage), x_tiles.index(stage))
        load_tile(folded, [block * BLOCK_N, start], full.index(stage), folded_tiles.index(stage))


@gluon.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    x_tiles, full, empty, done, STAGES: gl.constexpr, CENTRED: gl.constexpr, LAYOUT: gl.constexpr
):
    """Sums of eight neighbours in a row, and of their squares; nothing leaves a thread."""
    ROWS: gl.constexpr = x_tiles.shape[1]
    EIGHTS: gl.constexpr = x_tiles.shape[2] // 8
    stage = done % STAGES
    mbarrier.wait(full.index(stage), done // STAGES & 1)
    value = x_tiles.index(stage).load(LAYOUT)
    mbarrier.arrive(empty.index(stage), count=1)
    value = value.to(gl.float32)
    squares = gl.sum(gl.reshape(value * value, [ROWS, EIGHTS, 8]), 2)
    total = squares
    if CENTRED:
        total = gl.sum(gl.reshape(value, [ROWS, EIGHTS, 8]), 2)
    return total, squares


@gluon.jit  # type: ignore[untyped-decorator]
def _measure(  # type: ignore[no-untyped-def]
    flags, x_tiles, full, empty, rstds, shifts, told, taken, row_blocks, blocks, inner, eps, limit,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CENTRED: gl.constexpr,
):  # fmt: skip
    """Two warps: the statistics of each tile's rows. Flags [row blocks] tell where a mean exceeds limit / r.

    Up to there float32 loses less of the variance as a difference of sums than the result's rounding does.
    """
    EIGHTS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [MEASURING_WARPS, 1], [1, 0])
    done = 0
    for turn in range(gl.cdiv(row_blocks * blocks - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        block_row, block = tile // blocks, tile % blocks
        total, squares = _sums(x_tiles, full, empty, done, STAGES, CENTRED, EIGHTS)
        done += 1
        for _ in range(BLOCK_K, inner, BLOCK_K):
            more, more_squares = _sums(x_tiles, full, empty, done, STAGES, CENTRED, EIGHTS)
            total += more
            squares += more_squares
            done += 1
        square = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(1, EIGHTS)) / inner
        if CENTRED:
            mean = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, EIGHTS)) / inner
            square = gl.maximum(square - mean * mean, 0.0)
        rstd = gl.rsqrt(square + eps)
        mbarrier.wait(taken, (turn & 1) ^ 1)
        rstds.store(rstd)
        if CENTRED:
            shifts.store(mean * rstd)
            if block == 0:
                gl.store(flags + block_row, gl.max(gl.abs(mean * rstd), 0) > limit)
        mbarrier.arrive(told, count=1)


@gluon.jit
def _halves(tile):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile's columns."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    return gl.split(gl.permute(gl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@gluon.jit
def _store(target, part, out, turn, row, column):  # type: ignore[no-untyped-def]
    """Leaves part to the copy engine, in the place that it has had time to read from; returns the next turn."""
    tma.store_wait(1)
    place = out.index(turn % 2)
    place.store(part.to(target.dtype))
    fence_async_shared()
    store_tile(target, [row, column], place)
    return turn + 1


@gluon.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    part, shift, sums, constant, y, z, out, turn, row, column, count,
    CENTRED: gl.constexpr, CONSTANT: gl.constexpr, GELU: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Stores some columns of a tile; shift is mean * r of its rows."""
    LAYOUT: gl.constexpr = part.type.layout
    at = column + gl.arange(0, part.shape[1], gl.SliceLayout(0, LAYOUT))
    if CENTRED:
        factor = gl.load(sums + at, mask=at < count, other=0.0)
        part = part - gl.convert_layout(shift, gl.SliceLayout(1, LAYOUT))[:, None] * factor[None, :]
    if CONSTANT:
        part = part + gl.load(constant + at, mask=at < count, other=0.0)[None, :]
    if GELU:
        if KEEP:
            turn = _store(z, part, out, turn, row, column)
        part = 0.5 * part * (1.0 + gl.erf(part * 0.7071067811865476))
    return _store(y, part, out, turn, row, column)


@gluon.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    sums, constant, y, z, x_tiles, folded_tiles, full, empty, rstds, shifts, told, taken, out, row_blocks, blocks,
    count, inner,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, CENTRED: gl.constexpr, CONSTANT: gl.constexpr, GELU: gl.constexpr, KEEP: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Eight warps: multiply, apply the norm, store."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    done = 0
    stored = 0
    for turn in range(gl.cdiv(row_blocks * blocks - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        block_row, block = tile // blocks, tile % blocks
        stage = done % STAGES
        mbarrier.wait(full.index(stage), done // STAGES & 1)
        result = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, MMA)
        result = warpgroup_mma(
            x_tiles.index(stage), folded_tiles.index(stage).permute((1, 0)), result, use_acc=False, is_async=True
        )
        result = warpgroup_mma_wait(1, deps=[result])
        done += 1
        for _ in range(BLOCK_K, inner, BLOCK_K):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            result = warpgroup_mma(
                x_tiles.index(stage), folded_tiles.index(stage).permute((1, 0)), result, is_async=True
            )
            # The product before this one is done, so its tiles may go.
            result = warpgroup_mma_wait(1, deps=[result])
            mbarrier.arrive(empty.index((done - 1) % STAGES), count=1)
            done += 1
        result = warpgroup_mma_wait(0, deps=[result])
        mbarrier.arrive(empty.index((done - 1) % STAGES), count=1)
        mbarrier.wait(told, turn & 1)
        rstd = rstds.load(gl.SliceLayout(1, MMA))
        shift = rstd
        if CENTRED:
            shift = shifts.load(gl.SliceLayout(1, MMA))
        mbarrier.arrive(taken, count=1)
        result = result * rstd[:, None]
        parts = (result,)
        if PARTS == 2:
            parts = _halves(result)
        if PARTS == 4:
            left, right = _halves(result)
            parts = _halves(left) + _halves(right)
        for part in gl.static_range(PARTS):
            stored = _finish(
                parts[part], shift, sums, constant, y, z, out, stored, block_row * BLOCK_M,
                block * BLOCK_N + part * (BLOCK_N // PARTS), count, CENTRED, CONSTANT, GELU, KEEP,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x, folded, y, z, sums, constant, flags, rows, count, inner, eps, limit,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, CENTRED: gl.constexpr, CONSTANT: gl.constexpr, GELU: gl.constexpr, KEEP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Programs take tiles of y and z [R, N] in turn; x [R, K], folded [N, K], y and z are descriptors of tensors.

    K is a multiple of BLOCK_K; sums and constant are float32 [N].
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    folded_tiles = gl.allocate_shared_memory(folded.dtype, [STAGES, BLOCK_N, BLOCK_K], folded.layout)
    out = gl.allocate_shared_memory(y.dtype, [2, BLOCK_M, BLOCK_N // PARTS], y.layout)
    rstds = gl.allocate_shared_memory(gl.float32, [BLOCK_M], ROWS)
    shifts = gl.allocate_shared_memory(gl.float32, [BLOCK_M], ROWS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    taken = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        # By those who multiply and those who measure.
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(told, count=1)
    mbarrier.init(taken, count=1)
    row_blocks = gl.cdiv(rows, BLOCK_M)
    blocks = gl.cdiv(count, BLOCK_N)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    sums, constant, y, z, x_tiles, folded_tiles, full, empty, rstds, shifts, told, taken, out,
                    row_blocks, blocks, count, inner, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS, CENTRED,
                    CONSTANT, GELU, KEEP, num_warps,
                ),
            ),
            (
                _measure,
                (
                    flags, x_tiles, full, empty, rstds, shifts, told, taken, row_blocks, blocks, inner, eps, limit,
                    BLOCK_M, BLOCK_K, STAGES, CENTRED,
                ),
            ),
            (
                _load,
                (
                    x, folded, x_tiles, folded_tiles, full, empty, row_blocks, blocks, inner, BLOCK_M, BLOCK_N,
                    BLOCK_K, STAGES,
                ),
            ),
        ],
        [MEASURING_WARPS, 1],
        [96, 24],
    )  # fmt: skip


DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@lru_cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])


def descriptor(tensor: Tensor, shape: tuple[int, int], stride: int, block: tuple[int, int]) -> Any:
    """Of a matrix in tensor whose rows are stride elements apart, for tiles of block."""
    return TensorDescriptor(tensor, list(shape), [stride, 1], list(block), _layout(block, tensor.dtype))
