"""Says once what a fallback does, where the reports look for it."""

from __future__ import annotations

from kernbench import device


def say(message: str) -> None:
    """Note a warning for this process."""
    if message not in device.WARNINGS:
        device.WARNINGS.append(message)
