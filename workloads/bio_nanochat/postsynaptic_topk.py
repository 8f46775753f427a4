"""The postsynaptic organ of profile K: two weights, diagonal gains, low-rank gain, and an online Hebbian update.

    y0 = x w_slow + (x w_fast) clip(ca en, 0, 1) + b;   y = y0 (1 + fast + slow) + y0 (U V)

The update runs only where gradients are off, so never in a training step. Guards against NaN read the device, as
upstream's do. With ``enable_hebbian`` off there are no gains and no update.

Shapes: N tokens, I inputs, O outputs, R rank; a leading E in every tensor of experts.
Source: specification, section 4.2; by reading only. The order of upstream's seven reads is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .postsynaptic import DENSE_CALCIUM, DENSE_ENERGY, Signals, kept
from .synapses import TopKConfig

MEAN_LIMIT = 10.0
TRACE_RATE = 0.05


class TopKPlastic(NamedTuple):
    """Weights and plastic state of one layer, all views of it."""

    slow: Tensor
    fast: Tensor
    bias: Tensor
    fast_gain: Tensor
    slow_gain: Tensor
    gain_in: Tensor
    gain_out: Tensor
    trace_in: Tensor
    trace_out: Tensor
    camkii: Tensor
    pp1: Tensor
    bdnf: Tensor
    accumulated: Tensor
    last_change: Tensor


class TopKLinear(nn.Module):
    """Weights stored input by output; enzymes and growth factor by output."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: TopKConfig,
        *,
        experts: int = 0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        wide = torch.promote_types(dtype, torch.float32)
        several = (experts,) if experts else ()
        rank = config.rank_eligibility

        def full(value: float, *shape: int) -> Tensor:
            return torch.full((*several, *shape), value, device=device, dtype=wide)

        shapes = {
            "slow": (inputs, outputs), "fast": (inputs, outputs), "bias": (outputs,), "fast_gain": (outputs,),
            "slow_gain": (outputs,), "gain_in": (outputs, rank), "gain_out": (rank, outputs),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(full(0.0, *shape)))
        self.register_buffer("trace_in", full(0.0, inputs, rank))
        self.register_buffer("trace_out", full(0.0, rank, outputs))
        for name, value in {"camkii": 0.0, "pp1": 0.5, "bdnf": 0.0, "accumulated": 0.0}.items():
            self.register_buffer(name, full(value, outputs))
        self.register_buffer("last_change", full(0.0, 1))
        self.logged_change = 0.0
        self.drive: Callable[[Signals], Tensor | float] = drive

    def plastic(self) -> TopKPlastic:
        """All tensors, with their leading E where there are experts."""
        return TopKPlastic(*(getattr(self, name) for name in TopKPlastic._fields))

    def rows(self) -> list[TopKPlastic]:
        """The tensors of each expert; gradients of all come together again in one."""
        return [TopKPlastic(*row) for row in zip(*(entry.unbind() for entry in self.plastic()), strict=True)]

    def dense_signals(self) -> Signals:
        """What a layer without experts is told; its enzymes move at their own rates."""
        return Signals(DENSE_CALCIUM, DENSE_ENERGY, 1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """A dense layer: multiply, then learn where gradients are off."""
        return self.call(self.plastic(), x, self.dense_signals())

    def call(self, plastic: TopKPlastic, x: Tensor, signals: Signals) -> Tensor:
        """Multiply by one layer's weights, then let it learn where gradients are off."""
        y = multiply(plastic, x, self.drive(signals), hebbian=self.config.enable_hebbian)
        if self.config.enable_hebbian and not torch.is_grad_enabled():
            self.learn(plastic, x, y, signals)
        return y

    def learn(self, plastic: TopKPlastic, x: Tensor, y: Tensor, signals: Signals) -> None:
        """The online update after a call; one guard for what comes in, five for what is written, one read to log."""
        wide = plastic.slow.dtype
        mean_I, mean_O = (value.flatten(0, -2).mean(0, dtype=wide) for value in (x, y))
        if torch.isnan(mean_I.sum() + mean_O.sum()):
            return
        follow(plastic, mean_I, mean_O, y, signals, self.config)
        if torch.isnan(plastic.accumulated).any():
            plastic.accumulated.zero_()
        change = hebbian_change(plastic, self.config)
        if torch.isnan(change.weight).any() or torch.isinf(change.weight).any():
            return
        write_fast(plastic, change, self.config)
        if not (torch.isnan(change.slow_gain).any() or torch.isinf(change.slow_gain).any()):
            plastic.slow_gain.add_(change.slow_gain)
        plastic.last_change.copy_(change.weight.norm())
        self.logged_change = plastic.last_change.item()


class Change(NamedTuple):
    """What an online update adds: the Hebbian product [I, O], its diagonal or column mean [O], a share of it [O]."""

    weight: Tensor
    gain: Tensor
    slow_gain: Tensor


def drive(signals: Signals) -> Tensor | float:
    """How much the fast weights count, in [0, 1]: calcium times energy; 0-dim."""
    product = signals.calcium * signals.energy
    return product.clamp(0, 1) if isinstance(product, Tensor) else min(max(product, 0.0), 1.0)


def drive_compiled(signals: Signals) -> Tensor | float:
    """:func:`drive` for torch.compile, whose backward pass would make it again from energies that moved meanwhile."""
    energy = signals.energy
    return drive(signals._replace(energy=kept(energy) if isinstance(energy, Tensor) else energy))


def multiply(plastic: TopKPlastic, x: Tensor, drive: Tensor | float, *, hebbian: bool) -> Tensor:
    """The layer's output, its fast weights by ``drive``; ``U V`` is built each call, [O, O]."""
    drive = drive.to(x.dtype) if isinstance(drive, Tensor) else drive
    y = x @ plastic.slow.to(x.dtype) + (x @ plastic.fast.to(x.dtype)) * drive + plastic.bias.to(x.dtype)
    if not hebbian:
        return y
    low_rank = (plastic.gain_in @ plastic.gain_out).to(x.dtype)
    return y * (1 + plastic.fast_gain + plastic.slow_gain).to(x.dtype) + y @ low_rank


def follow(
    plastic: TopKPlastic, mean_I: Tensor, mean_O: Tensor, y: Tensor, signals: Signals, config: TopKConfig
) -> None:
    """Traces and both enzymes after a call. In place."""
    plastic.trace_in.mul_(config.post_trace_decay).add_(TRACE_RATE * mean_I[:, None])
    plastic.trace_out.mul_(config.post_trace_decay).add_(TRACE_RATE * mean_O[None, :])
    activity = y.flatten(0, -2).abs().mean(0, dtype=plastic.slow.dtype).clamp(0, MEAN_LIMIT)
    move_enzymes(plastic, activity, signals, config)


def move_enzymes(plastic: TopKPlastic, activity: Tensor, signals: Signals, config: TopKConfig) -> None:
    """CaMKII and PP1 towards 1 where their output is above or below its threshold. In place."""
    up, rate = signals.camkii_gain * config.camkii_up, signals.pp1_gain * (1 - config.pp1_tau)
    up = up.clamp(max=1) if isinstance(up, Tensor) else min(up, 1.0)
    rate = rate.clamp(0, 1) if isinstance(rate, Tensor) else min(max(rate, 0.0), 1.0)
    active = (activity > config.camkii_thr).to(activity.dtype)
    plastic.camkii.add_(up * active * (1 - plastic.camkii)).clamp_(0, 1)
    quiet = (activity < config.pp1_thr).to(activity.dtype)
    plastic.pp1.copy_((1 - rate) * plastic.pp1 + rate * quiet)


def hebbian_change(plastic: TopKPlastic, config: TopKConfig) -> Change:
    """The growth factor after a call, in place, and what the traces say should change.

    u v is formed three times, as upstream does: for the weights, for its diagonal, and for what accumulates.
    """
    source = plastic.accumulated if config.bdnf_hebb_accumulate else (plastic.camkii - 0.5).relu()
    plastic.bdnf.copy_((config.bdnf_tau * plastic.bdnf + (1 - config.bdnf_tau) * source).clamp(0, config.bdnf_max))
    gate = torch.sigmoid(plastic.camkii - 0.5) - 0.3
    weight = (plastic.trace_in @ plastic.trace_out) * gate.mean(-1)[..., None, None]
    gain = diagonal(plastic.trace_in @ plastic.trace_out)
    again = diagonal(plastic.trace_in @ plastic.trace_out)
    followed = config.bdnf_tau * plastic.accumulated + (1 - config.bdnf_tau) * again.abs()
    plastic.accumulated.copy_(followed.clamp(0, config.bdnf_max))
    gamma = config.bdnf_gamma if config.bdnf_gamma > 0 else config.bdnf_scale
    return Change(weight, gain, config.post_slow_lr * (1 + gamma * plastic.bdnf) * gain * gate)


def diagonal(product_IO: Tensor) -> Tensor:
    """The diagonal of a square product, the column mean of another; [O]."""
    inputs, outputs = product_IO.shape[-2:]
    return product_IO.diagonal(dim1=-2, dim2=-1) if inputs == outputs else product_IO.mean(-2)


def write_fast(plastic: TopKPlastic, change: Change, config: TopKConfig) -> None:
    """Both weights and the fast gain. In place."""
    plastic.fast.mul_(config.post_fast_decay).add_(config.post_fast_lr * change.weight)
    plastic.slow.add_(config.post_slow_lr * change.weight)
    plastic.fast_gain.mul_(config.post_fast_decay).add_(config.post_fast_lr * change.gain)
