"""Checks one kernel spec against its reference: all cases, dtypes, layouts, updates, gradients and modes.

Per case and dtype the reference runs twice on the same inputs, in the working dtype (eager) and on float64 copies (the
oracle).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernbench import compare, conditions, modes, mutants, registry
from kernbench.compare import Judged, Leaves
from kernbench.errors import KernbenchError
from kernbench.finding import Finding, raised
from kernbench.progress import Progress, Silent
from kernbench.record import ParityResult
from kernbench.spec import Case, Inputs, KernelSpec
from kernbench.subject import Subject, Truth, is_noise, judge_all, passes

UPDATES = (10, 100)
COPIES = 5
"""Memory that a check takes at its peak, over the bytes that one call moves: inputs, copies, float64 and mutants."""


def check_kernel(
    spec: KernelSpec,
    *,
    device: torch.device,
    dtypes: Sequence[str | torch.dtype] | None = None,
    cases: Sequence[Case | str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    skip: frozenset[tuple[str, str, str]] = frozenset(),
    begin: Callable[[str, str, str], None] | None = None,
) -> Iterator[ParityResult]:
    """One result per case, dtype and way of calling. A kernel that raises is a failed result, and the others go on.

    A case of which the inputs or the reference fail gives one row, in the mode that comes first.

    Args:
        dtypes: dtypes to check, those of the tolerance by default.
        cases: cases to check, by default all, on the CPU without the large ones.
        skip: rows to leave out, by case, dtype and mode: an earlier process has answered them.
        begin: told case, dtype and mode before each of them runs.

    Raises:
        KernbenchError: a dtype without a tolerance, or an unknown case.
    """
    progress = progress or Silent()
    names = _dtypes(spec, dtypes)
    chosen = _cases(spec, cases, device, progress)
    smallest = min(chosen, key=_size, default=None)
    with progress.stage(f"checking {spec.name}", len(names) * len(chosen)) as advance:
        for name in names:
            for case in chosen:
                if lacking := _lacking_memory(spec, case, getattr(torch, name), device):
                    progress.note(lacking)
                    continue
                check = _Check(spec, case, getattr(torch, name), device, seed)
                yield from _rows(check, smallest, skip, begin or _say_nothing)
                advance(1)


def _rows(
    check: _Check, smallest: Case | None, skip: frozenset[tuple[str, str, str]], begin: Callable[[str, str, str], None]
) -> Iterator[ParityResult]:
    kernel, case, dtype = check.spec.name, check.case.name, str(check.dtype).removeprefix("torch.")
    bodies = dict(_bodies(check, smallest))
    first = next(iter(bodies))
    for mode, body in bodies.items():
        if (case, dtype, mode) in skip:
            continue
        begin(case, dtype, mode)
        started = time.perf_counter()
        if check.broken and (finding := _run(check.prepare)).reason:
            if (case, dtype, first) not in skip:
                yield finding.row(kernel, case, dtype, first, time.perf_counter() - started)
            return
        yield _run(body).row(kernel, case, dtype, mode, time.perf_counter() - started)


def _say_nothing(case: str, dtype: str, mode: str) -> None:
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


def _bodies(check: _Check, smallest: Case | None) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Every way in which a case is checked on this device, by its mode."""
    spec, case = check.spec, check.case
    on_gpu = check.device.type == "cuda"
    yield "plain", check.plain
    if case.ragged:
        yield "offset", check.offset
        if not spec.mutates:
            yield "strided", check.strided
    if spec.differentiable:
        yield "gradient", check.gradient
        if case.ragged:
            yield "gradient of a sum", check.gradient_of_sum
    if spec.stateful:
        last = UPDATES[-1] if on_gpu or case is smallest else UPDATES[0]
        yield from ((f"{count} updates", check.updates(count)) for count in UPDATES if count <= last)
    if on_gpu:
        yield "compile", check.compiled
        yield "graph", check.graph


def _run(body: Callable[[], Finding]) -> Finding:
    try:
        return body()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the result of checking it
        return Finding(reason=raised(error))


class _Check(Subject):
    """A subject with the ways of checking it."""

    def prepare(self) -> Finding:
        """Inputs and truth, without which nothing can be judged."""
        _ = self.truth
        return Finding()

    def plain(self) -> Finding:
        """Poisoned outputs: right, twice the same, right on other inputs too, and nothing else touched."""
        others, stale = self._on_other_inputs()
        truth = self.truth
        inputs = compare.clone(self.inputs)
        with conditions.poisoned():
            first = self.call(self.spec.optimized, inputs)
        touched = self._touched(inputs)
        first = compare.clone(first)
        del inputs
        judged = self.judge(first, truth, self.inputs)
        again = self.call(self.spec.optimized, compare.clone(self.inputs))
        bitwise = first.keys() == again.keys() and all(compare.same_leaf(first[name], again[name]) for name in first)
        survey = mutants.survey(
            self._mutants(stale), lambda changed: passes(judge_all(changed, truth, self.forward, part=True))
        )
        kept_answer = any(item.reason for item in judged) and not any(item.reason for item in others)
        reasons = [
            touched,
            "" if bitwise else "two calls on equal inputs differ",
            next((f"on inputs of another seed {item.reason}" for item in others if item.reason), ""),
            "right on the inputs that came first, wrong on these: it may keep an answer" if kept_answer else "",
            survey.reason,
        ]
        return Finding(judged, "; ".join(filter(None, reasons)), None, (survey.killed, survey.total), bitwise)

    def _on_other_inputs(self) -> tuple[list[Judged], Leaves]:
        """The kernel judged on inputs of another seed, and what eager makes of them: a mutant's stale answer."""
        inputs = self.others()
        truth = self.truth_of(inputs)
        return self.judge(self.call(self.spec.optimized, compare.clone(inputs)), truth, inputs), truth.eager

    def _touched(self, inputs: Inputs) -> str:
        changed = [
            name
            for argument, value in inputs.items()
            if argument not in self.spec.mutates
            for name, leaf in compare.leaves(value, argument).items()
            if not compare.same_leaf(leaf, compare.leaves(self.inputs[argument], argument)[name])
        ]
        return f"writes into {', '.join(changed[:3])}, which it does not declare in mutates" if changed else ""

    def _mutants(self, stale: Leaves) -> Iterator[mutants.Mutant]:
        initial = self.results((), self.inputs)
        given = {key: leaf for name, value in self.inputs.items() for key, leaf in compare.leaves(value, name).items()}
        right = self.truth.eager
        signal = {
            item.name for item in judge_all(right, self.truth, self.forward) if not is_noise(item, right[item.name])
        }
        for mutant in mutants.of_call(right, initial, given, stale):
            if signal & mutant.changed.keys():
                yield mutant

    def offset(self) -> Finding:
        """Each tensor misaligned between guard bands: what is read or written past an end shows."""
        guarded = conditions.Guarded()
        with conditions.poisoned():
            got = self.call(self.spec.optimized, guarded.embed(self.inputs))
        reason = "" if guarded.intact() else "writes past the end of a tensor"
        return Finding(self.judge(got, self.truth, self.inputs), reason)

    def strided(self) -> Finding:
        """Inputs with gaps between elements; a kernel may refuse them with a ValueError, but not get them wrong."""
        try:
            with conditions.poisoned():
                got = self.call(self.spec.optimized, conditions.strided(self.inputs))
        except ValueError as error:
            return Finding(reason=f"refused: {(str(error).splitlines() or [''])[0]}", passed=True)
        return Finding(self.judge(got, self.truth, self.inputs))

    def gradient(self) -> Finding:
        """Gradients to all inputs that require them, for a random upstream gradient."""
        return self._gradient(expanded=False)

    def gradient_of_sum(self) -> Finding:
        """The same for the upstream gradient of ``sum()``, which is one number with strides of zero."""
        return self._gradient(expanded=True)

    def _gradient(self, *, expanded: bool) -> Finding:
        upstream = self.upstream(self.truth.eager, expanded=expanded)
        wanted = modes.differentiable_names(self.inputs, self.spec.mutates)
        run = modes.Backward(wanted, upstream)
        truth = self.backward_truth(run, self.inputs)
        with conditions.poisoned():
            got = run(self.spec.optimized, compare.clone(self.inputs))
        judged = self.judge_backward(got, truth, run, self.inputs)
        noise = {item.name for item in judged if is_noise(item, truth.eager[item.name])}
        right = {name: leaf for name, leaf in truth.eager.items() if isinstance(leaf, Tensor) and name not in noise}
        survey = mutants.survey(
            mutants.of_gradients(right), lambda changed: passes(judge_all(changed, truth, self.backward, part=True))
        )
        return Finding(judged, survey.reason, None, (survey.killed, survey.total))

    def updates(self, count: int) -> Callable[[], Finding]:
        """All state after ``count`` updates from one start, each with fresh inputs, against float64 all the way."""

        def body() -> Finding:
            steps = modes.Updates(self.spec, self.inputs, self.seed)
            eager = self.results(*steps.run(self.spec.reference, compare.clone(self.inputs), count))
            oracle = self.results(*steps.run(self.spec.reference, compare.upcast(self.inputs), count))
            got = self.results(*steps.run(self.spec.optimized, compare.clone(self.inputs), count))
            return Finding(judge_all(got, Truth(eager, oracle), self.forward))

        return body

    def compiled(self) -> Finding:
        """The kernel called from inside a graph of torch.compile."""
        got = self.call(modes.compiled(self.spec.optimized), compare.clone(self.inputs))
        return Finding(self.judge(got, self.truth, self.inputs))

    def graph(self) -> Finding:
        """The kernel captured in a CUDA graph, replayed on other inputs at the same addresses."""
        others = self.others()
        got = self.results(*modes.replayed(self.spec.optimized, self.inputs, others))
        mixed = modes.with_tensors_of(self.inputs, others)
        del others
        return Finding(self.judge(got, self.truth_of(mixed), mixed))
