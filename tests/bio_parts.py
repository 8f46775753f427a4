"""The modules of bio-nanochat's workload, for its tests."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from kernbench import registry

CPU = torch.device("cpu:0")


def module(name: str) -> ModuleType:
    """A module of the workload by its name."""
    build: Any = registry.workload("bio-nanochat").declaration.build
    return importlib.import_module(f"{build.__module__.rpartition('.')[0]}.{name}")


def small(**changes: Any) -> Any:
    """A config that is quick in float64 and has sizes that are no multiples of each other."""
    sizes: dict[str, Any] = {
        "vocabulary": 256, "length": 23, "batch": 2, "layers": 2, "heads": 2, "kv_heads": 2, "width": 24,
    }  # fmt: skip
    return module("config").BioConfig(**{**sizes, **changes})


def training(
    config: Any,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    data: str | None = None,
    device: torch.device = CPU,
) -> Any:
    """A training run whose noise is drawn as kernels draw it."""
    built = module("training").Training(config, device=device, dtype=dtype, seed=seed, data=data)
    built.model.counted_noise = True
    return built
