"""Seconds, bytes and rates of a record as a person reads them: three significant digits and the unit that fits."""

from __future__ import annotations

import math
from datetime import UTC, datetime

Scale = tuple[tuple[float, str], ...]

TIME: Scale = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
RATE: Scale = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
MEMORY: Scale = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))

UNKNOWN = "unknown"
MINUTE = 60.0


def number(value: float) -> str:
    """Three significant digits, thousands grouped: 1,204 and 92.1 and 0.012."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = _three_digits(value)
    size = abs(rounded)
    if size >= 1e12:
        return f"{rounded:.2e}"
    if size >= 100:
        return f"{rounded:,.0f}"
    if size >= 0.001:
        return f"{rounded:.{2 - math.floor(math.log10(size))}f}"
    return f"{rounded:.2e}"


def seconds(value: float | None) -> str:
    """A duration: "92.1 ms", "3 min 5 s"."""
    if value is None:
        return UNKNOWN
    if abs(value) >= 2 * MINUTE:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes:,} min {rest} s"
    return _scaled(value, TIME)


def seconds_range(low: float, high: float) -> str:
    """Two durations in one unit: "91.0–93.4 ms"."""
    unit, name = _unit_for(high, TIME)
    return f"{number(low / unit)}–{number(high / unit)} {name}"


def time_unit(value: float) -> tuple[float, str]:
    """The unit in which a duration is printed, for an axis: (1e-6, "µs")."""
    return _unit_for(value, TIME)


def milliseconds(value: float) -> float:
    """A duration in the unit of a plot's axis."""
    return value * 1e3


def size(value: float | None) -> str:
    """A memory size: "40.0 MiB"."""
    return UNKNOWN if value is None else _scaled(value, MEMORY)


def moved(value: float) -> str:
    """Bytes that are moved, in decimal units as their rate is: "5.30 GB"."""
    return _scaled(value, RATE) + "B"


def figure(value: float, unit: str) -> str:
    """A number with a unit that somebody else chose: "0.85", "80 ms"."""
    return f"{number(value)} {unit}".rstrip()


def bytes_rate(value: float | None) -> str:
    """Bandwidth in decimal units, as vendors count it: "3.98 TB/s"."""
    return UNKNOWN if value is None else _scaled(value, RATE) + "B/s"


def flops_rate(value: float | None) -> str:
    """Arithmetic rate: "52.1 TFLOP/s"."""
    return UNKNOWN if value is None else _scaled(value, RATE) + "FLOP/s"


def units_rate(value: float, unit: str) -> str:
    """Throughput in the workload's unit: "11,100 tokens/s"."""
    return f"{number(value)} {unit}/s"


def count(value: float | None) -> str:
    """A count per step: whole numbers as such ("1,204"), others with their fraction ("6.5")."""
    if value is None:
        return UNKNOWN
    return f"{round(value):,}" if abs(value - round(value)) < 1e-9 else number(value)


def share(value: float | None) -> str:
    """A part of a whole: "40 %", "3.2 %", "under 0.1 %"."""
    if value is None:
        return UNKNOWN
    percent = 100 * value
    if 0 < percent < 0.1:
        return "under 0.1 %"
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.1f} %"


def times(value: float) -> str:
    """A plain ratio: "1.23x"."""
    return f"{number(value)}x"


def times_range(low: float, high: float) -> str:
    """Two ratios: "1.19–1.27"."""
    return f"{number(low)}–{number(high)}"


def faster(ratio: float) -> str:
    """A before/after ratio in words: "1.23x faster", "1.09x slower", "the same"."""
    if not math.isfinite(ratio) or ratio <= 0:
        return UNKNOWN
    if abs(ratio - 1) < 0.0005:
        return "the same"
    return f"{_three_decimals(ratio)}x faster" if ratio > 1 else f"{_three_decimals(1 / ratio)}x slower"


def interval_name(confidence: float) -> str:
    """What an interval of a level is called: "99 % interval"."""
    return f"{share(confidence)} interval"


def floor(value: float) -> str:
    """A noise floor, the half-width around a ratio of 1: "±0.8 %"."""
    return f"±{share(value)}"


def scientific(value: float | None) -> str:
    """An error figure: "3.1e-07"; large ones, which are wrong ones, as plain numbers."""
    if value is None:
        return ""
    return number(value) if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def hertz(value: float | None) -> str:
    """A clock: "1,980 MHz"."""
    return UNKNOWN if value is None else f"{value / 1e6:,.0f} MHz"


def moment(text: str) -> str:
    """An ISO time as "2026-11-21 14:25 UTC"; text that is no time is shown as it stands."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return text
    if parsed.tzinfo is not None:
        parsed = parsed.astimezone(UTC)
    return f"{parsed:%Y-%m-%d %H:%M} UTC"


def _scaled(value: float, scale: Scale) -> str:
    unit, name = _unit_for(value, scale)
    return f"{number(value / unit)} {name}"


def _unit_for(value: float, scale: Scale) -> tuple[float, str]:
    """The largest unit in which the value, as it will be printed, is at least 1; zero takes the second unit."""
    printed = abs(_three_digits(value))
    if printed == 0:
        return scale[1] if scale is TIME else scale[-1]
    return next(((unit, name) for unit, name in scale if printed >= unit * (1 - 1e-12)), scale[-1])


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else value


def _three_decimals(value: float) -> str:
    """Ratios near 1 keep a third decimal, so that 1.004 does not read as 1.00."""
    return f"{value:.3f}" if value < 1.01 else number(value)
