"""torch's own AdamW beside :mod:`.fused_adamw`: its functional forms, and its optimizer as a program calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kernbench.spec import Peer, Tolerance


def _less_exact(update: Callable[..., None]) -> Peer:
    # 1 - beta2^t in float32 is off by an ulp of 1, which is 1 / (1 - beta2) = 1000 of its own at t = 1. No other dtype
    # gets here, since each of these peers refuses parameters narrower than their state.
    return Peer(call=update, tolerance=Tolerance(floor_ulp=1000.0), because="bias corrections in float32")


def _peer(*, fused: bool) -> Callable[..., None]:
    """torch's functional AdamW, called once for each learning rate as its optimizer does; it does not see ``ok``."""

    @torch.no_grad()
    def update(**inputs: Any) -> None:
        lists = [inputs[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
        params, _, exp_avgs, _ = lists
        _refuse_mixed(params, exp_avgs)
        steps, lrs = inputs["steps"], inputs["lrs"]
        counters = steps.unbind()
        for group in _groups(params, lrs):
            ours, grads, firsts, seconds = ([values[index] for index in group] for values in lists)
            adamw(
                ours, grads, firsts, seconds, [], [counters[index] for index in group],
                fused=fused, foreach=not fused,
                capturable=steps.is_cuda, amsgrad=False, beta1=inputs["beta1"], beta2=inputs["beta2"],
                eps=inputs["eps"], lr=lrs[group[0]] if steps.is_cuda else lrs[group[0]].item(),
                weight_decay=inputs["weight_decay"], maximize=False,
            )  # fmt: skip

    return update


def _groups(params: list[Tensor], lrs: Tensor) -> list[list[int]]:
    """Which tensors share a learning rate; read from the device once and kept with the tensors."""
    groups: list[list[int]] | None = getattr(params[0], "groups", None)
    if groups is None:
        by_rate: dict[float, list[int]] = {}
        for index, rate in enumerate(lrs.tolist()):
            by_rate.setdefault(rate, []).append(index)
        groups = list(by_rate.values())
        params[0].groups = groups  # type: ignore[attr-defined]
    return groups


def _torch_optimizer(params: list[Tensor], grads: list[Tensor], **inputs: Any) -> None:
    """``torch.optim.AdamW(fused=True).step()`` as a program calls it, with a parameter group for each learning rate."""
    # Kept with the tensors that it steps, so that it goes when they go.
    optimizer = getattr(params[0], "stepped_by", None)
    if optimizer is None:
        _refuse_mixed(params, inputs["exp_avgs"])
        lrs = inputs["lrs"]
        optimizer = torch.optim.AdamW(
            [
                {"params": [params[index] for index in group], "lr": lrs[group[0]].item()}
                for group in _groups(params, lrs)
            ],
            betas=(inputs["beta1"], inputs["beta2"]), eps=inputs["eps"], weight_decay=inputs["weight_decay"],
            fused=True,
        )  # fmt: skip
        states = zip(params, grads, inputs["steps"], inputs["exp_avgs"], inputs["exp_avg_sqs"], strict=True)
        for param, grad, step, exp_avg, exp_avg_sq in states:
            param.grad = grad
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        params[0].stepped_by = optimizer  # type: ignore[attr-defined]
    optimizer.step()


def _refuse_mixed(params: list[Tensor], exp_avgs: list[Tensor]) -> None:
    if params[0].dtype != exp_avgs[0].dtype:
        raise ValueError(f"torch's AdamW has no {params[0].dtype} parameters with {exp_avgs[0].dtype} state")


PEERS = {
    "torch fused": _less_exact(_peer(fused=True)),
    "torch foreach": _less_exact(_peer(fused=False)),
    "torch.optim.AdamW": _less_exact(_torch_optimizer),
}
