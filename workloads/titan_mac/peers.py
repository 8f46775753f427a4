"""What to time beside the phases: torch.compile of the baseline and of phase 0, and torch's own fused AdamW."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor

from .phases import control, group_statistics, meta_update, step_optimizer, step_training, update_memory
from .training import Training


def compile_loss(built: Training) -> None:
    """Compile forward and loss; the memory update stays eager between the graphs, for it differentiates inside."""
    built.model.memory.update = torch.compiler.disable(built.model.memory.update)  # type: ignore[no-untyped-call, method-assign]
    built.loss = torch.compile(built.loss)  # type: ignore[method-assign]


def compile_sync_free(built: Training) -> None:
    """Put phase 0 in place, without whose branches the optimizer can be compiled too: norms, controller, clip, AdamW.

    In parts, since what counts the calls between them would have them compiled anew. CMS mode, whose update would take
    minutes to compile, stays eager.
    """
    optimizer, memory = built.optimizer, built.model.memory
    controller = optimizer.controller
    for owner, name, function in (
        (built, "step", step_training),
        (memory, "update", update_memory),
        (optimizer, "step", step_optimizer),
        (optimizer, "meta_update", meta_update),
    ):
        vars(owner)[name] = MethodType(function, owner)
    compile_loss(built)
    vars(optimizer)["group_statistics"] = torch.compile(MethodType(group_statistics, optimizer))
    vars(controller)["forward"] = torch.compile(MethodType(control, controller))
    vars(optimizer)["clip_gradients"] = torch.compile(optimizer.clip_gradients)
    compiled = torch.compile(optimizer.apply_update)

    def apply_update(lr: Tensor, ok: Tensor) -> None:
        # Attaching reads counters of the host, once, and belongs into no graph.
        optimizer.attached_state()
        compiled(lr, ok)

    vars(optimizer)["apply_update"] = apply_update


def use_torch_fused_adamw(built: Training) -> None:
    """Let torch.optim.AdamW use its own fused kernel, whose step counters live on the device."""
    adamw = built.optimizer.adamw
    for group in adamw.param_groups:
        group.update(fused=True, foreach=False)
    for parameter, entry in adamw.state.items():
        entry["step"] = entry["step"].to(parameter.device)
