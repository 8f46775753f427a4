"""Steps before a capture are queued between what was and what will be on the current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernbench.capturing import on_stream


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_each_stream_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    streams = [Stream("main", log)]
    side: Any = Stream("side", log)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        streams.append(chosen)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def step() -> str:
        with on_stream(side):
            log.append(f"step on {streams[-1].name}")
            return "loss"

    assert step() == "loss"
    assert log == ["side waits for main", "step on side", "main waits for side"]
