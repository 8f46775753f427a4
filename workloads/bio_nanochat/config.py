"""Sizes and settings of one bio-nanochat run; every preset is one value of :class:`BioConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .synapses import Synapses, SynapticConfig, TopKConfig, refuse_unknown_words


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """When experts merge, split and are reset, and how. Specification, section 7.

    Attributes:
        every: steps from one call of the controller to the next; 0 never calls it.
        ddp_broadcast: every rank makes the first rank's moves, instead of its own.
        patch: what becomes of the optimizer state of an overwritten expert: zero, as upstream, or the parent's.
    """

    every: int = 1000
    min_step_interval: int = 10_000
    warmup_steps: int = 20_000
    merge_cosine_threshold: float = 0.85
    merge_health_max: float = 0.25
    merges_per_call: int = 1
    split_health_min: float = 0.80
    splits_per_call: int = 1
    reset_health_max: float = 0.02
    resets_per_call: int = 1
    noise_linear: float = 0.02
    noise_router: float = 0.01
    noise_embedding: float = 0.05
    use_util_weighting: bool = True
    ddp_broadcast: bool = True
    patch: Literal["zero", "inherit"] = "zero"

    def __post_init__(self) -> None:
        refuse_unknown_words(self)


@dataclass(frozen=True, kw_only=True)
class BioConfig:
    """Body, synapses, data and optimizers.

    Attributes:
        synapses: settings of profile P or K; None is the vanilla model without any.
        dock: "qk", or "upstream" with its transposed docking (profile P only).
        hebbian_limit: largest norm with which the traces' product enters H (profile P); upstream has none and diverges.
        experts: 0 is a dense feed-forward, more a mixture of which each token takes ``chosen``.
        step: one training step, or a forward pass with gradients off, where profile K writes its weights online.
        optimizer: AdamW for all, or Muon for the matrices of the blocks.
    """

    vocabulary: int = 1024
    length: int = 64
    batch: int = 4
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    width: int = 128
    hidden_multiple: int = 2
    experts: int = 0
    chosen: int = 2
    balance: float = 0.01
    synapses: Synapses | None = field(default_factory=SynapticConfig)
    dock: Literal["qk", "upstream"] = "qk"
    hebbian_limit: float = 1.0
    step: Literal["train", "forward"] = "train"
    structure: StructureConfig = field(default_factory=StructureConfig)

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    head_lr: float = 0.004
    embedding_lr: float = 0.2
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-10
    clip: float = 1.0
    log_every: int = 100

    def __post_init__(self) -> None:
        refuse_unknown_words(self)
        if self.dock == "upstream" and not isinstance(self.synapses, SynapticConfig):
            raise ValueError('dock="upstream" is one of profile P; leave it out')
        if self.width % self.heads or self.heads % self.kv_heads or (self.width // self.heads) % 2:
            raise ValueError("width is an even multiple of heads, and heads one of kv_heads")
        if self.experts and not 0 < self.chosen <= self.experts:
            raise ValueError(f"a token takes {self.chosen} of {self.experts} experts")
        if self.experts and self.synapses is None:
            raise ValueError("the vanilla model has no experts")
        if self.vocabulary < 256:
            raise ValueError("tokens are bytes, so a vocabulary has at least 256")

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.width // self.heads


def bench(**changes: object) -> BioConfig:
    """The sizes that the specification asks to measure: 12 layers, 768 features, 2048 tokens."""
    sizes: dict[str, object] = {
        "vocabulary": 50_257, "length": 2048, "layers": 12, "heads": 12, "kv_heads": 12, "width": 768,
        "hidden_multiple": 4, "optimizer": "muon",
    }  # fmt: skip
    return BioConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def small(**changes: object) -> BioConfig:
    """4 layers of 256 features, 512 tokens."""
    sizes: dict[str, object] = {"length": 512, "batch": 8, "layers": 4, "width": 256, "hidden_multiple": 4}
    return BioConfig(**{**sizes, **changes})  # type: ignore[arg-type]


LIVELY = StructureConfig(
    every=2, min_step_interval=0, warmup_steps=0, merge_cosine_threshold=0.1, merge_health_max=1.0,
    split_health_min=0.5,
)  # fmt: skip
"""Merges and splits every second step, so that ten steps of parity see some."""

PRESETS = {
    "tiny": BioConfig(experts=4),
    "tiny-dense": BioConfig(hidden_multiple=4),
    "tiny-deterministic": BioConfig(hidden_multiple=4, synapses=SynapticConfig(stochastic_train_frac=0.0)),
    "tiny-upstream": BioConfig(hidden_multiple=4, dock="upstream"),
    "tiny-muon": BioConfig(experts=4, optimizer="muon"),
    "tiny-structure": BioConfig(experts=4, structure=LIVELY),
    "tiny-k": BioConfig(width=64, experts=4, synapses=TopKConfig()),
    "tiny-k-dense": BioConfig(width=64, hidden_multiple=4, synapses=TopKConfig()),
    "tiny-k-forward": BioConfig(width=64, experts=4, synapses=TopKConfig(), step="forward"),
    "tiny-vanilla": BioConfig(hidden_multiple=4, synapses=None),
    "small": small(),
    "small-moe": small(experts=8),
    "small-vanilla": small(synapses=None),
    "bench": bench(),
    "bench-deterministic": bench(synapses=SynapticConfig(stochastic_train_frac=0.0)),
    "bench-forward": bench(step="forward"),
    "bench-k": bench(synapses=TopKConfig()),
    "bench-vanilla": bench(synapses=None),
    "bench-1280": bench(heads=10, kv_heads=10, width=1280, layers=2),
    "bench-1280-forward": bench(heads=10, kv_heads=10, width=1280, layers=2, step="forward"),
    "bench-4096": bench(heads=32, kv_heads=32, width=4096, layers=1, batch=1),
    "bench-4096-forward": bench(heads=32, kv_heads=32, width=4096, layers=1, batch=1, step="forward"),
    "moe-4": bench(layers=4, experts=4),
    "moe-8": bench(layers=4, experts=8),
    "moe-16": bench(layers=4, experts=16),
    "moe-64": bench(layers=4, experts=64),
}
