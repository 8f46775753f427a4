"""The TTS decoder as it stands before any swap: layers against torch's own, the loop, and its text."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernbench import philox, registry
from kernbench.errors import KernbenchError

CPU = torch.device("cpu")


def workload() -> Any:
    return registry.workload("tts-decoder").declaration


def module(name: str) -> Any:
    """A file of the workload's folder."""
    registry.workloads()
    return importlib.import_module(f"kernbench_workspace.builtin.workloads.tts_decoder.{name}")


def small(**changes: Any) -> Any:
    """The tiny preset with a short cache, and with settings of its sampling changed."""
    preset = workload().presets["tiny"]
    sampling = dataclasses.replace(preset.sampling, **changes)
    return dataclasses.replace(preset, positions=48, acoustic_vocabulary=256, sampling=sampling)


def decoder(config: Any = None, dtype: torch.dtype = torch.float32, data: str | None = None) -> Any:
    return workload().build(preset=config or small(), device=CPU, dtype=dtype, seed=3, data=data)


def stepped(built: Any, frames: int) -> list[list[int]]:
    for index in range(frames):
        built.step(index)
    codes: list[list[int]] = built.read_codes()
    return codes


def test_multimodal_rotation_of_equal_positions_is_the_plain_one() -> None:
    rotary, config = module("rotary"), workload().presets["1.7b"].talker
    positions_T = torch.arange(900, 907)
    plain = rotary.rotation_tables(config, positions_T, torch.float32)
    mixed = rotary.multimodal_tables(config, positions_T.expand(3, -1), torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))


def test_multimodal_rotation_interleaves_the_axes() -> None:
    rotary, config = module("rotary"), workload().presets["1.7b"].talker
    positions_AT = torch.tensor([[1.0], [10.0], [100.0]])
    cos, _ = rotary.multimodal_tables(config, positions_AT, torch.float64)
    axis = [1.0 if j >= 60 or j % 3 == 0 else (10.0, 100.0)[j % 3 - 1] for j in range(64)]
    expected = (torch.tensor(axis, dtype=torch.float64) * 1e6 ** (-torch.arange(64, dtype=torch.float64) / 64)).cos()
    assert torch.allclose(cos[0], expected, atol=1e-5)


def test_a_stack_equals_torchs_own_functions() -> None:
    """One layer written with torch's RMS norm, SDPA with grouped queries and complex numbers for the rotation."""
    model, cache, config = module("model"), module("cache"), small().talker
    config = dataclasses.replace(config, layers=1)
    torch.manual_seed(0)
    stack = model.Stack(config, model.Place(CPU, torch.float64))
    for weight in stack.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    x = torch.randn(1, 7, config.hidden, dtype=torch.float64)
    with torch.no_grad():
        found = stack(x, cache.KVCache(config, 16, device=CPU, dtype=torch.float64))
        layer = stack.layers[0]
        normed = functional.rms_norm(x, (config.hidden,), layer.input_layernorm.weight, config.eps)
        q, k, v = (
            functional.linear(normed, part.weight).view(1, 7, -1, config.head_dim).transpose(1, 2)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        angles = torch.arange(7)[:, None] * 1e6 ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        turn = torch.polar(torch.ones_like(angles), angles)

        def turned(heads: torch.Tensor, norm: Any) -> torch.Tensor:
            heads = functional.rms_norm(heads, (config.head_dim,), norm.weight, config.eps)
            both = torch.complex(*heads.chunk(2, dim=-1)) * turn
            return torch.cat([both.real, both.imag], dim=-1)

        mixed = functional.scaled_dot_product_attention(
            turned(q, layer.self_attn.q_norm), turned(k, layer.self_attn.k_norm), v, is_causal=True, enable_gqa=True
        )
        after = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        inner = functional.rms_norm(after, (config.hidden,), layer.post_attention_layernorm.weight, config.eps)
        mlp = layer.mlp
        after = after + mlp.down_proj(functional.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
        expected = functional.rms_norm(after, (config.hidden,), stack.norm.weight, config.eps)
    assert torch.allclose(found, expected, atol=1e-5)


def test_one_position_at_a_time_equals_all_at_once() -> None:
    model, cache, config = module("model"), module("cache"), small().talker
    torch.manual_seed(0)
    stack = model.Stack(config, model.Place(CPU, torch.float64))
    for weight in stack.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    x = torch.randn(1, 5, config.hidden, dtype=torch.float64)
    whole, parts = (cache.KVCache(config, 16, device=CPU, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        at_once = stack(x, whole)
        piecewise = torch.cat([stack.decode_one(x[:, i : i + 1], parts) for i in range(5)], dim=1)
    assert torch.allclose(at_once, piecewise, atol=1e-12)


def test_a_step_is_a_function_of_its_index() -> None:
    once = stepped(decoder(), 8)
    built = decoder()
    stepped(built, 5)
    for index in (3, 4, 2, 7):
        built.step(index)
    assert built.read_codes() == once
    assert torch.equal(built.codes_MG[built.config.prompt : built.position], torch.tensor(once))


def test_a_full_cache_begins_the_utterance_again() -> None:
    built = decoder()
    frames = built.config.frames
    once = stepped(built, frames)
    assert built.position == built.config.positions
    built.step(frames)
    assert built.read_codes() == once[:1]
    assert torch.equal(built.talker_cache.content()[0][0], built.talker_cache.keys[0])
    assert built.talker_cache.length == built.position == built.config.prompt + 1


def test_same_seed_same_codes_and_other_seed_others() -> None:
    assert stepped(decoder(), 4) == stepped(decoder(), 4)
    other = workload().build(preset=small(), device=CPU, dtype=torch.float32, seed=4, data=None)
    assert stepped(other, 4) != stepped(decoder(), 4)


def test_state_covers_what_a_later_step_depends_on() -> None:
    """A decoder with other weights and text goes on like the first one, once it has the first one's state."""
    one = decoder()
    other = workload().build(preset=small(), device=CPU, dtype=torch.float32, seed=9, data=__file__)
    for built in (one, other):
        stepped(built, 3)
    own, its = one.state_dict(), other.state_dict()
    for name in ("text", "codes", "token", "hidden"):
        its[name].copy_(own[name])
    # Weights and random numbers belong to the build, not to the state.
    other.model.load_state_dict(one.model.state_dict())
    other.host_uniforms_MG = one.host_uniforms_MG
    for kind in ("talker_keys", "talker_values"):
        for mine, theirs in zip(own[kind], its[kind], strict=True):
            theirs.copy_(mine)
    for built in (one, other):
        built.step(3)
        built.step(4)
    assert torch.equal(one.codes_MG, other.codes_MG)


def test_packed_weights_are_the_layers_own() -> None:
    built = decoder()
    layer = built.model.talker.layers[0]
    layer.self_attn.k_proj.weight.data.zero_()
    layer.mlp.up_proj.weight.data.zero_()
    width = layer.self_attn.q_proj.out_features
    assert int(layer.self_attn.qkv_weight[width:].count_nonzero()) == layer.self_attn.v_proj.weight.numel()
    assert int(layer.mlp.gate_up_weight.count_nonzero()) == layer.mlp.gate_proj.weight.numel()


def test_semantic_tokens_avoid_what_is_suppressed() -> None:
    codes = stepped(decoder(small(temperature=5.0, top_k=3000, top_p=1.0)), 32)
    assert all(frame[0] < 2048 for frame in codes)


def test_the_end_token_ends_the_speech() -> None:
    config = small(end_after=2)
    codes = decoder(config).generate(20)
    assert len(codes) == 20
    ends = next(index for index in range(3, 20) if codes[index][0] not in [frame[0] for frame in codes[:index]])
    built = decoder(config)
    built.end_token = codes[ends][0]
    assert built.generate(20) == codes[:ends]


def test_the_end_token_is_suppressed_at_first() -> None:
    built = decoder(small(end_after=2))
    assert [built.is_early(built.config.prompt - 1 + index) for index in range(4)] == [True, True, False, False]
    assert decoder().is_early(10_000)


def test_choosing_follows_the_definition() -> None:
    """Against a loop over sorted Python numbers."""
    sampling, settings = module("sampling"), small(top_k=7).sampling
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(1, 40, generator=generator) * 2
        uniform = torch.rand(1, generator=generator)
        found = int(sampling.choose(logits, uniform, settings, 0.8, 0.7))
        order = sorted(range(40), key=lambda i: (-float(logits[0, i]), i))[:7]
        weights = torch.softmax(logits[0, order].double() / 0.8, 0).tolist()
        kept, mass = [], 0.0
        for index, weight in zip(order, weights, strict=True):
            if mass < 0.7:
                kept.append((index, weight))
            mass += weight
        total, cumulated = sum(weight for _, weight in kept), 0.0
        for index, weight in kept:
            cumulated += weight
            if cumulated > float(uniform) * total:
                assert found == index
                break


def test_choosing_never_leaves_the_nucleus() -> None:
    sampling, settings = module("sampling"), small(top_k=3).sampling
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    assert int(sampling.choose(logits, torch.ones(1), settings, 1.0, 1.0)) == 2
    assert int(sampling.choose(logits, torch.zeros(1), settings, 1.0, 1.0)) == 0
    assert int(sampling.choose(logits, torch.ones(1), settings, 1.0, 1e-6)) == 0


def test_penalty_acts_on_tokens_seen() -> None:
    sampling = module("sampling")
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert sampling.penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_random_numbers_are_those_of_the_public_stream() -> None:
    built = decoder()
    offset = torch.tensor([20 * built.config.groups + 2])
    assert torch.equal(built.uniforms_MG[20, 2:3], philox.rand(3, offset))


def test_forced_codes_are_fed_back() -> None:
    built = decoder()
    forced = torch.randint(0, 200, built.codes_MG.shape, generator=torch.Generator().manual_seed(1))
    built.force(forced)
    stepped(built, 5)
    prompt = built.config.prompt
    assert torch.equal(built.codes_MG[prompt : prompt + 5], forced[prompt : prompt + 5])


def test_bytes_are_those_of_the_specification() -> None:
    """Section 4: talker 2.83 GB, predictor 15 x 161 MB, 112 KiB a position."""
    speech, model = module("speech"), module("model")
    for name, talker in (("0.6b", 0.444e9), ("1.7b", 1.416e9)):
        config = workload().presets[name]
        weights = speech.SpeechModel(config, model.Place(torch.device("meta"), torch.bfloat16))
        layers = sum(weight.numel() for weight in weights.talker.parameters())
        layers += weights.codec_head.weight.numel()
        assert layers == pytest.approx(talker, rel=0.01)
        assert sum(w.numel() for w in weights.predictor.parameters()) == pytest.approx(78.6e6, rel=0.01)
        assert weights.frame_weight_bytes() == pytest.approx(2 * talker + 15 * 161e6, rel=0.03)


def test_figures_have_both_conventions() -> None:
    figures = decoder().figures(0.04)
    assert figures == {"audio seconds per wall second": (2.0, "s/s"), "wall seconds per audio second": (0.5, "s/s")}


def test_text_by_default_and_from_a_file(tmp_path: Path) -> None:
    text = module("text")
    assert len(text.text_to_speak(None)) > 10_000
    file = tmp_path / "words.txt"
    file.write_text("Hello")
    ids = text.tokenize(text.text_to_speak(str(file)), None, vocabulary=512, most=3)
    assert ids.ids == [72, 101, 108]
    assert "stand-in" in ids.tokenizer
    assert stepped(decoder(data=str(file)), 3) != stepped(decoder(), 3)


def test_bad_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KernbenchError, match="cannot read .*absent"):
        decoder(data=str(tmp_path / "absent"))
    (tmp_path / "empty").touch()
    with pytest.raises(KernbenchError, match="is empty"):
        decoder(data=str(tmp_path / "empty"))
