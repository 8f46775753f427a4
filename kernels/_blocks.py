"""How many blocks cover a size, for launchers."""

from __future__ import annotations


def blocks_in(size: int, block: int) -> int:
    """As triton.cdiv, which is made for kernels too and takes microseconds on the host, where a launch has several."""
    return -(-size // block)
