"""Phase 6, beyond the plan: what remained slow once its phases were in, by the profile of a step.

The head's product ran on a kernel for rows that start anywhere, as 50,257 words are no multiple of eight; here the
vocabulary is padded. Muon made 96 matrices orthogonal one after the other, each too small to fill a GPU; here those of
one shape are a stack.

Shapes: V vocabulary, C width, S matrices of a stack, M and N their rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Head
from .optimizers import NEWTON_SCHULZ_STEPS, QUINTIC, Muon, stretch

VOCABULARY_MULTIPLE = 64
"""Of rows in the padded head: 128 bytes in a dtype of two, so that tiles of tensor cores start at cache lines."""
STACK_ELEMENTS = 1 << 25
"""Of the matrices that Muon handles at once: 64 MiB in a dtype of two bytes, which the passes over them share."""


def logits(self: Head, x: Tensor) -> Tensor:
    """``Head.forward`` with a vocabulary of whole cache lines; a view [..., V] of what that gives."""
    words = len(self.weight)
    weight = functional.pad(self.weight.to(x.dtype), (0, 0, 0, -words % VOCABULARY_MULTIPLE))
    return functional.linear(x, weight)[..., :words]


def move_in_stacks(self: Muon, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
    """``Muon.move`` of all matrices of one shape at once."""
    for stack in stacks(parameters):
        gradients: Any = [parameter.grad for parameter in stack]
        averages = [self.average(parameter) for parameter in stack]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])
        matrices = [update.to(self.dtype).view(-1, *update.shape[-2:]) for update in updates]
        made = torch.split(orthogonal_stack(torch.cat(matrices)), [len(part) for part in matrices])
        for parameter, part in zip(stack, made, strict=True):
            parameter.add_(part.view_as(parameter), alpha=-group["lr"] * stretch(parameter))


def stacks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose matrices have one shape; as many as ``STACK_ELEMENTS`` allow, and at least one."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
    for alike in by_shape.values():
        stack: list[nn.Parameter] = []
        for parameter in alike:
            if stack and sum(one.numel() for one in (*stack, parameter)) > STACK_ELEMENTS:
                yield stack
                stack = []
            stack.append(parameter)
        yield stack


def orthogonal_stack(x: Tensor) -> Tensor:
    """``orthogonal`` of [S, M, N]; each sum is rounded with its product, once, and nothing is transposed in memory."""
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x
