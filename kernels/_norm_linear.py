"""What rms_norm_linear and layer_norm_linear share: which kernels run, the operator, and its gradients.

    n = (x - mean) * r,  r = 1 / sqrt(mean((x - mean)^2) + eps);  an RMS norm takes nothing off
    h = n * scale + shift,  z = h @ weight^T + bias,  y = z or gelu(z)
    dz = dy * gelu'(z),  dbias = sum of dz over rows,  dweight = dz^T @ h,  dh = dz @ weight
    dscale = sum of dh * n over rows,  dshift = sum of dh
    dx = r * (g - n * mean(g * n) - mean(g)),  g = dh * scale;  the last mean in a layer norm alone

Cast order: everything up to h is float32, h is rounded to the dtype; products add up in float32, z and y are rounded
when stored. The gradients dz, dh and all results are rounded when stored.

The backward pass keeps x, and z for a GELU. It makes h again in the kernel that turns dh into dx and reads both anyway.

Shapes: R rows, K inner, N outputs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _norm_linear_kernels as kernels
from . import _rows

_SMALL = _rows.INTERPRETED.value
WHOLE = 16384
"""Longest row, which is kept in registers: 32 numbers a thread, of three tensors at once in the backward pass."""
MOST_WARPS = 16
WARP_BYTES = 32 * 16
"""What a warp takes in one access of 16 bytes a thread."""
RESIDENT_WARPS = 24
PIPELINE_BYTES = 96 * 1024
"""Shared memory for rows under way; a multiprocessor of an A100 has 164 KiB."""
GELU_ROWS, GELU_COLUMNS = (4, 64) if _SMALL else (8, 512)


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
    block = triton.next_power_of_2(inner)
    with _rows.on_device(x):
        kernels.normalise_kernel[(rows,)](
            x, scale, scale if shift is None else shift, normed, inner, x_stride, call.eps,
            BLOCK=block, CENTRED=call.centred, SHIFTED=shift is not None,
            num_warps=_warps(block * x.element_size()),
        )  # fmt: skip
    return normed


def _warps(bytes_at_once: int) -> int:
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


def in_tiles(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, call: Call, keep: bool,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z [R, N] in one launch, in the dtype's own precision."""
    x, x_stride = _rows.as_rows(x)
    rows, (count, inner) = x.numel() // x.shape[-1], weight.shape
    y = x.new_empty(rows, count)
    z = torch.empty_like(y) if keep else y
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(count, tiles.outputs),)
    with _rows.on_device(x):
        kernels.tile_kernel[grid](
            x, scale, scale if shift is None else shift, weight, y if bias is None else bias, y, z, rows, count, inner,
            x_stride, call.eps,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.inner, GROUP=tiles.group, CENTRED=call.centred,
            SHIFTED=shift is not None, BIASED=bias is not None, GELU=call.gelu, KEEP=keep,
            PRECISION="ieee", num_warps=tiles.warps, num_stages=tiles.stages,
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
    tiles = _tiles(x.numel() // x.shape[-1], *weight.shape, x.dtype)
    if tiles:
        y, z = in_tiles(x, scale, shift, weight, bias, call, keep, tiles)
    else:
        y, z = in_rows(x, scale, shift, weight, bias, call)
    return y.view(shape), (z.view(shape) if keep else x.new_empty(0))


@lru_cache(maxsize=1024)
def _tiles(rows: int, count: int, inner: int, dtype: torch.dtype) -> Tiles | None:
    """None where the library's product is the faster one."""
    if dtype == torch.float32:
        return None
    return Tiles(32, 32, 64, 8, 4, 1) if _SMALL else Tiles(64, 128, 64, 8, 4, 3)


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
            dy.reshape(-1, count).sum(0) if for_bias else nothing,
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
        dx, normed, dscale, dshift = _rows_backward(dz @ weight, x, scale, shift, call, for_weight)
    if for_weight:
        dweight = dz.T @ (normed if for_input else normalise(x, scale, shift, call))
    return dx, dscale, dshift, dweight, dbias


def _gelu_backward(dy: Tensor, z: Tensor, for_bias: bool) -> tuple[Tensor, Tensor]:
    """dz and dbias [R, N]."""
    dy, dy_stride = _rows.as_rows(dy)
    count = z.shape[-1]
    rows = z.numel() // count
    dz = z.new_empty(rows, count)
    blocks = triton.cdiv(count, GELU_COLUMNS)
    chunk = GELU_ROWS * triton.cdiv(rows, GELU_ROWS * max(1, _rows.resident(8) // blocks))
    programs = triton.cdiv(rows, chunk)
    partial = torch.empty(programs, count, dtype=torch.float32, device=z.device)
    with _rows.on_device(z):
        kernels.gelu_backward_kernel[(programs, blocks)](
            dy, z, dz, partial, rows, count, dy_stride, chunk, ROWS=GELU_ROWS, BLOCK=GELU_COLUMNS, num_warps=8
        )
    return dz, partial.sum(0).to(z.dtype) if for_bias else partial


def _rows_backward(
    dnormed: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, call: Call, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x, h once more, and the gradients of scale and shift."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = x.shape[-1]
    rows = x.numel() // inner
    x, x_stride = _rows.as_rows(x)
    normed = x.new_empty(rows, inner) if keep else dx
    plan = _plan(rows, inner, x.element_size(), 4 if keep else 3)
    dscale = torch.empty(plan.programs, inner, dtype=torch.float32, device=x.device)
    dshift = dscale if shift is None else torch.empty_like(dscale)
    with _rows.on_device(x):
        kernels.backward_rows_kernel[(plan.programs,)](
            dnormed, x, scale, scale if shift is None else shift, dx, normed, dscale, dshift, rows, inner, inner,
            x_stride, call.eps, plan.chunk,
            BLOCK=plan.block, CENTRED=call.centred, SHIFTED=shift is not None, KEEP=keep, STAGES=plan.stages,
            num_warps=plan.warps,
        )  # fmt: skip
    return (
        dx,
        normed,
        dscale.sum(0).to(x.dtype),
        x.new_empty(0) if shift is None else dshift.sum(0).to(x.dtype),
    )


class _Plan(NamedTuple):
    """How a backward pass over rows is launched: programs of chunk rows each, and what one works on at once."""

    chunk: int
    programs: int
    block: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def _plan(rows: int, inner: int, itemsize: int, tensors: int) -> _Plan:
    block = triton.next_power_of_2(inner)
    accesses = 1 if block * itemsize <= 8 * WARP_BYTES else 2
    warps = _warps(block * itemsize // accesses)
    on_each = max(1, RESIDENT_WARPS // (warps * accesses))
    chunk = triton.cdiv(rows, _rows.resident(on_each))
    stages = min(3, chunk, 1 + PIPELINE_BYTES // (2 * block * itemsize * on_each))
    return _Plan(chunk, triton.cdiv(rows, chunk), block, warps, stages)


def check(kernel: str, x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raises:
    ValueError: shapes, dtypes or devices do not fit.
    """
    given = [one for one in (x, scale, shift, weight, bias) if one is not None]
    inner = x.shape[-1:]
    shapes = x.dim() and scale.shape == inner and weight.dim() == 2 and weight.shape[1:] == inner
    shapes = shapes and (shift is None or shift.shape == inner) and (bias is None or bias.shape == weight.shape[:1])
    if not shapes or len({(one.dtype, one.device) for one in given}) > 1:
        described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in given)
        raise ValueError(f"{kernel} takes x [..., K], weights and biases of one dtype and device; they are {described}")
    if x.dtype not in _rows.DTYPES:
        raise ValueError(f"{kernel} takes float32, bfloat16 or float16, not {x.dtype}")
    if inner[0] > WHOLE:
        raise ValueError(f"{kernel} takes rows of at most {WHOLE} numbers, not {inner[0]}")


def norm_linear(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    gelu: bool,
) -> Tensor:  # fmt: skip
    """y [..., N] of checked arguments."""
    learning = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (x, scale, shift, weight, bias)
    )
    y: Tensor
    if _rows.watched():
        y, _ = torch.ops.kernbench.norm_linear.default(
            x, scale, shift, weight, bias, eps, centred, gelu, learning and gelu
        )
    elif learning:
        y = _NormLinear.apply(x, scale, shift, weight, bias, eps, centred, gelu)  # type: ignore[no-untyped-call]
    else:
        y, _ = forward(x, scale, shift, weight, bias, eps, centred, gelu, False)
    return y


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, weight, bias, ctx.eps, ctx.centred, ctx.gelu = inputs[:8]
    ctx.biased = bias is not None
    ctx.save_for_backward(x, scale, shift, weight, output[1] if ctx.gelu else None)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, weight, z = ctx.saved_tensors
    needed = ctx.needs_input_grad
    operator = torch.ops.kernbench.norm_linear_backward.default if _rows.watched() else backward
    dx, dscale, dshift, dweight, dbias = operator(
        dy, dy if z is None else z, x, scale, shift, weight, ctx.eps, ctx.centred, ctx.gelu,
        any(needed[:3]), needed[3], needed[4] and ctx.biased,
    )  # fmt: skip
    found = (dx, dscale, None if shift is None else dshift, dweight, dbias)
    return tuple(one if wanted else None for one, wanted in zip(found, needed, strict=False))


class _NormLinear(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale, shift, weight, bias, eps, centred, gelu = inputs
        output = forward(x, scale, shift, weight, bias, eps, centred, gelu, gelu)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _rows.refuse_second_derivative("norm_linear")
        return (*_gradients(ctx, dy), None, None, None)


def _fake_forward(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    gelu: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _fake_backward(
    dy: Tensor, z: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float, centred: bool,
    gelu: bool, for_input: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape if for_input else 0),
        x.new_empty(scale.shape if for_input else 0),
        x.new_empty(scale.shape if for_input and shift is not None else 0),
        x.new_empty(weight.shape if for_weight else 0),
        x.new_empty(weight.shape[:1] if for_bias else 0),
    )


def _operator_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy), None, None, None, None)


_TENSORS = "Tensor x, Tensor scale, Tensor? shift, Tensor weight"
_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation, _fake in (
    (
        "norm_linear",
        f"({_TENSORS}, Tensor? bias, float eps, bool centred, bool gelu, bool keep) -> (Tensor, Tensor)",
        forward,
        _fake_forward,
    ),
    (
        "norm_linear_backward",
        f"(Tensor dy, Tensor z, {_TENSORS}, float eps, bool centred, bool gelu, bool for_input, bool for_weight, "
        "bool for_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        backward,
        _fake_backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kernbench::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("kernbench::norm_linear", _operator_gradients, setup_context=_keep, lib=_LIBRARY)
