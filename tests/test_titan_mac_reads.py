"""The host reads of a TitanMAC step, derived from the specification and counted line by line."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench import registry

CPU = torch.device("cpu:0")

READ_LINES = {
    "memory clip": ("memory.py", "if norm > self.clip:"),
    "memory guard": ("memory.py", "if torch.isnan(gradient_P).any() or"),
    "gradient norms": ("optimizer.py", "gradient_square +="),
    "parameter norms": ("optimizer.py", "parameter_square +="),
    "group depths": ("optimizer.py", "self.depths_G[index].item()"),
    "controller input guard": ("optimizer.py", "if torch.isnan(statistics_G3).any() or"),
    "controller output guard": ("optimizer.py", "if torch.isnan(multipliers_G).any() or"),
    "gradient guard": ("optimizer.py", "if not torch.isfinite(norm):"),
    "learning rates": ("optimizer.py", ".tolist()\n        self.move_parameters"),
    "loss": ("training.py", "loss_value = loss.item()"),
}
"""For each label of ``expected_reads`` the file in workloads/titan_mac and a text that starts on the reading line."""


def expected_reads(config: Any, parameter_count: int) -> dict[str, int]:
    """Device reads of one healthy steady step of the baseline, by label; ``parameter_count`` counts tensors.

    Specification, section 4, with S = memory updates per step (segments in mac, one otherwise):
    the clip branch S; the NaN guard 2 S (isnan and isinf both run when healthy); the gradient guard 1; the learning
    rates 1; the loss 1. In the legacy version 2 norms per parameter, where a parameter without gradient has only one
    of them (section 8, item 5: W_Q weight and bias, and two gates of four tensors each; the dataflow leaves
    memory_proj unused in mag and gate_proj in mal), and one depth per group. In the intermediate version four reads
    by the two guards of the controller. Steady means no meta update (every meta_update_freq steps) and no logging
    (every 100): those read more.
    """
    updates = -(-config.length // config.segment) if config.variant == "mac" else 1
    without_gradient = 2 + 2 * 4 + (0 if config.variant == "mac" else 2)
    return {
        "memory clip": updates,
        "memory guard": 2 * updates,
        "gradient norms": parameter_count - without_gradient,
        "parameter norms": parameter_count,
        "group depths": 2,
        "controller input guard": 2,
        "controller output guard": 2,
        "gradient guard": 1,
        "learning rates": 1,
        "loss": 1,
    }


def folder() -> Path:
    return registry.workload("titan-mac").file.parent


def line_of(label: str) -> tuple[str, int]:
    """The file name and line number of a label."""
    name, text = READ_LINES[label]
    source = (folder() / name).read_text()
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {name}"
    return name, source[: source.index(text)].count("\n") + 1


class _Items(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, record: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.record()
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    def __init__(self, record: Any) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.record()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_reads() -> Iterator[collections.Counter[tuple[str, int]]]:
    """Counts reads by the innermost line of the workload; AdamW's reads of its host counters are left out."""
    reads: collections.Counter[tuple[str, int]] = collections.Counter()
    home = str(folder())

    def record() -> None:
        frame: Any = sys._getframe(1)
        in_adamw = False
        while frame is not None and not frame.f_code.co_filename.startswith(home):
            in_adamw |= "/torch/optim/" in frame.f_code.co_filename
            frame = frame.f_back
        if frame is not None and not in_adamw:
            reads[Path(frame.f_code.co_filename).name, frame.f_lineno] += 1

    with _Lists(record), _Items(record):
        yield reads


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac", "tiny-mal", "debug"])
def test_baseline_reads_what_the_specification_says(preset: str) -> None:
    workload = registry.workload("titan-mac").declaration
    built: Any = workload.make(preset, CPU, torch.float32, 0, None)
    for index in range(2):
        built.step(index)
    with counted_reads() as reads:
        built.step(2)
    expected = expected_reads(workload.presets[preset], len(list(built.model.parameters())))
    assert reads == {line_of(label): count for label, count in expected.items()}


def test_tiny_reads_in_figures() -> None:
    config = registry.workload("titan-mac").declaration.presets["tiny"]
    assert sum(expected_reads(config, 42).values()) == 3 + (30 + 42) + 2 + 4 + 3


def test_meta_update_and_log_read_more() -> None:
    workload = registry.workload("titan-mac").declaration
    built: Any = workload.make("tiny", CPU, torch.float32, 0, None)
    steady = sum(expected_reads(workload.presets["tiny"], 42).values())
    built.optimizer.calls = built.config.meta_update_freq - 1
    with counted_reads() as reads:
        built.step(99)
    assert sum(reads.values()) == steady + 1 + 5
