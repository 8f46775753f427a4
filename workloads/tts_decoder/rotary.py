"""Rotary positions: plain, and multimodal with interleaved axes.

Shapes: T positions, A = 3 axes (time, height, width), D features a head, F = D / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import StackConfig


def rotation_tables(config: StackConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] in ``dtype`` of what ``positions_T`` rotate by."""
    wide = torch.promote_types(dtype, torch.float32)
    angles_TF = positions_T.to(wide)[:, None] * frequencies(config, positions_T.device).to(wide)
    return angles_TF.cos().to(dtype), angles_TF.sin().to(dtype)


def frequencies(config: StackConfig, device: torch.device) -> Tensor:
    """theta^(-2i / D), [F] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.theta**exponents


def multimodal_tables(config: StackConfig, positions_AT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`rotation_tables`, where frequency j takes the position of axis j % 3 while that axis has sections left.

    Speech puts one position on all three axes, so this equals the plain tables to the bit.

    Source: the interleaved M-RoPE of Qwen3-VL, which the talker inherits; specification section 1.
    """
    cos, sin = (
        torch.stack(tables)
        for tables in zip(*(rotation_tables(config, positions_T, dtype) for positions_T in positions_AT), strict=True)
    )
    return _interleaved(config, cos), _interleaved(config, sin)


def _interleaved(config: StackConfig, tables_ATF: Tensor) -> Tensor:
    mixed_TF = tables_ATF[0].clone()
    for axis, section in enumerate(config.sections[1:], start=1):
        mixed_TF[:, axis : 3 * section : 3] = tables_ATF[axis, :, axis : 3 * section : 3]
    return mixed_TF


def rotate(x_BHTD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the first half of the features against the second."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat([first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF], dim=-1)
