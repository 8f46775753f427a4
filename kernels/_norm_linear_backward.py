"""How the backward pass of rms_norm_linear and layer_norm_linear is launched, in every way of the forward pass.

The products are the library's. One kernel turns dh into dx and makes h again for the gradient of the weight, another
takes dy through the GELU; the programs of both add up the gradients of vectors over their rows, and a sum over the
programs follows, always in one order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _norm_linear_kernels as kernels
from . import _rows
from ._blocks import blocks_in
from ._norm_linear_forward import TILE_BYTES, WARP_BYTES, Call, normalise, rows_at_once, warps_for

_SMALL = _rows.INTERPRETED.value
RESIDENT_WARPS = 24
PIPELINE_BYTES = 96 * 1024
"""Shared memory for rows under way; a multiprocessor of an A100 has 164 KiB."""
GELU_ROWS, GELU_COLUMNS = (16, 128) if _SMALL else (8, 512)


def backward(
    dy: Tensor, z: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float, centred: bool,
    gelu: bool, for_input: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, scale, shift, weight and bias; empty tensors for those not asked for. ``for_input`` asks for the
    first three."""
    count, inner = weight.shape
    nothing = x.new_empty(0)
    if not x.numel() or not weight.numel():
        return (
            torch.zeros_like(x, memory_format=torch.contiguous_format) if for_input else nothing,
            torch.zeros_like(scale) if for_input else nothing,
            torch.zeros_like(scale) if for_input and shift is not None else nothing,
            torch.zeros_like(weight) if for_weight else nothing,
            dy.sum_to_size(count) if for_bias else nothing,
        )
    call = Call(centred, gelu, eps)
    dbias = nothing
    if gelu:
        dz, dbias = _gelu_backward(dy, z, for_bias)
    else:
        dz = dy.reshape(-1, count)
        if for_bias:
            dbias = dz.sum(0)
    scale, shift = scale.contiguous(), None if shift is None else shift.contiguous()
    dx = dscale = dshift = dweight = normed = nothing
    if for_input:
        dx, normed, dscale, dshift = _rows_backward(dz @ weight, x, scale, shift, call, for_weight, nothing)
    if for_weight:
        dweight = dz.T @ (normed if for_input else normalise(x, scale, shift, call))
    return dx, dscale, dshift, dweight, dbias


def _gelu_backward(dy: Tensor, z: Tensor, for_bias: bool) -> tuple[Tensor, Tensor]:
    """dz and dbias [R, N]."""
    dy, dy_stride = _rows.as_rows(dy)
    count = z.shape[-1]
    rows = z.numel() // count
    dz = z.new_empty(rows, count)
    chunk, programs, blocks = _gelu_plan(rows, count)
    partial = torch.empty(programs, count, dtype=torch.float32, device=z.device)
    with _rows.on_device(z):
        kernels.gelu_backward_kernel[(programs, blocks)](
            dy, z, dz, partial, rows, count, dy_stride, chunk, ROWS=GELU_ROWS, BLOCK=GELU_COLUMNS, num_warps=8
        )
    return dz, partial.sum(0).to(z.dtype) if for_bias else partial


@lru_cache(maxsize=1024)
def _gelu_plan(rows: int, count: int) -> tuple[int, int, int]:
    """Rows of one program, programs that share all rows, and blocks of columns."""
    blocks = blocks_in(count, GELU_COLUMNS)
    chunk = GELU_ROWS * blocks_in(rows, GELU_ROWS * max(1, _rows.resident(8) // blocks))
    return chunk, blocks_in(rows, chunk), blocks


def _rows_backward(
    dnormed: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, call: Call, keep: bool, nothing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x, h once more if it is to be kept, and the gradients of scale and shift."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = x.shape[-1]
    rows = x.numel() // inner
    x, x_stride = _rows.as_rows(x)
    normed = x.new_empty(rows, inner) if keep else dx
    plan = _plan(rows, inner, x.element_size())
    dscale = torch.empty(plan.programs, inner, dtype=torch.float32, device=x.device)
    dshift = dscale if shift is None else torch.empty_like(dscale)
    with _rows.on_device(x):
        kernels.backward_rows_kernel[(plan.programs,)](
            dnormed, x, scale, scale if shift is None else shift, dx, normed, dscale, dshift, rows, inner, inner,
            x_stride, call.eps, plan.chunk,
            ROWS=plan.at_once, BLOCK=plan.block, CENTRED=call.centred, SHIFTED=shift is not None, KEEP=keep,
            STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return (
        dx,
        normed,
        dscale.sum(0).to(x.dtype),
        nothing if shift is None else dshift.sum(0).to(x.dtype),
    )


class _Plan(NamedTuple):
    """How a backward pass over rows is launched: programs of chunk rows each, and what one works on at once."""

    chunk: int
    programs: int
    at_once: int
    block: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def _plan(rows: int, inner: int, itemsize: int) -> _Plan:
    at_once, block = rows_at_once(inner, itemsize, TILE_BYTES)
    held = at_once * block * itemsize
    accesses = 1 if held <= 8 * WARP_BYTES else 2
    warps = warps_for(held // accesses)
    on_each = max(1, RESIDENT_WARPS // (warps * accesses))
    chunk = at_once * blocks_in(rows, at_once * _rows.resident(on_each))
    stages = min(3, chunk // at_once, 1 + PIPELINE_BYTES // (2 * held * on_each))
    return _Plan(chunk, blocks_in(rows, chunk), at_once, block, warps, stages)
