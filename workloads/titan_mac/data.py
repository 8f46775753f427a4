"""Real text as bytes: Python's own documentation topics, or the file given with --data."""

from __future__ import annotations

import torch
from torch import Tensor

from kernbench.errors import KernbenchError
from kernbench.text import read_text


def load_streams(path: str | None, *, batch: int, length: int, device: torch.device) -> Tensor:
    """Byte ids [batch, stream], int64 on ``device``: row b is the b-th part of the text.

    Raises:
        KernbenchError: the file cannot be read, or is too short for one batch.
    """
    text = read_text(path)
    stream = len(text) // batch
    if stream < length:
        raise KernbenchError(
            f"the text has {len(text)} bytes and one batch takes {batch * length}; give a longer file with --data"
        )
    ids = torch.frombuffer(bytearray(text[: batch * stream]), dtype=torch.uint8)
    return ids.view(batch, stream).to(device=device, dtype=torch.int64)
