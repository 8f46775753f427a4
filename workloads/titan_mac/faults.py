"""Bad steps that parity provokes, and the state that must survive them bit for bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .training import Training


def inject_nan_loss(built: Training) -> None:
    """The embedding of the next forward pass is NaN, and so are the loss and all gradients."""

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output * float("nan")

    handle: RemovableHandle = built.model.embedding.register_forward_hook(spoil)


def inject_nan_gradient(built: Training) -> None:
    """In the next step the memory's weights get NaN gradients while the loss is finite.

    Both take effect: the memory's own gradient, so that nothing is written, and the optimizer's, so that it skips. The
    spoiling goes when the step after it begins.
    """
    weights = built.model.memory.weights()
    hooks = [weight.register_hook(lambda gradient: gradient * float("nan")) for weight in weights]  # type: ignore[no-untyped-call]
    passes = 0

    def end(module: Any, inputs: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            for hook in (*hooks, handle):
                hook.remove()

    handle: RemovableHandle = built.model.register_forward_pre_hook(end)


def protected(built: Training) -> dict[str, Tensor]:
    """Parameters, the optimizer's state of them, and the memory's weights (parameters too) and momentum."""
    state = {f"model.{name}": tensor for name, tensor in built.model.state_dict().items()}
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    for parameter, entry in built.optimizer.adamw.state.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{key}.{names[id(parameter)]}"] = entry[key]
    momenta = built.optimizer.momenta
    if momenta is not None:
        for parameter, tensor in zip(momenta.parameters, momenta.states, strict=True):
            state[f"momenta.{names[id(parameter)]}"] = tensor
        state |= {"network": momenta.network.weights_W, "trainings": momenta.trainings}
    return state
