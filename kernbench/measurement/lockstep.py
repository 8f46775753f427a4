"""What a measurement asks of the other ranks of its run, so that all of them take the same steps at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from kernbench import record


class Lockstep(Protocol):
    """The other ranks."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes the record; the others only take part in the steps."""

    def agree(self, seconds: float) -> float:
        """One figure for all ranks, the largest, where each would decide by its own how many steps to run."""

    def wait(self) -> None:
        """Wait until all ranks are here; leaves nothing in a trace."""

    def sides(self, seconds: float, units_per_step: float) -> record.Ranks | None:
        """What all ranks say of their unprofiled steps; None for a rank on its own."""

    def deliver(self, full: Path) -> None:
        """Hand this rank's trace to the one that leads."""

    def communication(self, folder: Path) -> record.Communication | None:
        """Keep the traces of all ranks in ``folder`` and compare them; None for the others, and on its own."""


class Alone:
    """One process that measures by itself."""

    leads = True

    def agree(self, seconds: float) -> float:
        return seconds

    def wait(self) -> None:
        return None

    def sides(self, seconds: float, units_per_step: float) -> record.Ranks | None:
        return None

    def deliver(self, full: Path) -> None:
        return None

    def communication(self, folder: Path) -> record.Communication | None:
        return None


ALONE = Alone()
