"""Real text as bytes: Python's own documentation topics, or the file given with --data."""

from __future__ import annotations

import torch
from torch import Tensor

from kernbench.errors import KernbenchError
from kernbench.text import read_text


class Text:
    """Byte ids resident on the device in ``batch`` streams, so that a step copies nothing to it."""

    def __init__(self, path: str | None, *, batch: int, length: int, device: torch.device) -> None:
        text = read_text(path)
        stream = len(text) // batch
        if stream < length + 1:
            raise KernbenchError(
                f"the text has {len(text)} bytes and one batch takes {batch * (length + 1)}; "
                "give a longer file with --data"
            )
        ids = torch.frombuffer(bytearray(text[: batch * stream]), dtype=torch.uint8)
        self.ids_BN: Tensor = ids.view(batch, stream).to(device=device, dtype=torch.int64)
        self.length = length
        self.windows = (stream - 1) // length

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and the ones that follow them [B, T] of window ``index``, which wraps around."""
        start = index % self.windows * self.length
        window_BT = self.ids_BN[:, start : start + self.length + 1]
        return window_BT[:, :-1], window_BT[:, 1:]
