"""What a built workload says of its own step: figures under their own names, and the bytes that it has to move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kernbench import record
from kernbench.errors import WorkloadFailed
from kernbench.measurement import ceilings
from kernbench.measurement.roofline import IMPOSSIBLE_SHARE


def figures_of(built: Any, seconds: float, name: str) -> list[record.Figure]:
    """What ``built.figures(seconds_per_step)`` makes of a step's time; empty if it has none.

    Raises:
        WorkloadFailed: it gives something else than names with a finite number and a unit.
    """
    tell = getattr(built, "figures", None)
    if tell is None:
        return []
    told = tell(seconds)
    if not isinstance(told, Mapping):
        raise WorkloadFailed(
            f"figures of {name} gives a {type(told).__name__}; give a mapping of names to (value, unit)"
        )
    return [_figure(str(title), figure, name) for title, figure in told.items()]


def _figure(title: str, figure: Any, name: str) -> record.Figure:
    try:
        value, unit = figure
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not isinstance(unit, str):
        raise WorkloadFailed(
            f"figures of {name} gives {figure!r} for {title!r}; give a finite number and its unit, as in (12.5, 's')"
        )
    return record.Figure(name=title, value=number, unit=unit)


def floor_of(
    built: Any, seconds: float, roofs: record.Ceilings | None, device: torch.device, name: str
) -> record.Floor | None:
    """How close a step is to the time that moving its ``bytes_per_step`` alone would take; None if it states none.

    Raises:
        WorkloadFailed: the number of bytes is none.
    """
    moved = getattr(built, "bytes_per_step", None)
    if moved is None:
        return None
    if isinstance(moved, bool) or not isinstance(moved, int | float) or not math.isfinite(moved) or moved <= 0:
        raise WorkloadFailed(f"bytes_per_step of {name} is {moved!r}; give a number of bytes above 0, or None")
    rate = roofs.copy_bytes_per_second if roofs is not None else None
    if rate is None:
        return record.Floor(bytes_per_step=moved, note="copy bandwidth was not measured here")
    held = ceilings.cache_bytes(device)
    if moved <= held:
        note = f"a cache of {held / 1e6:,.0f} MB holds them, so that memory does not bind"
        return record.Floor(bytes_per_step=moved, note=note)
    least = moved / rate
    share = least / seconds
    note = "faster than memory delivers: more bytes are counted than are moved, or the cache holds part of them"
    return record.Floor(bytes_per_step=moved, seconds=least, share=share, note=note if share > IMPOSSIBLE_SHARE else "")
