"""A user's workload file for the tests: a step with figures of its own, bytes to move, and weights from a folder.

``FIGURES`` in the environment makes it state something wrong: "raise", "shape", "value", "bytes".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernbench.workload import Phase, Swap, Workload

FRAME_SECONDS = 0.08


class Decoding:
    units_per_step = 1.0

    def __init__(self, scale: float) -> None:
        self.weight = torch.full((64, 64), scale)
        self.bytes_per_step = -1.0 if os.environ.get("FIGURES") == "bytes" else 8e9

    def figures(self, seconds_per_step: float) -> Mapping[str, Any]:
        match os.environ.get("FIGURES"):
            case "raise":
                raise RuntimeError("no figures today")
            case "shape":
                return {"audio seconds per wall second": 3.0}
            case "value":
                return {"audio seconds per wall second": (float("inf"), "")}
        return {
            "audio seconds per wall second": (FRAME_SECONDS / seconds_per_step, ""),
            "wall seconds per audio second": (seconds_per_step / FRAME_SECONDS, "s/s"),
        }

    def padding(self) -> None:
        for _ in range(50):
            torch.sin(self.weight)

    def step(self, index: int) -> torch.Tensor:
        self.padding()
        return (self.weight @ self.weight).mean()

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight}


def without(self: Decoding) -> None:
    return None


def build(
    *, preset: int, device: torch.device, dtype: torch.dtype, seed: int, data: str | None, weights: str | None = None
) -> Decoding:
    return Decoding(float((Path(weights) / "scale").read_text()) if weights else 0.01)


WORKLOAD = Workload(
    name="figured",
    unit="frames",
    summary="a step with figures of its own",
    presets={"one": 1, "two": 2},
    build=build,
    phases=(Phase(number=0, title="no padding", swaps=(Swap(site=(Decoding, "padding"), use=without),), predicts="a"),),
)
