"""The nested optimizer: a small network sets the learning rate of two parameter groups, step by step.

AdamW moves the parameters, or in CMS mode what :mod:`.cms` has.

Shapes: G = 2 groups (core, embed), statistics [G, 3] = L2 norm of gradients, L2 norm of parameters, mean depth.
This is the state that the source document profiled: norms are read one by one, and guards are Python branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adamw import DeviceState, branchless_adamw
from .cms import TRAIN_EVERY, Momenta, active_levels
from .config import TitanConfig
from .model import TitanMac

LOWEST_MULTIPLIER, HIGHEST_MULTIPLIER = 0.1, 2.0
EMBED_WORDS = ("norm", "gate", "router")


class LearningRateController(nn.Module):
    """Learning rate multiplier per group, between 0.1 and 2.0, from the group's statistics."""

    def __init__(self, config: TitanConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        width = config.controller_width
        sizes = [3, *[width] * config.controller_layers]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs, device=device, dtype=dtype), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1, device=device, dtype=dtype))
        self.initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Xavier uniform weights, zero biases, drawn on the host."""
        for parameter in self.parameters():
            values = torch.zeros(parameter.shape)
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(values, generator=generator)
            parameter.copy_(values)

    def multipliers(self, statistics_G3: Tensor) -> Tensor:
        """The network's answer [G], unguarded."""
        shares_G = torch.sigmoid(self.net(statistics_G3).squeeze(-1))
        return LOWEST_MULTIPLIER + (HIGHEST_MULTIPLIER - LOWEST_MULTIPLIER) * shares_G

    def forward(self, statistics_G3: Tensor) -> Tensor:
        """Multipliers [G]; all 1.0 where a statistic or a multiplier is NaN or Inf."""
        if torch.isnan(statistics_G3).any() or torch.isinf(statistics_G3).any():
            return torch.ones_like(statistics_G3[:, 0])
        multipliers_G = self.multipliers(statistics_G3)
        if torch.isnan(multipliers_G).any() or torch.isinf(multipliers_G).any():
            return torch.ones_like(multipliers_G)
        return multipliers_G


class DeepNestedOptimizer:
    """AdamW or CMS over two groups whose learning rates a controller sets; a bad loss or gradient skips the step.

    ``calls`` counts calls of ``step``, skipped ones included, so the host knows every schedule without asking the
    device; AdamW's own counters count updates.
    """

    def __init__(self, model: TitanMac, config: TitanConfig, *, device: torch.device, seed: int) -> None:
        self.config = config
        self.device = device
        dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
        core, embed, depths = grouped(model, config.layers)
        self.adamw = torch.optim.AdamW(
            [{"params": core}, {"params": embed}],
            lr=config.base_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.momenta = None
        if config.optimizer == "cms":
            self.momenta = Momenta([core, embed], config, device=device, dtype=dtype, seed=seed)
        for parameter in (*core, *embed) if self.momenta is None else ():
            self.adamw.state[parameter] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self.controller = LearningRateController(config, device=device, dtype=dtype, seed=seed)
        self.meta = torch.optim.Adam(self.controller.parameters(), lr=config.meta_lr)
        self.calls = 0
        self.depths_G = torch.tensor(depths, dtype=dtype, device=device)
        ones_G = torch.ones(2, dtype=dtype, device=device)
        self.default_statistics_G3 = torch.stack([ones_G, ones_G, self.depths_G], dim=1)
        self.statistics_G3 = self.default_statistics_G3.clone()
        self.multipliers_G = ones_G.clone()
        self.good_multipliers_G = ones_G.clone()
        self.loss_average_G = torch.zeros_like(ones_G)
        self.earlier_average = torch.zeros((), dtype=dtype, device=device)
        self.device_state: DeviceState | None = None

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self, loss: float | Tensor) -> None:
        """One update; skipped where ``loss`` or the gradient norm is NaN or Inf. A loss on the device takes phase 0."""
        if isinstance(loss, Tensor):
            raise TypeError("a loss on the device needs phase 0 in place")
        self.count_call()
        if not math.isfinite(loss):
            return
        rate = self.config.loss_average_rate
        self.loss_average_G.mul_(1 - rate).add_(rate * loss)
        self.statistics_G3.copy_(self.group_statistics())
        if self.calls % self.config.controller_update_freq == 0:
            with torch.no_grad():
                self.multipliers_G.copy_(self.controller(self.statistics_G3))
        norm = self.clip_gradients()
        if not torch.isfinite(norm):
            return
        lrs = (self.config.base_lr * self.multipliers_G).tolist()
        self.move_parameters(lrs, True)

    def count_call(self) -> None:
        """What comes now and then: a meta update, which sees nothing of the step that it comes with."""
        self.calls += 1
        if self.calls % self.config.meta_update_freq == 0:
            self.meta_update()

    def move_parameters(self, lr: list[float] | Tensor, ok: bool | Tensor) -> None:
        """One update in the configured mode; arguments as for ``apply_update``."""
        if self.momenta is None:
            self.apply_update(lr, ok)
            return
        if self.calls % TRAIN_EVERY == 0:
            self.momenta.train(ok)
        self.momenta.update(lr, ok, active_levels(self.calls))

    @torch.no_grad()
    def group_statistics(self) -> Tensor:
        """Statistics [G, 3]; a norm that is NaN or Inf counts as 1."""
        statistics_G3 = torch.zeros_like(self.statistics_G3)
        for index, group in enumerate(self.adamw.param_groups):
            gradient_square = parameter_square = 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient_square += parameter.grad.norm().item() ** 2
                parameter_square += parameter.norm().item() ** 2
            depth = self.depths_G[index].item()
            row = (math.sqrt(gradient_square), math.sqrt(parameter_square), depth)
            for column, value in enumerate(row):
                statistics_G3[index, column].fill_(value if math.isfinite(value) else 1.0)
        return statistics_G3

    def clip_gradients(self) -> Tensor:
        """Scale all gradients to the largest allowed global norm; returns the norm before, 0-dim."""
        parameters = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)

    def apply_update(self, lr: list[float] | Tensor, ok: bool | Tensor) -> None:
        """AdamW with one learning rate per group.

        Host figures (``ok`` is then True) go through torch.optim.AdamW. Device tensors, lr [G] and a 0-dim bool, go
        through the branchless update, which leaves everything as it is where ``ok`` is False.
        """
        if isinstance(lr, Tensor):
            if not isinstance(ok, Tensor):
                raise TypeError("learning rates on the device need ok on the device")
            with torch.no_grad():
                config = self.config
                branchless_adamw(
                    self.attached_state(),
                    lr,
                    ok,
                    weight_decay=config.weight_decay,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                )
            return
        self.detach_state()
        for group, group_lr in zip(self.adamw.param_groups, lr, strict=True):
            group["lr"] = group_lr
        self.adamw.step()

    def attached_state(self) -> DeviceState:
        """AdamW's state with its counters on the device; attached anew only when other parameters have gradients."""
        if self.device_state is None or not self.device_state.covers(self.adamw):
            self.detach_state()
            self.device_state = DeviceState.attach(self.adamw, self.device)
        return self.device_state

    def detach_state(self) -> None:
        """Bring the step counters back to the host, if they are on the device."""
        if self.device_state is not None:
            self.device_state.detach(self.adamw)
            self.device_state = None

    def meta_update(self) -> None:
        """Train the controller once: towards the multipliers of the last window in which the loss fell."""
        average = self.loss_average_G.mean()
        if average < self.earlier_average:
            self.good_multipliers_G.copy_(self.multipliers_G)
        self.earlier_average.copy_(average)
        self.train_controller()

    @torch.enable_grad()
    def train_controller(self) -> None:
        """One Adam step on the distance to the good multipliers, less a bonus for spread."""
        multipliers_G = self.controller.multipliers(self.statistics_G3)
        distance = functional.mse_loss(multipliers_G, self.good_multipliers_G)
        proxy = distance - self.config.exploration * multipliers_G.var(correction=0)
        self.meta.zero_grad(set_to_none=True)
        proxy.backward()  # type: ignore[no-untyped-call]
        self.meta.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on; ``adamw`` is what torch.optim.AdamW loads."""
        return {
            "adamw": self.adamw.state_dict(),
            "meta": self.meta.state_dict(),
            "controller": self.controller.state_dict(),
            "calls": self.calls,
            **({} if self.momenta is None else {"momenta": self.momenta.state_dict()}),
            **{name: getattr(self, name) for name in self.tensor_names},
        }

    tensor_names = ("statistics_G3", "multipliers_G", "good_multipliers_G", "loss_average_G", "earlier_average")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``; step counters return to the host."""
        self.device_state = None
        self.adamw.load_state_dict(state["adamw"])
        for entry in self.adamw.state.values():
            entry["step"] = entry["step"].detach().to("cpu", copy=True)
        self.meta.load_state_dict(state["meta"])
        self.controller.load_state_dict(state["controller"])
        self.calls = state["calls"]
        if self.momenta is not None:
            self.momenta.load_state_dict(state["momenta"])
        for name in self.tensor_names:
            getattr(self, name).copy_(state[name])


def grouped(model: TitanMac, layers: int) -> tuple[list[nn.Parameter], list[nn.Parameter], list[float]]:
    """Parameters of the core group (2-D) and the embed group (the rest, and all norms and gates), and mean depths."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    depths: tuple[list[float], list[float]] = ([], [])
    for name, parameter in model.named_parameters():
        index = int(parameter.dim() != 2 or any(word in name for word in EMBED_WORDS))
        groups[index].append(parameter)
        depths[index].append(depth(name, layers))
    return *groups, [sum(values) / len(values) for values in depths]


def depth(name: str, layers: int) -> float:
    """How deep a parameter lies: embeddings 0, layer i (i + 1) / layers, final norm 1, everything else 0.5."""
    part, _, rest = name.partition(".")
    if part in ("embedding", "position"):
        return 0.0
    if part == "blocks":
        return (int(rest.partition(".")[0]) + 1) / layers
    return 1.0 if part == "norm" else 0.5
