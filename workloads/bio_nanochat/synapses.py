"""The settings of the synapses, field by field under their names upstream: profile P and profile K.

Fields in ``UNREAD`` steer nothing here and nothing upstream, or modules outside of the workload; they are kept so that
a config of either profile can be given as it is. Time constants tau_* are in calls of the rule, rates are per call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

ReleaseMode = Literal["normal_reparam", "gumbel_sigmoid_ste", "straight_through"]

SWITCHES = ("native_presyn", "native_metrics", "native_genetics", "native_plasticity")
LEAST_GENES = 4
UNREAD = frozenset(
    {
        "enabled",
        "alpha_recycle",
        "eta_slow",
        "router_sim_threshold",
        "camkii_down",
        "structural_interval",
        "structural_tau_util",
        "structural_age_bias",
    }
)


@dataclass(frozen=True, kw_only=True)
class SynapticConfig:
    """Profile P, the one that the kernel plan was written for: 44 fields. Specification, section 3.1."""

    tau_c: float = 4.0
    tau_buf: float = 10.0
    alpha_ca: float = 0.25
    alpha_buf_on: float = 0.6
    alpha_buf_off: float = 0.1

    tau_prime: float = 18.0
    tau_rrp: float = 40.0
    alpha_prime: float = 0.10
    alpha_unprime: float = 0.04
    alpha_refill: float = 0.04
    alpha_recycle: float = 0.02

    tau_energy: float = 80.0
    energy_in: float = 0.03
    energy_cost_rel: float = 0.015
    energy_cost_pump: float = 0.006

    syt_fast_kd: float = 0.4
    syt_slow_kd: float = 3.0
    complexin_bias: float = 0.5
    qmax: float = 1.3
    q_beta: float = 2.0

    rank_eligibility: int = 16
    rho_elig: float = 0.95
    eta_elig: float = 0.02
    eta_fast: float = 0.03
    eta_slow: float = 0.002
    camkii_gain: float = 1.5
    pp1_gain: float = 1.0

    barrier_strength: float = 0.075
    stochastic_train_frac: float = 0.10
    stochastic_quanta: int = 8
    epsilon: float = 1e-6

    structural_interval: int = 50_000
    structural_tau_util: float = 0.2
    structural_age_bias: float = 1.0
    router_embed_dim: int = 24
    router_contrastive_lr: float = 1e-4
    router_contrastive_push: float = 0.1
    router_sim_threshold: float = 0.6
    xi_dim: int = 4

    enabled: bool = True
    native_presyn: bool = False
    native_metrics: bool = False
    native_genetics: bool = False
    native_plasticity: bool = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Profile K, release at the top-k keys of a query: 80 fields. Specification, section 3.2.

    ``tau_c`` multiplies calcium as it is; in the rules R2 and R3 it would be a time constant.
    """

    enabled: bool = True
    rank_eligibility: int = 8
    attn_topk: int = 32
    stochastic_train_frac: float = 0.12
    stochastic_mode: ReleaseMode = "normal_reparam"
    stochastic_tau: float = 1.0
    stochastic_count_cap: int = 8

    tau_c: float = 0.85
    alpha_c: float = 0.55
    syt1_slope: float = 8.0
    syt7_slope: float = 3.0
    cpx_thresh: float = 0.55
    doc2_gain: float = 0.08
    prime_rate: float = 0.075
    unprime_per_release: float = 0.05
    nsf_recover: float = 0.08
    rec_rate: float = 0.06
    endo_delay: int = 3
    amp_load: float = 0.02
    amp_leak: float = 0.006

    init_rrp: float = 6.0
    init_reserve: float = 18.0
    init_snare: float = 0.7
    init_clamp: float = 0.6
    init_amp: float = 1.0
    init_energy: float = 0.85

    energy_fill: float = 0.02
    energy_use: float = 0.02
    energy_max: float = 1.0

    lambda_loge: float = 1.0
    barrier_strength: float = 0.1
    epsilon: float = 1e-6

    tau_buf: float = 4.0
    tau_prime: float = 5.0
    tau_rrp: float = 40.0
    tau_energy: float = 50.0
    alpha_ca: float = 0.55
    alpha_buf_on: float = 0.1
    alpha_buf_off: float = 0.1
    alpha_prime: float = 0.1
    alpha_unprime: float = 0.1
    alpha_refill: float = 0.1
    energy_in: float = 0.01
    energy_cost_rel: float = 0.015
    energy_cost_pump: float = 0.01
    syt_fast_kd: float = 0.4
    syt_slow_kd: float = 1.0
    complexin_bias: float = 0.0
    qmax: float = 2.0
    q_beta: float = 1.0

    post_fast_decay: float = 0.95
    post_fast_lr: float = 1.5e-3
    post_slow_lr: float = 5e-4
    post_trace_decay: float = 0.96
    camkii_up: float = 0.05
    camkii_down: float = 0.02
    pp1_tau: float = 0.985
    camkii_thr: float = 1.0
    pp1_thr: float = 0.7
    bdnf_tau: float = 0.985
    bdnf_scale: float = 1.0
    bdnf_gamma: float = 0.0
    bdnf_hebb_accumulate: bool = True
    bdnf_max: float = 10.0

    structural_interval: int = 50_000
    structural_tau_util: float = 0.2
    structural_age_bias: float = 1.0
    router_embed_dim: int = 24
    router_contrastive_lr: float = 1e-4
    router_contrastive_push: float = 0.1
    router_sim_threshold: float = 0.6
    xi_dim: int = 4

    enable_presyn: bool = True
    enable_hebbian: bool = True
    enable_metabolism: bool = True
    use_flex_attention: bool = False
    native_presyn: bool = False
    native_metrics: bool = False
    native_genetics: bool = False
    native_plasticity: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.use_flex_attention:
            raise ValueError("use_flex_attention is on, which is another rule than profile K's; leave it off")


Synapses = SynapticConfig | TopKConfig


def check(config: Synapses) -> None:
    """Kernels come in by phases, never by a field that nobody would see at work.

    Raises:
        ValueError: a switch of the config is on, genes are missing, or a word is none of the known ones.
    """
    on = [name for name in SWITCHES if getattr(config, name)]
    if on:
        raise ValueError(f"{on[0]} is on: leave it off and swap the phase in, for example by its BIO_FUSED_ flag")
    if config.xi_dim < LEAST_GENES:
        raise ValueError(f"xi_dim is {config.xi_dim}: a genome has at least {LEAST_GENES} genes")
    refuse_unknown_words(config)


def refuse_unknown_words(config: object) -> None:
    """Raises ValueError where a field takes one of a few words and has another."""
    for name, kind in get_type_hints(type(config)).items():
        word = getattr(config, name)
        if get_origin(kind) is Literal and word not in get_args(kind):
            raise ValueError(f"{name} is {word!r}; it can be {' or '.join(map(repr, get_args(kind)))}")
