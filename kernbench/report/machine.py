"""What a record knows of the machine it ran on, as rows of name and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernbench.record import Clocks, CompareRecord, Environment, ProfileRecord, Record, SwapRecord
from kernbench.report import units


def environment_rows(environment: Environment) -> list[tuple[str, str]]:
    """Device and versions, name and text."""
    device = environment.device
    rows = [
        ("device", device.name + (f" x {device.count}" if device.count > 1 else "")),
        ("compute capability", device.capability),
        ("memory", units.size(device.memory_bytes) if device.memory_bytes else ""),
        ("L2 cache", units.size(device.l2_bytes) if device.l2_bytes else ""),
        ("driver", device.driver),
        ("CUDA runtime", device.runtime),
        ("processor", f"{environment.cpu}, {environment.cpu_threads} threads"),
        ("torch", environment.torch),
        ("Triton", environment.triton),
        ("Python", environment.python),
        ("kernbench", environment.kernbench),
        ("platform", environment.platform),
    ]
    return [(name, text) for name, text in rows if text]


def ceiling_rows(environment: Environment) -> list[tuple[str, str]]:
    """The measured roofs; empty where none was measured."""
    ceilings = environment.ceilings
    if ceilings is None:
        return []
    rows = [
        ("copy", ceilings.copy_bytes_per_second, units.bytes_rate),
        ("triad", ceilings.triad_bytes_per_second, units.bytes_rate),
        *((f"matmul {name}", rate, units.flops_rate) for name, rate in ceilings.matmul_flops_per_second.items()),
        ("launch floor", ceilings.launch_seconds, units.seconds),
    ]
    return [(name, show(value)) for name, value, show in rows if value is not None]


def clock_rows(clocks: Sequence[Clocks]) -> list[tuple[str, str]]:
    """What the device said of itself, as the range over all readings."""
    rows = []
    fields: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("SM clock", "sm_hz", units.hertz),
        ("memory clock", "memory_hz", units.hertz),
        ("power", "power_watts", lambda value: f"{value:.0f} W"),
        ("temperature", "temperature_celsius", lambda value: f"{value:.0f} °C"),
    )
    for name, attribute, show in fields:
        values = [value for reading in clocks if (value := getattr(reading, attribute)) is not None]
        if values:
            low, high = show(min(values)), show(max(values))
            rows.append((name, low if low == high else f"{low} to {high}"))
    if clocks:
        reasons = sorted({reason for reading in clocks for reason in reading.throttle_reasons})
        rows.append(("throttled", ", ".join(reasons) or "no"))
    return rows


def clocks_of(record: Record) -> list[Clocks]:
    """All clock readings of a record."""
    match record:
        case ProfileRecord():
            return [record.clocks] if record.clocks else []
        case SwapRecord():
            return record.clocks
        case CompareRecord():
            return [*clocks_of(record.before), *clocks_of(record.after)]
        case _:
            return []
