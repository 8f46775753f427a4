"""Runs a workload for some real steps under a plan, and keeps what parity compares: losses and state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare
from kernbench.parity.compare import Leaves
from kernbench.swap import Plan
from kernbench.workload import Built, Fault

LOSS = "loss"


class NotSettableError(Exception):
    """A built workload whose state cannot be set to that of another."""


@dataclass
class Trajectory:
    """Losses and state by leaf name, at chosen points: after some steps, and after each fault and a good step.

    ``changed`` names the protected leaves that a provoked bad step changed.
    """

    initial: Leaves
    points: dict[str, Leaves] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)


def run(
    built: Built,
    plan: Plan,
    *,
    marks: Sequence[int],
    faults: Sequence[Fault],
    seed: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> Trajectory:
    """Step to the last of ``marks``, keeping the leaves at each; then each fault and one good step.

    Random generators are seeded before each step, so that dropout is the same on every side, and put back at the end.
    """
    trajectory = Trajectory(state_of(built))
    losses: list[Any] = []
    index = 0

    def step() -> None:
        nonlocal index
        torch.manual_seed(seed * 1_000_003 + index)
        losses.append(built.step(index))
        index += 1
        advance(1)

    with _generators_kept(device), plan.applied(built):
        while index < max(marks):
            step()
            if index in marks:
                trajectory.points[after_steps(index)] = _observed(built, losses)
        for fault in faults:
            before = compare.leaves(compare.clone(fault.protects(built)), "")
            fault.inject(built)
            step()
            losses.pop()
            after = compare.leaves(fault.protects(built), "")
            changed = [name for name in before if name not in after or not compare.same_leaf(before[name], after[name])]
            step()
            trajectory.changed[after_fault(fault)] = changed
            trajectory.points[after_fault(fault)] = _observed(built, losses)
    return trajectory


def after_steps(count: int) -> str:
    """The name of the point after ``count`` steps."""
    return f"{count} step{'s' if count > 1 else ''}"


def after_fault(fault: Fault) -> str:
    """The name of the point after a fault."""
    return f"fault {fault.name}"


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _observed(built: Built, losses: Sequence[Any]) -> Leaves:
    found = state_of(built)
    known = [float(loss) for loss in losses if loss is not None]
    if known:
        found[LOSS] = torch.tensor(known, dtype=torch.float64)
    return found


def state_of(built: Built) -> Leaves:
    """Copies of the numbers in ``state_dict()`` that are state.

    Flags and names are settings, and so is what an optimizer keeps in ``param_groups``: a wrong learning rate shows in
    the parameters, a right one may live on the device.
    """
    found = compare.leaves(compare.clone(built.state_dict()), "")
    return {
        name: leaf
        for name, leaf in found.items()
        if isinstance(leaf, Tensor | int | float) and not isinstance(leaf, bool) and "param_groups[" not in name
    }


def set_state(built: Built, source: Mapping[str, Any]) -> None:
    """Overwrite the tensors of ``built`` with those of ``source`` (see :func:`state_of`), each in its own dtype.

    Raises:
        NotSettableError: the structures differ, or ``state_dict()`` hands out copies, so that writing has no effect.
    """
    own = compare.leaves(built.state_dict(), "")
    missing = [name for name, leaf in source.items() if isinstance(leaf, Tensor) and name not in own]
    if missing:
        raise NotSettableError(f"state_dict() has no {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, leaf in source.items():
            if isinstance(leaf, Tensor):
                own[name].copy_(leaf)
    for name, leaf in state_of(built).items():
        if isinstance(leaf, Tensor) and name in source and not _holds(leaf, source[name]):
            raise NotSettableError(f"state_dict() gives copies, so {name} cannot be set")


def _holds(leaf: Tensor, value: Tensor) -> bool:
    return compare.same_bits(leaf, value.to(dtype=leaf.dtype, device=leaf.device))
