"""A log that costs the training loop one small copy: a thread waits for it, and writes.

The loop copies a vector into pinned memory on the current stream and records an event; the thread asks the event now
and then, sums up what arrived, and hands it to whoever writes. Nothing in the loop waits for the device.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernbench.errors import KernbenchError

from . import parallel

DIRECTORY = "BIO_LOG_DIR"
"""Names the folder for TensorBoard's event files; without it entries stay in memory."""
LOOK_AGAIN_SECONDS = 0.002
Summarize = Callable[[int, Tensor], dict[str, Any]]
Write = Callable[[str, dict[str, Any]], None]


class Pending(NamedTuple):
    """A copy under way, and the event behind it; None where there is nothing to wait for."""

    tag: str
    step: int
    values: Tensor
    arrived: torch.cuda.Event | None


class AsyncLog:
    """Takes vectors from the loop and gives summaries to ``write``, in order, on a thread that ends with its work."""

    def __init__(self, summarize: Summarize, write: Write) -> None:
        self.summarize = summarize
        self.write = write
        self.failed: BaseException | None = None
        self.waiting: deque[Pending] = deque()
        self.writing = False
        self.changed = threading.Condition()

    def put(self, tag: str, step: int, values: Tensor) -> None:
        """Log a snapshot of ``values``; returns at once.

        Raises:
            RuntimeError: writing an earlier one failed.
        """
        self._complain()
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(values.device))
        else:
            host = values.clone()
        with self.changed:
            self.waiting.append(Pending(tag, step, host, arrived))
            if not self.writing:
                self.writing = True
                # No daemon: a program that ends now waits until this is written.
                threading.Thread(target=self._run, name="bio-nanochat log").start()

    def flush(self) -> None:
        """Wait until all is written; not for the loop.

        Raises:
            RuntimeError: writing failed.
        """
        with self.changed:
            self.changed.wait_for(lambda: not self.writing)
        self._complain()

    def _complain(self) -> None:
        if self.failed is not None:
            raise RuntimeError("the log could not be written") from self.failed

    def _run(self) -> None:
        while True:
            with self.changed:
                if not self.waiting:
                    self.writing = False
                    self.changed.notify_all()
                    return
                pending = self.waiting.popleft()
            try:
                # Asking does not hold the driver as waiting does.
                while pending.arrived is not None and not pending.arrived.query():  # type: ignore[no-untyped-call]
                    time.sleep(LOOK_AGAIN_SECONDS)
                self.write(pending.tag, self.summarize(pending.step, pending.values))
            except Exception as error:  # noqa: BLE001 - told to the loop by the next put or flush
                self.failed = error


class TensorBoard:
    """Writes summaries as scalars, histograms and a table to TensorBoard's event files."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise KernbenchError(
                f"{DIRECTORY} asks for TensorBoard's files, and there is no tensorboard; "
                "pip install 'kernbench[tensorboard]', or unset it"
            ) from error
        self.writer: Any = SummaryWriter(folder)

    def __call__(self, tag: str, entry: dict[str, Any]) -> None:
        """Write one summary."""
        step = entry["step"]
        for name, value in entry.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{tag}/{name}", value, step)
        for name, values in entry["histograms"].items():
            self.writer.add_histogram(f"{tag}/{name}", torch.tensor(values), step)
        rows = "\n".join("| " + " | ".join(f"{value:.4g}" for value in row) + " |" for row in entry["best"])
        self.writer.add_text(f"{tag}/best", rows, step)
        self.writer.flush()


def writer() -> TensorBoard | None:
    """What the environment asks to write with, if anything; of several ranks the first one writes."""
    folder = os.environ.get(DIRECTORY)
    return TensorBoard(folder) if folder and parallel.world()[0] == 0 else None
