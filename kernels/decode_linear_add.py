"""Matrix-vector product of one row, added to a residual: y = residual + round(weight @ x).

With a bias as the residual it is a linear layer. One program computes a few rows of the product, all columns of them,
so that nothing is left to add up between programs.

Source: torch.nn.functional.linear.
Shapes: K inner, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _decode, _rows
from ._decode import Tiles

TABLE = {
    (1024, 2048): Tiles(4, 2048, 8),
    (2048, 2048): Tiles(4, 2048, 8),
    (1024, 3072): Tiles(2, 1024, 4),
    (2048, 6144): Tiles(2, 2048, 8),
}
"""By [N, K] of the weight: 256 to 1024 programs, 1.9 to 7.8 on each of 132 multiprocessors."""


def decode_linear_add_reference(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """In plain PyTorch; arguments as in :func:`decode_linear_add`."""
    return residual + torch.nn.functional.linear(x, weight)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, residual, y, count, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles STEPS * ROWS rows of weight [count, inner]; grid is count over that, rounded up."""
    _decode.started(OVERLAP)
    row = tl.program_id(0) * (STEPS * ROWS) + tl.arange(0, ROWS)
    queue = _decode.asked_for(weight, row, count, inner, ROWS, COLUMNS, CHUNKS, AHEAD, EVEN, EVICT)
    _decode.wait(OVERLAP)
    values = _decode.vectors(x, inner, COLUMNS, CHUNKS)
    DTYPE: tl.constexpr = y.dtype.element_ty
    for step in tl.static_range(STEPS):
        rows = row + step * ROWS
        carried = tl.load(residual + rows, mask=rows < count, other=0.0).to(tl.float32)
        product, queue = _decode.products(
            queue, values, weight, row, count, inner, step, ROWS, COLUMNS, CHUNKS, STEPS, AHEAD, EVEN, EVICT
        )
        total = _decode.round_to(carried + _decode.round_to(product, DTYPE), DTYPE)
        tl.store(y + rows, total.to(DTYPE), mask=rows < count)


def decode_linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, tiles: Sequence[int] | None = None) -> Tensor:
    """residual [N] + weight [N, K] times x [K], a new tensor [N]; all contiguous, of one dtype.

    The weight may not be written by a kernel that launches early as these do; it is read before the wait.

    Args:
        tiles: a :class:`_decode.Tiles`, to measure others than those of the table.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    call = _OPERATOR if _rows.watched() else _launch
    y: Tensor = call(x, weight, residual, tiles)
    return y


@lru_cache(maxsize=1024)
def _plan(count: int, inner: int, itemsize: int, tiles: tuple[int, ...] | None) -> _decode.Plan:
    return _decode.linear_plan(count, inner, itemsize, tiles, TABLE)


def _launch(x: Tensor, weight: Tensor, residual: Tensor, tiles: Sequence[int] | None = None) -> Tensor:
    inner, count = x.numel(), weight.shape[0]
    _decode.check(
        "decode_linear_add", x,
        {"x": (x, (inner,)), "weight": (weight, (count, inner)), "residual": (residual, (count,))},
    )  # fmt: skip
    plan = _plan(count, inner, x.itemsize, tuple(tiles) if tiles else None)
    y = torch.empty(count, dtype=x.dtype, device=x.device)
    _decode.launch(_kernel, plan, x.device, x, weight, residual, y, count, inner)
    return y


_OPERATOR = _decode.register(
    "decode_linear_add(Tensor x, Tensor weight, Tensor residual, int[]? tiles=None) -> Tensor",
    _launch,
    lambda x, weight, residual, tiles=None: x.new_empty(weight.shape[0]),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A normal row and residual, and a weight that keeps the row's size."""
    generator = torch.Generator(device).manual_seed(seed)
    inner, count = case["inner"], case["outputs"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    return {
        "x": normal(inner).to(dtype),
        "weight": (normal(count, inner) / inner**0.5).to(dtype),
        "residual": normal(count).to(dtype),
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two operations a weight; the weights are nearly all that is read."""
    inner, count = case["inner"], case["outputs"]
    return Cost(
        flops=2.0 * count * inner + count,
        bytes_read=float(dtype.itemsize * (count * inner + inner + count)),
        bytes_written=float(dtype.itemsize * count),
    )


SPEC = KernelSpec(
    name="decode_linear_add",
    reference=decode_linear_add_reference,
    optimized=decode_linear_add,
    make_inputs=make_inputs,
    cases=(
        Case("one", outputs=1, inner=1),
        Case("ragged", outputs=37, inner=1101),
        Case("aligned", outputs=64, inner=256),
        Case("predictor output", large=True, outputs=1024, inner=2048),
        Case("predictor down", large=True, outputs=1024, inner=3072),
        Case("talker output", large=True, outputs=2048, inner=2048),
        Case("talker down", large=True, outputs=2048, inner=6144),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    sizes={"outputs": Sizes(least=1, most=40, block=8), "inner": Sizes(least=1, most=1200, block=1024)},
    values={name: Values(least=-1e3, most=1e3) for name in ("x", "weight", "residual")},
    source="torch.nn.functional.linear",
)
