"""Random numbers of stochastic release: torch's own while timed, Philox 4x32-10 where kernels must draw the same.

Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernbench import philox


@dataclass(frozen=True)
class Noise:
    """What one call of the presynaptic organ draws from.

    Attributes:
        seed: 0-dim int64 on the device, another one for each layer and step.
        counted: draw Philox numbers of that seed, as kernels do. Without it numbers are those of torch's generator,
            which is what noise costs a baseline: Philox in plain PyTorch takes a hundred passes over int64.
    """

    seed: Tensor
    counted: bool = False

    def uniform(self, shape: tuple[int, ...], stream: int, like: Tensor) -> Tensor:
        """Uniform float32 in [0, 1) of ``shape`` beside ``like``.

        Number n in row-major order is that of offset n (int64) under the seed ``seed + stream * 2^32``.
        """
        if not self.counted:
            return torch.rand(shape, dtype=torch.float32, device=like.device)
        return philox.rand(self._seed_of(stream), _offsets(shape, like)).view(shape)

    def normal(self, shape: tuple[int, ...], stream: int, like: Tensor) -> Tensor:
        """Standard normal numbers of ``shape``, in the dtype of ``like`` but at least float32; streams as above."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if not self.counted:
            return torch.randn(shape, dtype=dtype, device=like.device)
        return philox.randn(self._seed_of(stream), _offsets(shape, like), dtype=dtype).view(shape)

    def _seed_of(self, stream: int) -> Tensor:
        return self.seed + (stream << 32)


def _offsets(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int64, device=like.device)
