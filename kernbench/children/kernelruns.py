"""Parity and times of kernels through child processes: a row that dies is a failed one, and the others go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from kernbench import bench, record
from kernbench.children import isolation, jobs, supervised
from kernbench.children.isolation import Died, Terms
from kernbench.parity.kernelcheck import PARTS, Part
from kernbench.progress import Advance, Progress
from kernbench.request import Request
from kernbench.spec import Case, KernelSpec

GPU_LANES = 4
"""Processes that check kernels on one GPU at a time: each has a context there, of some hundred megabytes."""
OUTSIDE = "process"
"""Mode of the row for a process that died before it began with any row, or again and again."""


def check_kernels(
    kernels: Sequence[tuple[KernelSpec, Sequence[Case] | None]],
    request: Request,
    device: torch.device,
    progress: Progress,
    keep: Callable[[list[record.ParityResult]], None],
    *,
    dtypes: Sequence[str] | None = None,
    working: str | None = None,
) -> None:
    """Hand over all results so far, one per case, dtype and way of calling, whenever there is a new one. A row that
    takes the process down is a failed result.

    A kernel's rows are shared out: on the CPU to a process for each processor, on a GPU to a few, of which one alone
    has large cases, so that memory is asked for once. Where rows stand does not depend on when they came.

    Args:
        kernels: each with the cases that were asked for, None for all.
        dtypes: those to check, by default all that a kernel states a tolerance for.
        working: the only one to check, in kernels that have it; the gate's row is in the strictest all the same.

    Raises:
        WorkloadFailed: the device does not answer any more.
    """
    shares: list[_Share] = []
    for spec, cases in kernels:
        chosen = [working] if working is not None and working in spec.tolerance else list(dtypes or spec.tolerance)
        shares += _shares(spec, cases, chosen, device)
    processors = 1 if request.in_process else len(os.sched_getaffinity(0))
    lanes = min(len(shares), processors if device.type == "cpu" else min(processors, GPU_LANES))
    found: list[list[record.ParityResult]] = [[] for _ in shares]
    shared = _Shared(progress)
    stop = threading.Event()
    terms = replace(
        supervised.terms_of(request), stop=stop, threads=max(1, torch.get_num_threads() // lanes) if lanes > 1 else None
    )

    def answer(number: int) -> None:
        def take(row: record.ParityResult) -> None:
            with shared.lock:
                found[number].append(row)
                # What kills every process before it begins with a row is one result.
                rows = [one for rows in found for one in rows]
                keep(list({(one.kernel, one.case, one.dtype, one.mode): one for one in rows}.values()))

        _check(shares[number], request, device, shared, take, terms)

    if lanes <= 1:
        for number in range(len(shares)):
            answer(number)
        return
    apart = [device.type == "cuda" and share.parts == ("large",) for share in shares]
    with ThreadPoolExecutor(max(1, lanes - any(apart))) as pool, ThreadPoolExecutor(1) as large:
        running = [(large if alone else pool).submit(answer, number) for number, alone in enumerate(apart)]
        try:
            for one in as_completed(running):
                one.result()
        except BaseException:
            # Whatever ended this one ends the others, too, so that an interrupted run does not go on in the dark.
            stop.set()
            for executor in (pool, large):
                executor.shutdown(cancel_futures=True)
            raise


class _Share(NamedTuple):
    """Rows of one kernel that one process answers."""

    spec: KernelSpec
    cases: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    parts: tuple[Part, ...] = PARTS


def _shares(
    spec: KernelSpec, cases: Sequence[Case] | None, dtypes: Sequence[str], device: torch.device
) -> Iterator[_Share]:
    names = tuple(case.name for case in cases) if cases is not None else None
    checked = cases if cases is not None else spec.cases
    if cases is None or not all(case.large for case in cases):
        yield from (_Share(spec, names, (dtype,), ("inputs",)) for dtype in dtypes)
    if any(case.large for case in checked) and (cases is not None or device.type == "cuda"):
        yield from (_Share(spec, names, (dtype,), ("large",)) for dtype in dtypes)
    if cases is None:
        yield _Share(spec, names, tuple(dtypes), ("kernel",))


def _check(
    share: _Share,
    request: Request,
    device: torch.device,
    progress: Progress,
    take: Callable[[record.ParityResult], None],
    terms: Terms,
) -> None:
    job = jobs.KernelParity(
        kernel=share.spec.name,
        device=str(device),
        dtypes=share.dtypes,
        cases=share.cases,
        seed=request.seed,
        parts=share.parts,
    )
    answered: set[tuple[str, str, str]] = set()

    def answer(row: record.ParityResult) -> None:
        answered.add((row.case, row.dtype, row.mode))
        take(row)

    finished = False
    while not finished:
        before = len(answered)
        try:
            finished = isolation.run(replace(job, skip=frozenset(answered)), answer, terms, progress)
        except Died as death:
            case, dtype, mode, *example = death.unit or ("", "", OUTSIDE)
            late = (case, dtype, mode) in answered
            reason = (
                f"after this row was done, the process {supervised.as_verb(death.reason)}" if late else death.reason
            )
            reason = ": ".join([*example, reason])
            answer(
                record.ParityResult(
                    kernel=share.spec.name, case=case, dtype=dtype, mode=mode, passed=False, reason=reason
                )
            )
            # Where nothing new was answered, the same would happen again.
            finished = len(answered) == before or not death.unit
            supervised.make_sure_it_answers(request, device, progress, death)


def bench_kernel(
    spec: KernelSpec,
    request: Request,
    device: torch.device,
    progress: Progress,
    take: Callable[[record.BenchResult], None],
    *,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    ceilings: record.Ceilings | None = None,
    swept: bool = False,
) -> None:
    """Hand over the times of every case, dtype and implementation. One that ends the process is labelled "failed".

    Args:
        cases: by default all; on the CPU large ones are timed only if they stand here.
        swept: the cases are those of a sweep, of which nobody asked for each.

    Raises:
        WorkloadFailed: the device does not answer any more.
    """
    names = list(dtypes if dtypes is not None else spec.tolerance)
    directions = bench.directions_of(spec, request.direction)
    units: list[tuple[str, str, bench.Direction]] = []
    for case in cases if cases is not None else spec.cases:
        for name in names:
            if (cases is None or swept) and case.large and device.type == "cpu":
                why = bench.LARGE_SWEEP if swept else bench.LARGE
                take(_unmeasured(spec, (case.name, name, directions[0]), "eager", bench.NOT_MEASURED, why))
            else:
                units += [(case.name, name, direction) for direction in directions]
    failed: dict[str, str] = {}

    def finish(rows: Sequence[record.BenchResult]) -> None:
        unit = units.pop(0)
        for row in rows:
            take(row)
        for name, reason in failed.items():
            take(_unmeasured(spec, unit, name, bench.FAILED, reason))
        failed.clear()

    while units:
        job = jobs.KernelTimes(
            kernel=spec.name,
            device=str(device),
            units=tuple(units),
            rounds=request.rounds,
            ceilings=ceilings,
            without=frozenset(failed),
        )
        try:
            supervised.not_poisoned(isolation.run(job, finish, supervised.terms_of(request), progress))
        except Died as death:
            implementation = "".join(death.unit)
            if implementation and implementation not in failed:
                failed[implementation] = death.reason
            else:
                failed.setdefault("eager", f"before any implementation could run: {death.reason}")
                finish([])
            supervised.make_sure_it_answers(request, device, progress, death)


class _Shared:
    """Progress for several threads at once. It says nothing twice: jobs of one kernel begin with the same notes."""

    def __init__(self, progress: Progress) -> None:
        self.lock = threading.RLock()
        self._progress = progress
        self._said: set[str] = set()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        with self.lock:
            stage = self._progress.stage(title, total)
            inner = stage.__enter__()

        def advance(units: int) -> None:
            with self.lock:
                inner(units)

        try:
            yield advance
        finally:
            with self.lock:
                stage.__exit__(None, None, None)

    def note(self, text: str) -> None:
        with self.lock:
            if text not in self._said:
                self._said.add(text)
                self._progress.note(text)


def _unmeasured(
    spec: KernelSpec, unit: tuple[str, str, bench.Direction], implementation: str, label: str, note: str
) -> record.BenchResult:
    case, dtype, direction = unit
    return record.BenchResult(
        kernel=spec.name, case=case, dtype=dtype, implementation=implementation, seconds=None, direction=direction,
        label=label, note=note,
    )  # fmt: skip
