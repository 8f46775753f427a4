"""What differs between two traces, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernbench.record import Difference
from kernbench.report import sentences, terminal, units
from kernbench.report.terminal import STYLES

if TYPE_CHECKING:
    from rich.console import RenderableType

TOP_OPERATORS = 8


def difference(found: Difference | None) -> list[RenderableType]:
    """The operators that changed most, and where the two sequences part; nothing where no traces were compared."""
    if found is None:
        return []
    blocks: list[RenderableType] = []
    if found.operators:
        table = terminal.table("operator", ">calls a step", ">on the device", "", ">on the host", "")
        for item in found.operators[:TOP_OPERATORS]:
            calls = " → ".join(map(units.count, item.calls_per_step))
            row = [terminal.line(item.name), terminal.text(calls)]
            for old, new in (item.device_seconds_per_step, item.host_seconds_per_step):
                words, tone = sentences.difference(old, new, "seconds") if old or new else ("", "neutral")
                row += [terminal.text(units.seconds(new) if old or new else ""), terminal.text(words, STYLES[tone])]
            table.add_row(*row)
        blocks.append(table)
    return [*blocks, terminal.text(in_words(found))]


def in_words(found: Difference) -> str:
    """How many operators changed, and where the sequences part, in a sentence."""
    if not found.operators and not found.parting:
        return "The traces call the same operators in the same order, and none takes another time."
    rest = max(0, len(found.operators) - TOP_OPERATORS)
    counted = f"{len(found.operators)} operators changed" + (f", {rest} of them only in the report" if rest else "")
    same = f"{found.same} did not"
    parting = f"; {found.parting}" if found.parting else "; they come in the same order"
    return f"{counted}, {same}{parting}."
