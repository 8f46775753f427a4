"""Tables of a run for SQL and pandas: events, kernels, stalls and steps. Times are whole nanoseconds.

In Python: ``kernbench.tables.frames("20261121-1015")["kernels"].groupby("name").duration_ns.sum()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from kernbench import evidence
from kernbench.analysis import stalls
from kernbench.analysis.families import FAMILIES, kind_of_device, of_device
from kernbench.analysis.idle import busy_intervals, step_windows
from kernbench.errors import KernbenchError
from kernbench.record import Stall
from kernbench.traces import trace
from kernbench.traces.nesting import Ints
from kernbench.traces.trace import Trace

HOST_KINDS = ("op", "call", "annotation")
_MODULE = "nn.Module: "

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "events": {
        "id": "row; parent, call and launching refer to it",
        "kind": "op, call (runtime or driver), or annotation",
        "name": "",
        "thread": "process/thread",
        "start_ns": "since the first event",
        "end_ns": "",
        "duration_ns": "",
        "self_ns": "of an operator, without its child operators",
        "parent": "id of the innermost operator around",
        "op": "its name",
        "step": "number of the step, empty between steps",
        "phase": "of kernbench, if in one",
        "correlation": "number that links a call with its device work",
        "module": "innermost nn.Module around, where recorded",
        "file": "innermost Python function outside of libraries, where recorded",
        "line": "line on which that function is defined",
        "function": "",
        "shapes": "of the inputs as JSON, where recorded",
        "dtypes": "of the inputs as JSON, where recorded",
    },
    "kernels": {
        "id": "row",
        "kind": "kernel, copy or memset",
        "name": "",
        "family": "kind of work, told from the name",
        "device": "",
        "stream": "",
        "start_ns": "since the first event",
        "end_ns": "",
        "duration_ns": "",
        "launched_ns": "begin of the call that launched it",
        "bytes": "of a copy or memset",
        "call": "id of the launching call in events",
        "op": "operator that launched it",
        "step": "number of the step that launched it",
        "phase": "of kernbench, if in one",
        "graph": "whether a CUDA graph launched it",
        "module": "as in events",
        "file": "as in events",
        "line": "as in events",
        "shapes": "inputs of the operator, as in events",
    },
    "stalls": {
        "file": "empty where no line is known",
        "line": "",
        "source": "text of the line",
        "function": "",
        "op": "operator or call that reads",
        "class": "free, starved, busy, drain, unclassified, would-sync or cpu-tensor",
        "real": "whether the runtime's own synchronising call was seen",
        "count_per_step": "",
        "wait_ns_per_step": "",
        "saving_ns_per_step": "what a replay without it saves",
        "phase": "of kernbench, if in one",
    },
    "steps": {
        "step": "number",
        "start_ns": "on the host",
        "end_ns": "",
        "duration_ns": "",
        "counted": "whether analyses average over it; cut ones are left out",
        "window_ns": "until its last device work has ended, of counted steps",
        "busy_ns": "of the window, on the busiest device",
        "idle_ns": "",
        "launches": "device work that it launched",
        "waits": "calls in which the host waited",
        "wait_ns": "in these calls",
    },
}
"""The tables and their columns, each with what it holds where its name does not say."""


def frames(run: str | Path) -> dict[str, pandas.DataFrame]:
    """The tables of a run, by name as in ``COLUMNS``, of the trace that it kept (one step of a profile) or of a file.

    Args:
        run: a run folder, its record.json, part of a run id, or a trace file.

    Raises:
        KernbenchError: there is no such run, or it kept no trace.
    """
    found, path = trace_of(run)
    loaded = trace.load(path)
    rows = found.side.stalls if found.side is not None else stalls.stalls(loaded, None)
    return of_trace(loaded, rows)


def trace_of(run: str | Path) -> tuple[evidence.Evidence, Path]:
    """What a name stands for, and the file of its trace; raises as :func:`frames`."""
    found = evidence.find(str(run))
    if found.trace is None:
        raise KernbenchError(f"{found.name} keeps no trace; name a profile, swap or analyze run, or a trace file")
    return found, found.trace


def of_trace(loaded: Trace, rows: Sequence[Stall]) -> dict[str, pandas.DataFrame]:
    """The tables of a loaded trace and its stalls."""
    made = {"events": _events(loaded), "kernels": _kernels(loaded), "stalls": _stalls(rows), "steps": _steps(loaded)}
    return {name: pandas.DataFrame({column: made[name][column] for column in COLUMNS[name]}) for name in COLUMNS}


def _events(loaded: Trace) -> dict[str, Any]:
    host = loaded.host
    return {
        "id": np.arange(len(host)),
        "kind": _text(HOST_KINDS, host.kind),
        "name": _text(loaded.names, host.name),
        "thread": _text(loaded.threads, host.thread),
        "start_ns": host.start_ns,
        "end_ns": host.end_ns,
        "duration_ns": host.end_ns - host.start_ns,
        "self_ns": _known(host.self_ns, host.kind == HOST_KINDS.index("op")),
        "parent": _known(host.parent),
        "op": _text(loaded.names, _through(host.name, host.parent)),
        "step": _step_number(loaded, host.step),
        "phase": _known(host.phase),
        "correlation": _known(host.correlation),
        **_program(loaded, np.arange(len(host))),
    }


def _kernels(loaded: Trace) -> dict[str, Any]:
    host, device = loaded.host, loaded.device
    kinds = [kind_of_device(kind) for kind in range(3)]
    return {
        "id": np.arange(len(device)),
        "kind": _text(kinds, device.kind),
        "name": _text(loaded.names, device.name),
        "family": _text(FAMILIES, of_device(loaded)),
        "device": device.device,
        "stream": device.stream,
        "start_ns": device.start_ns,
        "end_ns": device.end_ns,
        "duration_ns": device.end_ns - device.start_ns,
        "launched_ns": _known(_through(host.start_ns, device.call)),
        "bytes": _known(device.bytes),
        "call": _known(device.call),
        "op": _text(loaded.names, _through(host.name, device.op)),
        "step": _step_number(loaded, device.step),
        "phase": _known(device.phase),
        "graph": device.graph > 0,
        # The call may stand outside the operator's own row, so shapes are the operator's and places the call's.
        **_program(loaded, device.call),
        "shapes": _text([shape for shape, _ in loaded.shape_texts], _through(loaded.shapes, device.op)),
    }


def _program(loaded: Trace, rows: Ints) -> dict[str, Any]:
    """Where in the program host rows are from, and what they were given; nothing for row -1."""
    source, shapes = _through(loaded.source, rows), _through(loaded.shapes, rows)
    names = [name.removeprefix(_MODULE) for name in loaded.names]
    lines = np.fromiter((place.line for place in loaded.sources), np.int64, len(loaded.sources))
    return {
        "module": _text(names, _through(loaded.modules, rows)),
        "file": _text([place.file for place in loaded.sources], source),
        "line": _known(_through(lines, source)),
        "function": _text([place.function for place in loaded.sources], source),
        "shapes": _text([shape for shape, _ in loaded.shape_texts], shapes),
        "dtypes": _text([dtype for _, dtype in loaded.shape_texts], shapes),
    }


def _stalls(rows: Sequence[Stall]) -> dict[str, Any]:
    return {
        "file": _strings([row.file for row in rows]),
        "line": pandas.array([row.line or None for row in rows], dtype="Int64"),
        "source": _strings([row.source for row in rows]),
        "function": _strings([row.function for row in rows]),
        "op": _strings([row.op for row in rows]),
        "class": _strings([row.klass for row in rows]),
        "real": [row.real for row in rows],
        "count_per_step": [row.count_per_step for row in rows],
        "wait_ns_per_step": _nanoseconds([row.wait_seconds_per_step for row in rows]),
        "saving_ns_per_step": _nanoseconds([row.saving_seconds_per_step for row in rows]),
        "phase": pandas.array([row.phase for row in rows], dtype="Int64"),
    }


def _steps(loaded: Trace) -> dict[str, Any]:
    steps, host = loaded.steps, loaded.host
    count = len(steps)
    counted = np.zeros(count, bool)
    counted[loaded.counted] = True
    windows = step_windows(loaded)
    window, busy = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    window[loaded.counted] = windows.end - windows.start
    if loaded.on_gpu:
        busy[loaded.counted] = busy_intervals(loaded).covered(windows.start, windows.end)
    waits = loaded.sync_calls[host.step[loaded.sync_calls] >= 0]
    length = (host.end_ns - host.start_ns)[waits]
    return {
        "step": steps.number,
        "start_ns": steps.start_ns,
        "end_ns": steps.end_ns,
        "duration_ns": steps.end_ns - steps.start_ns,
        "counted": counted,
        "window_ns": _known(window),
        "busy_ns": _known(busy),
        "idle_ns": _known(window - busy, busy >= 0),
        "launches": np.bincount(loaded.device.step[loaded.device.step >= 0], minlength=count),
        "waits": np.bincount(host.step[waits], minlength=count),
        "wait_ns": np.bincount(host.step[waits], weights=length, minlength=count).astype(np.int64),
    }


def _text(values: Sequence[str], codes: Ints) -> pandas.Categorical:
    """Text by position in ``values``, missing for -1. The categories are sorted, so that SQL orders them as text."""
    used = np.unique(codes[codes >= 0])
    distinct, position = np.unique(
        np.array([values[code] for code in used.tolist()], dtype=object), return_inverse=True
    )
    translated = np.full(len(values) + 1, -1, np.int64)  # the last entry answers for -1
    translated[used] = position
    return pandas.Categorical.from_codes(translated[codes], distinct.tolist())


def _known(values: Ints, known: Any = None) -> Any:
    """Whole numbers, missing where they are not known: below 0, if nothing else is said."""
    return pandas.arrays.IntegerArray(values.astype(np.int64), values < 0 if known is None else ~known)


def _through(values: Ints, rows: Ints) -> Ints:
    """``values`` at ``rows``, -1 where a row is -1."""
    return np.append(values, -1)[rows]


def _step_number(loaded: Trace, step: Ints) -> Any:
    return _known(_through(loaded.steps.number, step), step >= 0)


def _strings(values: Sequence[str]) -> Any:
    return pandas.array([value or None for value in values], dtype="string")


def _nanoseconds(seconds: Sequence[float | None]) -> Any:
    return pandas.array([None if value is None else round(value * 1e9) for value in seconds], dtype="Int64")
