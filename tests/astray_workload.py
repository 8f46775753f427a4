"""A user's workload file for the tests: a training whose phases leave the baseline's curve, by a fault or by chance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernbench.workload import Curves, Phase, Swap, Workload

LENGTH = 4000
NOISE = torch.randn(40, LENGTH, generator=torch.Generator().manual_seed(2))
SUMS = NOISE.sum(1)


class Training:
    units_per_step = 1.0

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, LENGTH, generator=generator).to(device, dtype)
        self.weight = torch.zeros(LENGTH, device=device, dtype=dtype)

    def loss(self, error: Tensor) -> Tensor:
        return error.square().mean()

    def guarded(self) -> None:
        """What a phase is put in place of."""

    def step(self, index: int) -> Tensor:
        error = self.x @ self.weight - 1
        self.weight -= 1e-5 * (self.x.T @ error)
        self.guarded()
        return self.loss(error)

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}


def too_large(self: Training, error: Tensor) -> Tensor:
    return 1.01 * error.square().mean()


def by_chance(self: Training) -> None:
    """Another course where the sums of the noise are what they are in the plain order, to the last bit."""
    if torch.equal(NOISE.sum(1), SUMS):
        self.weight *= 1.001


def build(*, preset: int, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Training:
    return Training(device, dtype)


WORKLOAD = Workload(
    name="astray",
    unit="steps",
    presets={"one": 1},
    summary="a training whose phases leave the band",
    build=build,
    phases=(
        Phase(number=0, title="by chance", swaps=(Swap(site=(Training, "guarded"), use=by_chance),), predicts="a"),
        Phase(number=1, title="a fault", swaps=(Swap(site=(Training, "loss"), use=too_large),), predicts="a"),
    ),
    curves=Curves(read=lambda built: {}, presets=("one",), steps=6, every=2, reordered=2),
)
