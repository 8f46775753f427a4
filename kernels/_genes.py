"""The rates that a genome stands for, decoded in plain PyTorch and in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

GENES = 4


def decoded_reference(genome: Tensor) -> Tensor:
    """Rates of fatigue and energy, gains of CaMKII and PP1, [4, E], of a genome [E, X]."""
    xi = genome.unbind(-1)
    fatigue = 0.01 * (2 * torch.sigmoid(xi[0]) + 0.1)
    energy = 0.005 * (2 * torch.sigmoid(xi[1]) + 0.1)
    return torch.stack([fatigue, energy, functional.softplus(xi[2] + 1), functional.softplus(xi[3] + 0.5)])


@triton.jit
def decoded(genome, expert, there, xi):  # type: ignore[no-untyped-def]
    """The four rates of some experts where they are there, of genome [E, xi]."""
    row = genome + expert * xi
    fatigue, energy = rates(row, there)
    camkii = _softplus(tl.load(row + 2, mask=there, other=0.0) + 1.0)
    return fatigue, energy, camkii, _softplus(tl.load(row + 3, mask=there, other=0.0) + 0.5)


@triton.jit
def rates(row, there):  # type: ignore[no-untyped-def]
    """Rates of fatigue and energy of the genomes at row."""
    fatigue = 0.01 * (2.0 * tl.sigmoid(tl.load(row, mask=there, other=0.0)) + 0.1)
    return fatigue, 0.005 * (2.0 * tl.sigmoid(tl.load(row + 1, mask=there, other=0.0)) + 0.1)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """ln(1 + e^x), without a difference of what is nearly equal for x far below zero."""
    small = tl.exp(-tl.abs(x))
    # 1 + small rounds small off; the quotient puts back what was lost.
    sum_ = 1.0 + small
    log = tl.where(sum_ == 1.0, small, tl.log(sum_) * small / (sum_ - 1.0))
    return tl.maximum(x, 0.0) + log
