"""Workload, Phase and Swap: what is profiled, and the plan of what to put in its place."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from kernbench.record import Prediction, ProfileRecord

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Built(Protocol):
    """A workload ready to run.

    It may have more: ``model``, the ``nn.Module`` that module globs are matched against; ``figures(seconds_per_step)``,
    a mapping of names to (value, unit) that is shown beside the throughput; ``bytes_per_step``, what a step has to move
    at least, for its share of the bandwidth floor.
    """

    units_per_step: float

    def step(self, index: int) -> Any:
        """Run step ``index``; return its loss (0-dim tensor or float) or None. Equal seeds and indices, equal steps."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything a later step depends on: parameters, buffers, optimizer state, nested as it comes."""


Site = tuple[type | ModuleType, str] | str
"""Where a swap acts: an owner and attribute name, ``"package.module:Class.attribute"``, or a glob over module names."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Replace what is at ``site``: by ``use``, or by an implementation of the kernel spec named ``kernel``.

    ``adapt`` turns the chosen implementation (signature of the spec's reference) into what the site expects, for
    example a method that gathers the arguments. For a glob, ``use`` takes a module and returns its replacement. A site
    that the program reaches only now and then says so by ``every`` (steps from call to call), so that a race shorter
    than that is no evidence of a replacement that never runs.
    """

    site: Site
    use: Callable[..., Any] | None = None
    kernel: str = ""
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if (self.use is None) == (not self.kernel):
            raise ValueError(f"swap at {self.site!r}: give either use=... or kernel=..., not both and not neither")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One planned set of swaps, with what it promises before it is measured.

    ``claim`` is the source document's figure in its own words; ``predicts`` is ours, and ``predict`` puts it in figures
    from the profile of the side before. ``needs`` numbers the phases without which this one cannot run.
    """

    number: int
    title: str
    swaps: tuple[Swap, ...]
    predicts: str
    flag: str = ""
    claim: str = ""
    predict: Callable[[ProfileRecord], Prediction] | None = None
    needs: tuple[int, ...] = ()

    def lacks(self, numbers: Container[int]) -> list[int]:
        """The phases that it needs and that are not among ``numbers``."""
        return [number for number in self.needs if number not in numbers]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An alternative to time beside the phases, as torch.compile of the baseline: ``prepare(built)`` installs it."""

    name: str
    prepare: Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A bad step that parity provokes: ``inject(built)`` spoils the next step, ``protects(built)`` is the state that
    must be the same, bit for bit, after it."""

    name: str
    inject: Callable[[Any], None]
    protects: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A training run that bench follows with the baseline and with every phase: what none of them may change.

    Attributes:
        read: ``read(built)`` gives figures by name with their units, the test accuracy, say; a step's own loss is
            followed without it.
        steps: how many are run.
        every: steps from one reading to the next; the loss is the mean over them.
        presets: those that train, and in reasonable time.
        reordered: further runs of the baseline that add up their sums in other orders. With one in float64, which
            shows what all rounding of the baseline does, they make a band, and a phase may leave it no more than they
            do. One that leaves it is run in as many other orders too: where one element of AdamW's first step or one
            token's expert hangs on the last bit, a run may go astray by chance, and a fault does so in every order.

    Raises:
        ValueError: there is nothing to read.
    """

    read: Callable[[Any], Mapping[str, tuple[float, str]]]
    presets: tuple[str, ...]
    steps: int = 300
    every: int = 15
    reordered: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.every <= self.steps:
            raise ValueError(f"{self.steps} steps with a reading every {self.every} are no curve")


class Side(Protocol):
    """One side of a comparison: each call builds it afresh, and in the block the swaps of the side are in place."""

    def __call__(self, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """The built workload, in ``dtype`` or the one that is checked."""


class Compared(NamedTuple):
    """What a comparison of a workload's own came to: a row of parity, with the figures in ``note``."""

    name: str
    passed: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A program to profile.

    Attributes:
        name: unique over all workspaces.
        unit: what throughput counts ("tokens", "frames", "images").
        summary: one line for ``kernbench list``.
        presets: by name, passed to ``build`` as they are; the first one is the default.
        build: ``build(preset=, device=, dtype=, seed=, data=) -> Built``; ``data`` is the path of ``--data`` or None.
            One that also takes ``weights`` gets the folder of ``--weights`` there, where one is given.
        dtype: default dtype by torch name.
        dtypes: the same for some of the presets.
        steady: ``steady(built)`` makes the steps comparable that parity runs and curves follow, where one that rounds
            another way would change all that come after: a decoder is fed fixed codes, noise comes from one stream.
        compare: ``compare(unswapped, before, after, steps)`` checks what steps do not show; ``steps`` is what parity
            runs, few where kernels are interpreted.
        curves: a training run to follow.

    Raises:
        ValueError: no presets, two phases with one number, one that needs a phase not before it, or curves of a preset
            that is not there.
    """

    name: str
    unit: str
    summary: str
    presets: Mapping[str, Any]
    build: Callable[..., Built]
    phases: tuple[Phase, ...] = ()
    peers: tuple[Peer, ...] = ()
    faults: tuple[Fault, ...] = ()
    dtype: str = "float32"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    steady: Callable[[Any], None] | None = None
    compare: Callable[[Side, Side, Side, int], Iterator[Compared]] | None = None
    curves: Curves | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.presets:
            raise ValueError(
                f"workload {self.name!r} has no presets; give at least one, for example presets={{'default': {{}}}}"
            )
        numbers = [phase.number for phase in self.phases]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"workload {self.name!r} has two phases of one number: {numbers}")
        for place, phase in enumerate(self.phases):
            if phase.lacks(numbers[:place]):
                raise ValueError(
                    f"phase {phase.number} of workload {self.name!r} needs phases {phase.needs}; name ones before it"
                )
        strange = sorted(set(self.curves.presets) - set(self.presets)) if self.curves else []
        if strange:
            raise ValueError(
                f"workload {self.name!r} follows curves of {', '.join(strange)}, which are no presets of it"
            )

    @property
    def default_preset(self) -> str:
        return next(iter(self.presets))

    def default_dtype(self, preset: str) -> str:
        """The dtype of a preset, by torch name."""
        return self.dtypes.get(preset, self.dtype)

    def phases_numbered(self, numbers: Sequence[int]) -> tuple[Phase, ...]:
        """The phases with these numbers, in plan order."""
        return tuple(phase for phase in self.phases if phase.number in numbers)

    def make(self, preset: str, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Built:
        """Build the workload at a named preset."""
        return self.build(preset=self.presets[preset], device=device, dtype=dtype, seed=seed, data=data)
