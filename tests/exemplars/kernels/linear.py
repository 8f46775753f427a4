"""Matrix product with a bias: y = x @ weight + bias, in float32, rounded once.

Both matrices may have any strides, so a transposed weight is not copied. float32 is multiplied as such, not as tf32.

Shapes: M rows, K inner, N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _shared

BLOCK_M, BLOCK_N, BLOCK_K = 32, 32, 32


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`linear`."""
    wide = _shared.wide(x.dtype)
    return (x.to(wide) @ weight.to(wide) + bias.to(wide)).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, y, M, K, N, x_stride_m, x_stride_k, weight_stride_k, weight_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program handles a tile [BLOCK_M, BLOCK_N] of y [M, N]; grid is the number of tiles, along rows first."""
    tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_mask = (m[:, None] < M) & (k[None, :] < K)
        weight_mask = (k[:, None] < K) & (n[None, :] < N)
        left = tl.load(x + m[:, None] * x_stride_m + k[None, :] * x_stride_k, mask=x_mask, other=0.0)
        right = tl.load(
            weight + k[:, None] * weight_stride_k + n[None, :] * weight_stride_n, mask=weight_mask, other=0.0
        )
        if _shared.INTERPRETED:
            # Tensor cores multiply bfloat16 as it is; the interpreter would multiply its bit patterns.
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _shared.store(y + m[:, None] * N + n[None, :], total, (m[:, None] < M) & (n[None, :] < N))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [M, K] @ weight [K, N] + bias [N], all of one dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or a tensor is none that the kernel takes.
    """
    _shared.check("linear", x=x, weight=weight, bias=bias)
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0] and bias.shape == weight.shape[1:]
    if not fits or not x.dtype == weight.dtype == bias.dtype:
        described = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (x, weight, bias))
        raise ValueError(f"linear takes [M, K], [K, N] and [N] of one dtype; they are {described}")
    y: Tensor = _launch(x, weight, bias)
    return y


@torch.library.custom_op("kernbench_exemplars::linear", mutates_args=())
def _launch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    (rows, inner), columns = x.shape, weight.shape[1]
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if y.numel():
        _kernel[(triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N),)](
            x, weight, bias.contiguous(), y, rows, inner, columns, *x.stride(), *weight.stride(),
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return y


@_launch.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal x and bias, and a weight that keeps their size."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = _shared.normal(generator, (case["inner"], case["columns"]), torch.float32) / max(1, case["inner"]) ** 0.5
    return {
        "x": _shared.normal(generator, (case["rows"], case["inner"]), dtype),
        "weight": weight.to(dtype),
        "bias": _shared.normal(generator, (case["columns"],), dtype),
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two operations per product; x, weight and bias read and y written once."""
    rows, inner, columns = case["rows"], case["inner"], case["columns"]
    return Cost(
        flops=2.0 * rows * inner * columns,
        bytes_read=float(dtype.itemsize * (rows * inner + inner * columns + columns)),
        bytes_written=float(dtype.itemsize * rows * columns),
    )


SPEC = KernelSpec(
    name="linear",
    reference=linear_reference,
    optimized=linear,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, inner=1, columns=1),
        Case("ragged", rows=37, inner=45, columns=51),
        Case("aligned", rows=64, inner=64, columns=32),
        Case("large", large=True, rows=2048, inner=1024, columns=1024),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={
        "rows": Sizes(most=70, block=BLOCK_M),
        "inner": Sizes(most=70, block=BLOCK_K),
        "columns": Sizes(most=70, block=BLOCK_N),
    },
    values={name: Values(least=-1e3, most=1e3) for name in ("x", "weight", "bias")},
    source="torch.nn.functional.linear, with the weight the other way round",
)
