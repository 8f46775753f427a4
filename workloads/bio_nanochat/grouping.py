"""Tokens in the order of their experts, and products of each group with its own weights, with nothing read.

Shapes: N tokens, C width, E experts, k chosen of a token, M = N k rows in the order of experts, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernbench.device import warn_once

PADDED = "experts are multiplied with padding to all tokens each: grouped products take bfloat16 on a GPU"


@dataclass(frozen=True)
class Groups:
    """Where each of the M rows goes.

    Attributes:
        order, inverse: [M], what sorts the flat choices [N k] by expert, and what undoes it.
        expert: [M], whose each sorted row is.
        count, ends: [E], rows of each expert, and where its rows end (int32).
    """

    chosen: int
    order: Tensor
    inverse: Tensor
    expert: Tensor
    count: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index_Nk: Tensor, experts: int) -> Groups:
        """The groups of a routing."""
        flat_M = index_Nk.flatten()
        expert_M, order_M = torch.sort(flat_M, stable=True)
        rows_M = torch.arange(len(flat_M), device=flat_M.device)
        inverse_M = torch.empty_like(order_M).scatter_(0, order_M, rows_M)
        experts_E = torch.arange(experts, device=flat_M.device)
        count_E = (flat_M.unsqueeze(-1) == experts_E).sum(0)
        ends_E = count_E.cumsum(0).to(torch.int32)
        return cls(index_Nk.shape[1], order_M, inverse_M, expert_M, count_E, ends_E)

    def one_hot(self, dtype: torch.dtype) -> Tensor:
        """Which row is whose, [M, E]: a product with it gives rows their expert's value, deterministic both ways."""
        experts_E = torch.arange(len(self.count), device=self.expert.device)
        return (self.expert.unsqueeze(-1) == experts_E).to(dtype)

    def means(self, x_MI: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean row of every expert [E, I]; zero where it has none."""
        sums_EI = self.one_hot(dtype).T @ x_MI.to(dtype)
        return sums_EI / self.count.clamp(min=1).to(dtype).unsqueeze(-1)

    def sorted_rows(self, x_NC: Tensor) -> Tensor:
        """Each token once per expert that it takes, by expert: [M, C]."""
        rows: Tensor = _Spread.apply(x_NC, self)  # type: ignore[no-untyped-call]
        return rows

    def by_token(self, y_MC: Tensor) -> Tensor:
        """Rows back in the order of tokens, [N, k, C]."""
        rows: Tensor = _Collect.apply(y_MC, self)  # type: ignore[no-untyped-call]
        return rows.view(-1, self.chosen, y_MC.shape[-1])


class _Spread(torch.autograd.Function):
    """Rows of tokens in the order of experts; its gradient is a gather too, where index_select would add atomically."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return x_NC.index_select(0, groups.order // groups.chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        groups: Groups = ctx.groups
        rows_MC = gradients[0].index_select(0, groups.inverse)
        return rows_MC.view(-1, groups.chosen, rows_MC.shape[-1]).sum(1), None


class _Collect(torch.autograd.Function):
    """The inverse permutation."""

    @staticmethod
    def forward(ctx: Any, y_MC: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return y_MC.index_select(0, groups.inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.groups.order), None


def grouped_product(x_MI: Tensor, w_EIO: Tensor, groups: Groups) -> Tensor:
    """Each row times its expert's weights, [M, O]: one grouped product, or a batched one over padded groups."""
    if x_MI.is_cuda and x_MI.dtype == torch.bfloat16 and not w_EIO.shape[1] % 8 and not w_EIO.shape[2] % 8:
        product: Tensor = torch._grouped_mm(x_MI, w_EIO, offs=groups.ends)
        return product
    if x_MI.is_cuda:
        warn_once(PADDED)
    first_E = groups.ends - groups.count
    place_M = torch.arange(len(x_MI), device=x_MI.device) - first_E[groups.expert]
    tokens = len(x_MI) // groups.chosen
    padded_ENI = x_MI.new_zeros(w_EIO.shape[0], tokens, x_MI.shape[1])
    padded_ENI = padded_ENI.index_put((groups.expert, place_M), x_MI)
    return torch.bmm(padded_ENI, w_EIO)[groups.expert, place_M]
