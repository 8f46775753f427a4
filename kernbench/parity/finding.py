"""What one check found, and how it becomes a row of the record."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernbench.parity.compare import Judged
from kernbench.record import MutantResult, Oracle, ParityResult

REASONS_SHOWN = 3


@dataclass
class Finding:
    """What one check found; it becomes a ParityResult.

    ``reason`` adds to those of the judged leaves. No reason at all is a pass, unless ``passed`` says otherwise.
    """

    judged: list[Judged] = field(default_factory=list)
    reason: str = ""
    passed: bool | None = None
    mutants: tuple[int, int] | None = None
    bitwise: bool | None = None
    graded: list[MutantResult] = field(default_factory=list)
    examples: int | None = None
    oracle: Oracle = "float64"

    def row(self, kernel: str, case: str, dtype: str, mode: str, seconds: float) -> ParityResult:
        worst = max(self.judged, key=lambda judged: judged.excess, default=None)
        wrong = [judged.reason for judged in self.judged if judged.reason]
        more = f"and {len(wrong) - REASONS_SHOWN} more tensors" if len(wrong) > REASONS_SHOWN else ""
        reason = "; ".join(filter(None, [*wrong[:REASONS_SHOWN], more, self.reason]))
        limits = worst.limits if worst else None
        return ParityResult(
            kernel=kernel,
            case=case,
            dtype=dtype,
            mode=mode,
            passed=not reason if self.passed is None else self.passed,
            oracle=self.oracle,
            errors=worst.errors if worst else None,
            eager_errors=worst.eager if worst else None,
            bound=limits.max if limits else None,
            tensor=worst.name if worst else "",
            limits=limits,
            mutants_killed=self.mutants,
            mutants=self.graded,
            examples=self.examples,
            bitwise=self.bitwise,
            seconds=seconds,
            reason=reason,
        )


def raised(error: Exception) -> str:
    """An exception as a reason: its type and first line; of a full device's long one what it did not get."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        first = ". ".join(first.split(". ")[:2])
    return f"raised {type(error).__name__}: {first}" if first else f"raised {type(error).__name__}"
