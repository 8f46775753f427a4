"""AdamW without host reads: learning rates, step counters and the decision to skip stay on the device.

Shapes: n tensors with gradients, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Tensors ``first`` to ``last`` (excluded) of one parameter group and one step count: one set of scalars serves."""

    group: int
    first: int
    last: int


@dataclass(frozen=True)
class DeviceState:
    """The state of a torch.optim.AdamW, laid out for updates on the device.

    ``steps_n`` (float32) is what the optimizer's own step entries are views of, so its state_dict stays true.
    """

    parameters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps_n: Tensor
    group_n: Tensor
    buckets: list[Bucket]

    @classmethod
    def attach(cls, adamw: torch.optim.AdamW, device: torch.device) -> DeviceState:
        """Move the step counters of all parameters with gradients to ``device``. Reads counters: not for every step."""
        entries = [
            (group, float(adamw.state[parameter]["step"]), parameter)
            for group, options in enumerate(adamw.param_groups)
            for parameter in options["params"]
            if parameter.grad is not None
        ]
        entries.sort(key=lambda entry: entry[:2])
        parameters: list[Tensor] = [parameter for _, _, parameter in entries]
        steps_n = torch.tensor([step for _, step, _ in entries], dtype=torch.float32, device=device)
        group_n = torch.tensor([group for group, _, _ in entries], dtype=torch.int64, device=device)
        for parameter, step in zip(parameters, steps_n.unbind(), strict=True):
            adamw.state[parameter]["step"] = step
        return cls(
            parameters=parameters,
            exp_avgs=[adamw.state[parameter]["exp_avg"] for parameter in parameters],
            exp_avg_sqs=[adamw.state[parameter]["exp_avg_sq"] for parameter in parameters],
            steps_n=steps_n,
            group_n=group_n,
            buckets=_buckets([entry[:2] for entry in entries]),
        )

    def detach(self, adamw: torch.optim.AdamW) -> None:
        """Give the counters back to the host, one read for all, as torch.optim.AdamW keeps them by default."""
        for parameter, step in zip(self.parameters, self.steps_n.tolist(), strict=True):
            adamw.state[parameter]["step"] = torch.tensor(step, dtype=torch.float32)

    def covers(self, adamw: torch.optim.AdamW) -> bool:
        """Whether the parameters with gradients are still those of ``attach``."""
        having = sum(parameter.grad is not None for options in adamw.param_groups for parameter in options["params"])
        return having == len(self.parameters) and all(parameter.grad is not None for parameter in self.parameters)

    def gradients(self) -> list[Tensor]:
        """The gradients of this step, in the order of ``parameters``."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _buckets(keys: Sequence[tuple[int, float]]) -> list[Bucket]:
    starts = [index for index, key in enumerate(keys) if index == 0 or key != keys[index - 1]]
    return [Bucket(keys[first][0], first, last) for first, last in zip(starts, [*starts[1:], len(keys)], strict=True)]


def branchless_adamw(
    state: DeviceState,
    lr_G: Tensor,
    ok: Tensor,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW update in place; where ``ok`` is False, parameters, moments and counters keep every bit.

    A skipped step is an update by zero: the gradient is replaced by 0 (NaN times 0 is NaN), and the shares by which the
    moments move become -0.0, because x + -0.0 is x also for x = -0.0. From a parameter +0.0 is taken, for that reason.

    Args:
        lr_G: learning rate per parameter group, on the device.
        ok: 0-dim bool on the device.
    """
    bad = ~ok
    dtype, device = state.parameters[0].dtype, lr_G.device
    share1 = torch.full((), 1 - beta1, dtype=dtype, device=device).masked_fill(bad, -0.0)
    share2 = torch.full((), 1 - beta2, dtype=dtype, device=device).masked_fill(bad, -0.0)
    gradients = [gradient.masked_fill(bad, 0.0) for gradient in state.gradients()]
    state.steps_n.add_(ok)
    for group, first, last in state.buckets:
        parameters = state.parameters[first:last]
        # A skipped first step has count 0, whose corrections would divide by zero.
        step = state.steps_n[first].double().clamp(min=1.0)
        lr = lr_G[group].double().masked_fill(bad, 0.0)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        torch._foreach_mul_(parameters, (1 - lr * weight_decay).to(dtype))
        _move(state.exp_avgs[first:last], gradients[first:last], share1)
        squares = torch._foreach_mul(gradients[first:last], gradients[first:last])
        _move(state.exp_avg_sqs[first:last], squares, share2)
        denominators = torch._foreach_sqrt(state.exp_avg_sqs[first:last])
        torch._foreach_div_(denominators, correction2.sqrt().to(dtype))
        torch._foreach_add_(denominators, eps)
        changes = list(torch._foreach_div(state.exp_avgs[first:last], denominators))
        torch._foreach_mul_(changes, (lr / correction1).to(dtype))
        torch._foreach_add_(changes, 0.0)
        torch._foreach_sub_(parameters, changes)


def _move(averages: list[Tensor], values: list[Tensor] | tuple[Tensor, ...], share: Tensor) -> None:
    """Move each average towards its value by ``share``, in place."""
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, share)
    torch._foreach_add_(averages, differences)
