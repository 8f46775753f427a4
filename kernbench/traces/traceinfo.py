"""What a trace file holds and what it cannot tell, in figures and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from kernbench.record import TraceInfo
from kernbench.traces.kineto import Tables
from kernbench.traces.nesting import CALL, Bools
from kernbench.traces.tracetables import Device, Host, Steps

_AMD = ("amd", "radeon", "instinct", "gfx")


def describe(path: Path, table: Tables, host: Host, device: Device, steps: Steps, lost: Bools) -> TraceInfo:
    """``lost`` marks host rows of launches whose device work is missing."""
    counted = np.flatnonzero(steps.complete)
    averaged = counted if len(counted) else np.arange(len(steps))
    described = _device_name(table, device)
    rank, size = (table.distributed.get(key) for key in ("rank", "world_size"))
    return TraceInfo(
        file=path.name,
        bytes=path.stat().st_size,
        events=table.events,
        vendor=_vendor(table, host, device, described),
        device=described,
        rank=rank if isinstance(rank, int) else None,
        world_size=size if isinstance(size, int) else None,
        steps=len(steps) if steps.marker else 0,
        counted_steps=len(counted) if steps.marker else 0,
        marker=steps.marker,
        step_seconds=float((steps.end_ns - steps.start_ns)[averaged].mean()) / 1e9,
        stacks=len(table.frames) > 0,
        shapes=len(table.shape_texts) > 0,
        sync_events=len(table.syncs) > 0,
        memory_events=len(table.memory) > 0,
        lost_launches=int(np.count_nonzero(lost)),
        notes=_notes(table, host, device, steps, int(np.count_nonzero(lost))),
    )


def _device_name(table: Tables, device: Device) -> str:
    """The name of the device with most of the work."""
    used = device.device[device.device >= 0]
    number = int(np.bincount(used).argmax()) if len(used) else -1
    for properties in table.device_properties:
        if isinstance(properties, dict) and properties.get("id") == number:
            return str(properties.get("name", ""))
    return ""


def _vendor(table: Tables, host: Host, device: Device, described: str) -> Literal["nvidia", "amd", "cpu", ""]:
    calls = {table.names[index] for index in np.unique(host.name[host.kind == CALL]).tolist()}
    if any(name.startswith("hip") for name in calls) or described.lower().startswith(_AMD):
        return "amd"
    if any(name.startswith("cu") for name in calls) or described.startswith("NVIDIA"):
        return "nvidia"
    return "" if len(device) else "cpu"


def _notes(table: Tables, host: Host, device: Device, steps: Steps, lost: int) -> list[str]:
    notes = []
    if not steps.marker:
        notes.append("No step is marked, so the whole trace counts as one step; call profiler.step() after each step.")
    if lost:
        notes.append(
            f"{lost} launches have no kernel in the trace (the profiler lost them); steps that lost more than one in"
            " a hundred are not counted."
        )
    left_out = int(np.count_nonzero(~steps.complete))
    if steps.marker and left_out == len(steps):
        notes.append("No step was recorded whole, so every figure per step is doubtful; record the trace again.")
    elif left_out:
        notes.append(f"{left_out} of {len(steps)} steps were not recorded whole and are not counted.")
    if not len(device):
        notes.append("The trace holds no device event; what follows is about the host alone.")
    elif not np.any(device.call >= 0):
        notes.append("No runtime call is recorded, so nothing tells when the host launched what or waited.")
    elif not len(table.frames):
        notes.append("No Python calls are recorded (with_stack=True), so no source line is known from this trace.")
    return notes
