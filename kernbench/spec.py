"""KernelSpec: the one declaration from which parity, bench, swap and the docs of a kernel follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Inputs = dict[str, Any]
"""Keyword arguments of one call: tensors, lists of tensors, and scalars."""
ALLOWABLE = frozenset({"spills", "shared memory"})


class Case:
    """One named input size of a kernel: ``Case("ragged", rows=127, dim=769)``.

    ``large`` marks sizes meant for a GPU: the interpreter leaves them out, and says so.
    """

    def __init__(self, name: str, *, large: bool = False, **sizes: int) -> None:
        self.name = name
        self.large = large
        self.sizes = sizes

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"Case({self.name!r}, {sizes})"

    @property
    def ragged(self) -> bool:
        """Whether some size is neither 1 nor a multiple of 16, so that a block has a tail."""
        return any(size > 1 and size % 16 for size in self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One size that ``bench --sweep`` walks through; the others follow, so that bytes stay the same where they can.

    Attributes:
        size: name of the size, as the user types it.
        values: those taken if no range is given, ascending; the first and the last are the least and the most.
        sizes: ``(value) -> sizes`` of its case, the swept one among them.
        fixed: what is the same for all values, in words.
        large: as a case's: on the CPU nothing is timed.

    Raises:
        ValueError: the values are fewer than two, or do not ascend.
    """

    size: str
    values: tuple[int, ...]
    sizes: Callable[[int], Mapping[str, int]]
    fixed: str
    large: bool = True

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"a sweep of {self.size} takes two or more ascending values, not {self.values}")

    def case(self, value: int) -> Case:
        """The case of a value; its name says which one it is."""
        return Case(f"{self.size}={value}", large=self.large, **self.sizes(value))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure that a document states for a case, so that bench can set what exists beside it.

    Attributes:
        case: name of the case.
        title: what the document calls it.
        bytes_per_second: the figure.
        counted_bytes: what the document counts to come to it.
        real_bytes: what exists of them, each once.
        why: what is counted that does not exist, in words that follow "it counts".
    """

    case: str
    title: str
    bytes_per_second: float
    counted_bytes: float
    real_bytes: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What one document states: its name, its device, and that device's memory bandwidth."""

    source: str
    device: str
    roof_bytes_per_second: float
    claims: tuple[Claim, ...]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far from the float64 oracle a kernel may be, relative to what eager itself misses in the working dtype.

    A kernel passes if its error is at most ``forward`` (``gradient`` for gradients) times eager's plus ``floor_ulp``
    units in the last place of the working dtype, scaled by the tensor's root mean square.

    Source: parity.md, method step 2 (flash-attention uses 2 forward and 3 for gradients).
    """

    forward: float = 2.0
    gradient: float = 3.0
    floor_ulp: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of one call: floating-point operations and *unique* bytes, each input read and each output written once."""

    flops: float
    bytes_read: float
    bytes_written: float

    @property
    def bytes_moved(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that a kernel takes for one name of its cases; generated inputs stay inside.

    Attributes:
        least: the smallest; 0 means that an empty tensor is fine.
        most: the largest to draw where it is checked on the CPU; a GPU draws larger ones too.
        block: the largest number of elements that one program handles at once; sizes around it are drawn often.
        multiple_of: every size is a multiple of it.
    """

    least: int = 0
    most: int
    block: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.multiple_of < 1:
            raise ValueError(f"sizes from {self.least} to {self.most} in multiples of {self.multiple_of} are none")


@dataclass(frozen=True, kw_only=True)
class Values:
    """What one argument may hold; generated inputs stay inside. Integers and booleans are never changed.

    Attributes:
        least: lower bound of its numbers.
        most: upper bound of its numbers.
        nonfinite: the contract speaks of NaN and infinities here: the result is what the reference makes of them.
        fixed: left as ``make_inputs`` draws it: a step counter, a probability.
    """

    least: float = float("-inf")
    most: float = float("inf")
    nonfinite: bool = False
    fixed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stochastic:
    """How randomness enters a kernel, and what it must look like.

    Attributes:
        seed: name of the integer argument that chooses the stream.
        law: distribution of the draws that ``draws`` extracts.
        draws: ``(inputs, output) -> floating tensor`` of the random numbers that can be told from one call, in the
            order of the elements; for "bernoulli" zeros and ones.
        probability: of a one, ``(inputs) -> float``; for "bernoulli" alone.
    """

    seed: str
    law: Literal["uniform", "normal", "bernoulli"]
    draws: Callable[[Inputs, Any], torch.Tensor]
    probability: Callable[[Inputs], float] | None = None

    def __post_init__(self) -> None:
        if (self.law == "bernoulli") != (self.probability is not None):
            raise ValueError("give a probability for the bernoulli law, and for no other")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library implementation that is less exact than eager by declaration; called as the reference is.

    Bench holds its results to ``tolerance`` where they miss the kernel's own, and says by how much and ``because`` of
    what. A peer that is as exact as eager needs no declaration: its function stands among the peers as it is.

    Raises:
        ValueError: no reason is given.
    """

    call: Callable[..., Any]
    tolerance: Tolerance
    because: str

    def __post_init__(self) -> None:
        if not self.because.strip():
            raise ValueError("say because of what a peer is less exact, for example because='float32 accumulation'")

    def __call__(self, **inputs: Any) -> Any:
        return self.call(**inputs)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A kernel with everything needed to check it, time it and place it on the roofline.

    Attributes:
        name: the kernel's name, unique over all workspaces.
        reference: plain PyTorch on any device, in any floating dtype: the definition of correct, cast order included.
        optimized: same signature as ``reference``; launches the Triton kernel.
        make_inputs: ``(case, dtype, device, seed) -> keyword arguments``, fresh tensors on every call.
        cases: named sizes, at least one of them ragged.
        tolerance: per dtype name ("float32", "bfloat16", …); its keys are the dtypes that parity runs.
        cost: ``(case, dtype) -> Cost``.
        backward_cost: the same of the backward pass alone, with what it reads of the forward's results; without it the
            backward is timed, but not placed under the roofs.
        mutates: names of arguments written in place; parity compares them, bench restores them.
        stateful: the kernel updates its own state, so parity also compares after 10 and 100 updates; ``next_inputs``
            then redraws what is not state, in place: ``(inputs, seed) -> None``.
        sizes: what each name of the cases may be; for a name that is absent, what the cases that are not large span.
        values: what each argument may hold; any number by default.
        stochastic: results depend on a seed argument; the reference repeats the same stream.
        run_to_run_ulp: how far two calls on equal inputs may be apart, in ulp of max(RMS, element); 0 is bitwise. A
            kernel that adds atomically states its bound here.
        allowed: what the compile matrix may find and let pass, "spills" or "shared memory", each with the reason.
        differentiable: parity compares gradients of all floating inputs that require them, bench times the backward.
        peers: library implementations to time beside ours, by name; each has the reference's signature. One that is
            less exact than eager is a :class:`Peer`, with the tolerance that it is held to.
        sweeps: sizes to walk through with ``bench --sweep``.
        claims: what documents state for cases, to be set beside what is measured.
        source: paper and equation, or the file the formula came from.

    Raises:
        ValueError: no ragged case, no tolerance, two cases of one name, stateful without ``next_inputs``, sizes that
            no case has, something else allowed than can be, two sweeps of one size, or ``reference`` and ``optimized``
            are the same function.
    """

    name: str
    reference: Callable[..., Any]
    optimized: Callable[..., Any]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    cases: tuple[Case, ...]
    tolerance: Mapping[str, Tolerance]
    cost: Callable[[Case, torch.dtype], Cost]
    backward_cost: Callable[[Case, torch.dtype], Cost] | None = None
    mutates: tuple[str, ...] = ()
    stateful: bool = False
    next_inputs: Callable[[Inputs, int], None] | None = None
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    values: Mapping[str, Values] = field(default_factory=dict)
    stochastic: Stochastic | None = None
    run_to_run_ulp: float = 0.0
    allowed: Mapping[str, str] = field(default_factory=dict)
    differentiable: bool = False
    peers: Mapping[str, Callable[..., Any] | Peer] = field(default_factory=dict)
    sweeps: tuple[Sweep, ...] = ()
    claims: Claims | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.reference is self.optimized:
            raise ValueError(
                f"kernel {self.name!r}: reference and optimized are the same function, so parity could not fail"
            )
        if not any(case.ragged for case in self.cases):
            raise ValueError(
                f"kernel {self.name!r} has no ragged case; add one with a size that is not a multiple of 16"
            )
        if not self.tolerance:
            raise ValueError(f"kernel {self.name!r} states no tolerance; give one per dtype")
        names = [case.name for case in self.cases]
        if len(set(names)) != len(names):
            raise ValueError(f"kernel {self.name!r} has two cases of one name: {', '.join(names)}")
        if self.stateful and self.next_inputs is None:
            raise ValueError(f"kernel {self.name!r} is stateful; give next_inputs so that many updates can be compared")
        unknown = sorted(self.sizes.keys() - {name for case in self.cases for name in case.sizes})
        if unknown:
            raise ValueError(f"kernel {self.name!r} gives sizes for {', '.join(unknown)}, which no case has")
        strange = sorted(self.allowed.keys() - ALLOWABLE)
        if strange:
            raise ValueError(
                f"kernel {self.name!r} allows {', '.join(strange)}; it can allow {', '.join(sorted(ALLOWABLE))}"
            )
        swept = [sweep.size for sweep in self.sweeps]
        if len(set(swept)) != len(swept):
            raise ValueError(f"kernel {self.name!r} has two sweeps of one size: {', '.join(swept)}")

    def case(self, name: str) -> Case:
        """The case of this name, or that of a value of a sweep: "seeds=100".

        Raises:
            KeyError: there is none.
        """
        for case in self.cases:
            if case.name == name:
                return case
        size, _, value = name.partition("=")
        for sweep in self.sweeps:
            if sweep.size == size and value.isdigit() and sweep.values[0] <= int(value) <= sweep.values[-1]:
                return sweep.case(int(value))
        raise KeyError(name)
