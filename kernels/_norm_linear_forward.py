"""How the forward pass of rms_norm_linear and layer_norm_linear is launched: one of three ways.

On a Hopper GPU numbers of 16 bits in many rows go through :mod:`._norm_linear_hopper`: two launches and no copy of the
rows. After a layer norm a third one does rows again whose mean is far above their spread. Tiny problems take one launch
that normalises rows on the way to the product, tile by tile. All others take a normalised copy of the rows and the
library's product, which alone multiplies float32 numbers in torch's precision; so do few rows without a GELU, whose
copy stays in the cache.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _norm_linear_kernels as kernels
from . import _rows
from ._blocks import blocks_in

_SMALL = _rows.INTERPRETED.value
MOST_WARPS = 16
WARP_BYTES = 32 * 16
"""What a warp takes in one access of 16 bytes a thread."""
TILE_BYTES = 32 * 2**10 if _SMALL else 4096
"""Rows at once in kernels over rows: two accesses of four warps."""
FOLD_BYTES = 16 * 2**10
"""Weight rows of one program, which are all asked for at once; few programs leave other multiprocessors free for the
product's first tiles."""
REPAIR_SPLITS = 4
HOPPER_INNER = 64
"""Of a tile: 128 bytes a row are what its shared memory is swizzled by."""
TINY = 2**28
"""Up to so many products a launch takes longer than they do."""
FEW_ROWS = 4096


class Call(NamedTuple):
    """What a call computes besides the tensors: a mean is taken off, a GELU follows, eps."""

    centred: bool
    gelu: bool
    eps: float


def normalise(x: Tensor, scale: Tensor, shift: Tensor | None, call: Call) -> Tensor:
    """h [R, K] of x, whose rows may be any distance apart."""
    x, x_stride = _rows.as_rows(x)
    rows, inner = x.numel() // x.shape[-1], x.shape[-1]
    normed = x.new_empty(rows, inner)
    at_once, block = rows_at_once(inner, x.element_size(), TILE_BYTES)
    with _rows.on_device(x):
        kernels.normalise_kernel[(blocks_in(rows, at_once),)](
            x, scale, scale if shift is None else shift, normed, rows, inner, x_stride, call.eps,
            ROWS=at_once, BLOCK=block, CENTRED=call.centred, SHIFTED=shift is not None,
            num_warps=warps_for(at_once * block * x.element_size() // 2),
        )  # fmt: skip
    return normed


@lru_cache(maxsize=1024)
def rows_at_once(inner: int, itemsize: int, most_bytes: int) -> tuple[int, int]:
    """How many rows a program takes, and the block that holds one."""
    block = triton.next_power_of_2(inner)
    return max(1, min(32, most_bytes // (block * itemsize))), block


def warps_for(bytes_at_once: int) -> int:
    """Warps of which each thread takes 16 bytes."""
    return max(1, min(MOST_WARPS, bytes_at_once // WARP_BYTES))


class Tiles(NamedTuple):
    """How :func:`kernels.tile_kernel` cuts the result up, and what it is compiled with."""

    rows: int
    outputs: int
    inner: int
    group: int
    warps: int
    stages: int


class HopperTiles(NamedTuple):
    """How :func:`_norm_linear_hopper.product_kernel` cuts the result up; ``parts`` of a tile are stored one by one."""

    rows: int
    outputs: int
    inner: int
    stages: int
    parts: int
    warps: int


HOPPER_TILES = HopperTiles(128, 256, HOPPER_INNER, 3, 2, 8)
"""Three tiles of x and of folded and two parts of y take 208 of the 227 KiB of shared memory that a block can have."""
GELU_TILES = HopperTiles(128, 256, HOPPER_INNER, 4, 4, 8)
"""In smaller parts, for the function takes registers."""
STEEPEST = {torch.bfloat16: 64.0, torch.float16: 8.0}
"""Largest mean of a row in units of its spread that may be taken off a product instead of the row: the product's error,
relative to what is left, grows with it, and should stay below that of rounding."""


def in_tiles(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, call: Call, keep: bool,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z [R, N] in one launch, in the dtype's own precision."""
    x, x_stride = _rows.as_rows(x)
    rows, (count, inner) = x.numel() // x.shape[-1], weight.shape
    y = x.new_empty(rows, count)
    z = torch.empty_like(y) if keep else y
    grid = (blocks_in(rows, tiles.rows) * blocks_in(count, tiles.outputs),)
    with _rows.on_device(x):
        kernels.tile_kernel[grid](
            x, scale, scale if shift is None else shift, weight, y if bias is None else bias, y, z, rows, count, inner,
            x_stride, call.eps,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.inner, GROUP=tiles.group, CENTRED=call.centred,
            SHIFTED=shift is not None, BIASED=bias is not None, GELU=call.gelu, KEEP=keep,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y, z


def fits_hopper(x: Tensor, weight: Tensor) -> bool:
    """Whether the GPU is one, and its copy engine takes tensors like these."""
    count, inner = weight.shape
    if x.dtype == torch.float32 or inner % HOPPER_INNER or count % 8 or _hopper() is None:
        return False
    x, x_stride = _rows.as_rows(x)
    return x_stride % 8 == 0 and x.data_ptr() % 16 == 0


def _hopper() -> ModuleType | None:
    """:mod:`._norm_linear_hopper`, if the GPU that Triton launches on is one."""
    if _SMALL:
        return None
    return _hopper_on(triton.runtime.driver.active.get_current_device())


@cache
def _hopper_on(device: int) -> ModuleType | None:
    if triton.runtime.driver.active.get_current_target().arch != 90:
        return None
    try:
        from . import _norm_linear_hopper
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"norm and linear run slower: this Triton has another Gluon than 3.6 to 3.9 ({error})", stacklevel=2
        )
        return None
    return _norm_linear_hopper


def on_hopper(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, call: Call, keep: bool,
    tiles: HopperTiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z [R, N] by :mod:`._norm_linear_hopper`, with the norm's weight in the projection's."""
    hopper = _hopper()
    assert hopper is not None
    x, x_stride = _rows.as_rows(x)
    rows, (count, inner) = x.numel() // x.shape[-1], weight.shape
    y = x.new_empty(rows, count)
    z = torch.empty_like(y) if keep else y
    folded = torch.empty_like(weight)
    vectors = torch.empty(2, count, dtype=torch.float32, device=x.device)
    part = (tiles.rows, tiles.outputs // tiles.parts)
    row_blocks = blocks_in(rows, tiles.rows)
    flags = torch.empty(row_blocks, dtype=torch.int32, device=x.device)
    switches = {"SHIFTED": shift is not None, "BIASED": bias is not None}
    given = (scale, scale if shift is None else shift)
    offset = weight if bias is None else bias
    at_once, block = rows_at_once(inner, x.element_size(), FOLD_BYTES)
    programs = min(_rows.resident(1), row_blocks * blocks_in(count, tiles.outputs))
    with _rows.on_device(x):
        kernels.fold_kernel[(blocks_in(count, at_once),)](
            weight, *given, offset, folded, vectors[0], vectors[1], count, inner,
            ROWS=at_once, BLOCK=block, CENTRED=call.centred, **switches, num_warps=8,
        )  # fmt: skip
        hopper.product_kernel[(programs,)](
            hopper.descriptor(x, (rows, inner), x_stride, (tiles.rows, tiles.inner)),
            hopper.descriptor(folded, (count, inner), inner, (tiles.outputs, tiles.inner)),
            *(hopper.descriptor(one, (rows, count), count, part) for one in (y, z)),
            vectors[0], vectors[1], flags, rows, count, inner, call.eps, STEEPEST[x.dtype],
            BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.inner, STAGES=tiles.stages,
            PARTS=tiles.parts, CENTRED=call.centred, CONSTANT=any(switches.values()), GELU=call.gelu, KEEP=keep,
            num_warps=tiles.warps, launch_pdl=True,
        )  # fmt: skip
        if call.centred:
            kernels.repair_kernel[(row_blocks, REPAIR_SPLITS)](
                flags, x, *given, weight, offset, y, z, rows, count, inner, x_stride, call.eps,
                BLOCK_M=tiles.rows, BLOCK_N=64, BLOCK_K=32, **switches, GELU=call.gelu, KEEP=keep,
                num_warps=8, num_stages=2,
            )  # fmt: skip
    return y, z


def in_rows(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """y and z [R, N] by a normalised copy of x and the library's product, in torch's precision."""
    z = torch.nn.functional.linear(normalise(x, scale, shift, call), weight, bias)
    return (torch.nn.functional.gelu(z), z) if call.gelu else (z, z)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    gelu: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [..., N], and z of the same shape if it is to be kept for the backward pass of a GELU, else an empty tensor."""
    shape = (*x.shape[:-1], weight.shape[0])
    call = Call(centred, gelu, eps)
    if not x.numel() or not weight.numel():
        # Sums of nothing.
        z = x.new_zeros(shape) if bias is None else bias.expand(shape).clone(memory_format=torch.contiguous_format)
        y = torch.nn.functional.gelu(z) if gelu else z
        return y, (z if keep else x.new_empty(0))
    x, scale, weight = x.contiguous() if x.dim() == 1 else x, scale.contiguous(), weight.contiguous()
    shift, bias = (None if one is None else one.contiguous() for one in (shift, bias))
    rows = x.numel() // x.shape[-1]
    if (gelu or rows > FEW_ROWS) and fits_hopper(x, weight):
        y, z = on_hopper(x, scale, shift, weight, bias, call, keep, GELU_TILES if gelu else HOPPER_TILES)
    elif tiles := _tiles(rows, *weight.shape, x.dtype):
        y, z = in_tiles(x, scale, shift, weight, bias, call, keep, tiles)
    else:
        y, z = in_rows(x, scale, shift, weight, bias, call)
    return y.view(shape), (z.view(shape) if keep else x.new_empty(0))


@lru_cache(maxsize=1024)
def _tiles(rows: int, count: int, inner: int, dtype: torch.dtype) -> Tiles | None:
    """None where the product is left to the library."""
    if dtype == torch.float32 or rows * count * inner > TINY:
        return None
    return Tiles(32, 32, 64, 8, 4, 1) if _SMALL else Tiles(64, 64, 64, 8, 8, 3)
