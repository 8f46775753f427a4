"""Phase 0: sampling stays on the device, codes are read once at the end, and nobody waits for the end token."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from . import sampling
from .decoder import Decoder

KEY = "syncfree"


class Resident:
    """What the device needs to filter semantic logits by itself.

    Attributes:
        added_2V: what suppression adds to the logits; the second row suppresses the end token, too.
        early_M: which of the rows a position takes.
        seen_1V: the semantic tokens of all positions up to ``seen_through``.
    """

    def __init__(self, decoder: Decoder) -> None:
        config, device = decoder.config, decoder.place.device
        self.made_for = (config, decoder.end_token)
        self.added_2V = torch.cat(
            [sampling.suppression(config, decoder.end_token, early=early, device=device) for early in (False, True)]
        )
        early = [decoder.is_early(position) for position in range(config.positions + 1)]
        self.early_M = torch.tensor(early, device=device).long()
        self.seen_1V = torch.zeros(1, config.codec_vocabulary, dtype=torch.bool, device=device)
        self.seen_through = config.prompt - 1
        self.end = EndWatch(config.positions + 1, decoder.end_token, cuda=device.type == "cuda")

    def catch_up(self, decoder: Decoder) -> None:
        """Make ``seen_1V`` right for the frame before this one, after the decoder went elsewhere."""
        if self.seen_through != decoder.position - 1:
            self.seen_1V.zero_()
            before = decoder.codes_MG[decoder.config.prompt : decoder.position, 0]
            self.seen_1V.scatter_(1, before[None], True)
            self.seen_through = decoder.position - 1

    def added(self, decoder: Decoder) -> Tensor:
        """What suppression adds to the logits of this position, [1, V]."""
        if decoder.counters_2 is not None:
            return self.added_2V.index_select(0, decoder.here(self.early_M))
        early = decoder.is_early(decoder.position)
        return self.added_2V[1:] if early else self.added_2V[:1]


def resident(decoder: Decoder) -> Resident:
    """What this phase keeps with a decoder."""
    kept = decoder.kept.get(KEY)
    if not isinstance(kept, Resident) or kept.made_for != (decoder.config, decoder.end_token):
        kept = decoder.kept[KEY] = Resident(decoder)
    return kept


class EndWatch:
    """Copies tokens to the host without waiting, and looks at those that have arrived.

    An end token is so noticed a few frames late at most; the frames in between are cut off when the codes are read.
    """

    def __init__(self, positions: int, end_token: int, *, cuda: bool) -> None:
        self.end_token = end_token
        self.arrived = torch.zeros(positions, dtype=torch.int64, pin_memory=cuda)
        self.on_host = self.arrived.numpy()
        self.cuda = cuda
        self.under_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self.spare: list[torch.cuda.Event] = []
        self.latest = -1
        self.over = False

    def look(self, position: int, token: Tensor) -> bool:
        """Whether the end token was among those that have arrived; ``token`` (0-dim) of this position sets out."""
        if position <= self.latest:
            self.under_way.clear()
            self.over = False
        self.latest = position
        self.arrived[position].copy_(token, non_blocking=True)
        event = None
        if self.cuda:
            event = self.spare.pop() if self.spare else torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.under_way.append((position, event))
        while self.under_way and _happened(self.under_way[0][1]):
            arrived, event = self.under_way.popleft()
            if event is not None:
                self.spare.append(event)
            self.over = self.over or int(self.on_host[arrived]) == self.end_token
        return self.over


def _happened(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]


def acoustic_code(self: Decoder, logits_1V: Tensor, group: int) -> Tensor:
    """``Decoder.acoustic_code`` that leaves the code where it is."""
    settings = self.config.sampling
    if settings.acoustic_temperature == 0.0:
        return logits_1V.argmax(-1)
    uniform_1 = self.here(self.uniforms_MG)[:, group]
    return sampling.choose(logits_1V, uniform_1, settings, settings.acoustic_temperature, top_p=1.0)


def semantic_code(self: Decoder, logits_1V: Tensor) -> Tensor:
    """``Decoder.semantic_code`` with the filters, and the set of tokens seen, on the device."""
    kept, settings = resident(self), self.config.sampling
    kept.catch_up(self)
    if self.position >= self.config.prompt:
        kept.seen_1V.scatter_(1, self.here(self.codes_MG)[:, :1], True)
        kept.seen_through = self.position
    logits_1V = sampling.penalize(logits_1V, kept.seen_1V, settings.penalty) + kept.added(self)
    uniform_1 = self.here(self.uniforms_MG, ahead=1)[:, 0]
    return sampling.choose(logits_1V, uniform_1, settings, settings.temperature, settings.top_p)


def ended(self: Decoder) -> bool:
    """``Decoder.ended`` that asks for what has arrived, and never waits."""
    return resident(self).end.look(self.position, self.codes_MG[self.position, 0])


def read_codes(self: Decoder) -> list[list[int]]:
    """``Decoder.read_codes`` as one read of all frames."""
    codes: list[list[int]] = self.codes_MG[self.config.prompt : self.position].tolist()
    return codes
