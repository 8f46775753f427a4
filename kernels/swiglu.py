"""The gated activation of a SwiGLU block, forward and backward.

    y = silu(gate) * up,  silu(g) = g * sigmoid(g)
    dup = dy * silu(gate),  dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

One program handles one block of one row, each element once; contiguous tensors count as one long row. Rows may lie any
distance apart, so the halves of a packed projection are read where they are.

Cast order, that of PyTorch's F.silu(gate) * up: arithmetic is float32; silu(gate) is rounded to the dtype before it is
multiplied, dy * up before it is taken further, results when stored.

Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 5.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Sweep, Tolerance, Values

from . import _rows
from ._blocks import blocks_in
from ._rows import narrow


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`swiglu`."""
    return torch.nn.functional.silu(gate) * up


@triton.jit  # type: ignore[untyped-decorator]
def _place(blocks, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and first column of this program, where a row takes so many blocks."""
    block = tl.program_id(0).to(tl.int64)
    row = block * 0
    # A single row would wait for the division.
    if not ONE_ROW:
        row = block // blocks
        block -= row * blocks
    return row, block * BLOCK


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, columns, blocks, gate_stride, up_stride, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr
):
    """One program handles BLOCK elements of one row of gate, up and out [rows, columns]; grid is rows * blocks."""
    row, start = _place(blocks, BLOCK, ONE_ROW)
    offset = tl.arange(0, BLOCK)
    mask = offset < columns - start
    DTYPE: tl.constexpr = out.dtype.element_ty
    g = tl.load(gate + row * gate_stride + start + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + offset, mask=mask, other=0.0).to(tl.float32)
    silu = narrow(g / (1.0 + tl.exp(-g)), DTYPE).to(tl.float32)
    tl.store(out + row * columns + start + offset, narrow(silu * u, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dout, gate, up, dgate, dup, columns, blocks, dout_stride, gate_stride, up_stride,
    BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK elements of one row of all five tensors [rows, columns]; grid is rows * blocks."""
    row, start = _place(blocks, BLOCK, ONE_ROW)
    offset = tl.arange(0, BLOCK)
    mask = offset < columns - start
    DTYPE: tl.constexpr = dgate.dtype.element_ty
    dy = tl.load(dout + row * dout_stride + start + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + start + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = narrow(g * sigmoid, DTYPE).to(tl.float32)
    dsilu = narrow(dy * u, DTYPE).to(tl.float32)
    tl.store(dup + row * columns + start + offset, narrow(dy * silu, DTYPE), mask=mask)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + row * columns + start + offset, narrow(dsilu * slope, DTYPE), mask=mask)


WARPS = 4
SMALL = 1024
"""One access of 16 bytes a thread and tensor where a number takes two bytes; it divides the widths of most models."""
LARGE = 2048
FEW = 2**18
"""Up to so many elements, small blocks spread over more multiprocessors."""
SMALLER = () if _rows.INTERPRETED.value else ((2**14, 128), (FEW, 512))
"""Blocks of so few elements that each waits for memory once: the fewer a thread has, the sooner it is done."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [..., I], contiguous; both of one shape and dtype, float32, bfloat16 or float16.

    Rows may be any equal distance apart; other layouts are copied.

    Raises:
        ValueError: shape, dtype or device of the two differ, or the dtype is another.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.get_device() != up.get_device():
        raise ValueError(f"swiglu takes two tensors alike; they are {_described(gate)} and {_described(up)}")
    if gate.dtype not in _rows.DTYPES or not gate.dim():
        raise ValueError(f"swiglu takes float32, bfloat16 or float16 rows, not {_described(gate)}")
    out: Tensor
    if _rows.watched():
        out = torch.ops.kernbench.swiglu.default(gate, up)
    elif torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    else:
        out = _forward(gate, up)
    return out


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    count = out.numel()
    if not count:
        return out
    gate, gate_stride = _rows.as_rows(gate)
    up, up_stride = _rows.as_rows(up)
    columns = out.shape[-1]
    if gate_stride == up_stride == columns:
        columns = gate_stride = up_stride = count
    blocks, programs, block = _grid(count, columns)
    with _rows.on_device(gate):
        _forward_kernel[(programs,)](
            gate, up, out, columns, blocks, gate_stride, up_stride,
            BLOCK=block, ONE_ROW=blocks == programs, num_warps=WARPS,
        )  # fmt: skip
    return out


def _backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(dgate)
    count = dgate.numel()
    if not count:
        return dgate, dup
    dout, dout_stride = _rows.as_rows(dout)
    gate, gate_stride = _rows.as_rows(gate)
    up, up_stride = _rows.as_rows(up)
    columns = dgate.shape[-1]
    if dout_stride == gate_stride == up_stride == columns:
        columns = dout_stride = gate_stride = up_stride = count
    blocks, programs, block = _grid(count, columns)
    with _rows.on_device(gate):
        _backward_kernel[(programs,)](
            dout, gate, up, dgate, dup, columns, blocks, dout_stride, gate_stride, up_stride,
            BLOCK=block, ONE_ROW=blocks == programs, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup


@lru_cache(maxsize=1024)
def _grid(count: int, columns: int) -> tuple[int, int, int]:
    """Blocks of a row, programs in all, and elements of a block: a large one if little of it lies past a row's end."""
    block = LARGE if count > FEW and (columns == count or columns % LARGE == 0) else SMALL
    block = next((smaller for most, smaller in SMALLER if count <= most), block)
    blocks = blocks_in(columns, block)
    return blocks, count // columns * blocks, block


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    if not _rows.watched():
        return _backward(dout, gate, up)
    gradients: tuple[Tensor, Tensor] = torch.ops.kernbench.swiglu_backward.default(dout, gate, up)
    return gradients


class _SwiGLU(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        _rows.refuse_second_derivative("swiglu")
        return _gradients(ctx, dout)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation in (
    ("swiglu", "(Tensor gate, Tensor up) -> Tensor", _forward),
    ("swiglu_backward", "(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)", _backward),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::swiglu", lambda gate, up: gate.new_empty(gate.shape), lib=_LIBRARY)
torch.library.register_fake(
    "kernbench::swiglu_backward",
    lambda dout, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    lib=_LIBRARY,
)
torch.library.register_autograd("kernbench::swiglu", _gradients, setup_context=_keep, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Both halves of one packed projection, as a fused linear layer leaves them."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = torch.randn(case["rows"], 2 * case["width"], generator=generator, device=device) * 2
    gate, up = packed.to(dtype).chunk(2, dim=-1)
    if not case["packed"]:
        gate, up = gate.contiguous(), up.contiguous()
    return {"gate": gate.requires_grad_(), "up": up.requires_grad_()}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Gate and up read once, their product written once; an exponential counts as one operation."""
    elements = float(case["rows"] * case["width"])
    return Cost(flops=5 * elements, bytes_read=2 * dtype.itemsize * elements, bytes_written=dtype.itemsize * elements)


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """The incoming gradient, gate and up read once, two gradients written once."""
    elements = float(case["rows"] * case["width"])
    return Cost(
        flops=11 * elements, bytes_read=3 * dtype.itemsize * elements, bytes_written=2 * dtype.itemsize * elements
    )


def _liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out


SPEC = KernelSpec(
    name="swiglu",
    reference=swiglu_reference,
    optimized=swiglu,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, width=1, packed=0),
        Case("ragged", rows=7, width=151, packed=0),
        Case("packed", rows=3, width=1100, packed=1),
        Case("decode", large=True, rows=1, width=6144, packed=0),
        Case("decode-packed", large=True, rows=1, width=6144, packed=1),
        Case("16-rows", large=True, rows=16, width=6144, packed=0),
        Case("512-rows", large=True, rows=512, width=6144, packed=0),
        Case("16384-rows", large=True, rows=16384, width=6144, packed=0),
        Case("16384-packed", large=True, rows=16384, width=6144, packed=1),
        Case("16384-wide", large=True, rows=16384, width=11008, packed=0),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=cost,
    backward_cost=backward_cost,
    sizes={"rows": Sizes(most=20), "width": Sizes(most=1100, block=SMALL), "packed": Sizes(most=1)},
    values={"gate": Values(nonfinite=True), "up": Values(nonfinite=True)},
    sweeps=(
        Sweep(
            size="rows",
            values=(1, 16, 512, 16384),
            sizes=lambda rows: {"rows": rows, "width": 6144, "packed": 0},
            fixed="6144 columns, the talker's inner width",
        ),
    ),
    differentiable=True,
    peers={"liger": _liger},
    source="Shazeer, GLU Variants Improve Transformer, 2020, equation 5",
)
