"""First half of a gated MLP for one row: y = silu(gate) * up, where gate and up are halves of one weight times norm(x).

One program computes the norm again, which costs it one row from the L2 cache, and a few outputs: of each it multiplies
the row of the gate and that of the up projection, which lie I rows apart. Cast order, that of an unfused model: gate,
up, silu(gate) and their product are each rounded.

Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 6; Zhang and Sennrich, Root Mean Square Layer
Normalization, 2019, equation 4.
Shapes: H inner, I outputs.
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

TABLE = {(3072, 1024): Tiles(4, 1024, 4), (6144, 2048): Tiles(2, 2048, 8, steps=2, ahead=2)}
"""By [I, H]: 768 and 1536 programs, 5.8 and 11.6 on each of 132 multiprocessors; a tile has twice so many rows."""


def decode_gate_up_reference(x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, eps: float) -> Tensor:
    """In plain PyTorch; arguments as in :func:`decode_gate_up`."""
    gate, up = torch.nn.functional.linear(_rope.normed(x, norm_weight, eps), gate_up_weight).chunk(2)
    return torch.nn.functional.silu(gate) * up


@triton.jit(do_not_specialize=["outputs"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, norm_weight, gate_up_weight, y, eps, outputs, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles STEPS * ROWS outputs of gate_up_weight [2, outputs, inner]; grid is outputs over that."""
    _decode.started(OVERLAP)
    first = tl.program_id(0) * (STEPS * ROWS)
    pair = tl.arange(0, 2 * ROWS)
    # Gate and up of an output are neighbours, so that both are in one thread in the end. Beyond the last output its
    # gate is one of the up rows, which is read and not used.
    row = first + pair // 2 + (pair % 2) * outputs
    count = 2 * outputs
    queue = _decode.asked_for(gate_up_weight, row, count, inner, ROWS, COLUMNS, CHUNKS, AHEAD, EVEN, EVICT)
    factors = _decode.vectors(norm_weight, inner, COLUMNS, CHUNKS)
    _decode.wait(OVERLAP)
    values = _decode.vectors(x, inner, COLUMNS, CHUNKS)
    DTYPE: tl.constexpr = y.dtype.element_ty
    values = _decode.normalised(values, factors, inner, eps, CHUNKS, DTYPE)
    for step in tl.static_range(STEPS):
        product, queue = _decode.products(
            queue, values, gate_up_weight, row, count, inner, step, ROWS, COLUMNS, CHUNKS, STEPS, AHEAD, EVEN, EVICT
        )
        gate, up = tl.split(tl.reshape(_decode.round_to(product, DTYPE), [ROWS, 2]))
        activated = _decode.round_to(gate / (1.0 + tl.exp(-gate)), DTYPE)
        output = first + step * ROWS + tl.arange(0, ROWS)
        tl.store(y + output, _decode.round_to(activated * up, DTYPE).to(DTYPE), mask=output < outputs)


def decode_gate_up(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, eps: float, *, tiles: Sequence[int] | None = None
) -> Tensor:
    """silu(gate) * up [I] of the normalised x [H], for gate_up_weight [2 * I, H]; all contiguous, of one dtype.

    Neither weight may be written by a kernel that launches early as these do; they are read before the wait.

    Args:
        tiles: a :class:`_decode.Tiles` whose rows are outputs, to measure others than those of the table.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    call = _OPERATOR if _rows.watched() else _launch
    y: Tensor = call(x, norm_weight, gate_up_weight, eps, tiles)
    return y


@lru_cache(maxsize=1024)
def _plan(outputs: int, inner: int, itemsize: int, tiles: tuple[int, ...] | None) -> _decode.Plan:
    return _decode.linear_plan(outputs, inner, itemsize, tiles, TABLE, pair=2)


def _launch(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, eps: float, tiles: Sequence[int] | None = None
) -> Tensor:
    inner, outputs = x.numel(), gate_up_weight.shape[0] // 2
    _decode.check(
        "decode_gate_up", x,
        {
            "x": (x, (inner,)), "norm_weight": (norm_weight, (inner,)),
            "gate_up_weight": (gate_up_weight, (2 * outputs, inner)),
        },
    )  # fmt: skip
    plan = _plan(outputs, inner, x.itemsize, tuple(tiles) if tiles else None)
    y = torch.empty(outputs, dtype=x.dtype, device=x.device)
    _decode.launch(_kernel, plan, x.device, x, norm_weight, gate_up_weight, y, eps, outputs, inner)
    return y


_OPERATOR = _decode.register(
    "decode_gate_up(Tensor x, Tensor norm_weight, Tensor gate_up_weight, float eps, int[]? tiles=None) -> Tensor",
    _launch,
    lambda x, norm_weight, gate_up_weight, eps, tiles=None: x.new_empty(gate_up_weight.shape[0] // 2),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A normal row, a norm weight around one, and a weight that keeps the row's size."""
    generator = torch.Generator(device).manual_seed(seed)
    inner, outputs = case["inner"], case["outputs"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    return {
        "x": normal(inner).to(dtype),
        "norm_weight": (1 + 0.1 * normal(inner)).to(dtype),
        "gate_up_weight": (normal(2 * outputs, inner) / inner**0.5).to(dtype),
        "eps": 1e-6,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two operations a weight, five a normalised number and five an output; nearly all bytes are weights."""
    inner, outputs = case["inner"], case["outputs"]
    return Cost(
        flops=4.0 * outputs * inner + 5.0 * (inner + outputs),
        bytes_read=float(dtype.itemsize * 2 * (outputs * inner + inner)),
        bytes_written=float(dtype.itemsize * outputs),
    )


SPEC = KernelSpec(
    name="decode_gate_up",
    reference=decode_gate_up_reference,
    optimized=decode_gate_up,
    make_inputs=make_inputs,
    cases=(
        Case("one", outputs=1, inner=1),
        Case("ragged", outputs=37, inner=1101),
        Case("aligned", outputs=64, inner=256),
        Case("predictor", large=True, outputs=3072, inner=1024),
        Case("talker", large=True, outputs=6144, inner=2048),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    sizes={"outputs": Sizes(least=1, most=40, block=4), "inner": Sizes(least=1, most=1200, block=1024)},
    values={name: Values(least=-1e3, most=1e3) for name in ("x", "norm_weight", "gate_up_weight")},
    source="Shazeer, GLU Variants Improve Transformer, 2020, equation 6; Zhang and Sennrich, Root Mean Square Layer "
    "Normalization, 2019, equation 4",
)
