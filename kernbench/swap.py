"""Puts the swaps of a plan in place, counts what they do, and takes them out again exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kernbench import ranges, registry, sites
from kernbench.errors import KernbenchError
from kernbench.record import SiteHit
from kernbench.sites import Attribute, AttributePatch, ForwardPatch, Match, ModulePatch, Patch
from kernbench.spec import KernelSpec
from kernbench.watching.syncwatch import current_phase
from kernbench.workload import Built, Phase, Swap, Workload

IMPLEMENTATIONS = ("triton", "compile", "eager")
PYTHON = "python"
"""Implementation name of swaps that come with a callable instead of a kernel spec."""


@dataclass
class Counter:
    """Calls of a replacement; ``traces`` are calls while torch.compile built a graph, or a CUDA graph was captured."""

    calls: int = 0
    traces: int = 0


@dataclass(frozen=True)
class Claim:
    """One swap of one phase, with the callable that goes in."""

    phase: Phase
    swap: Swap
    function: Callable[..., Any]
    implementation: str
    counter: Counter = field(default_factory=Counter)

    @property
    def site(self) -> str:
        return sites.display(self.swap.site)

    def hit(self, calls: int, steps: int) -> SiteHit:
        return SiteHit(
            site=self.site,
            implementation=self.implementation,
            calls=calls,
            calls_per_step=calls / steps if steps else 0.0,
            kernel=self.swap.kernel,
            every=self.swap.every,
            steps=steps,
        )


class Receipt:
    """How often each replacement of a plan ran since the receipt was opened.

    Inside a graph of torch.compile, or a CUDA graph, a replacement is counted when it is traced or captured, not when
    the graph runs: nothing of Python runs then. Such a site shows the traces of the plan's whole life, so it never
    looks unreached.
    """

    def __init__(self, claims: Sequence[Claim]) -> None:
        self._claims = claims
        self._start = [claim.counter.calls for claim in claims]

    def hits(self, steps: int) -> list[SiteHit]:
        """One line per site, over ``steps`` steps."""
        return [
            claim.hit(claim.counter.calls - start + claim.counter.traces, steps)
            for claim, start in zip(self._claims, self._start, strict=True)
        ]


class Applied:
    """Swaps in while entered, out after. Enter it as often as you like, nested too; leave in reverse order."""

    def __init__(self, patches: Sequence[Patch], receipt: Receipt) -> None:
        self._patches = patches
        self._receipt = receipt
        self._entered: list[list[tuple[Patch, Any]]] = []

    def __enter__(self) -> Receipt:
        undo: list[tuple[Patch, Any]] = []
        self._entered.append(undo)
        try:
            for patch in self._patches:
                # On the undo list before it is in: an interrupt between the two restores what was not changed.
                undo.append((patch, patch.found()))
                patch.install()
            return self._receipt
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        undo = self._entered[-1]
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                _restore(undo)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        del self._entered[-1]
        if interrupt is not None:
            raise interrupt


def _restore(undo: list[tuple[Patch, Any]]) -> None:
    while undo:
        patch, found = undo[-1]
        patch.restore(found)
        del undo[-1]


class Plan:
    """The swaps of some phases, each with its implementation chosen; see :func:`plan`."""

    def __init__(
        self, workload: Workload, phases: Sequence[Phase], claims: Sequence[Claim], specs: Sequence[KernelSpec]
    ):
        self.workload = workload
        self.numbers = tuple(phase.number for phase in phases)
        self.kernels = tuple(specs)
        """Specs whose Triton implementation is in the plan."""
        self.implementations = {
            phase.number: next(
                (claim.implementation for claim in claims if claim.phase is phase and claim.swap.kernel), PYTHON
            )
            for phase in phases
        }
        self._claims = tuple(claims)
        self._attributes = {
            id(claim): _counting_patch(sites.resolve(claim.swap.site), claim)
            for claim in claims
            if not sites.is_glob(claim.swap.site)
        }
        self._modules: WeakKeyDictionary[torch.nn.Module, list[tuple[torch.nn.Module, torch.nn.Module]]]
        self._modules = WeakKeyDictionary()
        _refuse_conflicts(self._claims, self._attributes)

    def sites(self) -> list[tuple[int, SiteHit]]:
        """Every site with the number of its phase, before anything ran."""
        return [(claim.phase.number, claim.hit(0, 0)) for claim in self._claims]

    def receipt(self) -> Receipt:
        """A receipt that counts from now on, over every use of this plan."""
        return Receipt(self._claims)

    def applied(self, built: Built) -> Applied:
        """The context manager that puts the plan in place for ``built``; entering it yields a receipt.

        Replacements are made once per plan, so entering is cheap and torch.compile sees the same functions every time.

        Raises:
            KernbenchError: a module glob matches nothing in ``built.model``, or two swaps claim one module.
        """
        patches: list[Patch] = list(self._attributes.values())
        for claim, found in self._matched(built):
            patches.extend(self._module_patch(built, claim, match) for match in found)
        return Applied(patches, self.receipt())

    def _matched(self, built: Built) -> list[tuple[Claim, list[Match]]]:
        """What each module glob of the plan matches, all claims checked before any replacement is made."""
        matched = []
        taken: dict[str, Claim] = {}
        for claim in self._claims:
            if id(claim) in self._attributes:
                continue
            found = list(sites.matches(_model(built, claim.site), claim.site))
            if not found:
                raise KernbenchError(
                    f"site {claim.site!r} of phase {claim.phase.number} matches no module of {self.workload.name}; "
                    "compare it with the names in built.model.named_modules()"
                )
            for match in found:
                for path, other in taken.items():
                    if other is not claim and _nested(path, match.path):
                        raise _conflict(match.path, other, claim)
                taken[match.path] = claim
            matched.append((claim, found))
        return matched

    def _module_patch(self, built: Built, claim: Claim, match: Match) -> ModulePatch:
        replaced = self._modules.setdefault(_model(built, claim.site), [])
        replacement = next((new for old, new in replaced if match.module is old or match.module is new), None)
        if replacement is None:
            replacement = _replace(match.module, claim)
            replaced.append((match.module, replacement))
        return ModulePatch(match.parent, match.name, replacement)


def plan(
    workload: Workload,
    numbers: Sequence[int],
    *,
    use: Mapping[int, str],
    kernels: Callable[[str], KernelSpec],
) -> Plan:
    """The plan that puts the phases ``numbers`` in place.

    Args:
        use: implementation of kernel swaps per phase, "triton" (also where none is given), "compile" or "eager".
        kernels: finds a kernel spec by name.

    Raises:
        KernbenchError: unknown phase, implementation or kernel; a phase without one that it needs; a site that matches
            nothing; two claims on one site.
    """
    known = [phase.number for phase in workload.phases]
    for number in numbers:
        if number not in known:
            raise KernbenchError(
                f"{workload.name} has no phase {number}; its phases are {', '.join(map(str, known)) or 'none'}"
            )
    phases = workload.phases_numbered(numbers)
    for phase in phases:
        if missing := phase.lacks(numbers):
            raise KernbenchError(_lacking(workload, phase, missing))
    claims: list[Claim] = []
    specs: dict[str, KernelSpec] = {}
    for phase in phases:
        chosen = registry.nearest(use.get(phase.number, "triton"), list(IMPLEMENTATIONS), "implementation")
        for swap in phase.swaps:
            if swap.use is not None:
                claims.append(Claim(phase, swap, _adapted(swap, swap.use), PYTHON))
                continue
            spec = kernels(swap.kernel)
            if chosen == "triton":
                specs[spec.name] = spec
            claims.append(Claim(phase, swap, _adapted(swap, _implementation(spec, chosen)), chosen))
    return Plan(workload, phases, claims, list(specs.values()))


def _lacking(workload: Workload, phase: Phase, missing: Sequence[int]) -> str:
    needs = ",".join(map(str, phase.needs))
    return (
        f"phase {phase.number} of {workload.name} needs phase{'s' * (len(missing) > 1)} "
        f"{' and '.join(map(str, missing))} in place: keep {'them' if len(missing) > 1 else 'it'} first, or name all: "
        f"swap --phase {phase.number} --phases {needs}, profile --phases {needs},{phase.number}"
    )


def _implementation(spec: KernelSpec, name: str) -> Callable[..., Any]:
    if name == "triton":
        return spec.optimized
    if name == "eager":
        return spec.reference
    compiled: Callable[..., Any] = torch.compile(spec.reference, dynamic=False)
    return compiled


def _adapted(swap: Swap, function: Callable[..., Any]) -> Callable[..., Any]:
    return swap.adapt(function) if swap.adapt is not None else function


@contextmanager
def annotated(workload: Workload, built: Built, plan: Plan | None = None) -> Iterator[None]:
    """Name every site of every phase in traces, swapped or not, ``kernbench.phase<N>:<site>``, with ``plan`` in.

    A site of a phase outside the plan that matches nothing is left out: an earlier phase may be what brings it.
    """
    with ExitStack() as stack:
        if plan is not None:
            stack.enter_context(plan.applied(built))
        patches: list[Patch] = []
        for phase in workload.phases:
            for swap in phase.swaps:
                try:
                    patches.extend(_annotations(built, phase, swap))
                except KernbenchError:
                    if plan is not None and phase.number in plan.numbers:
                        raise
        stack.enter_context(Applied(patches, Receipt(())))
        yield


def _annotations(built: Built, phase: Phase, swap: Swap) -> Iterator[Patch]:
    name = sites.display(swap.site)
    label = f"kernbench.phase{phase.number}:{name}"
    wrap = functools.partial(_annotating, label, phase.number, swap.kernel)
    if sites.is_glob(swap.site):
        seen: set[int] = set()
        for match in sites.matches(_model(built, name), str(swap.site)):
            if id(match.module) not in seen:
                yield ForwardPatch(match.module, wrap(match.module.forward))
            seen.add(id(match.module))
    else:
        target = sites.resolve(swap.site)
        inner = target.raw.__func__ if isinstance(target.raw, staticmethod | classmethod) else target.raw
        yield AttributePatch(target, sites.in_kind(target.raw, inner, wrap))


def _annotating(label: str, number: int, kernel: str, function: Callable[..., Any]) -> Callable[..., Any]:
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return function(*args, **kwargs)
        token = current_phase.set(number)
        try:
            with ranges.annotation(label), ranges.range(f"kernbench.kernel:{kernel}") if kernel else nullcontext():
                return function(*args, **kwargs)
        finally:
            current_phase.reset(token)

    return wrapper


CAN_CAPTURE = bool(torch.backends.cuda.is_built())  # type: ignore[no-untyped-call]


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured; where torch is built without CUDA, it cannot even be asked."""
    return CAN_CAPTURE and torch.cuda.is_current_stream_capturing()


def _counting(counter: Counter, function: Callable[..., Any]) -> Callable[..., Any]:
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or _is_capturing():
            _count_trace(counter)
        else:
            counter.calls += 1
        return function(*args, **kwargs)

    return wrapper


def _count_trace(counter: Counter) -> int:
    """Runs while a graph is traced and leaves nothing in it."""
    counter.traces += 1
    return 0


# What torch.compiler.assume_constant_result does; asked itself, it would import torch._dynamo, which takes a second.
_count_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _counting_patch(target: Attribute, claim: Claim) -> AttributePatch:
    wrap = functools.partial(_counting, claim.counter)
    return AttributePatch(target, sites.in_kind(target.raw, claim.function, wrap))


def _replace(module: torch.nn.Module, claim: Claim) -> torch.nn.Module:
    replacement = claim.function(module)
    if not isinstance(replacement, torch.nn.Module) or replacement is module:
        raise KernbenchError(
            f"the swap at {claim.site!r} must return a new nn.Module for each module it is given, "
            f"it returned {'the module itself' if replacement is module else type(replacement).__name__}"
        )
    sites.keep_hooks(module, replacement)
    vars(replacement)["forward"] = _counting(claim.counter, replacement.forward)
    return replacement


def _model(built: Built, site: str) -> torch.nn.Module:
    model = getattr(built, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise KernbenchError(f"site {site!r} is a module glob, but what build() returns has no nn.Module named 'model'")
    return model


def _refuse_conflicts(claims: Sequence[Claim], attributes: Mapping[int, AttributePatch]) -> None:
    taken: dict[tuple[int, str], Claim] = {}
    for claim in claims:
        patch = attributes.get(id(claim))
        key = (0, str(claim.swap.site)) if patch is None else patch.target.key
        if key in taken:
            raise _conflict(claim.site, taken[key], claim)
        taken[key] = claim


def _nested(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _conflict(site: str, first: Claim, second: Claim) -> KernbenchError:
    if first.phase is second.phase:
        return KernbenchError(f"phase {first.phase.number} claims site {site} twice, as {first.site} and {second.site}")
    return KernbenchError(
        f"phases {first.phase.number} and {second.phase.number} both claim site {site} "
        f"(as {first.site} and {second.site}); merge them, or leave one out"
    )
