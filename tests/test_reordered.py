"""Sums in another order: the same values but for rounding, forward and backward, and other rounding for every order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernbench.parity.reordered import RULES, ReorderedSums

LONG = 3000
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: x @ x.T,
    "bmm": lambda x: x.view(2, 4, -1) @ x.view(2, 4, -1).mT,
    "addmm": lambda x: torch.addmm(x[:, :8], x, x.T, beta=0.5, alpha=2.0),
    "baddbmm": lambda x: torch.baddbmm(x.view(2, 4, -1)[..., :4], x.view(2, 4, -1), x.view(2, 4, -1).mT),
    "sum": torch.sum,
    "mean": torch.mean,
    "sum of a dimension": lambda x: x.sum(-1),
    "sum of dimensions": lambda x: x.view(2, 4, -1).sum((0, 2), keepdim=True),
    "mean of a dimension": lambda x: x.mean(0, dtype=x.dtype) + x.mean(1).sum(),
    "norm": lambda x: torch.linalg.vector_norm(x) + x.norm(dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "log of softmax": lambda x: x.log_softmax(-1),
    "layer norm": lambda x: functional.layer_norm(x, x.shape[-1:], x[0], x[1]),
    "layer norm without weights": lambda x: functional.layer_norm(x, x.shape[-1:]),
}  # fmt: skip


def values(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and gradient for fixed input [8, LONG]."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, LONG, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y = function(x)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


def differ(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return any(not torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_order_is_the_same_function_rounded_otherwise(name: str) -> None:
    function = FUNCTIONS[name]
    plain = values(function, torch.float64)
    with ReorderedSums(1):
        other = values(function, torch.float64)
    for want, got in zip(plain, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    plain = values(function, torch.float32)
    with ReorderedSums(1):
        first = values(function, torch.float32)
    with ReorderedSums(2):
        second = values(function, torch.float32)
    assert differ(plain, first)
    assert differ(first, second)
    assert not differ(plain, values(function, torch.float32))


def test_every_rule_is_tried() -> None:
    seen = set()

    class Noting(ReorderedSums):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Noting(1):
        for function in FUNCTIONS.values():
            values(function, torch.float32)
    assert set(RULES) <= seen


def test_what_is_not_floating_point_or_has_no_dimension_is_left_alone() -> None:
    counts, one = torch.arange(LONG), torch.tensor(2.5)
    with ReorderedSums(1):
        assert counts.sum() == LONG * (LONG - 1) // 2
        assert one.sum() == one.mean() == one
        assert torch.linalg.vector_norm(one) == one
        assert one.softmax(0) == 1
        assert torch.empty(0).sum() == 0
