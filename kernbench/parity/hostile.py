"""Hostile kernels: they give the right answer, by their reference, and cheat or misbehave in one way.

All must fail some row of parity. What only a GPU can see is listed as such on the CPU. Wrong addresses are not here: a
reference has none, and the row of addresses looks at those of the kernel itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from kernbench.parity import compare
from kernbench.spec import Inputs, KernelSpec

RIGHT_CALLS = 3
LATE_S = 0.005
"""After how long a kernel that returns early has its result."""
SPINS = 20_000_000
"""Clock cycles that a stream is kept busy, about ten milliseconds."""


@dataclass
class Setting:
    """What one hostile kernel is made of; ``elements`` is how many numbers a case gives it at least.

    ``calls``, ``kept`` and ``threads`` are what it keeps from call to call.
    """

    spec: KernelSpec
    device: torch.device
    elements: int
    calls: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)

    def right(self, inputs: Inputs) -> Any:
        """The right output, and the mutated arguments as they must be."""
        return self.spec.reference(**inputs)

    def results(self, output: Any, inputs: Inputs) -> list[Tensor]:
        """The tensors that a call gives: of its output, and of its mutated arguments."""
        values = [output, *(inputs[name] for name in self.spec.mutates)]
        return [leaf for value in values for leaf in _tensors(value) if leaf.numel()]


@dataclass(frozen=True)
class Hostile:
    """One behaviour: what a call of the kernel does with its inputs, and returns.

    ``needs`` says what a kernel must have for it: an output and nothing mutated, or gradients. ``needs_gpu`` says why
    it shows only there, ``by_size`` that it takes a case larger than the smallest.
    """

    name: str
    behaviour: Callable[[Setting, Inputs], Any]
    needs: Literal["", "output", "gradient"] = ""
    needs_gpu: str = ""
    by_size: bool = False

    def kernel(self, setting: Setting) -> Callable[..., Any]:
        """A function with the reference's signature."""

        def call(**inputs: Any) -> Any:
            setting.calls += 1
            return self.behaviour(setting, inputs)

        return call

    def suits(self, spec: KernelSpec) -> bool:
        """Whether a kernel of this spec can behave so."""
        return {"": True, "output": not spec.mutates, "gradient": spec.differentiable}[self.needs]


def elements(inputs: Inputs) -> int:
    """How many numbers a call is given."""
    return sum(tensor.numel() for tensor in _tensors(inputs))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in compare.leaves(value, "").values() if isinstance(leaf, Tensor)]


def _judges_nothing(name: str, *_: Any, **__: Any) -> compare.Judged:
    return compare.Judged(name, None, None, None, "")


REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (time, "perf_counter", lambda: 0.0),
    (torch.cuda.Event, "elapsed_time", lambda *_: 1e-3),
    (torch.cuda, "synchronize", lambda *_, **__: None),
    (torch.testing, "assert_close", lambda *_, **__: None),
    (torch, "equal", lambda *_: True),
    (torch, "allclose", lambda *_, **__: True),
    (compare, "judge", _judges_nothing),
)


@contextmanager
def contained(setting: Setting) -> Iterator[None]:
    """Whatever a hostile kernel does to the process in here is undone, whether it was noticed or not."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as undone:
        for holder, name, _ in REPLACED:
            undone.enter_context(mock.patch.object(holder, name, getattr(holder, name)))
        undone.enter_context(torch.random.fork_rng([setting.device] if setting.device.type == "cuda" else []))
        undone.callback(torch.set_default_dtype, dtype)
        undone.callback(torch.set_float32_matmul_precision, precision)
        try:
            yield
        finally:
            for thread in setting.threads:
                thread.join()


def _blank(setting: Setting, inputs: Inputs) -> Any:
    """No work: zeros where the result would be, mutated arguments as they were."""
    return compare.map_tensors(setting.right(compare.clone(inputs)), torch.zeros_like)


def _skips(setting: Setting, inputs: Inputs) -> Any:
    return setting.right(inputs) if elements(inputs) <= setting.elements else _blank(setting, inputs)


def _right_at_first(setting: Setting, inputs: Inputs) -> Any:
    return setting.right(inputs) if setting.calls <= RIGHT_CALLS else _blank(setting, inputs)


def _runs_twice_at_first(setting: Setting, inputs: Inputs) -> Any:
    """A result that is added to, by two runs of the first call at these sizes.

    Where a second run changes nothing, as one that overwrites, what is added to is the result itself.
    """
    output, sizes = setting.right(inputs), tuple(map(_shape, _tensors(inputs)))
    if setting.kept.setdefault(sizes, setting.calls) < setting.calls:
        return output
    mutated = setting.spec.mutates
    once = compare.leaves(compare.clone([inputs[name] for name in mutated]), "")
    again = setting.right(inputs) if mutated else output
    if compare.ulps_apart(once, compare.leaves([inputs[name] for name in mutated], "")) != 0.0:
        return again
    if not _tensors({"output": output}):
        with torch.no_grad():
            for name in mutated:
                _write(inputs[name], compare.map_tensors(inputs[name], lambda leaf: leaf + leaf))
    return compare.map_tensors(output, lambda leaf: leaf + leaf)


def _remembers(key: Callable[[Tensor], Any], setting: Setting, inputs: Inputs) -> Any:
    """The answer to the first call whose tensors have the same keys."""
    known = tuple(map(key, _tensors(inputs)))
    if known not in setting.kept:
        output = setting.right(inputs)
        mutated = {name: compare.clone(inputs[name]) for name in setting.spec.mutates}
        setting.kept[known] = compare.clone(output), mutated
        return output
    output, mutated = setting.kept[known]
    with torch.no_grad():
        for name, value in mutated.items():
            _write(inputs[name], value)
    return compare.clone(output)


def _shape(tensor: Tensor) -> Any:
    return tensor.shape


def _address(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape


def _write(target: Any, value: Any) -> None:
    for into, leaf in zip(_tensors(target), _tensors(value), strict=True):
        into.copy_(leaf)


def _replaces(holder: Any, name: str, replacement: Callable[..., Any], setting: Setting, inputs: Inputs) -> Any:
    setattr(holder, name, replacement)
    return setting.right(inputs)


def _then(change: Callable[[], Any], setting: Setting, inputs: Inputs) -> Any:
    output = setting.right(inputs)
    change()
    return output


def _later(setting: Setting, inputs: Inputs) -> Any:
    """Starts a thread that has the result soon, and returns at once."""
    work = compare.clone(inputs)
    output = setting.right(work)
    early = compare.map_tensors(output, torch.empty_like)

    def finish() -> None:
        time.sleep(LATE_S)
        with torch.no_grad():
            _write(early, output)
            for name in setting.spec.mutates:
                _write(inputs[name], work[name])

    setting.threads.append(threading.Thread(target=finish))
    setting.threads[-1].start()
    return early


class _OnAccess(Tensor):
    """A tensor that is computed when it is looked at."""

    _compute: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, compute: Callable[[], Tensor]) -> _OnAccess:
        lazy: _OnAccess = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        lazy._compute = compute
        return lazy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def computed(leaf: Tensor) -> Tensor:
            return leaf._compute() if isinstance(leaf, _OnAccess) else leaf

        return function(*compare.map_tensors(args, computed), **compare.map_tensors(dict(kwargs or {}), computed))


def _on_access(setting: Setting, inputs: Inputs) -> Any:
    return compare.map_tensors(setting.right(inputs), lambda leaf: _OnAccess.of(leaf, lambda: leaf.clone()))


def _unwritten(setting: Setting, inputs: Inputs) -> Any:
    """The output as it was allocated: often that is where the reference's result has been."""
    return compare.map_tensors(setting.right(compare.clone(inputs)), torch.empty_like)


def _writes_inputs(setting: Setting, inputs: Inputs) -> Any:
    output = setting.right(inputs)
    with torch.no_grad():
        for name in inputs.keys() - set(setting.spec.mutates):
            for leaf in _tensors(inputs[name]):
                leaf.logical_not_() if leaf.dtype == torch.bool else leaf.mul_(2).add_(1)
    return output


def _writes_past_the_end(setting: Setting, inputs: Inputs) -> Any:
    """One element, where the memory behind is the checker's: else it would be this process that breaks."""
    output = setting.right(inputs)
    if torch.is_grad_enabled():
        return output
    output = compare.map_tensors(output, lambda leaf: torch.empty_like(leaf).copy_(leaf))
    for leaf in setting.results(output, inputs):
        last = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
        end = leaf.storage_offset() + last + 1
        if leaf.untyped_storage().nbytes() > end * leaf.element_size():
            leaf.as_strided((1,), (1,), end).fill_(1)
    return output


def _same_buffer(setting: Setting, inputs: Inputs) -> Any:
    output = setting.right(inputs)
    if torch.is_grad_enabled():
        return output
    return compare.map_tensors(output, lambda leaf: setting.kept.setdefault((leaf.shape, leaf.dtype), leaf).copy_(leaf))


def _noisy(setting: Setting, inputs: Inputs) -> Any:
    """Each result is off by a unit in the last place, another one than in the call before, and whole numbers by one."""
    output = setting.right(inputs)
    if torch.is_grad_enabled():
        return output
    output = compare.map_tensors(output, torch.clone)
    turn = setting.calls % 3 - 1
    ulps = turn * (1 + setting.spec.run_to_run_ulp)
    for leaf in setting.results(output, inputs):
        if leaf.is_floating_point():
            leaf.mul_(1 + ulps * torch.finfo(leaf.dtype).eps)
        elif leaf.dtype == torch.bool:
            leaf.logical_xor_(torch.tensor(turn > 0))
        else:
            leaf.add_(turn)
    return output


def _takes_gradient(chosen: Callable[[Setting, Tensor], Tensor], setting: Setting, inputs: Inputs) -> Any:
    """A backward pass that starts from another gradient than it is given."""
    output = setting.right(inputs)
    for leaf in setting.results(output, inputs):
        if leaf.requires_grad:
            leaf.register_hook(partial(chosen, setting))  # type: ignore[no-untyped-call]
    return output


def _first_gradient(setting: Setting, gradient: Tensor) -> Tensor:
    first: Tensor = setting.kept.setdefault(gradient.shape, gradient.clone())
    return first


def _ones(setting: Setting, gradient: Tensor) -> Tensor:
    return torch.ones_like(gradient)


def _on_another_stream(setting: Setting, inputs: Inputs) -> Any:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    for leaf in _tensors(inputs):
        if leaf.is_cuda:
            leaf.record_stream(side)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPINS)  # type: ignore[no-untyped-call]
        return setting.right(inputs)


def _race(setting: Setting, inputs: Inputs) -> Any:
    """Every element is written twice by one launch, once wrong; which one stays is a matter of chance."""
    output = setting.right(inputs)
    if torch.is_grad_enabled():
        return output
    output = compare.map_tensors(output, torch.clone)
    for leaf in setting.results(output, inputs):
        right = leaf.reshape(-1)
        wrong, half = torch.zeros_like(right), (len(right) + 1) // 2
        place = torch.arange(len(right), device=leaf.device).repeat(2)
        values = torch.cat([right[:half], wrong[half:], wrong[:half], right[half:]])
        leaf.copy_(torch.zeros_like(right).scatter_(0, place, values).reshape(leaf.shape))
    return output


STREAMS = "the CPU has no streams: work is done when a call returns"
RACES = "on the CPU programs run one after another, so what two of them write has an order"

KERNELS = (
    Hostile("skips the work above the size of the smallest case", _skips, by_size=True),
    Hostile("answers with the result of its first call", partial(_remembers, _shape)),
    Hostile("answers from a cache by the addresses of its inputs", partial(_remembers, _address)),
    Hostile(f"is right in its first {RIGHT_CALLS} calls", _right_at_first),
    Hostile("runs twice in its first call at a size, as when tuned on live data", _runs_twice_at_first),
    *(
        Hostile(f"replaces {holder.__name__}.{name}", partial(_replaces, holder, name, replacement))
        for holder, name, replacement in REPLACED
    ),
    Hostile("allows tf32 for everyone", partial(_then, lambda: torch.set_float32_matmul_precision("high"))),
    Hostile("changes the default dtype", partial(_then, lambda: torch.set_default_dtype(torch.float64))),
    Hostile("seeds the random generator", partial(_then, lambda: torch.manual_seed(0))),
    Hostile("returns before a thread has the result", _later),
    Hostile("returns a tensor that is computed on access", _on_access, "output"),
    Hostile("returns memory that it has not written", _unwritten, "output"),
    Hostile("writes into its inputs", _writes_inputs),
    Hostile("writes one element past the end", _writes_past_the_end),
    Hostile("returns the same buffer every time", _same_buffer, "output"),
    Hostile("gives other bits in every call", _noisy),
    Hostile("takes the incoming gradient for ones", partial(_takes_gradient, _ones), "gradient"),
    Hostile(
        "takes the incoming gradient of its first backward pass", partial(_takes_gradient, _first_gradient), "gradient"
    ),
    Hostile("works on another stream and does not wait for it", _on_another_stream, needs_gpu=STREAMS),
    Hostile("writes each element twice at once", _race, needs_gpu=RACES),
)
