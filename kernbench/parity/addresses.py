"""Address arithmetic beyond 2^31 elements, checked without a GPU and without the memory.

The kernel is called on tensors of more than 2^31 elements that take no memory until they are touched. Of each launch
Triton's interpreter runs a few programs: the first, the last, and those about where a 32-bit offset in elements or
bytes would wrap. Every address is held against the tensors before it is used.

Integer overflow as such is no fault: hashes and random generators wrap on purpose, and an offset that wraps shows by
the address it leads to.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernbench.parity import compare, modes
from kernbench.parity.finding import Finding, raised
from kernbench.parity.interpreted import WRAP, Program, Stopped, Watch, watched
from kernbench.parity.sparse import VAST_BYTES, Memory, SparseTorch, Unreal
from kernbench.spec import Case, Inputs, KernelSpec

TARGET = WRAP + WRAP // 16
"""Elements of the largest tensor: beyond 2^31 by enough that many programs work there."""
TRIAL = 2**20
"""Elements of the largest tensor in a trial of ``make_inputs``, which shows whether torch makes all that is large."""
GROWTH = 4
BASES = 2
SMALL_GRID = 64
LAUNCH_SECONDS = 0.3
EXTRA = 0.5
"""Seconds for a second size to make large, once one has been checked."""
CPU = torch.device("cpu")


def check(spec: KernelSpec, dtype: torch.dtype, *, seed: int, seconds: float) -> Finding:
    """Whether all addresses stay right where a tensor has more than 2^31 elements, gradients included.

    One size of a case at a time is made so large. A finding that passes with a reason was not checked, or in part: the
    reason says why. What refuses such sizes aloud passes as well.

    Args:
        seconds: processor time to take; a launch that loops over all elements in one program does not end in it.

    Raises:
        KernbenchError: Triton does not interpret here, or its interpreter is not one that we know.
    """
    started = time.thread_time()
    deadline = started + seconds
    result = _Result()
    for base in _bases(spec):
        for case, name in _vast_cases(spec, base, dtype, seed, deadline, result.unfinished):
            now = time.thread_time()
            share = min(deadline - now, EXTRA) if result.done else (deadline - now) * 0.7
            result.add(*_run_vast(spec, case, name, dtype, seed, now + share))
            if result.wrong:
                return Finding(reason=result.wrong)
            if result.done and time.thread_time() - started > seconds / 2:
                return Finding()
        if result.done:
            return Finding()
    if result.unlaunchable:
        return Finding(reason=result.unlaunchable)
    why = result.unfinished[:2] or ["no size makes a tensor larger"]
    return Finding(reason="not checked: " + "; ".join(why), passed=True)


@dataclass
class _Result:
    """What came of the cases that were tried."""

    wrong: str = ""
    unlaunchable: str = ""
    unfinished: list[str] = field(default_factory=list)
    done: bool = False

    def add(self, case: Case, watch: Watch | None, refused: str) -> None:
        sizes = "with " + ", ".join(f"{name}={size}" for name, size in case.sizes.items())
        if watch is not None and watch.wrong:
            self.wrong = f"{sizes}: {watch.wrong}"
        elif watch is not None and watch.unlaunchable:
            self.unlaunchable = f"{sizes}: {watch.unlaunchable}"
        elif refused or watch is None:
            self.unfinished.append(f"{sizes}: {refused}")
        elif watch.late or not watch.beyond:
            self.unfinished.append(f"{sizes}: {watch.late or _why_not_beyond(watch)}")
        else:
            self.done = True


def bounds(spec: KernelSpec, case: Case, dtype: torch.dtype, *, seed: int, seconds: float = math.inf) -> Finding:
    """Whether every access of a call, and of its gradients, lies inside a tensor, read and unused values included.

    Raises:
        KernbenchError: as :func:`check`.
    """
    memory = Memory()
    inputs = _placed(spec.make_inputs(case, dtype, CPU, seed), memory)
    with watched(memory, _all_programs, time.thread_time() + seconds) as watch:
        refused = _call(spec, inputs, watch, vast_bytes=math.inf)
    if watch.late:
        return Finding(reason=f"checked in part: {watch.late}", passed=True)
    return Finding(reason=watch.wrong or watch.unlaunchable or refused)


@dataclass
class _Trial:
    """The shape of each tensor in the inputs of one case."""

    case: Case
    shapes: dict[str, torch.Size]

    @property
    def elements(self) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self.shapes.items()}

    @property
    def largest(self) -> int:
        return max(self.elements.values(), default=0)

    def inner(self, name: str) -> bool:
        """Whether a size is the last one of the largest tensor, over which one program is apt to loop."""
        largest = max(self.shapes.values(), key=torch.Size.numel)
        return len(largest) > 1 and largest[-1] == self.case[name]


def _bases(spec: KernelSpec) -> list[Case]:
    """The cases to enlarge: ragged ones first, and those with larger blocks, of which a GPU takes fewer."""
    small = [case for case in spec.cases if not case.large] or list(spec.cases)
    volume = {case.name: math.prod(max(1, size) for size in case.sizes.values()) for case in small}
    return sorted(small, key=lambda case: (not case.ragged, -volume[case.name]))[:BASES]


def _vast_cases(
    spec: KernelSpec, base: Case, dtype: torch.dtype, seed: int, deadline: float, refused: list[str]
) -> Iterator[tuple[Case, str]]:
    """Cases with one size, named beside it, so large that a tensor has more than 2^31 elements.

    Those come first of which a GPU runs more programs rather than longer ones, then those with fewer elements in all.
    """

    def attempt(case: Case, vast_bytes: float = 2**16) -> _Trial:
        inputs = _vast_inputs(spec, case, dtype, seed, Memory(), deadline, vast_bytes)
        return _Trial(case, {name: leaf.shape for name, leaf in _tensors(inputs).items()})

    try:
        start = attempt(base)
        grown = [found for name in base.sizes if (found := _grown(spec, start, name, attempt))]
    except Unreal as error:
        refused.append(str(error))
        return
    for trial, name in sorted(grown, key=lambda found: (found[0].inner(found[1]), sum(found[0].elements.values()))):
        try:
            yield _reach(spec, trial, name, attempt), name
        except Unreal as error:
            refused.append(f"with a larger {name}: {error}")


def _grown(spec: KernelSpec, start: _Trial, name: str, attempt: Callable[[Case], _Trial]) -> tuple[_Trial, str] | None:
    """A trial in which some tensor has about ``TRIAL`` elements through one size; None if that makes none larger."""
    if not start.case[name]:
        start = attempt(_with_size(spec, start.case, name, 1))
    larger = attempt(_with_size(spec, start.case, name, GROWTH * start.case[name]))
    # A size that counts tensors makes more of them, not larger ones.
    if larger.elements.keys() != start.elements.keys() or larger.elements == start.elements:
        return None
    return attempt(_with_size(spec, start.case, name, _extrapolate(start, larger, name, TRIAL))), name


def _reach(spec: KernelSpec, trial: _Trial, name: str, attempt: Callable[[Case, float], _Trial]) -> Case:
    """The case whose largest tensor has at least ``TARGET`` elements, not many more.

    Raises:
        Unreal: there is none.
    """
    before = attempt(_with_size(spec, trial.case, name, max(1, trial.case[name] // GROWTH)), 2**16)
    for _ in range(3):
        size = _extrapolate(before, trial, name, TARGET)
        before, trial = trial, attempt(_with_size(spec, trial.case, name, size), VAST_BYTES)
        if WRAP < trial.largest < 2 * WRAP:
            return trial.case
    raise Unreal(f"{name}={trial.case[name]} makes a tensor of {trial.largest} elements")


def _extrapolate(one: _Trial, other: _Trial, name: str, target: int) -> int:
    """The size at which the first tensor should reach so many elements, if each grows by a power of the size."""
    ratio = other.case[name] / one.case[name]
    needed: list[float] = []
    for tensor, elements in other.elements.items():
        before = one.elements[tensor]
        power = math.log(elements / before) / math.log(ratio) if before and elements > before and ratio > 1 else 0.0
        if power > 0.1:
            # Sizes come in whole powers; what is between them is a constant beside the size.
            needed.append(other.case[name] * (target / elements) ** (1 / max(1, round(power))))
    if not needed:
        raise Unreal(f"{name} does not make any tensor larger")
    return math.ceil(min(needed))


def _with_size(spec: KernelSpec, case: Case, name: str, size: int) -> Case:
    """The case with another size: a multiple of what it must be, and odd if it may be, so that blocks have a tail."""
    multiple = spec.sizes[name].multiple_of if name in spec.sizes else 1
    size = -(-size // multiple)
    sizes = {**case.sizes, name: multiple * (size | 1 if size > 2 * GROWTH else size)}
    return Case(case.name, large=case.large, **sizes)


def _vast_inputs(
    spec: KernelSpec, case: Case, dtype: torch.dtype, seed: int, memory: Memory, deadline: float, vast_bytes: float
) -> Inputs:
    """What ``make_inputs`` gives, without the contents of what is large.

    Raises:
        Unreal: it cannot be made so.
    """

    def poll() -> None:
        if time.thread_time() > deadline:
            raise Unreal("the time was up in make_inputs")

    mode = SparseTorch(memory, keep=False, far=True, vast_bytes=vast_bytes, poll=poll)
    poll()
    try:
        with mode:
            inputs = spec.make_inputs(case, dtype, CPU, seed)
    except Exception as error:
        raise Unreal(f"make_inputs {raised(error)}") from error
    for name, leaf in _tensors(inputs).items():
        if leaf.numel() * leaf.element_size() > vast_bytes and not memory.holds(leaf):
            raise Unreal(f"make_inputs makes {name} without torch, so it cannot be made large")
    return inputs


def _run_vast(
    spec: KernelSpec, case: Case, name: str, dtype: torch.dtype, seed: int, deadline: float
) -> tuple[Case, Watch | None, str]:
    """The case that ran, what the interpreter saw of it, and why it was refused, empty if it was not.

    It is a smaller one where what the call makes is much larger than its inputs, which are what cases are enlarged by.
    """
    for _ in range(2):
        memory = Memory()
        try:
            inputs = _placed(_vast_inputs(spec, case, dtype, seed, memory, deadline, VAST_BYTES), memory)
        except Unreal as error:
            return case, None, str(error)
        with watched(memory, partial(telling_programs, memory), deadline, LAUNCH_SECONDS) as watch:
            refused = _call(spec, inputs, watch, vast_bytes=VAST_BYTES)
        largest = max(region.elements for region in memory.regions)
        if watch.wrong or watch.late or largest <= 2 * WRAP:
            break
        case = _with_size(spec, case, name, case[name] * TARGET // largest)
    return case, watch, refused


def _call(spec: KernelSpec, inputs: Inputs, watch: Watch, *, vast_bytes: float) -> str:
    """Call the kernel, backward too if it has one, under watch; why it was refused, empty if it was not."""
    mode = SparseTorch(watch.memory, keep=True, vast_bytes=vast_bytes, poll=watch.poll)
    try:
        with np.errstate(all="ignore"), torch.set_grad_enabled(spec.differentiable):
            sources = _sources(spec, inputs) if spec.differentiable else []
            with mode:
                output = spec.optimized(**inputs)
            if sources:
                _backward(compare.leaves(output, "output"), sources, watch.memory, mode)
    except Stopped:
        return ""
    except Unreal as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the result of checking it
        if watch.over:
            return ""
        if _overflows(error):
            watch.wrong = f"{watch.function or 'the call'} {raised(error)}"
        return mode.refused or raised(error)
    return mode.refused


def _sources(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    tensors = _tensors(inputs)
    return [tensors[name].requires_grad_() for name in modes.differentiable_names(inputs, spec.mutates)]


def _backward(outputs: compare.Leaves, sources: Sequence[Tensor], memory: Memory, mode: SparseTorch) -> None:
    reached = {name: leaf for name, leaf in outputs.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    if not reached:
        return
    upstream = [
        memory.tensor(leaf.shape, leaf.stride(), leaf.dtype, f"the gradient of {name}")
        for name, leaf in reached.items()
    ]
    with mode:
        torch.autograd.grad(list(reached.values()), sources, upstream, allow_unused=True)


def _overflows(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OverflowError):
            return True
        error = error.__cause__
    return False


def _why_not_beyond(watch: Watch) -> str:
    if not watch.launches:
        return "the call launches no Triton function"
    return f"none of the {watch.programs} programs that ran touches an element beyond 2^31"


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    leaves = compare.leaves(inputs, "")
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}


def _placed(inputs: Inputs, memory: Memory) -> Inputs:
    """The inputs with every tensor in ``memory``, under its name."""
    names = {id(leaf): name for name, leaf in reversed(_tensors(inputs).items())}
    placed: Inputs = compare.map_tensors(
        inputs, lambda tensor: memory.place(tensor, names[id(tensor)]).requires_grad_(tensor.requires_grad)
    )
    return placed


def _wraps(memory: Memory) -> list[float]:
    """Where in the large tensors, from 0 to 1, 32-bit offsets wrap: in elements, and signed and unsigned in bytes."""
    marks = {
        round(limit / region.bytes, 4)
        for region in memory.regions
        for limit in (WRAP * region.itemsize, WRAP, 2 * WRAP)
        if limit < region.bytes
    }
    return sorted(marks, reverse=True)


def telling_programs(memory: Memory, grid: Program) -> list[Program]:
    """The programs of a grid that would show a wrapped offset, the most telling first.

    Programs are taken to walk through memory in their order, whichever index of the grid runs fastest.
    """
    x, y, z = grid
    total = x * y * z
    if total <= SMALL_GRID:
        return _all_programs(grid)[::-1]
    wraps = [int(mark * total) for mark in _wraps(memory)]
    order = [total - 1, *wraps, 0, total - 2, *(wrap + step for wrap in wraps for step in (1, -1)), 1]
    found: dict[Program, None] = {}
    for index in order:
        if 0 <= index < total:
            found[index // (y * z), index // z % y, index % z] = None
            found[index % x, index // x % y, index // (x * y)] = None
    edges = [sorted({size - 1, size // 2, 0}, reverse=True) for size in grid]
    found.update(dict.fromkeys(itertools.product(edges[0], edges[1], edges[2])))
    return list(found)


def _all_programs(grid: Program) -> list[Program]:
    x, y, z = map(range, grid)
    return list(itertools.product(x, y, z))
