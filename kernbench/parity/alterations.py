"""Wrong kernels derived from a reference: it runs with one call of one operator done wrong, or an input left out.

The calls are watched below autograd, so that those of a backward pass can be altered too. A call is named by the place
in the reference that makes it, which stays the same in another dtype and at other sizes, and by its turn there.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Union

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench import philox
from kernbench.parity import bounds, compare, mistakes, modes, subject
from kernbench.parity.compare import Leaves
from kernbench.parity.operators import Call, alterable, operator_of

PER_KIND = 24
"""Alterations of one kind at most: a reference may loop over hundreds of tensors."""
TORCH = str(Path(torch.__file__).parent)
OURS = frozenset({compare.__file__, philox.__file__})
"""Not the reference: what copies its inputs, and the random stream, of which there is one and not to be altered."""
CALLERS = frozenset({str(module.__file__) for module in (modes, subject)} | {__file__})
"""A walk up the stack that ends in one of these has met no line of the reference."""

Function = Callable[..., Any]
Wrong = Union["Alteration", "Detached", "Reseeded"]
Caller = Callable[[Function], Leaves]
"""Calls a function on fresh inputs: ``subject.call``, or forward and backward."""


class Turn(Enum):
    """Which of several calls."""

    LAST = -1
    FIRST = 0
    MIDDLE = None

    def of(self, count: int) -> int:
        """Its index among ``count`` calls."""
        return count // 2 if self is Turn.MIDDLE else self.value % max(1, count)


class Place(NamedTuple):
    """Where a call stands: its operator, the file and line, which call of that line; or the node of a backward pass."""

    function: OpOverload
    where: str
    instruction: int
    backward: bool


@dataclass(frozen=True)
class Alteration:
    """A wrong kernel: what the reference computes with one call done wrong.

    ``turn`` says which of the calls at ``place`` that can be done wrong this way.
    """

    name: str
    kind: str
    place: Place
    what: str
    turn: Turn

    def run(self, call: Caller, reference: Function, tape: Tape) -> Leaves | None:
        """What ``call`` gives for the altered reference; None where there is no such call to alter."""
        altering = self._mode(tape)
        with altering:
            got = call(reference)
        return got if altering.done else None

    def of(self, reference: Function, tape: Tape) -> Function:
        """A function with the reference's signature, whose forward pass is altered."""

        def altered(*args: Any, **kwargs: Any) -> Any:
            with self._mode(tape):
                return reference(*args, **kwargs)

        return altered

    def _mode(self, tape: Tape) -> _Altering:
        return _Altering(self.place, self.what, self.turn.of(tape.count(self.place, self.what)))


@dataclass(frozen=True)
class Detached:
    """A wrong kernel: one that gives no gradient to the leaf of this name."""

    leaf: str
    kind: str = "missing gradient"

    @property
    def name(self) -> str:
        return f"gives no gradient to {self.leaf}"

    def run(self, call: Caller, reference: Function, tape: Tape) -> Leaves | None:
        """What ``call`` gives for the reference without this gradient."""
        return call(self.of(reference, tape))

    def of(self, reference: Function, tape: Tape) -> Function:
        """A function with the reference's signature."""

        def altered(**inputs: Any) -> Any:
            given = {key: leaf for name, value in inputs.items() for key, leaf in compare.leaves(value, name).items()}
            cut = given[self.leaf]
            return reference(**compare.map_tensors(inputs, lambda tensor: tensor.detach() if tensor is cut else tensor))

        return altered


@dataclass(frozen=True)
class Reseeded:
    """A wrong kernel: one that draws the stream of another seed than the argument says."""

    name: str
    argument: str
    seed: Callable[[int], int]
    kind: str = "random stream"

    def run(self, call: Caller, reference: Function, tape: Tape) -> Leaves | None:
        """What ``call`` gives for the reference with the other stream."""
        return call(self.of(reference, tape))

    def of(self, reference: Function, tape: Tape) -> Function:
        """A function with the reference's signature."""

        def altered(**inputs: Any) -> Any:
            return reference(**{**inputs, self.argument: self.seed(inputs[self.argument])})

        return altered


def reseeded(argument: str) -> list[Reseeded]:
    """What can go wrong with the seed of a stochastic kernel."""
    return [
        Reseeded(f"draws the stream of the next {argument}", argument, lambda seed: seed + 1),
        Reseeded(f"ignores {argument}", argument, lambda seed: 0),
    ]


@dataclass(frozen=True)
class Tape:
    """What could be done wrong while a reference ran.

    ``possible`` holds the calls that a mistake at a place is possible in, numbered over all calls of the operator.
    """

    possible: Mapping[tuple[Place, str], Sequence[int]]
    kinds: Mapping[str, str]
    calls: Mapping[str, int]

    @classmethod
    def of(cls, call: Caller, reference: Function) -> Tape:
        recording = _Recording()
        with recording:
            call(reference)
        return cls(recording.possible, recording.kinds, recording.calls)

    def count(self, place: Place, what: str) -> int:
        return len(self.possible.get((place, what), ()))

    def alterations(self, seed: int, *, backward: bool = False) -> list[Alteration]:
        """At each place the last call, then the first, then one between, until there are enough of a kind.

        Those of the forward pass, or of the backward pass alone.
        """
        by_kind: dict[str, list[list[Alteration]]] = defaultdict(lambda: [[] for _ in Turn])
        for (place, what), numbers in self.possible.items():
            if place.backward == backward:
                for rank, turn in enumerate(list(Turn)[: len(numbers)]):
                    name = self._name(what, place, numbers[turn.of(len(numbers))])
                    kind = self.kinds[what]
                    by_kind[kind][rank].append(Alteration(name, kind, place, what, turn))
        draw = random.Random(seed)
        return [alteration for ranks in by_kind.values() for alteration in _enough(ranks, draw)]

    def _name(self, what: str, place: Place, number: int) -> str:
        where = f" {'in' if place.backward else 'at'} {place.where}" if place.where else ""
        turn = f"call {number} of {self.calls[operator_of(place.function)]}"
        return f"{what}{where} ({turn}{', backward' if place.backward else ''})"


def _enough(ranks: list[list[Alteration]], draw: random.Random) -> Iterator[Alteration]:
    room = PER_KIND
    for rank in ranks:
        yield from rank if len(rank) <= room else draw.sample(rank, room)
        room -= min(room, len(rank))


class _Watching(TorchDispatchMode):
    """A mode that no compiled code enters."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch._dynamo, seconds, and wrap every call, to keep it out.
        return False


class _Recording(_Watching):  # type: ignore[no-untyped-call]
    """Notes what could be done wrong in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.possible: dict[tuple[Place, str], list[int]] = defaultdict(list)
        self.kinds: dict[str, str] = {}

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _place(function)
        if place is not None and alterable(function):
            operator = operator_of(function)
            self.calls[operator] += 1
            for mistake in mistakes.of_call(Call.of(function, args, kwargs)):
                self.possible[place, mistake.what].append(self.calls[operator])
                self.kinds[mistake.what] = mistake.kind
        return function(*args, **kwargs)


class _Altering(_Watching):  # type: ignore[no-untyped-call]
    """Does one call wrong: the one that comes after ``turn`` others at this place."""

    def __init__(self, place: Place, what: str, turn: int) -> None:
        super().__init__()
        self.place = place
        self.what = what
        self.turn = turn
        self.done = False

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.done:
            # What was done wrong may be an index by now.
            bounds.check(function, args, kwargs)
            return function(*args, **kwargs)
        if function is not self.place.function or _place(function) != self.place:
            return function(*args, **kwargs)
        call = Call.of(function, args, kwargs)
        for mistake in mistakes.of_call(call):
            if mistake.what == self.what:
                self.turn -= 1
                if self.turn < 0:
                    self.done = True
                    return call.write(mistake.value())
        return function(*args, **kwargs)


def _place(function: OpOverload) -> Place | None:
    """Where the call comes from; None where it is none of the reference's own."""
    backward = torch._C._current_graph_task_id() != -1
    # In the backward pass there may be no Python frame above the mode: autograd has threads of its own for a GPU.
    frame: FrameType | None = sys._getframe(1).f_back
    while frame is not None and (file := frame.f_code.co_filename) not in CALLERS:
        if file in OURS:
            return None
        if not file.startswith(TORCH):
            return Place(function, f"{Path(file).name}:{frame.f_lineno}", frame.f_lasti, backward)
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return Place(function, node.name() if node else "", 0, backward)
