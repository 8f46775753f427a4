"""The decode loop: one frame of codes after the other, as the source document found it.

The host takes part in every frame: it reads each acoustic code, filters the semantic logits itself, and asks whether
the last token ended the speech.

Shapes: M most positions, G codes a frame, H width of the talker, V codec vocabulary. Row p of a table belongs to
position p; that of the codes holds the frame that is decoded there, that of the hidden states what it begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .cache import KVCache
from .config import FRAMES_PER_SECOND, StackConfig, TtsConfig
from .model import Place
from .speech import SpeechModel


class Decoder:
    """One model that speaks one text, a frame a step. When the cache is full it says the same again.

    ``position`` counts on the host. While a frame is captured, ``counters_2`` holds it and the position after on the
    device, and nothing depends on ``position``.
    """

    units_per_step = 1.0

    def __init__(self, model: SpeechModel, config: TtsConfig, place: Place, *, seed: int, text_ids: list[int]) -> None:
        self.model = model
        self.config = config
        self.place = place
        self.end_token = config.tokens.end
        device, rows = place.device, config.positions + 1
        wide = torch.promote_types(place.dtype, torch.float32)
        self.logits_dtype = wide
        self.talker_cache = KVCache(config.talker, config.positions, device=device, dtype=place.dtype)
        self.predictor_cache = KVCache(config.predictor, config.groups, device=device, dtype=place.dtype)
        self.codes_MG = torch.zeros(rows, config.groups, dtype=torch.int64, device=device)
        self.hidden_MH = torch.zeros(rows, config.talker.hidden, dtype=place.dtype, device=device)
        self.uniforms_MG = sampling.uniforms(config, seed, device)
        self.host_uniforms_MG = self.uniforms_MG.cpu()
        self.forced_MG: Tensor | None = None
        self.position = config.prompt - 1
        self.counters_2: Tensor | None = None
        # What the host has read, by position.
        self.frames = [[0] * config.groups for _ in range(rows)]
        # What a phase keeps with the decoder, by the phase's own key.
        self.kept: dict[str, Any] = {}
        self.logits_1V = torch.zeros(1, config.codec_vocabulary, dtype=wide, device=device)
        self.acoustic_logits: list[Tensor] = []
        # The codes of the frame under way, [1] each.
        self.chosen: list[Tensor] = []
        with torch.no_grad():
            self.text_MH = self.text_table(text_ids)
            self.begin(text_ids)

    def text_table(self, ids: list[int]) -> Tensor:
        """What the text adds at each position [M + 1, H]: after the prompt a token a frame, then padding."""
        config = self.config
        spoken = ids[config.prompt - 4 :][: config.frames]
        padding = [config.tokens.text_pad] * (config.positions + 1 - config.prompt - len(spoken))
        return self.model.embedded_text([config.tokens.text_pad] * config.prompt + spoken + padding)

    def begin(self, text_ids: list[int]) -> None:
        """Fill the cache with the prompt, and choose the first semantic token."""
        tokens, prompt = self.config.tokens, self.config.prompt
        codec = [tokens.no_think, tokens.think_begin, tokens.think_end, *[tokens.pad] * (prompt - 4), tokens.begin]
        text = [*[tokens.text_pad] * 3, tokens.text_begin, *text_ids[: prompt - 4]]
        text += [tokens.text_pad] * (prompt - len(text))
        x_TH = self.model.embedded_text(text) + self.model.embedded_codec(codec)
        self.speak(self.model.talker(x_TH[None], self.talker_cache)[:, -1:])
        self.position = prompt

    def step(self, index: int) -> None:
        """Decode frame ``index`` of the utterance, which begins again when it is full."""
        with torch.no_grad():
            self.seek(index % self.config.frames)
            self.run_frame()
            self.ended()

    def seek(self, frame: int) -> None:
        """Go to a frame: back to one that was decoded before, or on by decoding those in between."""
        target = self.config.prompt + frame
        if target < self.position:
            self.position = target
            self.talker_cache.truncate(target)
        while self.position < target:
            self.run_frame()

    @torch.no_grad()
    def generate(self, frames: int) -> list[list[int]]:
        """Speak from the start: the codes of at most ``frames`` frames, up to the one before the end token."""
        self.seek(0)
        for _ in range(min(frames, self.config.frames)):
            if self.ended():
                break
            self.run_frame()
        codes = self.read_codes()
        ends = [index for index, frame in enumerate(codes) if frame[0] == self.end_token]
        return codes[: min(ends, default=len(codes))]

    def run_frame(self) -> None:
        """Decode the next frame."""
        self.frame()
        self.position += 1

    def frame(self) -> None:
        """All of a frame that the device computes, and what the host has to do with it."""
        x_11H = self.predict()
        self.speak(self.model.talker.decode_one(x_11H + self.here(self.text_MH)[None], self.talker_cache))

    def predict(self) -> Tensor:
        """Choose the codes of this frame, and add up their embeddings, [1, 1, H]."""
        model, cache = self.model, self.predictor_cache
        cache.reset()
        self.acoustic_logits = []
        self.chosen = [self.here(self.codes_MG)[:, 0]]
        embedded_11H: Tensor = model.codec_embedding(self.chosen[0])[None]
        sum_11H = embedded_11H
        hidden_11H = self.here(self.hidden_MH)[None]
        project = model.into_predictor
        for group, head in enumerate(model.heads_in_order(), start=1):
            x_11P = project(embedded_11H)
            if group == 1:
                logits_1V = model.predictor.logits_after_two(project(hidden_11H), x_11P, cache, head)
            else:
                logits_1V = model.predictor.logits_after_one(x_11P, cache, head)
            self.acoustic_logits.append(logits_1V)
            embedded_11H, sum_11H = self.add_code(logits_1V, group, sum_11H)
        self.keep_codes()
        return sum_11H

    def add_code(self, logits_1V: Tensor, group: int, sum_11H: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the code of an acoustic group; its embedding, and the sum with it, [1, 1, H] each."""
        self.chosen.append(self.followed(self.acoustic_code(logits_1V, group), group, ahead=0))
        embedded_11H: Tensor = self.model.acoustic_embeddings[group - 1](self.chosen[-1])[None]
        return embedded_11H, sum_11H + embedded_11H

    def keep_codes(self) -> None:
        """Put the chosen codes of this frame into the table."""
        self.put(self.codes_MG, torch.stack(self.chosen, dim=-1))

    def speak(self, hidden_11H: Tensor) -> None:
        """Choose the semantic token of the next frame from the talker's hidden state."""
        self.put(self.hidden_MH, hidden_11H[0], ahead=1)
        self.logits_1V = self.add_token(self.model.into_logits(hidden_11H))

    def add_token(self, logits_1V: Tensor) -> Tensor:
        """Choose the semantic token of the next frame, and put it into the table of codes; the logits, wide."""
        wide_1V = logits_1V.to(self.logits_dtype)
        token_1 = self.followed(self.semantic_code(wide_1V), 0, ahead=1)
        self.put(self.codes_MG[:, 0], token_1, ahead=1)
        return wide_1V

    def acoustic_code(self, logits_1V: Tensor, group: int) -> Tensor:
        """The code of one acoustic group, [1]; the host keeps it."""
        settings = self.config.sampling
        uniform_1 = self.here(self.uniforms_MG)[:, group]
        code_1 = sampling.choose(logits_1V, uniform_1, settings, settings.acoustic_temperature, top_p=1.0)
        self.frames[self.position][group] = int(code_1)
        return code_1

    def semantic_code(self, logits_1V: Tensor) -> Tensor:
        """The semantic token, [1]: logits and the ids so far are read, and the host does the rest."""
        settings, prompt = self.config.sampling, self.config.prompt
        logits_1V = logits_1V.cpu()
        produced = self.codes_MG[prompt : self.position + 1, 0].tolist()
        seen_1V = torch.zeros(logits_1V.shape, dtype=torch.bool)
        seen_1V[:, produced] = True
        logits_1V = sampling.penalize(logits_1V, seen_1V, settings.penalty)
        logits_1V += sampling.suppression(
            self.config, self.end_token, early=self.is_early(self.position), device=logits_1V.device
        )
        uniform_1 = self.host_uniforms_MG[self.position + 1, :1]
        token_1 = sampling.choose(logits_1V, uniform_1, settings, settings.temperature, settings.top_p)
        self.frames[self.position + 1][0] = int(token_1)
        return token_1.to(self.place.device)

    def is_early(self, position: int) -> bool:
        """Whether the token chosen at ``position`` must not be the end."""
        end_after = self.config.sampling.end_after
        return end_after is None or position + 1 - self.config.prompt < end_after

    def ended(self) -> bool:
        """Whether the token of the next frame ends the speech."""
        return int(self.codes_MG[self.position, 0]) == self.end_token

    def read_codes(self) -> list[list[int]]:
        """The codes of all frames so far."""
        return [list(frame) for frame in self.frames[self.config.prompt : self.position]]

    def here(self, table: Tensor, *, ahead: int = 0) -> Tensor:
        """The row of this position, [1, ...], or of the next with ``ahead`` 1."""
        if self.counters_2 is None:
            return table[self.position + ahead : self.position + ahead + 1]
        return table.index_select(0, self.counters_2[ahead : ahead + 1])

    def put(self, table: Tensor, row: Tensor, *, ahead: int = 0) -> None:
        """Write the row [1, ...] of this position, or of the next with ``ahead`` 1."""
        if self.counters_2 is None:
            table[self.position + ahead : self.position + ahead + 1] = row
        else:
            table.index_copy_(0, self.counters_2[ahead : ahead + 1], row)

    def followed(self, code_1: Tensor, group: int, *, ahead: int) -> Tensor:
        """The code that the model goes on with: the chosen one, or where a sequence is forced, that of the sequence."""
        return code_1 if self.forced_MG is None else self.here(self.forced_MG[:, group], ahead=ahead)

    @torch.no_grad()
    def force(self, codes_MG: Tensor) -> None:
        """Feed these codes back instead of the chosen ones, so that one choice does not change all that follows.

        Args:
            codes_MG: a row per position, [M + 1, G] int64. That of the prompt's end becomes the first token at once.
        """
        self.forced_MG = codes_MG.to(self.place.device)
        self.codes_MG[self.config.prompt, 0] = self.forced_MG[self.config.prompt, 0]

    def state_dict(self) -> Mapping[str, Any]:
        """Text, cache, codes so far and the hidden state of the next frame; beside them the logits of the last.

        The weights are not state: no step changes them, and they are equal in every dtype of at least 16 bits.
        """
        keys, values = self.talker_cache.content()
        here = self.position
        return {
            "position": here,
            "text": self.text_MH,
            "talker_keys": keys,
            "talker_values": values,
            "codes": self.codes_MG[self.config.prompt : here],
            "token": self.codes_MG[here, 0],
            "hidden": self.hidden_MH[here],
            "logits": self.logits_1V,
            "acoustic_logits": list(self.acoustic_logits),
        }

    @property
    def bytes_per_step(self) -> float:
        """Bytes that a frame in the middle of the utterance must read: weights once a pass, and the caches."""
        config, size = self.config, self.place.dtype.itemsize
        middle = config.prompt + config.frames / 2
        passes = config.groups - 1
        seen = middle * _position_elements(config.talker)
        seen += sum(range(2, passes + 2)) * _position_elements(config.predictor)
        return self.model.frame_weight_bytes() + size * seen

    def figures(self, seconds_per_step: float) -> dict[str, tuple[float, str]]:
        """Both conventions of the real-time factor, each under its own name."""
        audio = 1 / FRAMES_PER_SECOND
        return {
            "audio seconds per wall second": (audio / seconds_per_step, "s/s"),
            "wall seconds per audio second": (seconds_per_step / audio, "s/s"),
        }


def _position_elements(config: StackConfig) -> int:
    """Elements of keys and values that one position takes in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim
