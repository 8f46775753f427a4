"""The eleven states of a seed: what may follow what, after how many epochs, and under which guard.

Every rule is a function of numbers or of tensors alike: the host asks it about one seed, the device about all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Life(IntEnum):
    """States; the last four are terminal."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


ACTIVE = (Life.TRAINING, Life.GRAFTING, Life.FINE_TUNING)
"""The PyTorch layer's meaning of "active", which this workload uses; upstream's kernels mean 3 to 6."""

FOLLOWERS = {
    Life.DORMANT: (Life.GERMINATED,),
    Life.GERMINATED: (Life.TRAINING, Life.CANCELLED),
    Life.TRAINING: (Life.GRAFTING, Life.CULLED, Life.CANCELLED),
    Life.GRAFTING: (Life.STABILIZATION, Life.ROLLED_BACK),
    Life.STABILIZATION: (Life.EVALUATING, Life.ROLLED_BACK),
    Life.EVALUATING: (Life.FINE_TUNING, Life.CULLED, Life.ROLLED_BACK),
    Life.FINE_TUNING: (Life.FOSSILIZED, Life.CULLED, Life.ROLLED_BACK),
}
EPOCHS = {
    Life.TRAINING: 100,
    Life.GRAFTING: 50,
    Life.STABILIZATION: 20,
    Life.EVALUATING: 30,
    Life.FINE_TUNING: 50,
}
"""Epochs in a state before it may be left, for anything but ROLLED_BACK."""

ALLOWED = tuple(tuple(target in FOLLOWERS.get(source, ()) for target in Life) for source in Life)
LEAST_EPOCHS = tuple(
    tuple(0 if target == Life.ROLLED_BACK else EPOCHS.get(source, 0) for target in Life) for source in Life
)


@dataclass(frozen=True)
class Context:
    """What a guard looks at; numbers, or tensors over seeds.

    Attributes:
        delta: share of the training loss that went since the seed entered its state.
        improvement: the same figure, under the name that the guard of FOSSILIZED has for it.
        error_rate: failed forward passes per epoch in the state.
    """

    reconstruction_loss: Any = 0.0
    delta: Any = 0.0
    improvement: Any = 0.0
    stability: Any = 1.0
    error_rate: Any = 0.0
    errors: Any = 0


def guards(context: Context) -> dict[tuple[Life, Life], Any]:
    """Whether each guarded transition passes; every other one does."""
    worse = (context.delta < -0.05) | (context.error_rate > 0.1) | (context.errors > 5)
    return {
        (Life.TRAINING, Life.GRAFTING): context.reconstruction_loss <= 0.01,
        (Life.EVALUATING, Life.FINE_TUNING): (context.delta > 0) & (context.stability >= 0.8),
        (Life.EVALUATING, Life.CULLED): worse,
        (Life.FINE_TUNING, Life.FOSSILIZED): (context.improvement >= 0.01) & (context.stability >= 0.95),
    }
