"""The kernels' places in the model: what a phase puts there, with an operator in one of its implementations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernbench.device import warn_once

from .attention import SynapticAttention, TopKAttention
from .noise import Noise
from .presynaptic import State
from .topk import EdgeState

PresynAttention = Callable[..., tuple[Tensor, ...]]
Attend = Callable[[SynapticAttention, Tensor, Tensor, Tensor, State, Noise | None], tuple[Tensor, State, Tensor]]
RATES = (
    "tau_c", "tau_buf", "alpha_ca", "alpha_buf_on", "alpha_buf_off", "tau_prime", "tau_rrp", "alpha_prime",
    "alpha_unprime", "alpha_refill", "tau_energy", "energy_in", "energy_cost_rel", "energy_cost_pump", "syt_fast_kd",
    "syt_slow_kd", "complexin_bias", "qmax", "q_beta", "barrier_strength", "epsilon",
    "stochastic_train_frac",
)  # fmt: skip
"""The fields of the config that ``presyn_attention`` takes as they are, in its order; last it takes how many quanta."""
TRANSPOSED = 'presyn_attention docks as "qk": layers with upstream\'s docking run as the baseline does'
OF_PROFILE_P = "presyn_attention computes profile P's rule: attention of profile K runs as the baseline does"
plain: Attend = SynapticAttention.attend
plain_topk = TopKAttention.attend


def adapt_presyn_attention(op: PresynAttention) -> Attend:
    """``SynapticAttention.attend`` through ``op``, the ``presyn_attention`` kernel in one of its implementations."""

    def attend(
        self: SynapticAttention, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, state: State, noise: Noise | None
    ) -> tuple[Tensor, State, Tensor]:
        if self.config.dock != "qk":
            warn_once(TRANSPOSED)
            return plain(self, q_BHTD, k_BHTD, v_BHTD, state, noise)
        seed = None if noise is None else noise.seed
        # As the rule has it; the kernel refuses what it would divide by zero.
        quanta = max(1, self.synapses.stochastic_quanta)
        rates = [*(float(getattr(self.synapses, name)) for name in RATES), float(quanta)]
        y_BHTD, calcium, buffer, pool, reserve, primed, energy, used = op(
            q_BHTD, k_BHTD, v_BHTD, *state, rates=rates, seed=seed
        )
        return y_BHTD, State(calcium, buffer, pool, reserve, primed, state.clamp, energy), used

    return attend


def attend_topk(
    self: TopKAttention, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, state: EdgeState, noise: Noise | None
) -> tuple[Tensor, EdgeState]:
    """``TopKAttention.attend`` as it was, said aloud."""
    warn_once(OF_PROFILE_P)
    return plain_topk(self, q_BHTD, k_BHTD, v_BHTD, state, noise)
