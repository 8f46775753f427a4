"""All weights of the TTS decoder: talker, code predictor, embeddings, heads and the projection of the text.

Shapes: T positions, H width of the talker, P width of the predictor, V codec vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import TtsConfig
from .model import Place, Stack, linear


class TextProjection(nn.Module):
    """Linear, SiLU, Linear, with biases."""

    def __init__(self, inputs: int, outputs: int, place: Place) -> None:
        super().__init__()
        self.linear_fc1 = linear(inputs, inputs, place, bias=True)
        self.linear_fc2 = linear(inputs, outputs, place, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        output: Tensor = self.linear_fc2(functional.silu(self.linear_fc1(x)))
        return output


def embedding(rows: int, width: int, place: Place) -> nn.Embedding:
    """An embedding whose memory is not initialized yet."""
    return nn.Embedding(rows, width, device="meta", dtype=place.dtype).to_empty(device=place.device)


class SpeechModel(nn.Module):
    """The weights, and the maps between codes, embeddings and logits."""

    def __init__(self, config: TtsConfig, place: Place) -> None:
        super().__init__()
        hidden, acoustic = config.talker.hidden, config.groups - 1
        self.config = config
        self.talker = Stack(config.talker, place)
        self.codec_embedding = embedding(config.codec_vocabulary, hidden, place)
        self.codec_head = linear(hidden, config.codec_vocabulary, place)
        self.text_embedding = embedding(config.text_vocabulary, config.text_hidden, place)
        self.text_projection = TextProjection(config.text_hidden, hidden, place)
        self.predictor = Stack(config.predictor, place)
        self.acoustic_embeddings = nn.ModuleList(
            embedding(config.acoustic_vocabulary, hidden, place) for _ in range(acoustic)
        )
        self.acoustic_heads = nn.ModuleList(
            linear(config.predictor.hidden, config.acoustic_vocabulary, place) for _ in range(acoustic)
        )
        self.predictor_input = (
            linear(hidden, config.predictor.hidden, place, bias=True) if config.projected else nn.Identity()
        )

    def embedded_text(self, ids: list[int]) -> Tensor:
        """Projected text [T, H]."""
        ids_T = torch.tensor(ids, dtype=torch.int64, device=self.codec_embedding.weight.device)
        projected: Tensor = self.text_projection(self.text_embedding(ids_T))
        return projected

    def embedded_codec(self, ids: list[int]) -> Tensor:
        """Codec embeddings [T, H] of ids that the host knows."""
        ids_T = torch.tensor(ids, dtype=torch.int64, device=self.codec_embedding.weight.device)
        embedded: Tensor = self.codec_embedding(ids_T)
        return embedded

    def into_predictor(self, x_11H: Tensor) -> Tensor:
        """What the predictor is given of one position of the talker's width, [1, 1, P]."""
        projected: Tensor = self.predictor_input(x_11H)
        return projected

    def into_logits(self, hidden_11H: Tensor) -> Tensor:
        """Semantic logits of one position, [1, V]."""
        logits_11V: Tensor = self.codec_head(hidden_11H)
        return logits_11V[:, 0]

    def heads_in_order(self) -> list[nn.Linear]:
        """The acoustic heads, as what they are."""
        return cast(list[nn.Linear], list(self.acoustic_heads))

    def embeddings_in_order(self) -> list[nn.Embedding]:
        """The acoustic embeddings, as what they are."""
        return cast(list[nn.Embedding], list(self.acoustic_embeddings))

    def frame_weight_bytes(self) -> int:
        """Bytes of weights that one frame has to read: the predictor's once for each of its passes, no embeddings."""
        talker = _bytes(self.talker) + _bytes(self.codec_head)
        passes = self.config.groups - 1
        inputs = (passes + 1) * _bytes(self.predictor_input)
        return talker + passes * _bytes(self.predictor) + inputs + _bytes(self.acoustic_heads)


def _bytes(module: nn.Module) -> int:
    return sum(cast(Tensor, weight).nbytes for weight in module.parameters())


@torch.no_grad()
def randomize(model: SpeechModel, *, seed: int, std: float = 0.02) -> None:
    """Normal weights with this deviation, norms one and biases zero.

    They are rounded to bfloat16, so that a model in float32 or float64 has the same ones and shows what a model in
    bfloat16 should compute.
    """
    generator = torch.Generator(model.codec_head.weight.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            weight.copy_(drawn.normal_(std=std, generator=generator).to(torch.bfloat16))
