"""The two attentions of TitanMAC: windowed on SDPA (A) and block-sparse (B).

Shapes: B batch, S positions (persistent tokens first), D width, E = 3 D, H heads, F = D / H, Q queries,
K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import TitanConfig

CONVOLUTION_TAPS = 4


def window_mask(like: Tensor, positions: int, persistent: int, window: int) -> Tensor:
    """Who sees whom, bool [S, S] beside ``like``: all see the persistent columns, persistent rows see nothing else, the
    other rows see what lies at most ``window`` before them."""
    mask_SS = like.new_ones(positions, positions, dtype=torch.bool).tril().triu(-window)
    mask_SS[:persistent] = False
    mask_SS[:, :persistent] = True
    return mask_SS


class WindowedAttention(nn.Module):
    """Attention A: SDPA with an explicit additive mask; the bool mask is cached, the additive one is built per call."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = config.heads
        self.persistent = config.persistent
        self.window = config.window
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(config.width, config.width, bias=False, device=device, dtype=dtype)
        self.masks: dict[int, Tensor] = {}

    def forward(self, qkv_BSE: Tensor) -> Tensor:
        """Mix positions; [B, S, D] of what ``self.qkv`` made."""
        positions = qkv_BSE.shape[1]
        q_BHSF, k_BHSF, v_BHSF = (split_heads(part, self.heads) for part in qkv_BSE.chunk(3, dim=-1))
        if positions not in self.masks:
            self.masks[positions] = window_mask(qkv_BSE, positions, self.persistent, self.window)
        bias_SS = qkv_BSE.new_zeros(positions, positions).masked_fill(~self.masks[positions], float("-inf"))
        mixed_BHSF = functional.scaled_dot_product_attention(q_BHSF, k_BHSF, v_BHSF, attn_mask=bias_SS)
        output: Tensor = self.output(join_heads(mixed_BHSF))
        return output


class BlockAttention(nn.Module):
    """Attention B: causal depthwise convolutions on q, k and v, then a Python loop over query blocks.

    A block sees the persistent columns and the keys from ``window`` before its start. Persistent queries see persistent
    columns only; upstream lets them see all positions, from where later layers read the future back.
    """

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = config.heads
        self.persistent = config.persistent
        self.window = config.window
        self.block = config.block
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(config.width, config.width, bias=False, device=device, dtype=dtype)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(
                config.width,
                config.width,
                CONVOLUTION_TAPS,
                groups=config.width,
                padding=CONVOLUTION_TAPS - 1,
                bias=False,
                device=device,
                dtype=dtype,
            )
            for _ in range(3)
        )
        self.masks: dict[tuple[int, int], Tensor] = {}

    def forward(self, qkv_BSE: Tensor) -> Tensor:
        """Mix positions; [B, S, D] of what ``self.qkv`` made."""
        positions = qkv_BSE.shape[1]
        q_BHSF, k_BHSF, v_BHSF = (
            split_heads(convolution(part.transpose(1, 2))[..., :positions].transpose(1, 2), self.heads)
            for part, convolution in zip(qkv_BSE.chunk(3, dim=-1), self.convolutions, strict=True)
        )
        kept = self.persistent
        mixed = []
        if kept:
            mixed.append(attend(q_BHSF[:, :, :kept], k_BHSF[:, :, :kept], v_BHSF[:, :, :kept], None))
        for start in range(kept, positions, self.block):
            end = min(start + self.block, positions)
            first = max(kept, start - self.window)
            keys = torch.cat([k_BHSF[:, :, :kept], k_BHSF[:, :, first:end]], dim=2)
            values = torch.cat([v_BHSF[:, :, :kept], v_BHSF[:, :, first:end]], dim=2)
            mask_QK = self.block_mask(qkv_BSE, end - start, start - first)
            mixed.append(attend(q_BHSF[:, :, start:end], keys, values, mask_QK))
        output: Tensor = self.output(join_heads(torch.cat(mixed, dim=2)))
        return output

    def block_mask(self, like: Tensor, queries: int, earlier: int) -> Tensor:
        """Bool [Q, K] of a block with ``earlier`` keys before it: causal, persistent columns open; cached."""
        size = (queries, earlier)
        if size not in self.masks:
            before = self.persistent + earlier
            self.masks[size] = like.new_ones(queries, before + queries, dtype=torch.bool).tril(before)
        return self.masks[size]


def attend(q_BHQF: Tensor, k_BHKF: Tensor, v_BHKF: Tensor, mask_QK: Tensor | None) -> Tensor:
    """Softmax attention written out: scores, mask fill, softmax, product."""
    scores_BHQK = q_BHQF @ k_BHKF.transpose(-2, -1) * q_BHQF.shape[-1] ** -0.5
    if mask_QK is not None:
        scores_BHQK = scores_BHQK.masked_fill(~mask_QK, float("-inf"))
    return torch.softmax(scores_BHQK, dim=-1) @ v_BHKF


def split_heads(x_BSD: Tensor, heads: int) -> Tensor:
    """[B, S, D] as [B, H, S, F]."""
    batch, positions, width = x_BSD.shape
    return x_BSD.view(batch, positions, heads, width // heads).transpose(1, 2)


def join_heads(x_BHSF: Tensor) -> Tensor:
    """[B, H, S, F] as [B, S, D]."""
    return x_BHSF.transpose(1, 2).flatten(2)
