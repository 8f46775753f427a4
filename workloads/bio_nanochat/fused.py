"""The kernels' places in the model: what a phase puts there, with an operator in one of its implementations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

PresynAttention = Callable[..., tuple[Tensor, ...]]
RATES = (
    "tau_c", "tau_buf", "alpha_ca", "alpha_buf_on", "alpha_buf_off", "tau_prime", "tau_rrp", "alpha_prime",
    "alpha_unprime", "alpha_refill", "tau_energy", "energy_in", "energy_cost_rel", "energy_cost_pump", "syt_fast_kd",
    "syt_slow_kd", "complexin_bias", "qmax", "q_beta", "barrier_strength", "epsilon",
)  # fmt: skip
"""The fields of the config that ``presyn_attention`` takes, in its order."""
