"""Wrong results on purpose: a gate that lets one of these pass proves nothing.

Each mutant is made from what eager computed, so running them costs no kernel call. A mutant that equals eager's result
bit for bit (a zero output where zero is right) tells nothing and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernbench.parity.compare import Leaves, root_mean_square, same_leaf
from kernbench.record import Errors

ENOUGH_TO_TELL = 16
"""Fewer elements of something else may resemble the right result by chance: in bfloat16 every fiftieth number does."""

CLEAR_ULP = 16
"""A difference that no gate may miss: several times the floor of a tolerance."""


@dataclass(frozen=True)
class Mutant:
    """A wrong result: eager's leaves with some replaced."""

    name: str
    changed: Leaves


@dataclass(frozen=True)
class Survey:
    """How many mutants the gate killed, and the names of those it let pass."""

    killed: int
    total: int
    survivors: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why a gate with survivors fails; empty if there are none."""
        if not self.survivors:
            return ""
        return (
            f"the gate would let wrong results pass ({', '.join(self.survivors[:3])}): "
            "draw inputs that tell them apart, or tighten the tolerance"
        )


def survey(mutants: Iterator[Mutant], passes: Callable[[Leaves], bool]) -> Survey:
    """Put every mutant before the gate; ``passes`` judges its changed leaves.

    One that passes counts only where there are numbers enough: a few may be right by chance, or hold rounding alone.
    """
    killed, survivors = 0, []
    for mutant in mutants:
        if not passes(mutant.changed):
            killed += 1
        elif sum(leaf.numel() for leaf in mutant.changed.values() if isinstance(leaf, Tensor)) >= ENOUGH_TO_TELL:
            survivors.append(mutant.name)
    return Survey(killed, killed + len(survivors), tuple(survivors))


def of_call(right: Leaves, initial: Leaves, inputs: Leaves, earlier: Leaves) -> Iterator[Mutant]:
    """Mutants of one call.

    Args:
        right: what eager computed: outputs and mutated arguments.
        initial: what the mutated arguments held before the call.
        inputs: what the call was given.
        earlier: what eager computed for other inputs, as a kernel that caches its result would return.
    """
    floating = {name: leaf for name, leaf in right.items() if _is_floating(leaf)}
    nothing = {name: initial.get(name, _zeros(leaf)) for name, leaf in right.items()}
    yield from _told_apart("no-op", nothing, right)
    yield from _told_apart("copied input", _copied(floating, inputs), right)
    yield from _told_apart("tail not written", _without_tail(floating, initial), right)
    if sum(leaf.numel() for leaf in floating.values()) >= ENOUGH_TO_TELL:
        yield from _told_apart("result of another call", earlier, right)
    yield from _told_apart("transposed", _moved(floating, _transposed), right)
    yield from _told_apart("off by one element", _moved(floating, _shifted), right)
    yield from scaled(floating)


def of_gradients(right: Leaves) -> Iterator[Mutant]:
    """Mutants of a backward pass: each gradient missing, zero, transposed, and off by a factor."""
    for name, leaf in right.items():
        yield from _told_apart(f"no {name}", {name: None}, right)
        yield from _told_apart(f"zero {name}", {name: _zeros(leaf)}, right)
        yield from _told_apart(f"transposed {name}", _moved({name: leaf}, _transposed), right)
    yield from scaled({name: leaf for name, leaf in right.items() if _is_floating(leaf)})


def of_state(right: Leaves, initial: Leaves, eps: float) -> Iterator[Mutant]:
    """Mutants of some steps in a dtype of this ``eps``: the state left as it was, and each tensor off by a factor."""
    yield from _told_apart("no step taken", initial, right)
    yield from scaled({name: leaf for name, leaf in right.items() if _is_floating(leaf)}, eps)


def scaled(right: Leaves, eps: float = 0.0) -> Iterator[Mutant]:
    """Each leaf off by a factor: a small term forgotten."""
    for name, leaf in right.items():
        factor = 1 + share_off(max(eps, torch.finfo(leaf.dtype).eps))
        if leaf.numel() and root_mean_square(leaf) > 0.0:
            yield from _told_apart(f"{name} times {factor:g}", {name: (leaf.double() * factor).to(leaf.dtype)}, right)


def share_off(eps: float) -> float:
    """By how much a forgotten term is off: 2 %, or 8 ulp where an ulp is coarse."""
    return max(0.02, 8 * eps)


def telling(eps: float, eager: Errors) -> bool:
    """Whether eager is so much closer to the oracle than a forgotten term that a gate must tell the two apart.

    Where it is not, as in a sum that cancels, the tensor holds rounding noise. A fifth leaves room for k = 3 and floor.
    """
    return eager.rms_ratio <= share_off(eps) / 5


def _told_apart(name: str, changed: Leaves, right: Mapping[str, Any]) -> Iterator[Mutant]:
    different = {key: leaf for key, leaf in changed.items() if not same_leaf(leaf, right.get(key))}
    if different:
        yield Mutant(name, different)


def _copied(floating: Leaves, inputs: Leaves) -> Leaves:
    copied = {}
    for name, leaf in floating.items():
        for source, value in inputs.items():
            same_form = isinstance(value, Tensor) and value.shape == leaf.shape and value.dtype == leaf.dtype
            if same_form and source != name and leaf.numel() >= ENOUGH_TO_TELL:
                copied[name] = value
                break
    return copied


def _without_tail(floating: Leaves, initial: Leaves) -> Leaves:
    """The last element as it was before the call: NaN in a fresh output, which the poison guarantees.

    Where the call moves it by little more than rounding, nobody can tell.
    """
    cut = {}
    for name, leaf in floating.items():
        if leaf.numel() == 0:
            continue
        flat = leaf.detach().clone().reshape(-1)
        right = float(flat[-1])
        flat[-1] = initial[name].reshape(-1)[-1] if name in initial else float("nan")
        little = CLEAR_ULP * torch.finfo(leaf.dtype).eps * max(root_mean_square(leaf), abs(right))
        if not abs(float(flat[-1]) - right) <= little:
            cut[name] = flat.reshape(leaf.shape)
    return cut


def _moved(leaves: Leaves, move: Callable[[Tensor], Tensor]) -> Leaves:
    """The leaves with elements moved, where that is more than rounding: a symmetric product may be transposed."""
    moved = {}
    for name, leaf in leaves.items():
        if _is_floating(leaf) and leaf.numel() >= ENOUGH_TO_TELL:
            elsewhere = move(leaf)
            if root_mean_square(elsewhere - leaf) > share_off(torch.finfo(leaf.dtype).eps) * root_mean_square(leaf):
                moved[name] = elsewhere
    return moved


def _transposed(leaf: Tensor) -> Tensor:
    """The elements as a kernel stores them that takes rows for columns; the shape stays."""
    return leaf.detach().mT.reshape(leaf.shape) if leaf.dim() >= 2 else leaf


def _shifted(leaf: Tensor) -> Tensor:
    """Every element one place late, as offsets that start at one."""
    return leaf.detach().reshape(-1).roll(1).reshape(leaf.shape)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf
