"""Sizes and settings of one TTS decoder; every preset is one value of this type."""

from __future__ import annotations

from dataclasses import dataclass, field

FRAMES_PER_SECOND = 12.5
"""1920 samples at 24 kHz a frame."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One transformer: the talker or the code predictor.

    Attributes:
        sections: frequencies per axis (time, height, width) where rotation is multimodal and interleaved; else empty.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    theta: float = 1e6
    eps: float = 1e-6
    sections: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} heads of keys and values")
        if self.sections and sum(self.sections) != self.head_dim // 2:
            raise ValueError(
                f"sections {self.sections} do not add up to the {self.head_dim // 2} frequencies of a head"
            )


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the talker's codec vocabulary, and of the text vocabulary (``text_``)."""

    pad: int = 2148
    begin: int = 2149
    end: int = 2150
    no_think: int = 2155
    think_begin: int = 2156
    think_end: int = 2157
    text_pad: int = 151671
    text_begin: int = 151672


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next code is chosen.

    Attributes:
        temperature: of the semantic token; 0 takes the most likely one.
        acoustic_temperature: of the acoustic codes, with the same ``top_k``.
        suppress_from: semantic ids from here on are never chosen, except the end token.
        end_after: frames before which the end token is not chosen; None suppresses it for good.
    """

    temperature: float = 0.9
    acoustic_temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.9
    penalty: float = 1.05
    suppress_from: int = 2048
    end_after: int | None = None


@dataclass(frozen=True, kw_only=True)
class TtsConfig:
    """Model, prompt and sampling.

    Attributes:
        groups: codes of one frame, one semantic and the others acoustic.
        positions: of the talker's cache: prompt and frames together.
        prompt: positions that are filled before the first frame.
    """

    talker: StackConfig
    predictor: StackConfig
    groups: int = 16
    codec_vocabulary: int = 3072
    acoustic_vocabulary: int = 2048
    text_vocabulary: int = 151936
    text_hidden: int = 2048
    positions: int = 1024
    prompt: int = 16
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if not 5 <= self.prompt < self.positions:
            raise ValueError(f"a prompt of {self.prompt} positions does not fit; give 5 to {self.positions - 1}")

    @property
    def frames(self) -> int:
        """Frames of one utterance."""
        return self.positions - self.prompt

    @property
    def projected(self) -> bool:
        """Whether the predictor's inputs are projected to its width."""
        return self.talker.hidden != self.predictor.hidden


PREDICTOR = StackConfig(layers=5, hidden=1024, intermediate=3072)
PRESETS = {
    "tiny": TtsConfig(
        talker=StackConfig(
            layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, sections=(12, 10, 10)
        ),
        predictor=StackConfig(layers=1, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32),
        groups=4,
        text_vocabulary=512,
        text_hidden=256,
        positions=256,
        tokens=SpecialTokens(text_pad=509, text_begin=510),
    ),
    "0.6b": TtsConfig(
        talker=StackConfig(layers=28, hidden=1024, intermediate=3072, sections=(24, 20, 20)), predictor=PREDICTOR
    ),
    "1.7b": TtsConfig(
        talker=StackConfig(layers=28, hidden=2048, intermediate=6144, sections=(24, 20, 20)), predictor=PREDICTOR
    ),
}
