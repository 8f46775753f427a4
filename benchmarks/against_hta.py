"""kernbench analyze against HolisticTraceAnalysis: the same files, the same run, in turn, each in a process of its own.

HolisticTraceAnalysis goes into an environment of its own, as it wants other versions of common packages:

    python -m venv /tmp/hta && /tmp/hta/bin/pip install HolisticTraceAnalysis
    python benchmarks/against_hta.py --hta-python /tmp/hta/bin/python

The files are a recorded trace of this repository, repeated to the wanted number of events with times, correlations and
step numbers moved on. Theirs is timed from loading to the end of the temporal breakdown, without imports and without a
picture. Ours is the whole command with its page, from the start of the process; the verdict is its first line of text.
Memory is that of the largest process of each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tests" / "traces" / "titan-mac-h200.json.gz"
PAUSE_US = 50

HTA = """
import json, resource, sys, time
from hta.trace_analysis import TraceAnalysis
began = time.perf_counter()
analysis = TraceAnalysis(trace_files={0: sys.argv[1]}, trace_dir="/")
loaded = time.perf_counter()
frame = analysis.get_temporal_breakdown(visualize=False)
ended = time.perf_counter()
print(json.dumps({"load": loaded - began, "seconds": ended - began, "rows": len(frame),
    "peak": 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))}))
"""


def repeated(document: dict[str, Any], events: int) -> Iterator[dict[str, Any]]:
    """Events of ``document`` over and over, as a longer recording would hold them, until there are ``events``."""
    all_events: list[dict[str, Any]] = document["traceEvents"]
    yield from (event for event in all_events if event["ph"] == "M")
    count = sum(event["ph"] == "M" for event in all_events)
    body = [event for event in all_events if event["ph"] != "M"]
    first = min(event["ts"] for event in body)
    period = max(event["ts"] + event.get("dur", 0) for event in body) - first + PAUSE_US
    ids = [number for event in body for number in _numbers(event).values()]
    span, round_ = max(ids, default=0) + 1, 0
    while count < events:
        for event in body[: events - count]:
            yield _moved(event, round_ * period, round_ * span, round_)
        count += len(body)
        round_ += 1


def _numbers(event: dict[str, Any]) -> dict[str, int]:
    args = event.get("args", {})
    return {key: args[key] for key in ("correlation", "External id") if key in args} | (
        {"id": event["id"]} if "id" in event else {}
    )


def _moved(event: dict[str, Any], by_us: float, by_number: int, round_: int) -> dict[str, Any]:
    numbers = {key: value + by_number for key, value in _numbers(event).items()}
    moved = event | {"ts": round(event["ts"] + by_us, 3)}
    if "id" in numbers:
        moved["id"] = numbers.pop("id")
    if "args" in event:
        moved["args"] = event["args"] | numbers
    marker, found, number = event["name"].partition("#")
    if found and number.isdecimal():
        # The profiler's own name for a step: the other tool knows no other.
        moved["name"] = f"ProfilerStep#{int(number) + round_}"
    return moved


def write(path: Path, events: int) -> None:
    """A trace of that many events in the layout that Kineto writes."""
    document = json.loads(gzip.decompress(RECORDED.read_bytes()))
    head = {key: value for key, value in document.items() if key != "traceEvents"}
    with path.open("w") as file:
        file.write(json.dumps(head)[:-1] + ',\n  "traceEvents": [\n')
        # Piece by piece, as Linux counts in a process's peak what its parent held when it started.
        for number, event in enumerate(repeated(document, events)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n  ]\n}\n")


def theirs(python: Path, path: Path) -> dict[str, float]:
    """One run of HolisticTraceAnalysis."""
    done = subprocess.run([python, "-c", HTA, str(path)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(path: Path, workspace: Path) -> dict[str, float]:
    """One run of ``kernbench analyze``: the whole, its first verdict, its memory."""
    command = [sys.executable, "-m", "kernbench", "analyze", str(path)]
    # As a user has it: with what Python compiled kept, which pip did for the other tool when it was installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment | {"KERNBENCH_WORKSPACE": str(workspace)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    verdict = 0.0
    for line in process.stderr:
        if not verdict and line.startswith(b"note:"):
            verdict = time.perf_counter() - began
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kernbench analyze {path} failed")
    return {"seconds": time.perf_counter() - began, "verdict": verdict, "peak": usage.ru_maxrss * 1024}


def main() -> None:
    """Measure both on each size and print a row of the table for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hta-python", type=Path, required=True, help="python with HolisticTraceAnalysis installed")
    parser.add_argument("--events", type=int, nargs="+", default=[130_000, 1_300_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| events | file MB | HTA load + breakdown s | kernbench analyze with page s | ratio | first verdict s |"
          " HTA peak MB | kernbench peak MB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for events in options.events:
            path = Path(folder) / f"trace-{events}.json"
            write(path, events)
            # Compiled modules and templates of the page are kept from the first run on.
            ours(path, Path(folder))
            rounds = [(theirs(options.hta_python, path), ours(path, Path(folder))) for _ in range(options.rounds)]
            hta, kernbench = ({key: statistics.median(run[side][key] for run in rounds) for key in rounds[0][side]}
                              for side in (0, 1))  # fmt: skip
            print(
                f"| {events:,} | {path.stat().st_size / 1e6:.0f} | {hta['seconds']:.2f} | {kernbench['seconds']:.2f} "
                f"| {kernbench['seconds'] / hta['seconds']:.2f} | {kernbench['verdict']:.2f} "
                f"| {hta['peak'] / 1e6:.0f} | {kernbench['peak'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
