"""RMSNorm and matrix-vector product of one row: y = weight @ (round(x / rms(x)) * norm_weight).

One program computes the norm again, which costs it one row from the L2 cache, and a few rows of the product.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4; torch.nn.functional.linear.
Shapes: H inner, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _decode, _rope, _rows
from ._decode import Tiles

TABLE = {
    (4096, 1024): Tiles(8, 1024, 4),
    (4096, 2048): Tiles(8, 2048, 8),
    (3072, 1024): Tiles(4, 1024, 4),
    (3072, 2048): Tiles(4, 2048, 8),
    (2048, 1024): Tiles(4, 1024, 4),
}
"""By [N, H] of the weight: 512 to 768 programs, 3.9 to 5.8 on each of 132 multiprocessors."""


def decode_norm_linear_reference(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In plain PyTorch; arguments as in :func:`decode_norm_linear`."""
    return torch.nn.functional.linear(_rope.normed(x, norm_weight, eps), weight)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, norm_weight, weight, y, eps, count, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles STEPS * ROWS rows of weight [count, inner]; grid is count over that, rounded up."""
    _decode.started(OVERLAP)
    row = tl.program_id(0) * (STEPS * ROWS) + tl.arange(0, ROWS)
    queue = _decode.asked_for(weight, row, count, inner, ROWS, COLUMNS, CHUNKS, AHEAD, EVEN, EVICT)
    factors = _decode.vectors(norm_weight, inner, COLUMNS, CHUNKS)
    _decode.wait(OVERLAP)
    values = _decode.vectors(x, inner, COLUMNS, CHUNKS)
    DTYPE: tl.constexpr = y.dtype.element_ty
    values = _decode.normalised(values, factors, inner, eps, CHUNKS, DTYPE)
    for step in tl.static_range(STEPS):
        product, queue = _decode.products(
            queue, values, weight, row, count, inner, step, ROWS, COLUMNS, CHUNKS, STEPS, AHEAD, EVEN, EVICT
        )
        rows = row + step * ROWS
        tl.store(y + rows, _decode.round_to(product, DTYPE).to(DTYPE), mask=rows < count)


def decode_norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, *, tiles: Sequence[int] | None = None
) -> Tensor:
    """weight [N, H] times the normalised x [H], [N]; all contiguous, of one dtype.

    Neither weight may be written by a kernel that launches early as these do; they are read before the wait.

    Args:
        tiles: a :class:`_decode.Tiles`, to measure others than those of the table.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    call = _OPERATOR if _rows.watched() else _launch
    y: Tensor = call(x, norm_weight, weight, eps, tiles)
    return y


@lru_cache(maxsize=1024)
def _plan(count: int, inner: int, itemsize: int, tiles: tuple[int, ...] | None) -> _decode.Plan:
    return _decode.linear_plan(count, inner, itemsize, tiles, TABLE)


def _launch(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, tiles: Sequence[int] | None = None) -> Tensor:
    inner, count = x.numel(), weight.shape[0]
    _decode.check(
        "decode_norm_linear", x,
        {"x": (x, (inner,)), "norm_weight": (norm_weight, (inner,)), "weight": (weight, (count, inner))},
    )  # fmt: skip
    plan = _plan(count, inner, x.itemsize, tuple(tiles) if tiles else None)
    y = torch.empty(count, dtype=x.dtype, device=x.device)
    _decode.launch(_kernel, plan, x.device, x, norm_weight, weight, y, eps, count, inner)
    return y


_OPERATOR = _decode.register(
    "decode_norm_linear(Tensor x, Tensor norm_weight, Tensor weight, float eps, int[]? tiles=None) -> Tensor",
    _launch,
    lambda x, norm_weight, weight, eps, tiles=None: x.new_empty(weight.shape[0]),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A normal row, a norm weight around one, and a weight that keeps the row's size."""
    generator = torch.Generator(device).manual_seed(seed)
    inner, count = case["inner"], case["outputs"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    return {
        "x": normal(inner).to(dtype),
        "norm_weight": (1 + 0.1 * normal(inner)).to(dtype),
        "weight": (normal(count, inner) / inner**0.5).to(dtype),
        "eps": 1e-6,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two operations a weight and five a number that is normalised; the weights are nearly all that is read."""
    inner, count = case["inner"], case["outputs"]
    return Cost(
        flops=2.0 * count * inner + 5.0 * inner,
        bytes_read=float(dtype.itemsize * (count * inner + 2 * inner)),
        bytes_written=float(dtype.itemsize * count),
    )


SPEC = KernelSpec(
    name="decode_norm_linear",
    reference=decode_norm_linear_reference,
    optimized=decode_norm_linear,
    make_inputs=make_inputs,
    cases=(
        Case("one", outputs=1, inner=1),
        Case("ragged", outputs=37, inner=1101),
        Case("aligned", outputs=64, inner=256),
        Case("predictor qkv", large=True, outputs=4096, inner=1024),
        Case("talker qkv", large=True, outputs=4096, inner=2048),
        Case("predictor head", large=True, outputs=2048, inner=1024),
        Case("talker head", large=True, outputs=3072, inner=2048),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    sizes={"outputs": Sizes(least=1, most=40, block=8), "inner": Sizes(least=1, most=1200, block=1024)},
    values={name: Values(least=-1e3, most=1e3) for name in ("x", "norm_weight", "weight")},
    source="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4; torch.nn.functional.linear",
)
