"""What profile says of TitanMAC's host reads, line by line, against the counts that the specification gives."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_titan_mac_reads import expected_reads, line_of

from kernbench import device
from kernbench import request as asked
from kernbench.analysis import stalls
from kernbench.measurement import measure
from kernbench.request import Request


def settings_of(preset: str) -> measure.Settings:
    return asked.settings(Request(command="test", preset=preset, device="cpu"), "titan-mac")


@functools.cache
def watched(preset: str, *phases: tuple[int, str]) -> tuple[measure.Settings, list[Any]]:
    settings = settings_of(preset)
    log = measure.watch(settings, asked.plan(settings.workload, dict(phases)))
    return settings, stalls.stalls(None, log)


def by_line(found: list[Any], kind: str) -> dict[tuple[str, int], float]:
    counts: Counter[tuple[str, int]] = Counter()
    for stall in found:
        if stall.klass == kind:
            counts[Path(stall.file).name, stall.line] += stall.count_per_step
    return dict(counts)


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac", "tiny-mal"])
def test_the_legacy_model_would_sync_exactly_where_the_specification_says(preset: str) -> None:
    settings, found = watched(preset)
    expected = expected_reads(settings.workload.presets[preset], len(list(settings.build().model.parameters())))  # type: ignore[attr-defined]
    assert by_line(found, "would-sync") == {line_of(label): count for label, count in expected.items()}
    # torch's AdamW reads one host counter per tensor with a gradient, all at the line that steps it: no stall anywhere.
    ((line, count),) = by_line(found, "cpu-tensor").items()
    assert (line[0], count) == ("optimizer.py", expected["gradient norms"])


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac", "tiny-mal"])
@pytest.mark.parametrize("phases", [[(0, "python")], [(0, "python"), (2, "eager")]])
def test_the_sync_free_model_reads_nothing(preset: str, phases: list[tuple[int, str]]) -> None:
    _, found = watched(preset, *phases)
    assert found == []


def test_phase_2_alone_leaves_the_device_reads_as_they_are() -> None:
    device.resolve("cpu")
    _, before = watched("tiny")
    _, after = watched("tiny", (2, "eager"))
    assert by_line(after, "would-sync") == by_line(before, "would-sync")
    assert by_line(after, "cpu-tensor") == {}
