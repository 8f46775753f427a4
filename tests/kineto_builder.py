"""Builds small Kineto traces with planted events, for tests whose answers are known beforehand. Times are in us."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

MAIN, AUTOGRAD = 100, 200


class KinetoBuilder:
    """Events of one process on device 0; ``offset_us`` puts them where real clocks stand."""

    def __init__(self, offset_us: float = 4_458_676_000_000.0) -> None:
        self.offset_us = offset_us
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
        self.metadata: dict[str, Any] = {"schemaVersion": 1}
        self._correlation = 0

    def _add(self, category: str, name: str, start: float, duration: float, tid: int, **args: Any) -> None:
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": 1,
                "tid": tid,
                "ts": self.offset_us + start,
                "dur": duration,
                "args": args,
            }
        )

    def step(self, number: int, start: float, end: float, marker: str = "kernbench.step#") -> None:
        self.annotation(f"{marker}{number}", start, end)

    def annotation(self, name: str, start: float, end: float, tid: int = MAIN) -> None:
        self._add("user_annotation", name, start, end - start, tid)

    def op(
        self,
        name: str,
        start: float,
        end: float,
        tid: int = MAIN,
        *,
        sequence: int | None = None,
        backward: bool = False,
        dims: list[Any] | None = None,
        types: list[str] | None = None,
        external: int | None = None,
    ) -> None:
        args: dict[str, Any] = {} if sequence is None else {"Sequence number": sequence, "Fwd thread id": int(backward)}
        if dims is not None:
            args |= {"Input Dims": dims, "Input type": types or ["float"] * len(dims)}
        if external is not None:
            args["External id"] = external
        self._add("cpu_op", name, start, end - start, tid, **args)

    def python(self, name: str, start: float, end: float, tid: int = MAIN) -> None:
        """A Python call as with_stack=True records it: "file.py(12): function", "nn.Module: Linear_0"."""
        self._add("python_function", name, start, end - start, tid)

    def memory(self, time: float, delta: int, allocated: int, reserved: int, *, device: int | None = 0) -> None:
        """An allocation or release; ``device`` None is host memory."""
        self._add("cpu_instant_event", "[memory]", time, 0, MAIN)
        self.events[-1] |= {"ph": "i", "s": "t"}
        self.events[-1]["args"] = {
            "Total Reserved": reserved,
            "Total Allocated": allocated,
            "Bytes": delta,
            "Addr": 1 << 40,
            "Device Id": -1 if device is None else device,
            "Device Type": 0 if device is None else 1,
        }

    def call(self, name: str, start: float, end: float, tid: int = MAIN) -> int:
        """A runtime call; returns its correlation number."""
        self._correlation += 1
        self._add("cuda_runtime", name, start, end - start, tid, correlation=self._correlation)
        return self._correlation

    def launch(
        self,
        name: str,
        call_start: float,
        start: float,
        end: float,
        *,
        tid: int = MAIN,
        stream: int = 7,
        call_us: float = 4,
        **args: Any,
    ) -> None:
        """A kernel with its launch call; [start, end) is device time."""
        correlation = self.call("cudaLaunchKernel", call_start, call_start + call_us, tid)
        self.on_device("kernel", name, start, end, correlation, stream, **args)

    def stream_wait(self, start: float, stream: int, on_stream: int, record: int) -> None:
        """The device's side of a stream that waits for an event; ``record`` is the recording call's correlation."""
        call = self.call("cudaStreamWaitEvent", start, start + 1)
        waited = {"wait_on_stream": on_stream, "wait_on_cuda_event_record_corr_id": record}
        self.on_device("cuda_sync", "Stream Wait Event", start, start + 1, call, stream, **waited)

    def on_device(
        self, category: str, name: str, start: float, end: float, correlation: int, stream: int = 7, **args: Any
    ) -> None:
        self._add(category, name, start, end - start, stream, correlation=correlation, device=0, stream=stream, **args)

    def write(self, path: Path) -> Path:
        data = json.dumps({**self.metadata, "traceEvents": self.events}).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path
