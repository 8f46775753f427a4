"""Checks one kernel spec against its reference: which rows there are, in which order, on which device.

Per case and dtype the reference runs twice on the same inputs, in the working dtype (eager) and on float64 copies (the
oracle); :mod:`kernbench.parity.casecheck` has the ways of checking. Rows about the kernel as a whole follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch

from kernbench import registry
from kernbench.errors import KernbenchError
from kernbench.parity import addresses, bf16lint, gate, generated, randomness
from kernbench.parity.casecheck import Body, CaseCheck
from kernbench.parity.finding import Finding, raised
from kernbench.parity.subject import Subject
from kernbench.progress import Progress, Silent
from kernbench.record import ParityResult
from kernbench.spec import Case, KernelSpec

UPDATES = (10, 100)
LAYOUTS = ("strided", "transposed", "expanded")
"""What a kernel may refuse."""
EXAMPLES = 300
GENERATED_SECONDS = {"cpu": 1.5, "cuda": 4.0}
"""How long generated inputs are tried; the interpreter does not come to all examples."""
GENERATED = "generated"
ADDRESSES = "addresses"
ADDRESS_SECONDS = 3.0
COPIES = 5
"""Memory that a check takes at its peak, over the bytes that one call moves: inputs, copies, float64 and mutants."""
Skip = frozenset[tuple[str, str, str]]
Begin = Callable[..., None]
"""Told case, dtype and mode of a row before it runs, and in generated rows each example in words."""
Part = Literal["inputs", "large", "kernel"]
"""Rows of each dtype (its cases, generated inputs, randomness), but for those of large cases, which are a part of their
own, or those of the kernel in its strictest dtype.
"""
PARTS: tuple[Part, ...] = ("inputs", "large", "kernel")


class Row(NamedTuple):
    """One row to be, by case, dtype and mode; ``body`` answers it."""

    case: str
    dtype: str
    mode: str
    body: Body


def check_kernel(
    spec: KernelSpec,
    *,
    device: torch.device,
    dtypes: Sequence[str | torch.dtype] | None = None,
    cases: Sequence[Case | str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    skip: Skip = frozenset(),
    begin: Begin | None = None,
    parts: Sequence[Part] = PARTS,
) -> Iterator[ParityResult]:
    """All rows of a kernel: those of its cases, then, unless ``cases`` chooses some, those about it as a whole.

    Args and errors as of :func:`check_cases`; ``parts`` leaves rows to another process.
    """
    begin, progress = begin or _say_nothing, progress or Silent()
    wanted = [large for large, part in ((False, "inputs"), (True, "large")) if part in parts]
    if wanted:
        yield from check_cases(
            spec, device=device, dtypes=dtypes, cases=cases, seed=seed, progress=progress, skip=skip, begin=begin,
            large=wanted,
        )  # fmt: skip
    if cases is not None:
        return
    rows = list(kernel_rows(spec, device=device, dtypes=_dtypes(spec, dtypes), seed=seed, parts=parts, begin=begin))
    left = [row for row in rows if row[:3] not in skip]
    if not left:
        return
    title = f"checking {spec.name} as a whole" if "kernel" in parts else f"{_title(spec, dtypes)} on generated inputs"
    with progress.stage(title, len(left)) as advance:
        for row in left:
            begin(*row[:3])
            started = time.perf_counter()
            yield _run(row, device).row(spec.name, *row[:3], time.perf_counter() - started)
            advance(1)


def kernel_rows(
    spec: KernelSpec,
    *,
    device: torch.device,
    dtypes: Sequence[str],
    seed: int,
    parts: Sequence[Part] = PARTS,
    begin: Begin | None = None,
) -> Iterator[Row]:
    """The rows about a kernel as a whole: generated inputs, far addresses, randomness, and the gate's own grade."""
    if "inputs" in parts:
        yield from _rows_of_dtypes(spec, device, dtypes, seed, begin or _say_nothing)
    if "kernel" in parts:
        # Whatever dtype is asked for: in a coarse one, inputs cannot tell much apart.
        yield from _rows_of_the_kernel(spec, device, "float32" if "float32" in spec.tolerance else dtypes[0], seed)


def _rows_of_dtypes(
    spec: KernelSpec, device: torch.device, dtypes: Sequence[str], seed: int, begin: Begin
) -> Iterator[Row]:
    cases = [case for case in spec.cases if not case.large] or list(spec.cases)
    ragged = next((case for case in cases if case.ragged), cases[0])
    for name in dtypes:
        dtype = getattr(torch, name)
        subject = Subject(spec, ragged, dtype, device, seed)
        examples = partial(
            generated.check,
            subject,
            seconds=GENERATED_SECONDS[device.type],
            examples=EXAMPLES,
            begin=partial(begin, GENERATED, name, GENERATED),
        )
        yield Row(GENERATED, name, GENERATED, examples)
        yield from (Row(ragged.name, name, mode, body) for mode, body in randomness.bodies(subject))


def _rows_of_the_kernel(spec: KernelSpec, device: torch.device, strictest: str, seed: int) -> Iterator[Row]:
    if device.type == "cpu":
        # Offsets count elements, whatever their dtype. A GPU runs large cases for real.
        far = partial(addresses.check, spec, getattr(torch, strictest), seed=seed, seconds=ADDRESS_SECONDS)
        yield Row("beyond 2^31", strictest, ADDRESSES, far)

    def check(wrong: KernelSpec) -> Iterator[ParityResult]:
        return check_cases(wrong, device=device, dtypes=[strictest], seed=seed)

    grade = partial(gate.grade, spec, device=device, dtype=getattr(torch, strictest), seed=seed, check=check)
    yield Row("all", strictest, "gate", grade)


def check_cases(
    spec: KernelSpec,
    *,
    device: torch.device,
    dtypes: Sequence[str | torch.dtype] | None = None,
    cases: Sequence[Case | str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    skip: Skip = frozenset(),
    begin: Begin | None = None,
    large: Sequence[bool] = (False, True),
) -> Iterator[ParityResult]:
    """One result per case, dtype and way of calling. A kernel that raises is a failed result, and the others go on.

    A case of which the inputs or the reference fail gives one row, in the mode that comes first.

    Args:
        dtypes: dtypes to check, those of the tolerance by default.
        cases: cases to check, by default all, on the CPU without the large ones.
        skip: rows to leave out, by case, dtype and mode: an earlier process has answered them.
        begin: told case, dtype and mode before each of them runs.
        large: which of the cases, small ones, large ones or both; the others are left to another process.

    Raises:
        KernbenchError: a dtype without a tolerance, or an unknown case.
    """
    progress = progress or Silent()
    names = _dtypes(spec, dtypes)
    chosen = _cases(spec, cases, device, progress)
    small = [case for case in spec.cases if not case.large]
    compiled = next((case for case in chosen if case.large), None)
    modes = _Modes(device, min(small, key=_size, default=None), _for_layouts(chosen), compiled)
    chosen = [case for case in chosen if case.large in large]
    with progress.stage(_title(spec, dtypes), len(names) * len(chosen)) as advance:
        for name in names:
            for case in chosen:
                if lacking := _lacking_memory(spec, case, getattr(torch, name), device):
                    progress.note(lacking)
                    continue
                check = CaseCheck(spec, case, getattr(torch, name), device, seed)
                yield from _case_rows(check, modes, skip, begin or _say_nothing)
                advance(1)


def _case_rows(check: CaseCheck, modes: _Modes, skip: Skip, begin: Begin) -> Iterator[ParityResult]:
    kernel, case, dtype = check.spec.name, check.case.name, str(check.dtype).removeprefix("torch.")
    rows = [Row(case, dtype, mode, body) for mode, body in modes.of(check)]
    for row in rows:
        if row[:3] in skip:
            continue
        begin(*row[:3])
        started = time.perf_counter()
        if check.broken and (finding := _run(row._replace(body=check.prepare), check.device)).reason:
            if rows[0][:3] not in skip:
                yield finding.row(kernel, case, dtype, rows[0].mode, time.perf_counter() - started)
            return
        yield _run(row, check.device).row(kernel, case, dtype, row.mode, time.perf_counter() - started)


def _title(spec: KernelSpec, dtypes: Sequence[str | torch.dtype] | None) -> str:
    names = [str(name).removeprefix("torch.") for name in dtypes or ()]
    return f"checking {spec.name}{' in ' if names else ''}{' and '.join(names)}"


def _say_nothing(*unit: str) -> None:
    """What begins is told to nobody."""


def _dtypes(spec: KernelSpec, dtypes: Sequence[str | torch.dtype] | None) -> list[str]:
    names = [str(name).removeprefix("torch.") for name in dtypes or spec.tolerance]
    for name in names:
        if name not in spec.tolerance:
            raise KernbenchError(
                f"kernel {spec.name!r} states no tolerance for {name}; it is checked in {', '.join(spec.tolerance)}"
            )
    return names


def _cases(
    spec: KernelSpec, cases: Sequence[Case | str] | None, device: torch.device, progress: Progress
) -> list[Case]:
    known = {case.name: case for case in spec.cases}
    if cases is not None:
        names = [case.name if isinstance(case, Case) else case for case in cases]
        return [known[registry.nearest(name, list(known), f"case of {spec.name}")] for name in names]
    if device.type == "cuda":
        return list(spec.cases)
    large = [case.name for case in spec.cases if case.large]
    if large:
        progress.note(f"{spec.name}: large cases are left out without a GPU: {', '.join(large)}")
    return [case for case in spec.cases if not case.large]


def _lacking_memory(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Why a large case cannot be checked on this GPU; empty if it can, or where memory is not the GPU's."""
    if device.type != "cuda" or not case.large:
        return ""
    torch.cuda.empty_cache()
    needed = COPIES * spec.cost(case, dtype).bytes_moved
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= free:
        return ""
    return (
        f"{spec.name}, {case.name}: not checked in {str(dtype).removeprefix('torch.')}, it takes about "
        f"{needed / 1e9:.0f} GB with the float64 oracle and {free / 1e9:.0f} GB are free"
    )


def _size(case: Case) -> int:
    size = 1
    for value in case.sizes.values():
        size *= max(1, value)
    return size


def _for_layouts(cases: Sequence[Case]) -> Case | None:
    """The ragged case with the most dimensions that are not one, of those the smallest."""
    ragged = [case for case in cases if case.ragged]
    return min(ragged, key=lambda case: (-sum(size > 1 for size in case.sizes.values()), _size(case)), default=None)


@dataclass(frozen=True)
class _Modes:
    """Which ways of checking a case gets. What takes an interpreter long is done in one case there, on a GPU in all.

    Large cases get neither layouts nor the most updates, and but one of them torch.compile, which takes longest of all:
    what those show, they show in small ones.

    Attributes:
        smallest: of all cases, for the most updates.
        for_layouts: of those that are checked.
        large_compiled: the large case for torch.compile, of those that are checked.
    """

    device: torch.device
    smallest: Case | None
    for_layouts: Case | None
    large_compiled: Case | None

    def of(self, check: CaseCheck) -> Iterator[tuple[str, Body]]:
        """The modes of a case with their bodies; the first is the first call of the kernel."""
        spec, case, on_gpu = check.spec, check.case, self.device.type == "cuda"
        all_layouts = case.ragged and not case.large and (on_gpu or case is self.for_layouts)
        yield "plain", check.plain
        if not case.large:
            yield "rewritten", check.rewritten
        if case.ragged:
            yield "offset", check.offset
        if all_layouts:
            yield from ((layout, check.laid_out(layout)) for layout in LAYOUTS)
        if spec.differentiable:
            yield "gradient", check.gradient
            if case.ragged:
                yield "gradient of a sum", check.gradient_of_sum
            if all_layouts:
                yield from ((f"gradient {layout}", check.gradient_laid_out(layout)) for layout in LAYOUTS[:2])
                yield "gradient offset", check.gradient_offset
        if spec.stateful:
            many = on_gpu and not case.large or case is self.smallest
            few = UPDATES[:1] if on_gpu or case is self.for_layouts else ()
            counts = UPDATES if many else few
            yield from ((f"{count} updates", check.updates(count)) for count in counts)
        if on_gpu:
            yield from self._on_gpu(check)

    def _on_gpu(self, check: CaseCheck) -> Iterator[tuple[str, Body]]:
        compiled = not check.case.large or check.case is self.large_compiled
        if not check.case.large:
            yield "stream", check.stream
        if compiled:
            yield "compile", check.compiled
        yield "graph", check.graph
        if check.spec.differentiable:
            if compiled:
                yield "gradient compile", check.gradient_compiled
            yield "gradient graph", check.gradient_graph


def _run(row: Row, device: torch.device) -> Finding:
    # One watch over the interpreter at a time: that over addresses has its own.
    linted = row.dtype == "bfloat16" and device.type == "cpu" and row.mode != ADDRESSES
    with bf16lint.watching() if linted else nullcontext() as watch:
        try:
            finding = row.body()
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the result of checking it
            finding = Finding(reason=raised(error))
    if watch is not None and watch.findings:
        return replace(finding, passed=False, reason="; ".join(filter(None, [finding.reason, *watch.findings])))
    return finding
