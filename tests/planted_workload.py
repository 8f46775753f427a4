"""The ten scenarios as real steps on a GPU: a fault, the same step without it, and what the replay says of it.

``python tests/planted_workload.py [FOLDER]`` prints the table of predicted and measured savings as an entry for
JOURNAL.md, and keeps the traces in FOLDER if one is named.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernbench
from kernbench import capture, device, runfolder
from kernbench.analysis.findings import findings
from kernbench.analysis.stalls import stalls
from kernbench.analysis.whatif import whatif
from kernbench.record import Cause, Change, Finding, WhatIf
from kernbench.traces import trace

RELATIVE, OF_STEP = 0.2, 0.03
"""A prediction holds within this share of the measured saving, or this share of the step."""
WARM_UP, ROUNDS, STEPS_PER_ROUND, TRACED = 5, 15, 8, 3
Step = Callable[[int], Any]


@dataclass
class Scenario:
    """``faulty`` and ``fixed`` make a step each, on tensors of their own."""

    name: str
    cause: Cause
    faulty: Callable[[], Step]
    fixed: Callable[[], Step] | None
    change: Change = "without all stalls"


@dataclass(frozen=True)
class Outcome:
    """Seconds per step, measured in turns without a profiler, and what the trace of the faulty side foretold."""

    scenario: Scenario
    faulty_seconds: float
    fixed_seconds: float
    findings: list[Finding]
    whatif: WhatIf

    @property
    def measured(self) -> float:
        return self.faulty_seconds - self.fixed_seconds

    @property
    def predicted(self) -> float | None:
        """The saving that the change of the scenario promises; a single stall is all stalls."""
        found = {estimate.change: sum(estimate.saving_seconds_per_step) / 2 for estimate in self.whatif.estimates}
        alone = found.get("without stall") if self.scenario.change == "without all stalls" else None
        return found.get(self.scenario.change, alone)

    @property
    def named(self) -> bool:
        """Whether the first finding is of the planted cause, and the only one where nothing is planted."""
        causes = [finding.cause for finding in self.findings]
        return causes[:1] == [self.scenario.cause] and (self.scenario.fixed is not None or len(causes) == 1)

    @property
    def foretold(self) -> bool:
        """Whether the prediction came as close to the measured saving as is asked; nothing to foretell is fine."""
        if self.scenario.fixed is None:
            return True
        if self.predicted is None or self.whatif.refused:
            return False
        off = abs(self.predicted - self.measured)
        return off <= max(RELATIVE * self.measured, OF_STEP * self.faulty_seconds)


class OneStep:
    """A step as a built workload, for the capture."""

    units_per_step = 1.0

    def __init__(self, step: Step) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {}


def _chain(count: int, width: int) -> Callable[[Tensor], Tensor]:
    """Matrix products and activations, one kernel each."""
    # Scaled so that values keep their size through any number of activations.
    weights = [torch.randn(width, width, device="cuda") * (2 / width) ** 0.5 for _ in range(count)]

    def run(x_RD: Tensor) -> Tensor:
        for weight_DD in weights:
            x_RD = torch.relu(x_RD @ weight_DD)
        return x_RD

    return run


def _input(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device="cuda")


def _reading(blocks: int, count: int, rows: int, width: int, *, reads: bool) -> Step:
    chain, x_RD = _chain(count, width), _input(rows, width)
    seen: list[Any] = []

    def step(index: int) -> None:
        y_RD = x_RD
        seen.clear()
        for _ in range(blocks):
            y_RD = chain(y_RD)
            total = y_RD.sum()
            seen.append(total.item() if reads else total)

    return step


class _Batches(torch.utils.data.Dataset[Tensor]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.batch_RD = torch.randn(1024, 1024)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Tensor:
        # A sleep lets go of the interpreter as decoding a file would.
        if self.seconds:
            time.sleep(self.seconds)
        return self.batch_RD


def _loading(seconds: float) -> Step:
    batches = iter(torch.utils.data.DataLoader(_Batches(seconds), batch_size=None, pin_memory=False))
    chain, x_RD = _chain(12, 2048), _input(2048, 2048)

    def step(index: int) -> None:
        next(batches)
        chain(x_RD)

    return step


def _copying(*, pinned: bool) -> Step:
    chain, x_RD = _chain(4, 1024), _input(2048, 1024)
    host = [torch.randn(256, 256, pin_memory=pinned) for _ in range(6)]

    def step(index: int) -> None:
        for part in host:
            part.to("cuda", non_blocking=pinned)
            chain(x_RD)

    return step


def _masking(*, waits: bool) -> Step:
    chain, x_RD = _chain(8, 1024), _input(2048, 1024)

    def step(index: int) -> None:
        y_RD = x_RD
        for _ in range(5):
            y_RD = chain(y_RD)
            few_RD = y_RD[:16]
            mask_RD = few_RD > 0.01
            # The sum over chosen elements, with a result whose size depends on them or without.
            few_RD[mask_RD].sum() if waits else torch.where(mask_RD, few_RD, 0.0).sum()

    return step


def _launching(*, graph: bool) -> Step:
    x_RD = _input(64, 64)

    def run() -> None:
        y_RD = x_RD
        for _ in range(150):
            y_RD = y_RD * 1.0001

    if not graph:
        return lambda index: run()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return lambda index: captured.replay()


def _allocating(*, churns: bool) -> Step:
    chain, x_RD = _chain(6, 1024), _input(1024, 1024)

    def step(index: int) -> None:
        for _ in range(4):
            scratch = torch.empty(64 << 20, device="cuda", dtype=torch.uint8)
            chain(x_RD)
            del scratch
            if churns:
                torch.cuda.empty_cache()

    return step


def _streaming(*, serial: bool) -> Step:
    """Batches are copied on a stream of their own, which waits for the computing one without need."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    chain, x_RD = _chain(2, 2048), _input(4096, 2048)
    host_RD = torch.randn(2048, 2048, pin_memory=True)
    target_RD = torch.empty(2048, 2048, device="cuda")

    def step(index: int) -> None:
        for _ in range(6):
            if serial:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                target_RD.copy_(host_RD, non_blocking=True)
            torch.cuda.current_stream().wait_stream(side)
            chain(x_RD)

    return step


def _healthy() -> Step:
    chain, x_RD = _chain(24, 2048), _input(4096, 2048)
    return lambda index: chain(x_RD)


SCENARIOS = (
    Scenario(
        "read in a host-bound loop",
        "host read",
        lambda: _reading(10, 2, 256, 256, reads=True),
        lambda: _reading(10, 2, 256, 256, reads=False),
    ),
    Scenario(
        "read in a device-bound loop",
        "host read",
        lambda: _reading(8, 4, 2048, 1024, reads=True),
        lambda: _reading(8, 4, 2048, 1024, reads=False),
    ),
    Scenario("slow data loading", "data loading", lambda: _loading(0.02), lambda: _loading(0), "without data loading"),
    Scenario("pageable copies", "pageable copy", lambda: _copying(pinned=False), lambda: _copying(pinned=True)),
    Scenario("implicit sync by mask", "implicit sync", lambda: _masking(waits=True), lambda: _masking(waits=False)),
    Scenario(
        "launch-bound chain", "launch-bound", lambda: _launching(graph=False), lambda: _launching(graph=True), "graph"
    ),
    Scenario(
        "allocator churn",
        "allocator",
        lambda: _allocating(churns=True),
        lambda: _allocating(churns=False),
        "without allocation",
    ),
    Scenario(
        "serialised streams",
        "serialised streams",
        lambda: _streaming(serial=True),
        lambda: _streaming(serial=False),
        "without stream waits",
    ),
    Scenario("healthy", "device-bound", _healthy, None),
)
"""Nine of the ten: a slow rank takes several devices, and is simulated in ``planted``."""


def outcome(scenario: Scenario, folder: Path) -> Outcome:
    """Measure both sides in turns, then trace the faulty one and ask the analyses."""
    faulty = scenario.faulty()
    fixed = scenario.fixed() if scenario.fixed else faulty
    for index in range(WARM_UP):
        faulty(index)
        fixed(index)
    torch.cuda.synchronize()
    slow, fast = _in_turns(faulty, fixed)
    path = folder / f"{scenario.name.replace(' ', '-')}.json.gz"
    gpu = torch.device("cuda")
    capture.trace_steps(OneStep(faulty), first=0, count=TRACED, device=gpu, path=folder / "warm-up.json.gz")
    capture.trace_steps(OneStep(faulty), first=0, count=TRACED, device=gpu, path=path)
    loaded = trace.load(path)
    replayed = whatif(loaded, stalls(loaded, None), unprofiled_seconds=slow)
    assert replayed is not None
    return Outcome(scenario, slow, fast, findings(loaded, replayed), replayed)


def _in_turns(faulty: Step, fixed: Step) -> tuple[float, float]:
    """Median seconds per step of both, a few steps at a time, each turn timed to the last kernel."""
    seconds: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for turn in range(ROUNDS):
            for side in (0, 1) if turn % 2 else (1, 0):
                step = (faulty, fixed)[side]
                step(0)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for index in range(STEPS_PER_ROUND):
                    step(index)
                torch.cuda.synchronize()
                seconds[side].append((time.perf_counter() - start) / STEPS_PER_ROUND)
    finally:
        gc.enable()
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def table(outcomes: list[Outcome]) -> str:
    """Markdown: cause found, predicted and measured saving, the error of the replay."""
    lines = [
        "| scenario | named first | step | predicted saving | measured saving | of the step | replay off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        step = one.faulty_seconds
        cause = one.findings[0].cause if one.findings else "nothing"
        predicted = one.predicted
        told = "-" if predicted is None else f"{predicted * 1e6:.0f} us"
        shares = f"{(predicted or 0) / step:.1%} / {one.measured / step:.1%}"
        error = one.whatif.refused or f"{one.whatif.error or 0:+.1%}"
        lines.append(
            f"| {one.scenario.name} | {cause} | {step * 1e6:.0f} us | {told} | {one.measured * 1e6:.0f} us | {shares} "
            f"| {error} |"
        )
    return "\n".join(lines)


def entry(outcomes: list[Outcome], command: str) -> str:
    """The table as an entry for JOURNAL.md, with what it says about the aim and what it was measured on."""
    planted = [one for one in outcomes if one.scenario.fixed is not None]
    foretold = sum(one.foretold for one in planted)
    environment = device.fingerprint(torch.device("cuda"))
    commit = device.git(Path(kernbench.__file__).parent.parent)
    stated = f"{commit.commit[:12]}{' with uncommitted changes' if commit.dirty else ''}" if commit else "unknown"
    return "\n".join(
        [
            f"## {runfolder.now_utc():%Y-%m-%d} planted faults: what the replay foretold, and what mending them won",
            "",
            f"Cause named in {sum(one.named for one in outcomes)} of {len(outcomes)} scenarios; the saving foretold "
            f"within {RELATIVE:.0%} or {OF_STEP * 100:.0f} points of the step in {foretold} of {len(planted)}. Medians "
            f"of {ROUNDS} turns of {STEPS_PER_ROUND} steps each, with and without the fault in turns, without a "
            "profiler.",
            "",
            table(outcomes),
            "",
            f"- Device: {environment.device.name}, torch {environment.torch}, triton {environment.triton}",
            f"- Commit: {stated}",
            f"- Command: `{command}`",
            "",
        ]
    )


def measured(folder: Path) -> list[Outcome]:
    """All scenarios, measured now; their traces stay in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return [outcome(scenario, folder) for scenario in SCENARIOS]


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        print(entry(measured(Path(arguments[0] if arguments else scratch)), "python tests/planted_workload.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
