"""Cuts a trace down to its last steps, so that it can be kept beside a report. Needs no torch."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec

from kernbench.errors import KernbenchError
from kernbench.record import write_atomically

STEP = "kernbench.step#"
_FRAME, _MEMORY = "python_function", "cpu_instant_event"
_DROPPED = (_FRAME, "Trace", _MEMORY)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_sync", "gpu_user_annotation", "overhead")

Event = dict[str, Any]


def trim(path_in: Path, path_out: Path, steps: int = 1) -> None:
    """Write the last ``steps`` annotated steps of the trace at ``path_in`` to ``path_out``, gzipped.

    Kept are the host's events inside these steps, the device work that they launched (also where it ran later), the
    flows between them, memory events, the names of processes and threads, and the Python calls inside and around these
    steps where they were recorded.

    Raises:
        KernbenchError: the input is no readable trace, or has no annotated step.
    """
    trace = _load(path_in)
    events: list[Event] = trace["traceEvents"]
    marks = sorted(
        (event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)),
        key=lambda event: event["ts"],
    )[-steps:]
    if not marks:
        raise KernbenchError(f"{path_in} has no step of kernbench in it; profile again to get one")
    start, end = marks[0]["ts"], max(mark["ts"] + mark["dur"] for mark in marks)
    trace["traceEvents"] = _within(events, start, end)
    write_atomically(path_out, gzip.compress(msgspec.json.encode(trace), mtime=0))


def _load(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        trace = msgspec.json.decode(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        if isinstance(trace, dict) and isinstance(trace.get("traceEvents"), list):
            return trace
    except (OSError, EOFError, gzip.zlib.error, msgspec.MsgspecError) as error:  # type: ignore[attr-defined]
        raise KernbenchError(f"cannot read the trace {path} ({error}); profile again to get one") from None
    raise KernbenchError(f"{path} is no Kineto trace: it has no list of traceEvents; give a torch.profiler trace")


def _within(events: list[Event], start: float, end: float) -> list[Event]:
    host = [event for event in events if event.get("ph") == "X" and _is_host(event) and start <= event["ts"] <= end]
    launched = {event["args"]["correlation"] for event in host if "correlation" in event.get("args", {})}
    host_ids = {id(event) for event in host}

    def kept(event: Event) -> bool:
        if event.get("ph") == "M" or id(event) in host_ids:
            return True
        if event.get("cat") in _DEVICE:
            correlation = event.get("args", {}).get("correlation")
            inside = start <= event.get("ts", start - 1) <= end
            return correlation in launched if correlation is not None else inside
        if event.get("cat") == _FRAME:
            return bool(event["ts"] <= end and event["ts"] + event["dur"] >= start)
        if event.get("cat") == _MEMORY:
            return bool(start <= event["ts"] <= end)
        if event.get("ph") in ("s", "f", "t"):
            return event.get("id") in launched if event.get("cat") == "ac2g" else start <= event["ts"] <= end
        return False

    return [event for event in events if kept(event)]


def _is_host(event: Event) -> bool:
    return event.get("cat") not in _DROPPED and event.get("cat") not in _DEVICE
