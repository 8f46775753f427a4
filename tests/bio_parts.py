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
