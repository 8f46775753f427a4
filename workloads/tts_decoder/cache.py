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
        bias: added to the scores of a query (row), [M, M]: nothing for a key (column) that it sees, else -inf.
        arrived: a counter for each head of queries, int32, zero between kernels.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    positions: Tensor
    bias: Tensor
    arrived: Tensor


class KVCache:
    """The cache of one transformer, for one sequence.

    ``length`` counts the positions on the host. Between :meth:`count_on_device` and :meth:`count_on_host` the device
    counts them in ``counter``, and attention sees all of the room through a mask: nothing depends on ``length``, so
    that what runs can be captured once and replayed.
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
        self._device_count: Tensor | None = None
        self._counted = -1
        self._bias_TM: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        if self.counter is not None:
            self.counter.zero_()
        else:
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
        if self.counter is not None:
            self.counter.add_(count)
        else:
            self.length += count

    def reserve(self) -> Room:
        """The room, allocated by the first call, which takes along what the cache holds."""
        if self.room is None:
            keys, values = self._moved(self.keys), self._moved(self.values)
            counted = torch.arange(self.most, device=self.device)
            cos, sin = rotation_tables(self.config, counted, self.dtype)
            bias = torch.zeros(self.most, self.most, device=self.device, dtype=self.dtype)
            bias.masked_fill_(counted > counted[:, None], float("-inf"))
            arrived = torch.zeros(self.config.heads, device=self.device, dtype=torch.int32)
            self.room = Room(keys, values, cos, sin, counted[:, None].repeat(1, 2), bias, arrived)
            self.keys, self.values = [], []
        return self.room

    def _moved(self, layers: list[Tensor]) -> list[Tensor]:
        # A tensor a layer, because compilers treat parts of one tensor that are written as one tensor.
        shape = (1, self.config.kv_heads, self.most, self.config.head_dim)
        rooms = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in layers]
        for room, layer in zip(rooms, layers, strict=True):
            room[:, :, : self.length] = layer
        return rooms

    def leave_room(self) -> None:
        """Go back to concatenation, for code that knows nothing else."""
        if self.room is not None:
            self.keys, self.values = map(list, self.content())
            self.room = None

    def count_on_device(self) -> None:
        """From here on the device counts."""
        room = self.reserve()
        if self._device_count is None:
            self._device_count = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self._counted != self.length:
            self._device_count.copy_(room.positions[self.length, :1])
        self._counted = -1
        self.counter = self._device_count

    def count_on_host(self) -> None:
        """From here on the host counts, from where it was."""
        self.counter = None

    def counted_to(self, length: int) -> None:
        """Take over how far the device has counted."""
        self.length = self._counted = length

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

    def bias(self, layer: int, count: int) -> Tensor | None:
        """What is added to the scores [T, M] of ``count`` queries that see a part of :meth:`visible`; else None.

        Computed for the first layer, for all of them.
        """
        if self.counter is None:
            return None
        if layer == 0:
            rows_T = self.counter if count == 1 else self.counter + torch.arange(count, device=self.counter.device)
            self._bias_TM = self.reserve().bias.index_select(0, rows_T)
        return self._bias_TM

    def content(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values per layer [B, H, S, D]; what is written into them is written into the cache."""
        if self.room is None:
            return self.keys, self.values
        return (
            [keys[:, :, : self.length] for keys in self.room.keys],
            [values[:, :, : self.length] for values in self.room.values],
        )
