"""Holds what is timed to what it should compute: results taken out of the timed blocks, compared as parity does.

In every block one call, at a place drawn anew, gets inputs whose values were put there just before; its result is kept
and compared with the reference's once the block is over. All else about that call is as in the others: the same
arguments at the same addresses, the same line of the same function on the stack, the same clock. Every output is
overwritten after its call, so that memory which is handed out again holds nothing that could pass for a result, and
the version counters of all inputs move on before every call, so that they do not tell which of them were rewritten.

So a kernel is found out that is right only for the first calls or outside of a timed block, that returns what it kept
for these addresses, or what the memory held, or something that computes when it is looked at, or whose work runs on
another stream and is not waited for. One that knows the values of its usual inputs again and works only on others is
found out by its times, as the checked calls are the slower ones.

What cannot be found out: a kernel that knows all values again that it was ever given, on the device, and keeps their
results, as the fresh values come back too; one that reads this module's random generator out of the program's memory;
work on another stream that is over before the result is copied.

Times are compared with those of controls, calls of the same block whose inputs were written anew just before as well,
but with their usual values. Places are drawn, so for a kernel that does the same work on all values the checked call is
equally likely to be the slowest, second slowest and so on of these few, however the times scatter and whatever loading
does to caches and to the host. That it is slower as often as is reported has a chance below ``FALSE_ALARM``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from kernbench.measurement.backward import Backward, ready
from kernbench.measurement.timing import synchronize
from kernbench.parity import compare, modes
from kernbench.parity.compare import Judged, Leaves, Rule
from kernbench.parity.subject import Truth, judge_fairly
from kernbench.spec import Inputs, KernelSpec, Tolerance

FRESH_SEED = 1_000_003
"""Far from the seeds of the input sets, whose values these must not be."""
SLOWER_WHEN_CHECKED = 1.5
CONTROLS = 3
FALSE_ALARM = 1e-6
"""Chance after each block, at most. Ten blocks with three controls each are the fewest that can pass it."""


class WrongResult(Exception):  # noqa: N818 - it names what an implementation gave, and becomes a label
    """A call that was to be timed does not do what the reference does; the message says what is wrong."""


@dataclass
class Allowance:
    """The tolerance of a peer that is less exact than eager by declaration, and how far off it was found to be.

    ``found`` is empty as long as all its results were as exact as those of others have to be.
    """

    tolerance: Tolerance
    because: str
    worst: float = 0.0
    found: str = ""

    @property
    def rule(self) -> Rule:
        return Rule(self.tolerance.forward, self.tolerance.floor_ulp)

    def take(self, judged: Sequence[Judged]) -> None:
        """Keep the words for the result that is furthest off, of leaves that miss what the others are held to."""
        off = max((item for item in judged if item.reason and item.errors), key=lambda item: item.excess, default=None)
        if off is not None and off.excess > self.worst:
            self.worst = off.excess
            self.found = f"{_how_far(off)}: {self.because}"


class Witness:
    """One set of inputs that takes fresh values, and what the reference makes of them.

    ``unchecked`` says why nothing can be compared, empty if it can: the reference fails, or memory is short.
    """

    def __init__(
        self,
        spec: KernelSpec,
        inputs: Inputs,
        make: Callable[[int], Inputs],
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int = 0,
        run_reference: bool = True,
    ) -> None:
        """Takes over the tensors of ``inputs``; its scalars stay what they are.

        Args:
            make: other inputs of the case by their seed; ``inputs`` are those of ``seed``.
        """
        self.inputs = inputs
        self.device = device
        self.unchecked = ""
        self._spec = spec
        self._returned = "gradient" if isinstance(spec.reference, Backward) else "output"
        self._seed = seed
        self._random = random.Random(seed)
        tolerance = spec.tolerance.get(str(dtype).removeprefix("torch."), Tolerance())
        self._rule = Rule(tolerance.forward, tolerance.floor_ulp)
        self._truths: dict[tuple[int, tuple[tuple[str, str], ...]], Truth] = {}
        self._accepted: set[tuple[Any, ...]] = set()
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(inputs)}
        self._values: Inputs = {}
        self._usual: Inputs = {}
        try:
            self._values, self._usual = compare.clone(inputs), compare.clone(inputs)
            _copy(make(FRESH_SEED + seed), self._values, like=inputs)
        except Exception as error:
            if not _memory(error):
                raise
            self._leave("too large for that")
            return
        if not run_reference:
            self._leave("eager is left out")
            return
        try:
            self._truth(1, ())
        except Exception as error:  # noqa: BLE001 - the reference's own row says what fails; the others are timed
            self._leave("too large for that" if _memory(error) else f"eager fails with {type(error).__name__}")

    def _leave(self, why: str) -> None:
        self._truths.clear()
        self._values = self._usual = {}
        self.unchecked = f"not compared with eager while timed: {why}"

    def reset(self) -> None:
        """Give the inputs the values back that they had before any check, which an implementation is to see first."""
        if not self.unchecked:
            self.load(usual=True)

    def places(self, count: int) -> list[int]:
        """Which of a block's calls to check, then those of its controls; empty if nothing can be checked.

        One call at least is neither, if there are two.
        """
        wanted = max(1, min(1 + CONTROLS, count - 1))
        return [] if self.unchecked else self._random.sample(range(count), wanted)

    def load(self, *, usual: bool = False) -> Inputs:
        """The inputs with their fresh values, or their usual ones, whatever calls have written into them since."""
        _copy(self._usual if usual else self._values, self.inputs, like=self.inputs)
        return self.inputs

    def take(self, output: Any) -> Leaves:
        """A copy of what a call with :meth:`load`'s inputs gave, made where the call itself was queued."""
        found = {name: _taken(leaf) for name, leaf in compare.leaves(output, self._returned).items()}
        for name in self._spec.mutates:
            found |= {at: _taken(leaf) for at, leaf in compare.leaves(self.inputs[name], name).items()}
        return found

    def in_place(self, output: Any) -> tuple[tuple[str, str], ...]:
        """Which outputs are an argument each, by name, though the kernel is not declared to write it.

        A peer may overwrite what nobody needs after the call; the next call with these arguments goes on from there.
        """
        arguments = {
            (value.data_ptr(), value.shape, value.stride(), value.dtype): name
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.numel() and name not in self._spec.mutates
        }
        return tuple(
            (name, arguments[look])
            for name, leaf in compare.leaves(output, self._returned).items()
            if type(leaf) is Tensor and (look := (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype)) in arguments
        )

    def check(
        self,
        got: Leaves,
        where: str,
        *,
        calls: int = 1,
        in_place: tuple[tuple[str, str], ...] = (),
        allowance: Allowance | None = None,
    ) -> None:
        """Compare the result of ``calls`` calls in a row, of which the first had fresh inputs.

        Args:
            in_place: outputs that are the arguments of the next call, as :meth:`in_place` tells.
            allowance: what else is let pass, and is told of it.

        Raises:
            WrongResult: it is not what the reference gives, by the rule of parity.
        """
        if self.unchecked:
            return
        for name, leaf in got.items():
            if isinstance(leaf, Tensor) and type(leaf) not in (Tensor, torch.nn.Parameter):
                raise WrongResult(f"{where}, {name} is a {type(leaf).__name__}, which may do the work when it is read")
        calls = calls if self._spec.mutates or in_place else 1
        seen = (calls, in_place, id(allowance), *_fingerprint(got))
        if seen not in self._accepted:
            truth, nudged = self._truth(calls, in_place), partial(self._nudged, calls, in_place)
            judged = judge_fairly(got, truth, self._rule, nudged)
            if allowance is not None and any(item.reason for item in judged):
                allowance.take(judged)
                judged = judge_fairly(got, truth, allowance.rule, nudged)
            reasons = [item.reason for item in judged if item.reason]
            if reasons:
                raise WrongResult(f"{where}, {reasons[0]}")
            self._accepted.add(seen)
        # The copies go back to the allocator, and must not turn up as the output of a kernel that writes none.
        for leaf in got.values():
            _spoil(leaf)

    def poison(self, output: Any) -> None:
        """Overwrite what a call returned, except where that is one of its arguments."""
        for leaf in compare.leaves(output, "").values():
            if type(leaf) is Tensor and leaf.untyped_storage().data_ptr() not in self._storages:
                _spoil(leaf)

    def owns(self, others: Sequence[Inputs]) -> None:
        """Outputs that share memory with these inputs are arguments as well, not to be overwritten."""
        self._storages |= {tensor.untyped_storage().data_ptr() for one in others for tensor in tensors(one)}

    def result_bytes(self) -> int | None:
        """Bytes of the tensors that one call returns anew; None if the reference does not run."""
        truth = self._truths.get((1, ()))
        if truth is None:
            return None
        sizes: dict[int, int] = {}
        written: set[int] = set()
        for name, leaf in truth.eager.items():
            if isinstance(leaf, Tensor):
                place = leaf.untyped_storage().data_ptr()
                if name.startswith(self._returned):
                    sizes[place] = max(sizes.get(place, 0), leaf.numel() * leaf.element_size())
                else:
                    written.add(place)
        return sum(size for place, size in sizes.items() if place not in written)

    def _truth(self, calls: int, in_place: tuple[tuple[str, str], ...]) -> Truth:
        key = calls, in_place
        if key not in self._truths:
            eager = self._run(compare.clone(self._values), *key)
            self._truths[key] = Truth(eager, self._run(compare.upcast(self._values), *key))
            synchronize(self.device)
        return self._truths[key]

    def _run(self, inputs: Inputs, calls: int, in_place: tuple[tuple[str, str], ...]) -> Leaves:
        found: Leaves = {}
        with torch.no_grad():
            for _ in range(calls):
                found = compare.leaves(self._spec.reference(**inputs), self._returned)
                inputs = inputs | {argument: found[output] for output, argument in in_place}
        for name in self._spec.mutates:
            found |= compare.leaves(inputs[name], name)
        return found

    def _nudged(self, calls: int, in_place: tuple[tuple[str, str], ...], draw: int) -> Leaves:
        return self._run(modes.nudge(self._values, self._seed + draw), calls, in_place)


def slower_when_checked(blocks: Sequence[tuple[float, Sequence[float]]], resolution: float = 0.0) -> str:
    """Why an implementation seems to work only in the checked calls; empty if it does not.

    Counts the controls that the checked call of their block exceeds. Without a difference the number of one block is at
    most that of a place drawn among them all, in every block anew.

    Args:
        blocks: seconds of the checked call and of its controls, for each block.
        resolution: seconds that times of the same work may differ by, as the timer goes.
    """
    exceeded = 0
    chances = numpy.ones(1)
    for checked, controls in blocks:
        exceeded += sum(checked > max(SLOWER_WHEN_CHECKED * usual, usual + resolution) for usual in controls)
        chances = numpy.convolve(chances, numpy.full(len(controls) + 1, 1 / (len(controls) + 1)))
    if float(chances[exceeded:].sum()) > FALSE_ALARM:
        return ""
    checked = float(numpy.median([checked for checked, _ in blocks])) * 1e6
    usual = float(numpy.median([usual for _, controls in blocks for usual in controls])) * 1e6
    return (
        f"takes {checked:.1f} us where its result is checked and {usual:.1f} us elsewhere, so it skips work when the "
        "inputs are those of an earlier call"
    )


def move_versions(inputs: Inputs) -> None:
    """Make all tensors look written to, as the checked ones are."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors(inputs) if not tensor.is_inference()])


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of nested inputs."""
    return [leaf for leaf in compare.leaves(inputs, "").values() if isinstance(leaf, Tensor)]


def _how_far(judged: Judged) -> str:
    """The first of the errors of a leaf that exceeds its limit, beside eager's own."""
    assert judged.errors is not None
    assert judged.eager is not None
    assert judged.limits is not None
    for what, error, own, allowed in (
        ("max", judged.errors.max, judged.eager.max, judged.limits.max),
        ("rms", judged.errors.rms_ratio, judged.eager.rms_ratio, judged.limits.rms_ratio),
        ("mean", abs(judged.errors.mean), abs(judged.eager.mean), judged.limits.mean),
    ):
        if not error <= allowed:
            return f"{judged.name} has a {what} error of {error:.2g} where eager's own is {own:.2g}"
    raise AssertionError(f"{judged.name} exceeds no limit")


def checked_call(witness: Witness, call: Callable[..., Any], where: str, *, allowance: Allowance | None = None) -> None:
    """One call on fresh inputs, not timed, and its result compared.

    Raises:
        WrongResult: as :meth:`Witness.check`.
    """
    inputs = witness.load()
    move_versions(inputs)
    output = ready(call, inputs)()
    got = witness.take(output)
    witness.poison(output)
    # All its work, that on other streams too, so that what fails late fails here.
    synchronize(witness.device)
    witness.check(got, where, allowance=allowance)


def _memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _copy(source: Inputs, target: Inputs, *, like: Inputs) -> None:
    """Copy tensors in place, except where those of ``like`` cannot be written element by element."""
    given, shown = compare.leaves(source, ""), compare.leaves(like, "")
    for name, leaf in compare.leaves(target, "").items():
        value = given.get(name)
        if not (isinstance(leaf, Tensor) and isinstance(value, Tensor)) or _overlaps_itself(shown[name]):
            continue
        if leaf.shape == value.shape:
            leaf.detach().copy_(value)


def _taken(leaf: Any) -> Any:
    # A tensor of another type is refused, and must not be made to compute what it has put off.
    return leaf.detach().clone() if type(leaf) in (Tensor, torch.nn.Parameter) else leaf


def _spoil(leaf: Any) -> None:
    """Overwrite a tensor with what no result is: NaN, the largest integer."""
    if type(leaf) is not Tensor or _overlaps_itself(leaf):
        return
    with torch.no_grad():
        if leaf.is_floating_point() or leaf.is_complex():
            leaf.detach().fill_(float("nan"))
        else:
            leaf.detach().fill_(True if leaf.dtype == torch.bool else torch.iinfo(leaf.dtype).max)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements share memory, as in an expanded tensor, so that it cannot be written."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _fingerprint(leaves: Leaves) -> list[Any]:
    """Names, kinds and bits of leaves in a few numbers each, so that an accepted result is known again; no kernel can
    aim for them."""
    found: list[Any] = []
    sums: dict[torch.device, list[Tensor]] = {}
    for name, leaf in sorted(leaves.items()):
        if isinstance(leaf, Tensor):
            found.append((name, tuple(leaf.shape), str(leaf.dtype), str(leaf.device)))
            sums.setdefault(leaf.device, []).extend(_sums(leaf))
        else:
            found.append((name, repr(leaf)))
    # One read for all of them, as each makes the host wait.
    return found + [tuple(torch.stack(ours).tolist()) for ours in sums.values()]


def _sums(leaf: Tensor) -> list[Tensor]:
    """Sums over the bits of both halves and of every other element, so that most ways of exchanging elements show."""
    flat = leaf.resolve_conj().contiguous().reshape(-1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.int64)
    bits = flat.view(words)
    half = bits.numel() // 2
    return [part.sum(dtype=torch.int64) for part in (bits[:half], bits[half:], bits[::2])]
