"""Ways of running a function other than one plain call: nudged, backward, many updates, torch.compile, CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernbench.capturing import on_stream, recorded
from kernbench.parity import compare
from kernbench.parity.compare import Leaves
from kernbench.spec import Inputs, KernelSpec

WARM_UPS = 2
SPIN_CYCLES = 100_000_000
"""Some 50 ms of a GPU: the host has queued the call long before it is over."""


def differentiable_names(inputs: Inputs, mutates: Sequence[str]) -> list[str]:
    """Leaves that gradients go to: the floating ones that require them, or all that are not mutated if none says so."""
    floating = {
        name: leaf
        for argument, value in inputs.items()
        if argument not in mutates
        for name, leaf in compare.leaves(value, argument).items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    return [name for name, leaf in floating.items() if leaf.requires_grad] or list(floating)


def upstream(outputs: Leaves, seed: int, *, expanded: bool) -> Leaves:
    """A gradient for each floating output: random, or that of ``sum()``, ones with strides of zero."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, leaf in outputs.items():
        if not (name.startswith("output") and isinstance(leaf, Tensor) and leaf.is_floating_point()):
            continue
        if expanded:
            gradients[name] = torch.ones((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
        else:
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            gradients[name] = drawn.to(dtype=leaf.dtype, device=leaf.device)
    return gradients


@dataclass(frozen=True)
class Backward:
    """Runs a function forward and backward; ``upstream`` is cast to the dtype of each output."""

    wanted: Sequence[str]
    upstream: Leaves

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Leaves:
        """The gradient of each wanted leaf by ``gradient of <name>``; None where the function gives none."""
        given = {key: leaf for name, value in inputs.items() for key, leaf in compare.leaves(value, name).items()}
        sources = [given[name].requires_grad_() for name in self.wanted]
        outputs = compare.leaves(function(**inputs), "output")
        pairs = [
            (outputs[name], gradient.to(outputs[name].dtype))
            for name, gradient in self.upstream.items()
            if outputs[name].requires_grad
        ]
        if not pairs:
            return {f"gradient of {name}": None for name in self.wanted}
        gradients = torch.autograd.grad(
            [output for output, _ in pairs], sources, [gradient for _, gradient in pairs], allow_unused=True
        )
        return {f"gradient of {name}": gradient for name, gradient in zip(self.wanted, gradients, strict=True)}


@dataclass(frozen=True)
class Updates:
    """Many updates of one state, with the same sequence of fresh inputs for every function that is run.

    The sequence is drawn once in the working dtype, because a generator draws other values in float64.
    """

    spec: KernelSpec
    start: Inputs
    seed: int

    def run(
        self, function: Callable[..., Any], inputs: Inputs, count: int, *, moved: int | None = None
    ) -> tuple[Any, Inputs]:
        """Call ``function`` ``count`` times on ``inputs``; the last output, and the inputs as they are then.

        ``moved`` is a seed by which the fresh inputs of each update are nudged: in a state that forgets how it began,
        nudging that alone would show nothing.
        """
        output = None
        with torch.no_grad():
            for index, drawn in enumerate(self._sequence(count)):
                if drawn is not None:
                    inputs = _take(inputs, drawn if moved is None else nudge(drawn, moved + index))
                output = function(**inputs)
        return output, inputs

    def _sequence(self, count: int) -> Iterator[Inputs | None]:
        """None for the inputs as they are, then what ``next_inputs`` redrew, nested as the inputs are."""
        yield None
        driver = compare.clone(self.start)
        assert self.spec.next_inputs is not None
        for index in range(1, count):
            before = {name: compare.clone(driver[name]) for name in self.spec.mutates}
            self.spec.next_inputs(driver, self.seed + index)
            yield {
                name: value for name, value in driver.items() if name not in before or not _same(value, before[name])
            }


def _same(one: Any, other: Any) -> bool:
    left, right = compare.leaves(one, ""), compare.leaves(other, "")
    return left.keys() == right.keys() and all(compare.same_leaf(left[name], right[name]) for name in left)


def _take(target: Any, drawn: Any) -> Any:
    """``target`` with the values of ``drawn``: tensors are overwritten in place, in their own dtype."""
    if isinstance(target, Tensor) and isinstance(drawn, Tensor):
        return target.copy_(drawn)
    if isinstance(target, Mapping):
        return {name: _take(value, drawn[name]) if name in drawn else value for name, value in target.items()}
    if isinstance(target, list | tuple):
        return type(target)(_take(value, new) for value, new in zip(target, drawn, strict=True))
    return drawn


def nudge(value: Any, seed: int) -> Any:
    """A copy with every floating element moved by up to one ulp, at random; other numbers are drawn on each device."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        drawn = torch.rand(tensor.shape, generator=generators[device], dtype=torch.float64, device=device)
        shift = drawn * 2 - 1
        return (tensor.detach().double() * (1 + shift * torch.finfo(tensor.dtype).eps)).to(tensor.dtype)

    return compare.map_tensors(value, move)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh graph around ``function``. Graphs of earlier cases are dropped, or their number would reach a limit."""
    torch.compiler.reset()

    def wrapper(**inputs: Any) -> Any:
        return function(**inputs)

    graph: Callable[..., Any] = torch.compile(wrapper, dynamic=False)
    return graph


def with_tensors_of(inputs: Inputs, others: Inputs) -> Inputs:
    """The tensors of ``others`` with the scalars of ``inputs``, as a graph captured with ``inputs`` sees them."""
    mixed: Inputs = _take(compare.clone(inputs), _tensors_only(others, inputs))
    return mixed


def _tensors_only(others: Any, inputs: Any) -> Any:
    if isinstance(others, Mapping):
        return {name: _tensors_only(value, inputs[name]) for name, value in others.items()}
    if isinstance(others, list | tuple):
        return [_tensors_only(value, old) for value, old in zip(others, inputs, strict=True)]
    return others if isinstance(others, Tensor) else inputs


def rewritten(target: Inputs, drawn: Inputs) -> Inputs:
    """``drawn`` in the tensors of ``target``, with scalars of its own.

    Their version counters do not move, as they do not when a Triton kernel writes: a counter is no proof of contents.
    """
    inside = compare.leaves(target, "")

    def write(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        place = inside[name]
        if place.shape != leaf.shape:
            return leaf.detach().clone()
        place.data.copy_(leaf.detach())
        return place

    written: Inputs = _replaced(drawn, "", write)
    return written


def _replaced(value: Any, name: str, write: Callable[[str, Any], Any]) -> Any:
    """A nested value with each leaf replaced, given by its path as in :func:`compare.leaves`."""
    if isinstance(value, Mapping):
        return {key: _replaced(item, f"{name}.{key}" if name else str(key), write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_replaced(item, f"{name}[{index}]", write) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return write(name, value)


def replayed(function: Callable[..., Any], inputs: Inputs, others: Inputs) -> tuple[Any, Inputs]:
    """Capture ``function`` on ``inputs`` in a CUDA graph, replay it on the tensors of ``others``; output and inputs."""
    static = compare.clone(inputs)
    with torch.no_grad():
        graph, output = _captured(lambda: function(**static))
        static = _take(static, _tensors_only(others, inputs))
        graph.replay()
    torch.cuda.synchronize()
    return output, static


def replayed_backward(
    function: Callable[..., Any], captured: Backward, inputs: Inputs, other: Backward, others: Inputs
) -> tuple[Leaves, Inputs]:
    """As :func:`replayed` for a forward and backward pass: ``captured`` of ``inputs``, then ``other`` of ``others``."""
    static, arriving = compare.clone(inputs), compare.clone(captured.upstream)
    run = Backward(captured.wanted, arriving)
    graph, gradients = _captured(lambda: run(function, static))
    with torch.no_grad():
        static = _take(static, _tensors_only(others, inputs))
        _take(arriving, other.upstream)
        graph.replay()
    torch.cuda.synchronize()
    return gradients, static


def _captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call that has warmed up on a side stream, and what the call returned."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with on_stream(side):
        for _ in range(WARM_UPS):
            call()
    graph = torch.cuda.CUDAGraph()
    with recorded(graph, alone=True):
        output = call()
    return graph, output


def on_side_stream(run: Callable[[Inputs], Leaves], inputs: Inputs, others: Inputs) -> Leaves:
    """A run on a stream of its own, where the contents of the inputs arrive late; its leaves, copied right behind it.

    Work that does not wait for that stream finds NaN or zeros; work that it does not wait for is copied unfinished. A
    first run on ``others`` compiles, so that the host is quick then, and leaves no right answer behind in memory.
    """
    contents = compare.clone(inputs)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    inputs = rewritten(inputs, others)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.synchronize()
    for leaf in compare.leaves(inputs, "").values():
        if isinstance(leaf, Tensor):
            leaf.data.fill_(math.nan if leaf.is_floating_point() else 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
        live = run(rewritten(inputs, contents))
        taken = {name: leaf.detach().clone() if type(leaf) is Tensor else leaf for name, leaf in live.items()}
    torch.cuda.synchronize()
    return taken
