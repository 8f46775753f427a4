"""What the NVIDIA driver says of a GPU: version, clocks, power, temperature, and why the clocks are held down."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pynvml

from kernbench.record import Clocks

# NVML's clock event reasons (nvml.h, "nvmlClocksEventReasons"). Bit 0x1, "GPU idle", is left out: it says only that
# nothing ran at the moment of asking, as after every synchronisation.
REASONS = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}

# Reasons that spoil a timing. The software power cap is not one of them: dense matrix products hold a data-centre GPU
# at its cap for as long as they run, so it is their steady state, and dropping it would drop every round.
THROTTLING = frozenset(
    ("hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake")
)


class UnavailableError(Exception):
    """The driver's library does not answer; the message says why."""


def driver_version() -> str:
    """The driver's version.

    Raises:
        UnavailableError: there is no NVIDIA driver.
    """
    _start()
    return _text(_call(pynvml.nvmlSystemGetDriverVersion))


def read(uuid: str, index: int) -> Clocks:
    """Clocks, power, temperature and throttle reasons now; what this device does not tell is None.

    Args:
        uuid: the device's UUID, with or without "GPU-"; empty if unknown.
        index: its CUDA index, used where the UUID is unknown to the driver.

    Raises:
        UnavailableError: no driver, or the device is not among the driver's.
    """
    handle = _handle(uuid, index)
    sm_mhz = _or_none(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)
    memory_mhz = _or_none(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    power_milliwatts = _or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
    temperature = _or_none(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    # The old name is the one that every driver and package version has.
    reasons = _or_none(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return Clocks(
        sm_hz=None if sm_mhz is None else sm_mhz * 1e6,
        memory_hz=None if memory_mhz is None else memory_mhz * 1e6,
        power_watts=None if power_milliwatts is None else power_milliwatts / 1e3,
        temperature_celsius=None if temperature is None else float(temperature),
        throttle_reasons=decode(reasons or 0),
    )


def decode(reasons: int) -> list[str]:
    """The words for a bit mask of clock event reasons, idle left out; an unknown bit is shown as it is."""
    words = [word for bit, word in REASONS.items() if reasons & bit]
    unknown = reasons & ~sum(REASONS) & ~0x1
    return [*words, f"reason {unknown:#x}"] if unknown else words


def throttled(clocks: Clocks) -> bool:
    """Whether the device was slowed down by heat or by its power supply, so that a timing says little."""
    return bool(slowdowns(clocks))


def slowdowns(clocks: Clocks | None) -> frozenset[str]:
    """Which of its throttle reasons spoil a timing."""
    return THROTTLING.intersection(clocks.throttle_reasons) if clocks is not None else frozenset()


@functools.cache
def _start() -> None:
    _call(pynvml.nvmlInit)


@functools.cache
def _handle(uuid: str, index: int) -> Any:
    _start()
    if uuid:
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        found = _or_none(pynvml.nvmlDeviceGetHandleByUUID, name)
        if found is not None:
            return found
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        raise UnavailableError(
            "the driver does not know this device's UUID, and CUDA_VISIBLE_DEVICES renumbers the devices"
        )
    return _call(pynvml.nvmlDeviceGetHandleByIndex, index)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        raise UnavailableError(f"NVML: {error}") from None


def _or_none(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
