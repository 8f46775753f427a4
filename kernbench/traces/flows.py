"""The launch of each device event where only flows tell it: arrows between places in the trace, without references."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernbench.traces import tracefile
from kernbench.traces.kinetopiece import GROUPS, Event, Number

Ints = NDArray[np.int64]

# Kineto's name of these flows today, and before PyTorch 1.13.
_CATEGORIES = ("ac2g", "async_gpu", "async_cpu_to_gpu", "async")
_Spot = tuple[int | str | None, int | str | None, float]


def numbers(path: Path, wanted: Iterable[str]) -> dict[str, Ints]:
    """For each wanted group the number of the flow at each of its events, in file order; -1 where there is none.

    Raises:
        KernbenchError: the file changed since it was read.
    """
    reader = _Reader(wanted)
    tracefile.read(path, reader.take, list[Event])
    return {
        group: np.fromiter((_number(reader.flows.get(spot)) for spot in spots), np.int64, len(spots))
        for group, spots in reader.spots.items()
    }


class _Reader:
    def __init__(self, wanted: Iterable[str]) -> None:
        self.flows: dict[_Spot, Number] = {}
        self.spots: dict[str, list[_Spot]] = {group: [] for group in wanted}

    def take(self, events: list[Event]) -> None:
        for event in events:
            spot = (event.pid, event.tid, event.ts)
            if event.cat in _CATEGORIES and event.ph in ("s", "f"):
                self.flows[spot] = event.id
            elif event.ph == "X" and (spots := self.spots.get(GROUPS.get(event.cat or "", ""))) is not None:
                spots.append(spot)


def _number(flow: Number) -> int:
    if isinstance(flow, str):
        return int(flow) if flow.isdecimal() and flow.isascii() else -1
    return -1 if flow is None else int(flow)
