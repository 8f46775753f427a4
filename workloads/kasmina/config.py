"""Sizes and settings of one Kasmina run; every preset is one value of this type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLUEPRINTS = 10
"""Rows of the elementwise blueprint bank."""


@dataclass(frozen=True, kw_only=True)
class KasminaConfig:
    """Layer, lifecycle, data and optimizer.

    Attributes:
        seeds, chunk: seed s owns columns s * chunk to (s + 1) * chunk, as far as ``width`` goes. Columns that no seed
            owns pass through; seeds behind the last column are empty.
        blueprint: elementwise rows of a bank, or a network per seed.
        start: seeds spread over the lifecycle, or the first 30 % grafting and the rest dormant.
        schedules: alpha schedules, given to the seeds in turn.
        pace: forward passes per epoch of the lifecycle, so that a timed layer stays in one state.
        step: one training step, or the layer's forward pass alone.
        document: one of the source document's sizes, whose byte count is shown beside the real one.
    """

    batch: int = 32
    width: int = 64
    seeds: int = 8
    chunk: int = 8
    blueprint: Literal["bank", "network"] = "bank"
    start: Literal["mixed", "grafting"] = "mixed"
    schedules: tuple[int, ...] = (0,)
    pace: int = 1
    step: Literal["train", "forward"] = "train"
    document: bool = False

    ramp: int = 50
    drift_threshold: float = 0.01
    adaptive_drift: float = 0.005
    adaptive_delta: float = 0.01
    pause: int = 10
    momentum_factor: float = 0.1
    delta_factor: float = 0.01
    stable_loss_variance: float = 0.1
    stable_accuracy_variance: float = 0.05

    lr: float = 0.1
    momentum: float = 0.9
    loss_average_rate: float = 0.1

    def __post_init__(self) -> None:
        if min(self.batch, self.width, self.seeds, self.chunk, self.pace) < 1:
            raise ValueError("batch, width, seeds, chunk and pace are at least 1")
        if not self.schedules or not set(self.schedules) <= set(range(5)):
            raise ValueError(f"schedules {self.schedules} are not a choice of 0 to 4")
        if self.blueprint == "network" and (self.seeds * self.chunk != self.width or {1, 3} & set(self.schedules)):
            raise ValueError("networks take equal chunks that fill the width, and schedules that watch no drift")

    @property
    def covered(self) -> int:
        """Columns that some seed owns."""
        return min(self.seeds * self.chunk, self.width)

    @property
    def live(self) -> int:
        """Seeds that own a column."""
        return -(-self.covered // self.chunk)


def honest(batch: int, width: int, seeds: int) -> KasminaConfig:
    """A training preset whose chunks fill the width."""
    return KasminaConfig(batch=batch, width=width, seeds=seeds, chunk=width // seeds, pace=20)


def document(batch: int, width: int, seeds: int, chunk: int) -> KasminaConfig:
    """One of the source document's sizes: more seeds than columns could feed."""
    return KasminaConfig(
        batch=batch,
        width=width,
        seeds=seeds,
        chunk=chunk,
        start="grafting",
        pace=2000,
        step="forward",
        document=True,
    )


PRESETS = {
    "tiny": KasminaConfig(),
    "tiny-schedules": KasminaConfig(width=96, seeds=12, schedules=(0, 1, 2, 3, 4)),
    "tiny-networks": KasminaConfig(blueprint="network", schedules=(0, 2, 4)),
    "small": honest(32, 512, 8),
    "medium": honest(64, 4096, 64),
    "large": honest(1024, 4096, 64),
    "extreme": honest(4096, 8192, 128),
    "seeds-1000": KasminaConfig(
        batch=64, width=16_000, seeds=1000, chunk=16, start="grafting", pace=2000, step="forward"
    ),
    "document-small": document(32, 512, 100, 64),
    "document-medium": document(32, 1024, 500, 128),
    "document-large": document(16, 2048, 1000, 256),
    "document-extreme": document(8, 4096, 2000, 512),
}
