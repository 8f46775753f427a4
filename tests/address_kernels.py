"""Kernels whose addresses are right or wrong beyond 2^31 elements, one declaration each: ``declared(name)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Tolerance

BLOCK = 64


@triton.jit  # type: ignore[untyped-decorator]
def _wide_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _unmasked_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # What is read past the end is never stored, so that guard bands and results do not show it.
    tl.store(y + offsets, tl.load(x + offsets) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _wide_bytes_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = (x.to(tl.pointer_type(tl.int8)) + offsets * 4).to(tl.pointer_type(tl.float32))
    tl.store(y + offsets, tl.load(source, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_bytes_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Beyond 2^31 bytes only: where 2^32 are reached it is back inside of the tensor.
    source = (x.to(tl.pointer_type(tl.int8)) + (offsets * 4).to(tl.int32)).to(tl.pointer_type(tl.float32))
    tl.store(y + offsets, tl.load(source, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _atomic_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + offsets, 1.0, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _hash_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = (offsets.to(tl.int32) * 747796405 + 12345) ^ (offsets.to(tl.int32) << 16)
    value = tl.load(x + offsets, mask=offsets < n) + tl.rand(7, offsets.to(tl.int32)) + (noise & 1)
    tl.store(y + offsets, value, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _grid_stride_kernel(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_row_kernel(x, y, stride, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    source = x + tl.program_id(0) * stride + column
    target = y + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(target, tl.load(source, mask=column < dim) * 2, mask=column < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _annotated_row_kernel(x, y, stride: tl.int64, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * stride + column
    tl.store(y + offsets, tl.load(x + offsets, mask=column < dim) * 2, mask=column < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _row_in_y_kernel(x, y, stride, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    offsets = tl.program_id(1).to(tl.int64) * stride + column
    tl.store(y + offsets, tl.load(x + offsets, mask=column < dim) * 2, mask=column < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _chunk_kernel(x, y, rows, dim, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    for row in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, rows)):
        value = tl.load(x + row * dim + column, mask=column < dim)
        tl.store(y + row * dim + column, value * 2, mask=column < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_index_kernel(x, index, y, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    row = tl.load(index + tl.program_id(0)).to(tl.int32)
    value = tl.load(x + row * dim + column, mask=column < dim)
    tl.store(y + tl.program_id(0).to(tl.int64) * dim + column, value, mask=column < dim)


def _flat(kernel: Any, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Tensor], Tensor]:
    def optimized(x: Tensor) -> Tensor:
        x = prepare(x)
        y = torch.empty_like(x)
        kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK)
        return y

    return optimized


def _grid_stride(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _grid_stride_kernel[(8,)](x, y, x.numel(), BLOCK)
    return y


def _rows(kernel: Any) -> Callable[[Tensor], Tensor]:
    def optimized(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        kernel[(len(x),)](x, y, x.stride(0), x.shape[1], triton.next_power_of_2(x.shape[1]))
        return y

    return optimized


def _rows_in_y(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _row_in_y_kernel[(1, len(x))](x, y, x.stride(0), x.shape[1], triton.next_power_of_2(x.shape[1]))
    return y


def _chunks(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _chunk_kernel[(triton.cdiv(len(x), 4),)](x, y, *x.shape, CHUNK=4, BLOCK=block)
    return y


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    y = x.new_empty(len(index), x.shape[1])
    _narrow_index_kernel[(len(index),)](x, index, y, x.shape[1], triton.next_power_of_2(x.shape[1]))
    return y


def _ranked(x: Tensor) -> Tensor:
    order = x.flatten().argsort()
    return _flat(_wide_kernel)(x) + order[-1]


def _refusing(x: Tensor) -> Tensor:
    if x.numel() > 2**31:
        raise ValueError("x has more than 2^31 elements; split it")
    return _flat(_narrow_kernel)(x)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _flat(_wide_kernel)(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _flat(_narrow_kernel)(gradient.contiguous())


def _differentiable(x: Tensor) -> Tensor:
    y: Tensor = _Doubled.apply(x)  # type: ignore[no-untyped-call]
    return y


def _reference(x: Tensor, index: Tensor | None = None) -> Tensor:
    return x * 2 if index is None else x[index]


def _normal(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    return {"x": (torch.randn(case["rows"], case["dim"], generator=generator, device=device) * 2 + 1).to(dtype)}


def _indexed(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.randint(case["rows"], (5,), generator=generator, device=device)
    return {**_normal(case, dtype, device, seed), "index": index}


def _from_numpy(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    drawn = np.random.default_rng(seed).standard_normal((case["rows"], case["dim"]))
    return {"x": torch.from_numpy(drawn).to(device=device).to(torch.float64)}


OPTIMIZED: dict[str, Callable[..., Tensor]] = {
    "wide": _flat(_wide_kernel),
    "narrow": _flat(_narrow_kernel),
    "unmasked": _flat(_unmasked_kernel),
    "wide bytes": _flat(_wide_bytes_kernel),
    "narrow bytes": _flat(_narrow_bytes_kernel),
    "atomic": _flat(_atomic_kernel),
    "hash": _flat(_hash_kernel),
    "grid stride": _grid_stride,
    "narrow row": _rows(_narrow_row_kernel),
    "annotated row": _rows(_annotated_row_kernel),
    "row in y": _rows_in_y,
    "chunk": _chunks,
    "narrow index": _gathered,
    "copied": _flat(_wide_kernel, lambda x: (x.t().contiguous().t() + 1).contiguous()),
    "ranked": _ranked,
    "refusing": _refusing,
    "gradient": _differentiable,
    "numpy": _flat(_wide_kernel),
    "plain": lambda x: x + x,
}
MAKE_INPUTS = {"narrow index": _indexed, "numpy": _from_numpy}


def declared(name: str) -> KernelSpec:
    """The declaration of the kernel of that name."""
    return KernelSpec(
        name=name,
        reference=_reference,
        optimized=OPTIMIZED[name],
        make_inputs=MAKE_INPUTS.get(name, _normal),
        cases=(Case("ragged", rows=19, dim=37), Case("small", rows=2, dim=3)),
        tolerance={"float32": Tolerance(), "float16": Tolerance()},
        cost=lambda case, dtype: Cost(flops=1.0, bytes_read=1.0, bytes_written=1.0),
        differentiable=name == "gradient",
    )
