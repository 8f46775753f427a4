"""The backward pass of a kernel as something to time: a spec whose implementations hand it over with forward done.

Every call runs its own forward pass first, which is not timed, so that nothing is kept from call to call: a backward
that writes into what forward saved, or into the gradients that arrive, is as good as one that does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from kernbench.parity import compare, modes
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Peer, Tolerance

Direction = Literal["forward", "backward"]
FORWARD: Final = "forward"
BACKWARD: Final = "backward"
BOTH: Final = "both"
ARRIVING = "arriving gradients"
"""Name of the argument that holds the gradient of each floating output; no Python argument has blanks in its name."""
UNKNOWN = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)
SEED = 0x5EED


@dataclass(frozen=True)
class Backward:
    """The backward pass of ``call``: the gradients of the ``wanted`` leaves of its inputs, by their names."""

    call: Callable[..., Any]
    wanted: tuple[str, ...]

    def __call__(self, **inputs: Any) -> dict[str, Tensor | None]:
        return self.ready(**inputs)()

    def ready(self, **inputs: Any) -> Callable[[], dict[str, Tensor | None]]:
        """Run the forward pass; what is left to do is returned. A gradient that is not given is None.

        Raises:
            RuntimeError: an output that a gradient arrives at does not require one.
        """
        arriving = inputs.pop(ARRIVING)
        outer = {name: leaf for key, value in inputs.items() for name, leaf in compare.leaves(value, key).items()}
        wanted = {id(outer[name]) for name in self.wanted}
        # Fresh leaves, so that no node of an earlier graph, or its stream, has a part in this one.
        inner = compare.map_tensors(
            inputs, lambda tensor: tensor.detach().requires_grad_() if id(tensor) in wanted else tensor
        )
        given = {name: leaf for key, value in inner.items() for name, leaf in compare.leaves(value, key).items()}
        with torch.enable_grad():
            outputs = compare.leaves(self.call(**inner), "output")
        for name in arriving:
            if not (isinstance(outputs.get(name), Tensor) and outputs[name].requires_grad):
                raise RuntimeError(f"its {name} requires no gradient, so there is no backward to time")
        return partial(
            _gradients, self.wanted, [outputs[name] for name in arriving], [given[name] for name in self.wanted],
            list(arriving.values()),
        )  # fmt: skip


def _gradients(
    wanted: tuple[str, ...], outputs: list[Tensor], sources: list[Tensor], arriving: list[Tensor]
) -> dict[str, Tensor | None]:
    gradients = torch.autograd.grad(outputs, sources, arriving, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


def ready(call: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    """What of a call is to be timed; the rest of it is done here."""
    return call.ready(**inputs) if isinstance(call, Backward) else partial(call, **inputs)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under torch.compile; of a backward, both its passes."""
    if isinstance(function, Backward):
        return replace(function, call=torch.compile(function.call))
    return torch.compile(function)


def backward_of(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> KernelSpec:
    """The spec of a kernel's backward in one case and dtype, to be timed and not to be checked by parity.

    Its inputs are the kernel's with a random gradient for each floating output, and its results the gradients that the
    reference gives.

    Raises:
        ValueError: the reference gives no gradient there. What the reference raises.
    """
    inputs = _detached(spec.make_inputs(case, dtype, device, 0))
    asked = modes.differentiable_names(spec.make_inputs(case, dtype, device, 0), spec.mutates)
    leaves = {name: leaf for key, value in inputs.items() for name, leaf in compare.leaves(value, key).items()}
    for name in asked:
        leaves[name].requires_grad_()
    with torch.enable_grad():
        outputs = compare.leaves(spec.reference(**inputs), "output")
    shapes = {
        name: (leaf.shape, leaf.dtype)
        for name, leaf in outputs.items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    }
    if not shapes:
        raise ValueError(f"{spec.name} is called differentiable, but no output of its reference requires a gradient")
    found = torch.autograd.grad(
        [outputs[name] for name in shapes], [leaves[name] for name in asked],
        [torch.ones_like(outputs[name]) for name in shapes], allow_unused=True,
    )  # fmt: skip
    wanted = tuple(name for name, gradient in zip(asked, found, strict=True) if gradient is not None)

    def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(SEED + seed)
        arriving = {
            name: torch.randn(shape, generator=generator, device=device).to(kind)
            for name, (shape, kind) in shapes.items()
        }
        return {**_detached(spec.make_inputs(case, dtype, device, seed)), ARRIVING: arriving}

    return replace(
        spec,
        reference=Backward(spec.reference, wanted),
        optimized=Backward(spec.optimized, wanted),
        make_inputs=make_inputs,
        cost=spec.backward_cost or (lambda case, dtype: UNKNOWN),
        tolerance={name: _of_gradients(tolerance) for name, tolerance in spec.tolerance.items()},
        mutates=(),
        stateful=False,
        differentiable=False,
        peers={name: _peer(peer, wanted) for name, peer in spec.peers.items()},
    )


def _detached(inputs: Inputs) -> Inputs:
    detached: Inputs = compare.map_tensors(inputs, lambda tensor: tensor.detach())
    return detached


def _of_gradients(tolerance: Tolerance) -> Tolerance:
    return replace(tolerance, forward=tolerance.gradient)


def _peer(peer: Callable[..., Any] | Peer, wanted: tuple[str, ...]) -> Callable[..., Any] | Peer:
    if isinstance(peer, Peer):
        return replace(peer, call=Backward(peer.call, wanted), tolerance=_of_gradients(peer.tolerance))
    return Backward(peer, wanted)
