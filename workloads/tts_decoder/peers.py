"""What to time beside the phases: the baseline's device part in plain PyTorch, captured, and compiled and captured.

Both keep codes on the device and the cache in its room, without which a frame can be neither compiled nor captured.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor

from . import graph, syncfree
from .cache import KVCache
from .decoder import Decoder
from .model import Attention, Mixed
from .rotary import rotate


def capture(built: Decoder) -> None:
    """One CUDA graph of the frame."""
    for name in ("acoustic_code", "semantic_code", "ended", "read_codes"):
        setattr(built, name, MethodType(getattr(syncfree, name), built))
    for stack in (built.model.talker, built.model.predictor):
        for layer in stack.in_order():
            mixer = layer.self_attn
            vars(mixer)["rotate_and_store"] = MethodType(rotate_and_store, mixer)
            vars(mixer)["attend"] = MethodType(graph.attend, mixer)
    vars(built)["run_frame"] = MethodType(run_frame, built)


def compile_and_capture(built: Decoder, backend: str = "inductor") -> None:
    """One CUDA graph of the frame, with both transformers compiled: one graph for one position, one for two."""
    capture(built)
    for stack in (built.model.talker, built.model.predictor):
        vars(stack)["forward"] = torch.compile(stack.forward, dynamic=False, backend=backend)


def run_frame(self: Decoder) -> None:
    """``Decoder.run_frame``; the predictor counts on the device too, so that no pass is compiled for its length."""
    cache = self.predictor_cache
    cache.truncate(0)
    cache.count_on_device()
    try:
        graph.run_frame(self)
    finally:
        cache.count_on_host()


def rotate_and_store(
    self: Attention, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cache: KVCache, layer: int
) -> Mixed:
    """``Attention.rotate_and_store`` in plain PyTorch, with tables that are computed once, into the room."""
    room, count = cache.reserve(), q_BTND.shape[1]
    places_T = cache.position()
    if count > 1:
        places_T = places_T + torch.arange(count, device=places_T.device)
    cos_TF, sin_TF = room.cos.index_select(0, places_T), room.sin.index_select(0, places_T)
    room.keys[layer].index_copy_(2, places_T, rotate(self.k_norm(k_BTKD).transpose(1, 2), cos_TF, sin_TF))
    room.values[layer].index_copy_(2, places_T, v_BTKD.transpose(1, 2))
    return Mixed(rotate(self.q_norm(q_BTND).transpose(1, 2), cos_TF, sin_TF), *cache.visible(layer, count))
