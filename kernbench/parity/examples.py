"""Which inputs a kernel's declaration allows, and how Hypothesis draws one of them: sizes, values and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from hypothesis import strategies
from torch import Tensor

from kernbench.errors import KernbenchError
from kernbench.parity import compare, layouts, patterns
from kernbench.parity.layouts import LAYOUTS
from kernbench.spec import Case, Inputs, KernelSpec, Sizes, Values

UPSTREAM = "incoming gradient"
"""Stands beside the arguments: the gradient that arrives at the outputs."""
CONTIGUOUS = "contiguous"
FAMILIAR = frozenset({CONTIGUOUS, "offset"})
"""Layouts that a kernel may not refuse: what is contiguous may begin anywhere."""
PRIMES = (3, 7, 17, 61, 127, 257, 521, 1021, 2053, 4099, 8209)
ELEMENTS = {"cpu": 2**15, "cuda": 2**24}
"""Elements moved by one call at most, so that the interpreter takes tenths of a second for it."""
SMALLER = 1 / 8
"""Share of those elements for examples that are not about sizes, so that more of them are tried."""
LARGER_ON_A_GPU = 8
MANY = 32
"""A largest size from here on is a length, which may be exceeded on a GPU; below it may be a switch or a rank."""

T = TypeVar("T")
Draw = Callable[[strategies.SearchStrategy[bool]], bool]


@dataclass(frozen=True)
class Filling:
    """What one argument holds and how it is stored. ``only`` is the element of a list that has the pattern."""

    pattern: str = patterns.PLAIN
    layout: str = CONTIGUOUS
    only: int | None = None

    @property
    def plain(self) -> bool:
        return self.pattern == patterns.PLAIN and self.layout == CONTIGUOUS

    def words(self, name: str) -> str:
        said = []
        if self.layout != CONTIGUOUS:
            said.append(f"{name} {self.layout}")
        if self.pattern != patterns.PLAIN:
            said.append(f"{name if self.only is None else f'{name}[{self.only}]'} {self.pattern}")
        return ", ".join(said)


@dataclass(frozen=True)
class Example:
    """One set of inputs; together with the declaration its words say all of it."""

    sizes: tuple[tuple[str, int], ...]
    fillings: tuple[tuple[str, Filling], ...]
    """Of the arguments that are not plain."""
    seed: int

    def __str__(self) -> str:
        said = [f"{name}={size}" for name, size in self.sizes]
        said += [filling.words(name) for name, filling in self.fillings]
        return ", ".join(said) or "the only size"

    @property
    def case(self) -> Case:
        return case_of(dict(self.sizes))

    @property
    def extreme(self) -> bool:
        """Whether some values are near the ends of their dtype."""
        return any(filling.pattern in patterns.EXTREME for _, filling in self.fillings)

    def laid_out(self, names: Sequence[str]) -> Example:
        """The same with awkward layouts for the arguments ``names`` alone."""
        kept = (
            (name, filling if name in names or filling.layout in FAMILIAR else replace(filling, layout=CONTIGUOUS))
            for name, filling in self.fillings
        )
        return replace(self, fillings=tuple((name, filling) for name, filling in kept if not filling.plain))

    @property
    def awkward(self) -> tuple[tuple[str, str], ...]:
        """The arguments that come in a layout that a kernel may refuse, with that layout."""
        return tuple((name, filling.layout) for name, filling in self.fillings if filling.layout not in FAMILIAR)

    def filled(self, inputs: Inputs, values: Mapping[str, Values]) -> Inputs:
        """Copies of ``inputs`` with this example's values; a tensor that stands in two places stays one tensor."""
        generator = torch.Generator().manual_seed(self.seed)
        fillings, seen = dict(self.fillings), dict[int, Tensor]()
        filled = {}
        for name, value in inputs.items():
            filling = fillings.get(name, Filling())
            places = len(list(_floating(value)))
            only = None if filling.only is None or not places else filling.only % places
            counter = iter(range(places))
            fill = partial(_fill, filling.pattern, only, values.get(name, Values()), generator, counter)
            filled[name] = compare.map_tensors(value, fill, seen)
        return filled

    def stored(self, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
        """Copies of ``inputs`` in this example's layouts, and the guard bands around those that are offset."""
        fillings, seen, bands = dict(self.fillings), dict[int, Tensor](), list[Tensor]()
        stored = {
            name: compare.map_tensors(value, partial(_store, fillings.get(name, Filling()).layout, bands), seen)
            for name, value in inputs.items()
        }
        return stored, bands


def case_of(sizes: Mapping[str, int]) -> Case:
    """A case of drawn sizes."""
    case = Case("generated")
    case.sizes = dict(sizes)
    return case


def _fill(
    pattern: str, only: int | None, values: Values, generator: torch.Generator, counter: Iterator[int], tensor: Tensor
) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    chosen = pattern if only in (None, next(counter, None)) else patterns.PLAIN
    return patterns.fill(tensor, chosen, values, generator)


def _store(layout: str, bands: list[Tensor], tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    if layout == "offset":
        inside, around = layouts.between_bands(tensor)
        bands += around
        return inside
    # One element has no gaps.
    return LAYOUTS[layout if tensor.numel() > 1 else CONTIGUOUS](tensor)


def _floating(value: Any) -> Iterator[Tensor]:
    return (
        leaf for leaf in compare.leaves(value, "").values() if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


@dataclass(frozen=True)
class Theme:
    """What a group of examples is about; everything else in them stays ordinary, so that it cannot hide the effect."""

    kind: str
    what: str = ""


class Domain:
    """Everything that the declaration of a kernel allows as inputs in one dtype.

    Raises:
        KernbenchError: there are no such inputs.
    """

    def __init__(self, spec: KernelSpec, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.spec = spec
        self.dtype = dtype
        self.seed = seed
        self.on_gpu = device.type == "cuda"
        self.sizes = {name: self._candidates(name) for name in self._names()}
        self._usual = {name: self._not_empty(name) for name in self.sizes}
        self.room = max(ELEMENTS[device.type if self.on_gpu else "cpu"], self._work(self._smallest()))
        example = spec.make_inputs(self._prototype(), dtype, device, seed)
        self.lists = {name for name, value in example.items() if not isinstance(value, Tensor)}
        floating = [name for name, value in example.items() if list(_floating(value))]
        self.patterns = {name: patterns.names_for(spec.values.get(name, Values())) for name in floating}
        self.layouts = {name: (CONTIGUOUS, "offset") if name in spec.mutates else tuple(LAYOUTS) for name in floating}
        if spec.differentiable:
            self.patterns[UPSTREAM], self.layouts[UPSTREAM] = tuple(patterns.FINITE), tuple(LAYOUTS)
            self.lists.add(UPSTREAM)

    def _ordinary(self) -> list[Case]:
        return [case for case in self.spec.cases if not case.large]

    def _prototype(self) -> Case:
        """A case of the declaration itself if one is small, which is sure to be valid."""
        ordinary = self._ordinary()
        return min(ordinary, key=lambda case: math.prod(case.sizes.values())) if ordinary else self._case_of_least()

    def _case_of_least(self) -> Case:
        return case_of(self._smallest())

    def _smallest(self) -> dict[str, int]:
        return {name: candidates[0] for name, candidates in self.sizes.items()}

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for case in self.spec.cases for name in case.sizes))

    def bounds(self, name: str) -> Sizes:
        """What the declaration says of a size, or else what its cases span."""
        if name in self.spec.sizes:
            return self.spec.sizes[name]
        seen = [case[name] for case in self._ordinary() if name in case.sizes]
        if not seen:
            raise KernbenchError(
                f"kernel {self.spec.name!r} has no inputs to generate: all its cases with {name} are large; "
                f"give sizes={{{name!r}: Sizes(most=…)}} or a small case"
            )
        return Sizes(least=min(1, *seen), most=max(seen))

    def inferred(self, example: Example) -> bool:
        """Whether some size is in no case and within no bounds that the declaration gives for every device."""
        return any(name not in self.spec.sizes or size > self.spec.sizes[name].most for name, size in example.sizes)

    def _candidates(self, name: str) -> tuple[int, ...]:
        """The sizes to draw from, smallest first: the ends, one, and those around blocks, powers of two and cases."""
        bounds = self.bounds(name)
        most = bounds.most * LARGER_ON_A_GPU if self.on_gpu and bounds.most >= MANY else bounds.most
        block = bounds.block or 1
        near = {0, 1, bounds.least, bounds.most, most, block - 1, block, block + 1, 2 * block + 3, *PRIMES}
        near |= {2**power + off for power in range(1, most.bit_length() + 1) for off in (-1, 0, 1)}
        near |= {case[name] for case in self._ordinary() if name in case.sizes}
        step = bounds.multiple_of
        near |= {step * size for size in near} | {size // step * step for size in near}
        found = sorted(size for size in near if bounds.least <= size <= most and size % step == 0)
        if not found:
            raise KernbenchError(
                f"kernel {self.spec.name!r} has no inputs to generate: "
                f"no multiple of {step} lies from {bounds.least} to {bounds.most}, the sizes it gives for {name}"
            )
        return tuple(found)

    def _not_empty(self, name: str) -> tuple[int, ...]:
        """Sizes with something in them; what is no size but a switch stands as the cases have it, as often."""
        if self.sizes[name][-1] > 1:
            return tuple(filter(None, self.sizes[name]))
        return tuple(sorted(case[name] for case in self._ordinary() if name in case.sizes)) or self.sizes[name]

    def _work(self, sizes: Mapping[str, int]) -> float:
        return self.spec.cost(case_of(sizes), self.dtype).bytes_moved / self.dtype.itemsize

    def fitting(self, sizes: dict[str, int], share: float = 1.0) -> dict[str, int]:
        """The sizes, the largest of them lowered step by step until a call takes this share of what one may."""
        while self._work(sizes) > self.room * share:
            lower = {name: [size for size in self.sizes[name] if size < sizes[name]] for name in sizes}
            reducible = [name for name in sizes if lower[name]]
            if not reducible:
                break
            largest = max(reducible, key=sizes.__getitem__)
            sizes = sizes | {largest: lower[largest][-1]}
        return sizes

    def themes(self) -> list[Theme]:
        """All kinds of example, in an order in which every few of them differ.

        It is a ring, and every dtype and seed begins elsewhere: where time is short, the dtypes go round together.
        """
        empty = [Theme("empty")] if any(options[0] == 0 for options in self.sizes.values()) else []
        sizes = [*empty, Theme("small"), *(Theme("size", name) for name in self.sizes)]
        names = dict.fromkeys(name for options in self.patterns.values() for name in options[1:])
        values = [Theme("values", name) for name in names]
        awkward = dict.fromkeys(name for options in self.layouts.values() for name in options[1:])
        stored = [Theme("layout", name) for name in awkward]
        groups = [sizes, values, stored, [Theme("mixed")]]
        position = [(index / len(group), place, theme) for place, group in enumerate(groups)
                    for index, theme in enumerate(group)]  # fmt: skip
        ring = [theme for _, _, theme in sorted(position, key=lambda item: item[:2])]
        dtypes = list(self.spec.tolerance)
        part = dtypes.index(str(self.dtype).removeprefix("torch.")) / len(dtypes)
        start = (self.seed + round(part * len(ring))) % len(ring)
        return ring[start:] + ring[:start]

    def examples(self, theme: Theme, turn: int) -> strategies.SearchStrategy[Example]:
        """The examples of one theme; the simplest, the same in all, has the least sizes and nothing else.

        From turn to turn another argument stands in the middle.
        """
        concerned = self._concerned(theme)
        focus = concerned[turn % len(concerned)]

        return _example(self, theme, focus)

    def example(self, draw: Draw, theme: Theme, focus: str) -> Example:
        """One example, as drawn."""
        if not often(draw):
            return Example(tuple(self._smallest().items()), (), self.seed)
        sizes = self.fitting(self._drawn_sizes(draw, theme), 1.0 if theme.kind == "size" else SMALLER)
        drawn = {name: self._drawn_filling(draw, theme, name, name == focus) for name in self.patterns}
        fillings = tuple((name, filling) for name, filling in drawn.items() if not filling.plain)
        return Example(tuple(sizes.items()), fillings, self.seed + pick(draw, range(8)))

    def _concerned(self, theme: Theme) -> list[str]:
        """The arguments that a theme is about."""
        options = {"values": self.patterns, "layout": self.layouts}.get(theme.kind)
        return [name for name in self.patterns if options is None or theme.what in options[name]] or [""]

    def _drawn_sizes(self, draw: Draw, theme: Theme) -> dict[str, int]:
        sizes = {}
        for name, options in self.sizes.items():
            if theme.kind == "small":
                options = options[:4]
            elif theme.kind == "size":
                block = self.bounds(name).block or 16
                options = _from(options, block) if theme.what == name else self._usual[name][:4]
            elif theme.kind in ("values", "layout"):
                options = self._usual[name]
            sizes[name] = pick(draw, options)
        if theme.kind == "empty":
            sizes[pick(draw, [name for name, options in self.sizes.items() if options[0] == 0])] = 0
        return sizes

    def _drawn_filling(self, draw: Draw, theme: Theme, name: str, in_focus: bool) -> Filling:
        """What one argument holds.

        A product of three huge factors overflows in one order and not in another, so only the argument in focus may
        have numbers near the ends of its dtype.
        """
        taken = [pattern for pattern in self.patterns[name] if in_focus or pattern not in patterns.EXTREME]
        pattern, layout = patterns.PLAIN, CONTIGUOUS
        concerned = in_focus or draw(strategies.booleans())
        if theme.kind == "mixed" and concerned:
            pattern, layout = pick(draw, taken), pick(draw, self.layouts[name])
        elif theme.kind == "values" and theme.what in taken and concerned:
            pattern = theme.what
        elif theme.kind == "layout" and theme.what in self.layouts[name] and concerned:
            layout = theme.what
        if pattern == patterns.PLAIN or name not in self.lists:
            return Filling(pattern, layout)
        return Filling(pattern, layout, pick(draw, (None, None, None, None, 0, 1, 2, 3)))

    def simpler(self, example: Example) -> Iterator[Example]:
        """Examples with one thing less out of the ordinary, then with a simpler one, then with a smaller size."""
        fillings = dict(example.fillings)
        for name, filling in fillings.items():
            plainer = [Filling(), Filling(layout=filling.layout), replace(filling, layout=CONTIGUOUS)]
            plainer += [replace(filling, pattern=each) for each in _before(filling.pattern, self.patterns[name])]
            plainer += [replace(filling, layout=each) for each in _before(filling.layout, self.layouts[name])]
            plainer += [replace(filling, only=None)]
            for other in plainer:
                if other != filling:
                    changed = fillings | {name: other}
                    yield replace(example, fillings=tuple(item for item in changed.items() if not item[1].plain))
        for name, size in example.sizes:
            for smaller in _before(size, self.sizes[name]):
                yield replace(example, sizes=tuple((dict(example.sizes) | {name: smaller}).items()))
        if example.seed != self.seed:
            yield replace(example, seed=self.seed)


@strategies.composite
def _example(draw: Draw, domain: Domain, theme: Theme, focus: str) -> Example:
    return domain.example(draw, theme, focus)


def _before(chosen: T, options: Sequence[T]) -> Sequence[T]:
    """The options that are simpler than the chosen one."""
    return options[: options.index(chosen)] if chosen in options else ()


def _from(options: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The sizes that fill a block, or the upper half if none does."""
    return tuple(size for size in options if size >= block - 1) or options[len(options) // 2 :]


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of some options, simplest first.

    Drawn in bits: an integer would now and then be a constant that Hypothesis found in whatever modules are loaded, and
    keeps on disk, so that one seed would not always give the same examples.
    """
    index = 0
    for _ in range((len(options) - 1).bit_length()):
        index = 2 * index + draw(strategies.booleans())
    return options[index % len(options)]


def often(draw: Draw) -> bool:
    """True three times out of four; false is simpler."""
    bits = draw(strategies.booleans()), draw(strategies.booleans())
    return any(bits)
