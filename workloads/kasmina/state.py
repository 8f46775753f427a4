"""The state of all seeds of a layer in tensors, and its one change: a transition that leaves a trace.

Shapes: S seeds, H history entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HISTORY = 10
LIFECYCLE, BLUEPRINT, EPOCHS, SCHEDULE, PARENT, CHECKPOINT, SCORE, ERRORS = range(8)
"""Columns of ``state_S8``: the score counts thousandths; -1 stands for no blueprint and no checkpoint."""
LOSS, ACCURACY, STABILITY, EFFICIENCY = range(4)
"""Columns of ``performance_S4``."""


class SeedState(nn.Module):
    """State, history and figures of S seeds, as buffers on the layer's device."""

    def __init__(self, seeds: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # At least float32: figures of a bfloat16 layer would say little.
        real = torch.promote_types(dtype, torch.float32)
        self.state_S8: Tensor
        self.history_SH2: Tensor
        self.pointer_S: Tensor
        self.performance_S4: Tensor
        self.telemetry_S2: Tensor
        self.moments_S2: Tensor
        state_S8 = torch.zeros(seeds, 8, dtype=torch.int32, device=device)
        state_S8[:, BLUEPRINT] = -1
        state_S8[:, CHECKPOINT] = -1
        self.register_buffer("state_S8", state_S8)
        self.register_buffer("history_SH2", torch.zeros(seeds, HISTORY, 2, dtype=torch.int32, device=device))
        self.register_buffer("pointer_S", torch.zeros(seeds, dtype=torch.int32, device=device))
        self.register_buffer("performance_S4", torch.zeros(seeds, 4, dtype=real, device=device))
        # Scratch of phase 2: lifecycle, blueprint, epochs and schedule that an update would set.
        self.values_S4: Tensor
        self.register_buffer("values_S4", torch.zeros(seeds, 4, dtype=torch.int32, device=device), persistent=False)
        # Sum and sum of squares of the last forward pass in which no seed was active.
        self.register_buffer("telemetry_S2", torch.zeros(seeds, 2, dtype=real, device=device))
        # Mean and population variance of the last forward pass in which one was.
        self.register_buffer("moments_S2", torch.zeros(seeds, 2, dtype=real, device=device))

    @property
    def lifecycle_S(self) -> Tensor:
        return self.state_S8[:, LIFECYCLE]

    @property
    def blueprint_S(self) -> Tensor:
        return self.state_S8[:, BLUEPRINT]

    @property
    def epochs_S(self) -> Tensor:
        return self.state_S8[:, EPOCHS]

    def change(self, seed: int, target: int) -> None:
        """Move one seed to ``target``: history, epochs and parent follow. Reads the seed's state and its pointer."""
        before = int(self.state_S8[seed, LIFECYCLE].item())
        place = int(self.pointer_S[seed].item())
        self.history_SH2[seed, place, 0] = before
        self.history_SH2[seed, place, 1] = target
        self.pointer_S[seed] = (place + 1) % HISTORY
        self.state_S8[seed, LIFECYCLE] = target
        self.state_S8[seed, EPOCHS] = 0
        self.state_S8[seed, PARENT] = before

    def age(self) -> None:
        """One more epoch for every seed."""
        self.epochs_S.add_(1)
