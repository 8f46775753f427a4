"""NVIDIA's compute-sanitizer around kernels: memcheck for wrong addresses, racecheck for races in shared memory.

Each kernel runs in a process of its own under each tool (``sanitized``), on fresh inputs of its small cases.
A clean summary alone is no pass: the kernel must say that it ran, because the tool also counts no errors in a program
that never started.

racecheck sees shared memory only, which Triton synchronises itself. Two programs that race in global memory go unseen
here; parity finds what comes of that by running a kernel twice.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from kernbench import registry
from kernbench.errors import KernbenchError
from kernbench.progress import Progress, Silent
from kernbench.record import SanitizerResult
from kernbench.spec import KernelSpec

TOOLS = ("memcheck", "racecheck")
OPTIONS = {
    # Two tensors may be neighbours; between them lies what belongs to neither. Torch asks the driver much that fails.
    "memcheck": ("--padding", "512", "--report-api-errors", "no"),
    "racecheck": (),
}
TOOLKITS = Path("/usr/local")
TIME_LIMIT_SECONDS = 600
SHOWN = 10
LENGTH = 300
RAN = "kernbench ran"
"""What ``kernbench.parity.sanitized`` prints when all calls are done."""


class Job(msgspec.Struct, frozen=True):
    """What ``kernbench.parity.sanitized`` calls: one kernel on some cases in some dtypes."""

    kernel: str
    cases: list[str]
    dtypes: list[str]


def sanitize(
    names: Sequence[str],
    *,
    dtype: str | None = None,
    case: str | None = None,
    progress: Progress | None = None,
    seconds: float = TIME_LIMIT_SECONDS,
) -> Iterator[SanitizerResult]:
    """One result per kernel and tool.

    Args:
        names: kernels; all if there are none.
        dtype: as "float16"; all that a kernel states a tolerance for by default.
        case: by default all that are not marked large; a tool makes a kernel some ten to a hundred times slower.
        seconds: after which a tool is stopped.

    Raises:
        KernbenchError: no GPU, no compute-sanitizer, or an unknown kernel, case or dtype.
    """
    if not torch.cuda.is_available():
        raise KernbenchError("compute-sanitizer checks kernels on a GPU, and PyTorch sees none; leave --sanitize out")
    executable = find()
    specs = [registry.kernel(name).declaration for name in names] or [
        found.declaration for found in registry.kernels().values()
    ]
    jobs = [Job(spec.name, _cases(spec, case), _dtypes(spec, dtype)) for spec in specs]
    progress = progress or Silent()
    with progress.stage("compute-sanitizer", len(jobs) * len(TOOLS)) as advance:
        for job in jobs:
            for tool in TOOLS:
                yield _run(executable, tool, job, seconds)
                advance(1)


def find() -> Path:
    """The compute-sanitizer on the PATH, of CUDA_HOME or CUDA_PATH, from a Python package, or in /usr/local/cuda*.

    Raises:
        KernbenchError: there is none; the message says how to get one.
    """
    named = shutil.which("compute-sanitizer")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        homes += sorted(Path(folder).glob("*"), reverse=True)
    homes += sorted(TOOLKITS.glob("cuda*"), reverse=True)
    places = [Path(named)] if named else [home / "bin" / "compute-sanitizer" for home in homes]
    for place in places:
        if os.access(place, os.X_OK) and place.is_file():
            return place
    raise KernbenchError(
        "compute-sanitizer is not here; pip install nvidia-cuda-sanitizer-api, or put the bin folder of a CUDA toolkit "
        "on the PATH"
    )


def _cases(spec: KernelSpec, name: str | None) -> list[str]:
    known = [case.name for case in spec.cases]
    if name is not None:
        return [registry.nearest(name, known, f"case of {spec.name}")]
    return [case.name for case in spec.cases if not case.large] or known


def _dtypes(spec: KernelSpec, name: str | None) -> list[str]:
    if name is None:
        return list(spec.tolerance)
    if name not in spec.tolerance:
        raise KernbenchError(
            f"kernel {spec.name!r} states no tolerance for {name}; it is checked in {', '.join(spec.tolerance)}"
        )
    return [name]


def _run(executable: Path, tool: str, job: Job, seconds: float) -> SanitizerResult:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kernbench-sanitizer-") as folder:
        log = Path(folder) / "log"
        command = [
            str(executable), "--tool", tool, "--log-file", str(log), "--show-backtrace", "no", "--print-limit", "200",
            "--target-processes", "application-only", *OPTIONS[tool],
            sys.executable, "-m", "kernbench.parity.sanitized", msgspec.json.encode(job).decode(),
        ]  # fmt: skip
        # Without torch's own cache every tensor is an allocation of the driver's, whose bounds the tool knows.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            output, complaints = process.communicate(timeout=seconds)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"did not end within {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            output, complaints = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        text = log.read_text(errors="replace") if log.exists() else ""
    report = read_report(text)
    if not late:
        late = _why_not(report, output, complaints, process.returncode)
    return SanitizerResult(
        kernel=job.kernel,
        tool=tool,
        passed=not late and not report.errors,
        errors=report.errors,
        findings=report.findings,
        seconds=time.perf_counter() - started,
        reason="" if report.errors else late,
    )


def _why_not(report: Report, output: str, complaints: str, code: int) -> str:
    """Why no errors found do not mean that there are none; empty if they do."""
    last = (complaints.strip().splitlines() or output.strip().splitlines() or [""])[-1].strip()
    if report.troubles:
        return "; ".join([*report.troubles[:2], last] if last else report.troubles[:2])[:LENGTH]
    if not report.complete:
        return f"gave no summary and ended with exit code {code}: {last or 'it said nothing'}"[:LENGTH]
    if RAN not in output or code:
        return f"the kernel did not run to its end under the tool: {last or f'exit code {code}'}"[:LENGTH]
    return ""


class Report:
    """What a tool wrote.

    Attributes:
        errors: those it counted.
        findings: each kind of error or warning once, with its place and how often it was reported.
        troubles: what the tool says of its own work.
        complete: whether it came to its summary.
    """

    def __init__(self, errors: int, findings: list[str], troubles: list[str], complete: bool) -> None:
        self.errors = errors
        self.findings = findings
        self.troubles = troubles
        self.complete = complete


SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?,")
TROUBLE = re.compile(
    r"(Internal Sanitizer Error.*|Target application (?:terminated|doesn't exist).*|No attachable process.*"
    r"|.*(?:[Nn]ot supported|might be incorrect|might go undetected|[Ff]ailed to initialize).*|Unable to .*)"
)
NOISE = re.compile(
    r"COMPUTE-SANITIZER|Target application returned|process didn't terminate|Tracking kernels launched|LEAK SUMMARY"
    r"|Default timeout|Maximum number of hazards"
)


def read_report(text: str) -> Report:
    """Read what memcheck or racecheck wrote with ``--show-backtrace no``.

    Source of the format: NVIDIA Compute Sanitizer user manual 2026.4, sections on understanding memcheck errors and
    racecheck analysis reports, and older versions' ``at 0x160 in file:line:kernel``.
    """
    counts: Counter[str] = Counter()
    troubles: list[str] = []
    errors, complete = 0, False
    for head, details in _entries(text):
        if summary := SUMMARY.search(head):
            errors, complete = errors + int(summary[1] or summary[2]), True
            continue
        severity, words = _severity(head)
        if trouble := TROUBLE.match(words):
            troubles.append(trouble[1])
        elif not NOISE.match(words):
            counts[severity + _described(words, details)] += 1
    findings = [_shortened(what) + (f" ({times} times)" if times > 1 else "") for what, times in counts.items()]
    if len(findings) > SHOWN:
        findings = [*findings[:SHOWN], f"and {len(findings) - SHOWN} more"]
    return Report(errors, findings, troubles, complete)


def _entries(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each message with the indented lines under it."""
    head, details = "", list[str]()
    for line in text.splitlines():
        if not line.startswith("="):
            continue
        body = line.lstrip("=")
        if body.startswith("  "):
            details.append(body.strip())
            continue
        if head:
            yield head, details
        head, details = body.strip(), []
    if head:
        yield head, details


def _severity(head: str) -> tuple[str, str]:
    match = re.match(r"(error|warning|warn|info)\s*:\s*(?:\(.*?\)\s*)?(.*)", head, re.IGNORECASE)
    if match is None:
        return "", head
    return ("" if match[1].lower() == "error" else "warning: "), match[2]


def _described(words: str, details: Sequence[str]) -> str:
    """One line for a message: what, where, and in how far; without the thread and the address, which always differ."""
    if words.startswith("Race reported"):
        first = words.removeprefix("Race reported between ")
        others = [detail.removeprefix("and ") for detail in details if detail.startswith("and ")]
        return "race between " + " and ".join(_access(access) for access in (first, *others[:3]))
    where = next((detail.removeprefix("at ") for detail in details if detail.startswith("at ")), "")
    words = words[0].lower() + words[1:]
    parts = [f"{words} in {_place(where)}" if where else words]
    for detail in details:
        if detail.endswith(("is out of bounds", "is misaligned")):
            parts.append(detail.rsplit(" is ", 1)[1])
        elif "nearest allocation" in detail:
            parts.append(re.sub(r" at 0x[0-9a-f]+", "", detail))
    return ", ".join(parts)


def _access(text: str) -> str:
    """``Write access at kernel+0x40 in file.py:3 [4 hazards]`` in fewer words."""
    match = re.match(r"(\w+) access at (.*?)\s*(\[\d+ hazards?\])?$", text)
    if match is None:
        return text
    hazards = f" {match[3]}" if match[3] else ""
    return f"{match[1].lower()} in {_place(match[2])}{hazards}"


PLACES = (
    re.compile(r"0x[0-9a-f]+ in (?P<file>[^:]+):(?P<line>\d+):(?P<kernel>.+)"),
    re.compile(r"(?P<kernel>.+?)[+:]0x[0-9a-f]+(?: in (?P<file>.+):(?P<line>\d+))?"),
    re.compile(r"0x[0-9a-f]+ in (?P<kernel>.+)"),
)


def _place(text: str) -> str:
    """The kernel and, where the tool knows it, the line: ``_norm_kernel (rms_norm.py:41)``."""
    for pattern in PLACES:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            kernel = re.sub(r"\(.*\)$", "", found["kernel"])
            return f"{kernel} ({Path(found['file']).name}:{found['line']})" if found.get("file") else kernel
    return text


def _shortened(text: str) -> str:
    return text if len(text) <= LENGTH else text[: LENGTH - 1] + "…"
