"""Keys and values of one transformer: grown by concatenation, or written into room that is allocated once.

Shapes: B batch, H heads of keys and values, T new positions, S positions so far, M most positions, D features a head,
F = D / 2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import StackConfig
from .rotary import rotation_tables


@dataclass(frozen=True)
class Room:
    """All memory that a preallocated cache needs.

    Attributes:
        keys, values: per layer [B, H, M, D].
        cos, sin: the rotation of every position, [M, F].
        positions: each position twice, [M, 2] int64, so that each lies at an address divisible by 16.
        causal: whether a query (row) sees a key (column), [M, M] bool.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    positions: Tensor
    causal: Tensor


class KVCache:
    """The cache of one transformer, for one sequence.

    ``length`` counts the positions on the host. ``counter`` is the same number on the device where a captured frame
    advances it; attention then sees all of the room through a mask, because nothing in it may depend on ``length``.
    """

    def __init__(self, config: StackConfig, most: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.most = most
        self.device = device
        self.dtype = dtype
        self.length = 0
        self.counter: Tensor | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.room: Room | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        if self.room is None and length == 0:
            shape = (1, self.config.kv_heads, 0, self.config.head_dim)
            self.keys = [torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(self.config.layers)]
            self.values = list(self.keys)
        elif self.room is None and length < self.length:
            self.keys = [keys[:, :, :length] for keys in self.keys]
            self.values = [values[:, :, :length] for values in self.values]
        self.length = length

    def append(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S + T, D] of a layer with the new ones behind."""
        self.leave_room()
        self.keys[layer] = torch.cat([self.keys[layer], keys_BHTD], dim=2)
        self.values[layer] = torch.cat([self.values[layer], values_BHTD], dim=2)
        return self.keys[layer], self.values[layer]

    def advance(self, count: int) -> None:
        """All layers have the next ``count`` positions."""
        self.length += count

    def reserve(self) -> Room:
        """The room, allocated by the first call, which takes what the cache holds along."""
        if self.room is None:
            shape = (self.config.layers, 2, 1, self.config.kv_heads, self.most, self.config.head_dim)
            memory = torch.zeros(shape, device=self.device, dtype=self.dtype)
            for layer in range(self.config.layers):
                memory[layer, 0, :, :, : self.length] = self.keys[layer]
                memory[layer, 1, :, :, : self.length] = self.values[layer]
            counted = torch.arange(self.most, device=self.device)
            cos, sin = rotation_tables(self.config, counted, self.dtype)
            self.room = Room(
                keys=[memory[layer, 0] for layer in range(self.config.layers)],
                values=[memory[layer, 1] for layer in range(self.config.layers)],
                cos=cos,
                sin=sin,
                positions=counted[:, None].repeat(1, 2),
                causal=counted[:, None] >= counted,
            )
            self.keys, self.values = [], []
        return self.room

    def leave_room(self) -> None:
        """Go back to concatenation, for code that knows nothing else."""
        if self.room is not None:
            self.keys, self.values = map(list, self.content())
            self.room = None

    def position(self) -> Tensor:
        """Index of the next position, [1] int64 on the device; no copy and no launch."""
        if self.counter is not None:
            return self.counter
        return self.reserve().positions[self.length, :1]

    def visible(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] that ``count`` new positions, already written, can see; all with a counter."""
        room = self.reserve()
        if self.counter is not None:
            return room.keys[layer], room.values[layer]
        end = self.length + count
        return room.keys[layer][:, :, :end], room.values[layer][:, :, :end]

    def mask(self) -> Tensor | None:
        """Who sees whom, [1, M] bool, where one query sees a part of :meth:`visible`; else None."""
        if self.counter is None:
            return None
        return self.reserve().causal.index_select(0, self.counter)

    def content(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values per layer [B, H, S, D]; what is written into them is written into the cache."""
        if self.room is None:
            return self.keys, self.values
        return (
            [keys[:, :, : self.length] for keys in self.room.keys],
            [values[:, :, : self.length] for values in self.room.values],
        )
