"""What kernbench says of Kasmina's host reads, line by line, against the counts that the specification gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kernbench import registry
from kernbench import request as asked
from kernbench.analysis import stalls
from kernbench.measurement import measure
from kernbench.request import Request

READ_LINES = {
    "active mask": "active = torch.tensor(ACTIVE",
    "any active": "if not mask_S.any():",
    "chunk start": "start = int(self.starts_S[seed].item())",
    "chunk end": "end = int(self.ends_S[seed].item())",
    "seed active": "if mask_S[seed]:",
    "state": "state = self.seeds.lifecycle_S[seed].item()",
    "blueprint": "blueprint = int(self.seeds.blueprint_S[seed].item())",
    "epochs": "epochs = seeds.epochs_S[seed].item()",
    "loss": "loss = seeds.performance_S4[seed, LOSS].item()",
    "accuracy": "accuracy = seeds.performance_S4[seed, ACCURACY].item()",
    "stability": "stability = seeds.performance_S4[seed, STABILITY].item()",
    "efficiency": "efficiency = seeds.performance_S4[seed, EFFICIENCY].item()",
    "drift": "drift = ((w_C - ema_C).norm() / ema_C.norm()).item()",
    "variance": "variance = chunk_BC.var(correction=0).item()",
    "sparsity": "sparsity = (chunk_BC.abs() < SPARSE_BELOW)",
    "mean": "mean = chunk_BC.mean().item()",
    "norm": "norm = chunk_BC.norm().item()",
    "index": "index = torch.tensor([seed], device=y_BH.device)",
    "sum": "self.seeds.telemetry_S2[seed, 0].fill_(",
    "sum of squares": "self.seeds.telemetry_S2[seed, 1].fill_(",
    "grafting seeds": "grafting_G = torch.nonzero(self.seeds.lifecycle_S == Life.GRAFTING).flatten()",
    "grafting epochs": "if epochs_G[place].item() >= LEAST_EPOCHS",
}
"""For each label of ``expected_reads`` the text that starts on the reading line of layer.py."""


def expected_reads(seeds: int, live: int, active: int, grafting: int, drifting: int = 0) -> dict[str, int]:
    """Reads of one steady forward pass of the baseline, by label; specification, section 6.

    Of ``seeds`` seeds ``live`` have columns. Two of the lines copy from the host instead: the list of active states
    (counted there as one of the last three) and the 4 S indices of the telemetry (named there beside the total).
    """
    if not active:
        return {"active mask": 1, "any active": 1, "chunk start": seeds, "chunk end": seeds} | dict.fromkeys(
            ("sum", "sum of squares"), seeds
        )
    found = {
        "active mask": 1,
        "any active": 1,
        "chunk start": 2 * seeds,
        "chunk end": 2 * seeds,
        "seed active": seeds,
        **dict.fromkeys(("state", "blueprint"), active),
        **dict.fromkeys(("epochs", "loss", "accuracy", "stability", "efficiency"), grafting),
        **dict.fromkeys(("variance", "sparsity", "mean", "norm"), live),
        "index": 4 * seeds,
        "grafting seeds": 1,
        "grafting epochs": grafting,
        "drift": drifting,
    }
    return {label: count for label, count in found.items() if count}


def total(reads: dict[str, int]) -> int:
    """Reads as the specification adds them up: without the indices."""
    return sum(count for label, count in reads.items() if label != "index")


def line_of(label: str) -> tuple[str, int]:
    """The file name and line number of a label."""
    source = (registry.workload("kasmina").file.parent / "layer.py").read_text()
    text = READ_LINES[label]
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in layer.py"
    return "layer.py", source[: source.index(text)].count("\n") + 1


def settings_of(preset: str) -> measure.Settings:
    return asked.settings(Request(command="test", preset=preset, device="cpu"), "kasmina")


def watched(preset: str, phases: dict[int, str], prepare: Any = None) -> list[Any]:
    """The stalls of two steps after two others."""
    settings = settings_of(preset)
    return stalls.stalls(None, measure.watch(settings, asked.plan(settings.workload, phases), prepare))


def by_line(found: list[Any]) -> dict[tuple[str, int], float]:
    counts: Counter[tuple[str, int]] = Counter()
    for stall in found:
        assert stall.klass == "would-sync"
        counts[Path(stall.file).name, stall.line] += stall.count_per_step
    return dict(counts)


@pytest.mark.parametrize(
    ("preset", "active", "grafting", "drifting"),
    [("tiny", 4, 2, 0), ("tiny-schedules", 6, 3, 1), ("tiny-networks", 4, 2, 0), ("document-small", 30, 30, 0)],
)
def test_the_baseline_would_sync_exactly_where_the_specification_says(
    preset: str, active: int, grafting: int, drifting: int
) -> None:
    config = settings_of(preset).workload.presets[preset]
    expected = expected_reads(config.seeds, config.live, active, grafting, drifting)
    assert by_line(watched(preset, {})) == {line_of(label): count for label, count in expected.items()}


def test_the_total_is_the_specifications() -> None:
    for seeds, active, grafting in ((1000, 300, 300), (8, 4, 2)):
        assert total(expected_reads(seeds, seeds, active, grafting)) == 9 * seeds + 2 * active + 6 * grafting + 3
    assert total(expected_reads(1000, 1000, 300, 300)) == 11_403


def test_a_layer_without_active_seeds_reads_less() -> None:
    def sleep(built: Any) -> None:
        built.model.kasmina.seeds.state_S8[:, 0] = 0

    config = settings_of("tiny").workload.presets["tiny"]
    expected = expected_reads(config.seeds, config.live, 0, 0)
    assert by_line(watched("tiny", {}, sleep)) == {line_of(label): count for label, count in expected.items()}
    # The specification has a nonzero among the two; here it is the upload of the active states.
    assert total(expected) == 4 * config.seeds + 2
