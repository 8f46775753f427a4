"""The compile matrix: every kernel built for several architectures without a GPU, and what ptxas made of it.

The work is done by :mod:`.buildworker` in a process of its own, because a kernel that was imported for
Triton's interpreter cannot be compiled, and because a compiler that aborts must not take the others' results along.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, TypeVar

import msgspec

from kernbench import registry
from kernbench.errors import WorkloadFailed
from kernbench.progress import Advance, Progress, Silent
from kernbench.record import Build
from kernbench.spec import Case, KernelSpec

if TYPE_CHECKING:
    import torch

    Dtypes = Sequence[str | torch.dtype]

T = TypeVar("T")

ARCHS = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024,
    "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
}  # fmt: skip
"""Most shared memory of one block. Source: CUDA C++ Programming Guide, technical specifications per capability."""
SILENT_SECONDS = 180.0
"""A process that reports nothing for so long hangs; of the kernels here the slowest takes seconds."""
MOST_WORKERS = 8
LAST_LINES = 30


class Wanted(msgspec.Struct):
    """One kernel with the dtypes and cases to compile it for."""

    kernel: str
    dtypes: list[str]
    cases: list[str]


class Request(msgspec.Struct):
    """What a worker does, ``workers`` functions at a time; ``skip`` names work that earlier processes had."""

    wanted: list[Wanted]
    archs: list[str]
    workers: int
    skip: list[str] = []


class Event(msgspec.Struct):
    """Work that begins, with the rows that its failure would be, or that is ``done``, with its results if any.

    The first of a process says that it has loaded the kernels, and names no work.
    """

    work: str
    rows: list[Build] = []
    done: bool = False


def compile_kernels(
    specs: Sequence[KernelSpec],
    *,
    archs: Sequence[str] = ARCHS,
    dtypes: Dtypes | Mapping[str, Dtypes] | None = None,
    cases: Sequence[Case | str] | Mapping[str, Sequence[Case | str]] | None = None,
    progress: Progress | None = None,
    silent_seconds: float = SILENT_SECONDS,
) -> Iterator[Build]:
    """One result per function, dtype and architecture, forward and backward, every configuration of an autotuned one.

    The kernels are called in a new process, which finds them by name, on CPU tensors laid out as on a GPU, so a kernel
    must leave refusing those to Triton. One that raises, does not compile or ends its process is a failed result, and
    the others go on.

    Args:
        specs: registered kernels; what they allow is taken from here.
        archs: keys of ``SHARED_LIMIT_BYTES``.
        dtypes: by default those of each tolerance; by kernel, if these are not the same for all.
        cases: by default all, the large ones too; by kernel, as with dtypes.
        silent_seconds: the process is ended when it reports nothing for so long, once it has begun.

    Raises:
        KernbenchError: an unknown architecture, case or dtype.
        WorkloadFailed: the process ends before it has called a kernel: a file of kernels fails without the interpreter.
    """
    wanted = [Wanted(spec.name, _dtypes(spec, _of(spec, dtypes)), _cases(spec, _of(spec, cases))) for spec in specs]
    chosen = [registry.nearest(arch, SHARED_LIMIT_BYTES, "architecture") for arch in archs]
    allowed = {spec.name: spec.allowed for spec in specs}
    return _built(wanted, chosen, allowed, progress or Silent(), silent_seconds)


def _of(spec: KernelSpec, asked: T | Mapping[str, T] | None) -> T | None:
    """What is asked for one kernel, by its name or the same for all."""
    return asked.get(spec.name) if isinstance(asked, Mapping) else asked


def _dtypes(spec: KernelSpec, dtypes: Sequence[str | torch.dtype] | None) -> list[str]:
    names = [str(name).removeprefix("torch.") for name in dtypes or spec.tolerance]
    return [registry.nearest(name, spec.tolerance, f"dtype of {spec.name}") for name in names]


def _cases(spec: KernelSpec, cases: Sequence[Case | str] | None) -> list[str]:
    names = [case.name if isinstance(case, Case) else case for case in (spec.cases if cases is None else cases)]
    return [registry.nearest(name, [case.name for case in spec.cases], f"case of {spec.name}") for name in names]


def _built(
    wanted: list[Wanted],
    archs: list[str],
    allowed: Mapping[str, Mapping[str, str]],
    progress: Progress,
    silent_seconds: float,
) -> Iterator[Build]:
    request = Request(wanted, archs, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    names = ", ".join(item.kernel for item in wanted)
    with progress.stage(f"compiling {names} for {', '.join(archs)}") as advance:
        while True:
            process = _Process(request, advance, silent_seconds)
            for row in process.results():
                yield judged(row, allowed[row.kernel])
            if not process.death:
                return
            if not process.begun:
                raise WorkloadFailed(
                    f"the process that compiles kernels {process.death} before it had called one: "
                    f"{process.last_words.splitlines()[-1] if process.last_words else 'it said nothing'}",
                    process.last_words,
                )
            request.skip += process.finished
            if len(process.begun) == 1:
                # Alone in its process, so the death is its own.
                (work, rows) = process.begun.popitem()
                request.skip.append(work)
                yield from (msgspec.structs.replace(row, reason=f"its process {process.death}") for row in rows)
            request.workers = 1


@dataclass
class _Process:
    """One run of the worker. ``begun`` has what it was at when it died; ``death`` is empty if it came to its end."""

    request: Request
    advance: Advance
    silent_seconds: float
    begun: dict[str, list[Build]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    death: str = ""
    last_words: str = ""

    def results(self) -> Iterator[Build]:
        # CPU tensors alone, so that the same is built with and without a GPU.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-m", "kernbench.compilation.buildworker"]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            ) as process:
                try:
                    yield from self._read(process)
                finally:
                    process.kill()
            errors.seek(0)
            self.last_words = "\n".join(errors.read().decode(errors="replace").splitlines()[-LAST_LINES:])

    def _read(self, process: subprocess.Popen[bytes]) -> Iterator[Build]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(self.request))
        process.stdin.close()
        for line in _lines(process.stdout, self.silent_seconds):
            if line is None:
                self.death = f"did not answer for {self.silent_seconds:.0f} s"
                return
            event = msgspec.json.decode(line, type=Event)
            if not event.done:
                self.begun[event.work] = event.rows
                continue
            self.begun.pop(event.work, None)
            if event.rows:
                self.finished.append(event.work)
                self.advance(len(event.rows))
                yield from event.rows
        self.death = _death(process.wait())


def _lines(stream: IO[bytes], seconds: float) -> Iterator[bytes | None]:
    """Whole lines as they come; None, as the last one, after so many seconds without anything."""
    rest, patience = b"", max(seconds, SILENT_SECONDS)  # a process takes long to begin where others are at work
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(patience):
                yield None
                return
            patience = seconds
            received = os.read(stream.fileno(), 2**16)
            if not received:
                return
            *lines, rest = (rest + received).split(b"\n")
            yield from lines


def _death(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended its process with exit code {code}" if code else ""


def judged(build: Build, allowed: Mapping[str, str]) -> Build:
    """The result with its verdict: spills and too much shared memory fail unless they are allowed."""
    if build.reason:
        return build
    wrong = _excess(build)
    reasons = [f"{words}; allowed: {allowed[name]}" if name in allowed else words for name, words in wrong.items()]
    return msgspec.structs.replace(build, passed=wrong.keys() <= allowed.keys(), reason="; ".join(reasons))


def _excess(build: Build) -> dict[str, str]:
    """What is wrong with a binary, by what a declaration can allow."""
    wrong = {}
    if build.spill_bytes:
        wrong["spills"] = f"each thread spills {build.spill_bytes} bytes from registers to memory"
    limit = SHARED_LIMIT_BYTES[build.arch]
    if build.shared_bytes is not None and build.shared_bytes > limit:
        wrong["shared memory"] = (
            f"takes {build.shared_bytes} bytes of shared memory, {build.shared_bytes - limit} more than a block can "
            f"have on {build.arch}"
        )
    return wrong
