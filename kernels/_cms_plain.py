"""CMS updates in plain PyTorch: what fused_cms has to compute, and a form of it for torch.compile to be timed beside.

Shapes: N tensors, L levels, E elements, F features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

KINDS = 4
"""Momentum, total, average and square."""
PERIOD = 10.0
MOMENTUM_DECAY = 0.9
LARGEST_SHARE = 100.0
"""A momentum is at most this many times as long as the gradient."""


@torch.no_grad()
def fused_cms_reference(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    weights: Tensor,
    lrs: Tensor,
    ok: Tensor,
    active: int,
    width: int,
    layers: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    """The update in plain PyTorch, without a branch on a tensor; arguments as in fused_cms."""
    for param, grad, state, lr in zip(params, grads, states, lrs.unbind(), strict=True):
        if not param.numel():
            continue
        momenta, totals, averages, squares = state.unbind()
        summed = totals + grad.to(state.dtype)
        change, kept = torch.zeros_like(summed[0]), torch.zeros((), dtype=state.dtype, device=state.device)
        for level in range(active):
            gradient = summed[level] / PERIOD**level
            summed[level].zero_()
            average = averages[level] * beta1 + gradient * (1 - beta1)
            square = torch.addcmul(squares[level] * beta2, gradient, gradient, value=1 - beta2)
            update = network(gradient, momenta[level], weights, width, layers)
            moved = momenta[level] * MOMENTUM_DECAY + update * (1 - MOMENTUM_DECAY)
            largest = LARGEST_SHARE * torch.linalg.vector_norm(gradient)
            norm = torch.linalg.vector_norm(moved)
            moved = moved * torch.where(norm > largest, largest / norm, 1.0)
            good = torch.isfinite(update).all()
            change, kept = change + torch.where(good, update, 0.0), kept + good
            averages[level].copy_(torch.where(ok, average, averages[level]))
            squares[level].copy_(torch.where(ok, square, squares[level]))
            momenta[level].copy_(torch.where(ok & good, moved, momenta[level]))
        totals.copy_(torch.where(ok, summed, totals))
        wide = param.to(state.dtype)
        updated = (wide - lr * (change / kept.sqrt() + weight_decay * wide)).to(param.dtype)
        param.copy_(torch.where(ok & (kept > 0), updated, param))


def network(gradient: Tensor, momentum: Tensor, weights: Tensor, width: int, layers: int) -> Tensor:
    """The update of each element, in the shape of ``gradient``; ``weights`` as there."""
    hidden_EF = torch.stack([*log_sign(gradient.flatten()), *log_sign(momentum.flatten())], dim=1)
    start = 0
    for layer in range(layers + 1):
        inputs, outputs = hidden_EF.shape[1], width if layer < layers else 1
        layer_weights = weights[start : start + outputs * (inputs + 1)]
        matrix, bias = torch.split(layer_weights, [outputs * inputs, outputs])
        hidden_EF = functional.linear(hidden_EF, matrix.view(outputs, inputs), bias)
        if layer < layers:
            hidden_EF = functional.silu(hidden_EF)
        start += outputs * (inputs + 1)
    return hidden_EF.view(gradient.shape)


def log_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """Size and sign of each element as two features."""
    size = x.abs()
    large = size >= math.exp(-10)
    logarithm = torch.where(large, size, 1.0).log() / 10
    return torch.where(large, logarithm, -1.0), torch.where(large, x.sign(), x * math.exp(10))


def weight_count(width: int, layers: int) -> int:
    """Numbers that a network of this size takes."""
    return 5 * width + (layers - 1) * width * (width + 1) + width + 1


@functools.cache
def _compiled_network() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(network, dynamic=False)
    return compiled


@torch.no_grad()
def vectorised(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    weights: Tensor,
    lrs: Tensor,
    active: int,
    width: int,
    layers: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
    **_: object,
) -> None:
    """The update with one compiled network over all elements at once and foreach around it; it sees no guard."""
    if params[0].dtype != states[0].dtype:
        raise ValueError(f"foreach has no {params[0].dtype} parameters with {states[0].dtype} state")
    torch._foreach_add_([state[1] for state in states], grads)
    changes = [torch.zeros_like(param) for param in params]
    for level in range(active):
        momenta, totals, averages, squares = ([state[kind, level] for state in states] for kind in range(KINDS))
        gradients = list(torch._foreach_div(totals, PERIOD**level))
        torch._foreach_zero_(totals)
        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (gradients, momenta)]
        parts = torch.split(_compiled_network()(*flat, weights, width, layers), [param.numel() for param in params])
        updates = [part.view_as(param) for part, param in zip(parts, params, strict=True)]
        torch._foreach_mul_(momenta, MOMENTUM_DECAY)
        torch._foreach_add_(momenta, updates, alpha=1 - MOMENTUM_DECAY)
        largest, norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (gradients, momenta))
        largest = largest * LARGEST_SHARE
        torch._foreach_mul_(momenta, list(torch.where(norms > largest, largest / norms, 1.0).unbind()))
        torch._foreach_add_(changes, updates)
    torch._foreach_mul_(changes, active**-0.5)
    torch._foreach_add_(changes, params, alpha=weight_decay)
    torch._foreach_mul_(changes, list(lrs.unbind()))
    torch._foreach_sub_(params, changes)
