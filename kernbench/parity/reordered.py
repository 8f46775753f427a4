"""Runs torch's operations with their sums in another order: the same function, rounded another way at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ReorderedSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the block, what products, sums, means, norms, softmax and layer norm sum over is permuted first.

    Forward and backward, inside of autograd's own functions too. Each length has one permutation for the whole run, as
    a kernel has one order. What sums in another way (fused attention, convolutions, scans, the backward pass of layer
    norm) runs as it is, and so does what is not floating point.

    Args:
        seed: chooses the permutations.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self._orders: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation itself, on permuted arguments where it is one that sums."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or not all(map(_summed, args)):
            return func(*args, **kwargs)
        return rule(self, func, *args, **kwargs)

    def permuted(self, x: Tensor, dims: Sequence[int], *, back: bool = False) -> Tensor:
        """``x`` in the order of this run along each of ``dims``, or ``back`` from it; unchanged if 0-dim."""
        for dim in dims if x.dim() else ():
            x = x.index_select(dim, self._order(x, dim)[back])
        return x

    def _order(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        key = x.shape[dim], x.device
        if key not in self._orders:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(key[0], generator=generator)
            self._orders[key] = order.to(x.device), order.argsort().to(x.device)
        return self._orders[key]


def _summed(argument: object) -> bool:
    dense = isinstance(argument, Tensor) and argument.layout == torch.strided and argument.is_floating_point()
    return dense or not isinstance(argument, Tensor)


def _product(mode: ReorderedSums, func: Any, left: Tensor, right: Tensor) -> Tensor:
    return func(mode.permuted(left, [-1]), mode.permuted(right, [-2]))  # type: ignore[no-any-return]


def _added_product(
    mode: ReorderedSums, func: Any, bias: Tensor, left: Tensor, right: Tensor, **scales: float
) -> Tensor:
    return func(bias, mode.permuted(left, [-1]), mode.permuted(right, [-2]), **scales)  # type: ignore[no-any-return]


def _all(mode: ReorderedSums, func: Any, x: Tensor, **options: Any) -> Tensor:
    return func(mode.permuted(x.reshape(-1), [0]), **options)  # type: ignore[no-any-return]


def _along(mode: ReorderedSums, func: Any, x: Tensor, dims: Sequence[int] | None, *rest: Any, **options: Any) -> Tensor:
    return func(mode.permuted(x, dims or range(x.dim())), dims, *rest, **options)  # type: ignore[no-any-return]


def _norm(
    mode: ReorderedSums,
    func: Any,
    x: Tensor,
    degree: float = 2,
    dims: Sequence[int] | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    return func(mode.permuted(x, dims or range(x.dim())), degree, dims, *rest, **options)  # type: ignore[no-any-return]


def _softmax(mode: ReorderedSums, func: Any, x: Tensor, dim: int, *rest: Any) -> Tensor:
    return mode.permuted(func(mode.permuted(x, [dim]), dim, *rest), [dim], back=True)


def _softmax_backward(mode: ReorderedSums, func: Any, upstream: Tensor, y: Tensor, dim: int, *rest: Any) -> Tensor:
    return mode.permuted(func(mode.permuted(upstream, [dim]), mode.permuted(y, [dim]), dim, *rest), [dim], back=True)


def _layer_norm(
    mode: ReorderedSums,
    func: Any,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = range(-len(shape), 0)
    given = (None if one is None else mode.permuted(one, dims) for one in (weight, bias))
    y, mean, rstd = func(mode.permuted(x, dims), shape, *given, eps)
    return mode.permuted(y, dims, back=True), mean, rstd


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.sum.default: _all,
    aten.mean.default: _all,
    aten.sum.dim_IntList: _along,
    aten.mean.dim: _along,
    aten.linalg_vector_norm.default: _norm,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _softmax_backward,
    aten.native_layer_norm.default: _layer_norm,
}
