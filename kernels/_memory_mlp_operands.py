"""What the memory MLP is given, as its products take it: rounded in TF32, and turned for some backward passes.

Shapes: N rows, D width of keys, H hidden width, M width of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import _memory_mlp_kernels as kernels
from . import _rows
from ._blocks import blocks_in
from ._memory_mlp_plans import Method, launch

BLOCK = 32 if _rows.INTERPRETED.value else 64


class Operands(NamedTuple):
    """Keys [N, D], W1 [H, D] and W2 [M, H] for the forward pass, and for the backward pass, turned if so planned.

    In TF32 they are copies that are rounded to the nearest number of that format: tensor cores cut off what they cannot
    take, and Triton leaves it to them.
    """

    forward: tuple[Tensor, Tensor, Tensor]
    backward: tuple[Tensor, Tensor, Tensor]


def operands(
    key: Tensor, weights: Sequence[Tensor], method: Method, *, forward: bool, backward: bool, with_key: bool
) -> Operands:
    """One launch at most: copies for the passes that are asked for, of W1 for the backward one only ``with_key``."""
    given = (key, weights[0], weights[2])
    turned = backward and method.plan.turned
    straight = method.precision == "tf32" and (forward or not turned)
    if not (straight or turned):
        return Operands(given, given)
    nothing = key.new_empty(0)
    ready = [key.new_empty(one.shape) if straight else nothing for one in given]
    wanted = (turned, turned and with_key, turned)
    back = [key.new_empty(one.shape[::-1]) if asked else nothing for one, asked in zip(given, wanted, strict=True)]
    counts = [
        blocks_in(one.shape[0], BLOCK) * blocks_in(one.shape[1], BLOCK) if straight or asked else 0
        for one, asked in zip(given, wanted, strict=True)
    ]
    (rows, width), (value_width, hidden_width) = key.shape, weights[2].shape
    launch(
        kernels.operand_kernel,
        sum(counts),
        (
            *(one for three in zip(given, ready, back, strict=True) for one in three),
            rows, width, hidden_width, value_width, *counts[:2], blocks_in(width, BLOCK),
            blocks_in(hidden_width, BLOCK),
        ),
        BLOCK=BLOCK, STRAIGHT=straight, TURNED=turned, INNER_TURNED=turned and with_key, PRECISION=method.precision,
    )  # fmt: skip
    plain = _three(ready) if straight else given
    return Operands(plain, _three(back) if turned else plain)


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    key, inner, outer = tensors
    return key, inner, outer
