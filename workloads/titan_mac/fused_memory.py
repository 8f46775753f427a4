"""Phases 1 and 3: the memory's own gradient step without autograd, and its loss with all gradients of it.

Phase 3 takes the gradients together with the loss, before the memory is written, so that no weight has to be kept; the
main backward pass then only multiplies them. The memory's part of them is what phase 1 writes. Without phase 3, phase 1
computes the forward pass again, which is less work than autograd's graph costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernbench import promises
from kernbench.device import warn_once
from kernbench.promises import Bound
from kernbench.record import Prediction, ProfileRecord

from .memory import Commit, NeuralMemory

UPDATE_CLAIM = "2-3x for the memory update, 20-30 % of the step"
UPDATE_PROMISE = "The memory's gradient, clip, momentum and write become six launches; at best they take no time."
LOSS_CLAIM = "10-15 % of the step"
LOSS_PROMISE = (
    "The memory's forward pass, loss and gradients become six launches, and its backward pass one; at best its forward "
    "pass takes no time."
)
HOOKED = (
    "phase 1 of titan-mac took a memory's gradient by autograd: its weights have hooks, which have to see that gradient"
)

MemoryUpdate = Callable[..., None]
MemoryLoss = Callable[..., Tensor]
Learn = Callable[[NeuralMemory, Tensor, Tensor, Tensor, Tensor, Commit], None]

# As it is before any swap.
_gradient = NeuralMemory.gradient


def adapt_memory_update(op: MemoryUpdate) -> Learn:
    """``NeuralMemory.learn`` through ``op``, the ``memory_mlp_update`` kernel in one of its implementations."""

    def learn(
        self: NeuralMemory, x_BTD: Tensor, key_NM: Tensor, value_NM: Tensor, loss: Tensor, commit: Commit
    ) -> None:
        hooked = has_hooks(self.weights())
        if hooked:
            warn_once(HOOKED)
        gradient_P = self.gradient(loss) if hooked or taken_gradient(loss) is not None else None
        with torch.no_grad():
            forget, decay = self.gates(x_BTD)
            weights = [weight.detach() for weight in self.weights()]
            op(
                key_NM.detach(), value_NM.detach(), *weights, self.momentum, forget, decay, self.step_size, self.clip,
                gradient_P,
            )  # fmt: skip

    return learn


def adapt_memory_loss(op: MemoryLoss) -> Callable[[NeuralMemory, Tensor, Tensor], Tensor]:
    """``NeuralMemory.reconstruction_loss`` through ``op``, the ``memory_mlp_loss`` kernel."""

    def reconstruction_loss(self: NeuralMemory, key_NM: Tensor, value_NM: Tensor) -> Tensor:
        gradient_P = torch.empty_like(self.momentum) if self.training and torch.is_grad_enabled() else None
        loss = op(key_NM, value_NM, *self.weights(), gradient_P)
        loss.memory_gradient_P = gradient_P  # type: ignore[attr-defined]
        return loss

    return reconstruction_loss


def gradient_taken(self: NeuralMemory, loss: Tensor) -> Tensor:
    """``NeuralMemory.gradient`` where it came with the loss; hooks of the weights see it as they see autograd's."""
    gradient_P = taken_gradient(loss)
    return _gradient(self, loss) if gradient_P is None or has_hooks(self.weights()) else gradient_P


def taken_gradient(loss: Tensor) -> Tensor | None:
    """The memory's gradient that came with a loss of phase 3."""
    gradient_P: Tensor | None = getattr(loss, "memory_gradient_P", None)
    return gradient_P


def has_hooks(tensors: Sequence[Tensor]) -> bool:
    """Whether someone wants to see, or change, gradients of these."""
    return any(tensor._backward_hooks for tensor in tensors)


def predict_memory_update(before: ProfileRecord) -> Prediction:
    """All of its time goes, at best."""
    return _predicted(before, 1, UPDATE_PROMISE, UPDATE_CLAIM)


def predict_memory_loss(before: ProfileRecord) -> Prediction:
    """All of its forward pass goes, at best."""
    return _predicted(before, 3, LOSS_PROMISE, LOSS_CLAIM)


def _predicted(before: ProfileRecord, number: int, text: str, claim: str) -> Prediction:
    """At best a site takes no time: of the device, or, where the host is what a step waits for, of its launches."""
    spots = [spot for spot in before.hotspots if spot.phase == number]
    step = promises.step_seconds(before)
    bound = Bound(None, "no hotspot of this phase or no step time in the profile before")
    if spots and step:
        busy = sum(spot.self_seconds_per_step for spot in spots)
        gain, basis = busy, f"{busy * 1e3:.3g} ms of a step of {step * 1e3:.3g} ms on the device"
        if before.environment.device.type == "cuda" and before.launches_per_step:
            calls = sum(spot.calls_per_step for spot in spots)
            gain = max(busy, step * calls / before.launches_per_step)
            basis += f", {calls:.4g} of {before.launches_per_step:.4g} launches"
        bound = Bound(step / (step - gain) if gain < step else None, basis)
    return promises.promise(text, bound, claim=claim)
