"""The postsynaptic organ of profile P: linear layers whose weights are slow, fast and Hebbian, and consolidate.

    y = x (w_fast + m w_slow + H) + b

After each call, while training or not, eligibility traces follow the mean of x and y, H follows their product, and two
enzymes open or close the gate m of the slow weights. It starts closed, so the first call knows fast weights alone.

Upstream's H feeds the means it learns from, with a gain of about |mean x|^2: a model of the tiny size is all NaN within
20 steps. So the product of the traces enters with a norm of at most ``limit``, which leaves H one of at most
limit eta_fast / (1 - rho_elig); an infinite one is upstream's rule.

One layer serves for a dense feed-forward, or for all experts of a mixture with a leading dimension E in every tensor;
then ``row`` gives the tensors of one expert, which are views.

Cast order: weights, traces and enzymes are float32 or wider; the sum of the weights is rounded to the dtype of x once.

Shapes: N tokens, I inputs, O outputs, R rank of the traces, E experts (no such dimension in a dense layer).
Source: specification, section 4.1; by reading only, so that no golden vectors exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .synapses import SynapticConfig

CALCIUM_THRESHOLD, ENERGY_THRESHOLD = 0.2, 0.3
DENSE_CALCIUM, DENSE_ENERGY = 0.5, 0.8
"""What a dense feed-forward tells its synapses; experts say 1 and their own energy."""


class Plastic(NamedTuple):
    """Weights and plastic state of one layer, all views of it: [I, O], [I, O], [O], [I, R], [R, O], [I, O], 3 x [1]."""

    slow: Tensor
    fast: Tensor
    bias: Tensor
    trace_in: Tensor
    trace_out: Tensor
    hebbian: Tensor
    camkii: Tensor
    pp1: Tensor
    gate: Tensor


class Signals(NamedTuple):
    """What a layer is told when it consolidates, 0-dim tensors or numbers, or one of each per expert [E].

    Attributes:
        calcium, energy: activity and metabolic state.
        camkii_gain, pp1_gain: how fast the two enzymes move; experts have them from their genes.
    """

    calcium: Tensor | float
    energy: Tensor | float
    camkii_gain: Tensor | float
    pp1_gain: Tensor | float


class SynapticLinear(nn.Module):
    """Weights stored input by output, with the state that they learn by between gradients."""

    names = ("trace_in", "trace_out", "hebbian", "camkii", "pp1", "gate")

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: SynapticConfig,
        *,
        experts: int = 0,
        limit: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.limit = limit
        self.weights: Callable[[Plastic], Tensor] = effective
        wide = torch.promote_types(dtype, torch.float32)
        several = (experts,) if experts else ()

        def full(value: float, *shape: int) -> Tensor:
            return torch.full((*several, *shape), value, device=device, dtype=wide)

        self.slow = nn.Parameter(full(0.0, inputs, outputs))
        self.fast = nn.Parameter(full(0.0, inputs, outputs))
        self.bias = nn.Parameter(full(0.0, outputs))
        self.trace_in: Tensor
        self.trace_out: Tensor
        self.hebbian: Tensor
        self.camkii: Tensor
        self.pp1: Tensor
        self.gate: Tensor
        self.register_buffer("trace_in", full(0.0, inputs, config.rank_eligibility))
        self.register_buffer("trace_out", full(0.0, config.rank_eligibility, outputs))
        self.register_buffer("hebbian", full(0.0, inputs, outputs))
        self.register_buffer("camkii", full(0.0, 1))
        self.register_buffer("pp1", full(0.5, 1))
        self.register_buffer("gate", full(0.0, 1))

    def plastic(self) -> Plastic:
        """All tensors, with their leading E where there are experts."""
        return Plastic(self.slow, self.fast, self.bias, *(getattr(self, name) for name in self.names))

    def rows(self) -> list[Plastic]:
        """The tensors of each expert; gradients of all come together again in one."""
        return [Plastic(*row) for row in zip(*(entry.unbind() for entry in self.plastic()), strict=True)]

    def dense_signals(self) -> Signals:
        """What a layer without experts is told."""
        return Signals(DENSE_CALCIUM, DENSE_ENERGY, self.config.camkii_gain, self.config.pp1_gain)

    def forward(self, x: Tensor) -> Tensor:
        """A dense layer: multiply, then consolidate."""
        return self.call(self.plastic(), x, self.dense_signals())

    def call(self, plastic: Plastic, x: Tensor, signals: Signals) -> Tensor:
        """Multiply by one layer's weights, then let it consolidate."""
        y = x @ self.weights(plastic).to(x.dtype) + plastic.bias.to(x.dtype)
        with torch.no_grad():
            wide = plastic.hebbian.dtype
            mean_I, mean_O = (value.flatten(0, -2).mean(0, dtype=wide) for value in (x, y))
            self.consolidate(plastic, mean_I, mean_O, signals)
        return y

    @torch.no_grad()
    def consolidate(self, plastic: Plastic, mean_I: Tensor, mean_O: Tensor, signals: Signals) -> None:
        """Traces, Hebbian weights, enzymes and gate after a call whose inputs and outputs had these means."""
        config = self.config
        plastic.trace_in.mul_(config.rho_elig).add_(config.eta_elig * mean_I[:, None])
        plastic.trace_out.mul_(config.rho_elig).add_(config.eta_elig * mean_O[None, :])
        rate = config.eta_fast * bounded(plastic, self.limit)
        plastic.hebbian.mul_(config.rho_elig).add_(rate * (plastic.trace_in @ plastic.trace_out))
        move_enzymes(plastic, signals)


def effective(plastic: Plastic) -> Tensor:
    """w_fast + m w_slow + H, [I, O]; H and m are copied first, because they change before backward reads them."""
    hebbian, gate = plastic.hebbian.clone(), plastic.gate.clone()
    return plastic.fast + gate.unsqueeze(-1) * plastic.slow + hebbian


def effective_compiled(plastic: Plastic) -> Tensor:
    """:func:`effective` for torch.compile, whose backward pass keeps what an operator gives that it knows nothing of.

    A plain copy it makes again in backward, of an m that the call has moved in the meantime: wrong gradients of w_slow.
    """
    weights: Tensor = plastic.fast + kept(plastic.gate).unsqueeze(-1) * plastic.slow + kept(plastic.hebbian)
    return weights


@torch.library.custom_op("bio_nanochat::kept", mutates_args=())
def kept(value: Tensor) -> Tensor:
    """A copy, behind an operator of its own, so that it is made once."""
    return value.clone()


@kept.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def bounded(plastic: Plastic, limit: float) -> Tensor:
    """The factor [..., 1, 1] that brings the product of the traces to a norm of ``limit`` where it has more.

    All columns of a trace are equal, so the norm of the product is the product of the norms.
    """
    norms = [trace.norm(dim=(-2, -1), keepdim=True) for trace in (plastic.trace_in, plastic.trace_out)]
    factor: Tensor = (limit / (norms[0] * norms[1])).clamp(max=1)
    return factor


def move_enzymes(plastic: Plastic, signals: Signals) -> None:
    """CaMKII rises with calcium, PP1 where energy is short; their difference is the gate. In place."""
    rise = clamp_min(signals.calcium - CALCIUM_THRESHOLD) * signals.camkii_gain
    plastic.camkii.add_(rise).clamp_(0, 1)
    plastic.pp1.add_(clamp_min(ENERGY_THRESHOLD - signals.energy) * signals.pp1_gain).clamp_(0, 1)
    plastic.gate.copy_(torch.sigmoid(3 * (plastic.camkii - 0.5) - 2 * plastic.pp1))


def clamp_min(value: Tensor | float) -> Tensor | float:
    """``value``, or zero where it is negative."""
    return value.clamp(min=0) if isinstance(value, Tensor) else max(0.0, value)
