"""Weights from a checkpoint in the safetensors layout, its tokenizer, and what can be wrong with either."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tts_decoder import CPU, decoder, module, small, stepped, workload
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from kernbench import device
from kernbench.errors import KernbenchError

CONFIG = {
    "talker_config": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "vocab_size": 3072,
        "num_code_groups": 4, "text_vocab_size": 512, "text_hidden_size": 256,
        "code_predictor_config": {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
        },
    },
}  # fmt: skip


def tensors(seed: int = 8) -> dict[str, Tensor]:
    """A checkpoint of the small model, its names written out as the layout has them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.03).to(torch.bfloat16)

    def layer(hidden: int, inner: int, width: int, narrow: int, head: int) -> dict[str, Tensor]:
        return {
            "self_attn.q_proj.weight": drawn(width, hidden), "self_attn.k_proj.weight": drawn(narrow, hidden),
            "self_attn.v_proj.weight": drawn(narrow, hidden), "self_attn.o_proj.weight": drawn(hidden, width),
            "self_attn.q_norm.weight": 1 + drawn(head), "self_attn.k_norm.weight": 1 + drawn(head),
            "mlp.gate_proj.weight": drawn(inner, hidden), "mlp.up_proj.weight": drawn(inner, hidden),
            "mlp.down_proj.weight": drawn(hidden, inner), "input_layernorm.weight": 1 + drawn(hidden),
            "post_attention_layernorm.weight": 1 + drawn(hidden),
        }  # fmt: skip

    found: dict[str, Tensor] = {}
    for index in range(2):
        part = layer(256, 512, 256, 128, 64)
        found |= {f"talker.model.layers.{index}.{name}": value for name, value in part.items()}
    part = layer(128, 256, 128, 64, 32)
    found |= {f"talker.code_predictor.model.layers.0.{name}": value for name, value in part.items()}
    found |= {
        "talker.model.norm.weight": 1 + drawn(256),
        "talker.model.codec_embedding.weight": drawn(3072, 256),
        "talker.model.text_embedding.weight": drawn(512, 256),
        "talker.text_projection.linear_fc1.weight": drawn(256, 256),
        "talker.text_projection.linear_fc1.bias": drawn(256),
        "talker.text_projection.linear_fc2.weight": drawn(256, 256),
        "talker.text_projection.linear_fc2.bias": drawn(256),
        "talker.codec_head.weight": drawn(3072, 256),
        "talker.code_predictor.model.norm.weight": 1 + drawn(128),
        "talker.code_predictor.small_to_mtp_projection.weight": drawn(128, 256),
        "talker.code_predictor.small_to_mtp_projection.bias": drawn(128),
    }
    for index in range(3):
        found[f"talker.code_predictor.model.codec_embedding.{index}.weight"] = drawn(256, 256)
        found[f"talker.code_predictor.lm_head.{index}.weight"] = drawn(256, 128)
    return {**found, "speaker_encoder.conv.weight": drawn(3, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def loaded(folder: Path, *, dtype: torch.dtype = torch.float32, data: str | None = None) -> Any:
    return workload().build(preset=small(), device=CPU, dtype=dtype, seed=3, data=data, weights=str(folder))


def test_every_weight_is_the_checkpoints(folder: Path) -> None:
    built = loaded(folder)
    expected = tensors()
    name_of: Callable[[str], str] = module("checkpoint").layout_name
    names = [name_of(name) for name, _ in built.model.named_parameters()]
    assert sorted([*names, "speaker_encoder.conv.weight"]) == sorted(expected)
    for name, weight in built.model.named_parameters():
        assert torch.equal(weight, expected[name_of(name)].float()), name
    layer = built.model.talker.layers[1].self_attn
    assert torch.equal(layer.qkv_weight[:256], expected["talker.model.layers.1.self_attn.q_proj.weight"].float())
    assert stepped(built, 3) != stepped(decoder(), 3)
    assert not any(weight.requires_grad for weight in built.model.parameters())


def test_a_text_is_embedded_by_the_checkpoint(folder: Path) -> None:
    built, weights = loaded(folder, dtype=torch.float64), {name: value.double() for name, value in tensors().items()}
    ids = torch.tensor([65, 66])
    rows = weights["talker.model.text_embedding.weight"][ids]
    for number in (1, 2):
        part = f"talker.text_projection.linear_fc{number}"
        rows = rows @ weights[f"{part}.weight"].T + weights[f"{part}.bias"]
        rows = torch.nn.functional.silu(rows) if number == 1 else rows
    assert torch.allclose(built.model.embedded_text([65, 66]), rows)


def test_no_projection_where_widths_are_equal() -> None:
    speech, model = module("speech"), module("model")
    name_of: Callable[[str], str] = module("checkpoint").layout_name
    for preset, projected in (("0.6b", False), ("1.7b", True)):
        weights = speech.SpeechModel(workload().presets[preset], model.Place(torch.device("meta"), torch.bfloat16))
        names = [name_of(name) for name, _ in weights.named_parameters()]
        assert ("talker.code_predictor.small_to_mtp_projection.weight" in names) == projected
        assert len(names) == len(set(names)) == 28 * 11 + 5 * 11 + 2 + 2 + 4 + 1 + 30 + 2 * projected


def test_several_files_with_an_index(folder: Path) -> None:
    once = stepped(loaded(folder), 3)
    everything = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(everything)
    parts = {"model-00001.safetensors": names[::2], "model-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: everything[name] for name in part}, folder / file)
    assert stepped(loaded(folder), 3) == once
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert stepped(loaded(folder), 3) == once
    (folder / "model-00002.safetensors").unlink()
    with pytest.raises(KernbenchError, match="names files that are not there: model-00002.safetensors"):
        loaded(folder)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = tensors()
    change(found)
    save_file(found, folder / "model.safetensors")


def test_missing_tensors_are_named(folder: Path) -> None:
    changed(folder, lambda found: found.pop("talker.codec_head.weight"))
    with pytest.raises(KernbenchError, match=r"lacks 1 tensor: talker\.codec_head\.weight$"):
        loaded(folder)


def test_extra_tensors_are_named(folder: Path) -> None:
    changed(folder, lambda found: found.update({f"talker.model.layers.{i}.q.bias": torch.ones(1) for i in range(5)}))
    with pytest.raises(KernbenchError, match=r"has 5 tensors .* talker\.model\.layers\.0\.q\.bias, .* and 2 more$"):
        loaded(folder)


def test_wrong_shapes_are_named(folder: Path) -> None:
    changed(folder, lambda found: found.update({"talker.model.norm.weight": torch.ones(255)}))
    with pytest.raises(KernbenchError, match=r"talker\.model\.norm\.weight is \(255,\) instead of \(256,\)$"):
        loaded(folder)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_quantized_weights_are_named(folder: Path, dtype: torch.dtype, name: str) -> None:
    changed(folder, lambda found: found.update({"talker.model.norm.weight": torch.ones(256).to(dtype)}))
    with pytest.raises(
        KernbenchError, match=rf"talker\.model\.norm\.weight is {name}; fetch one that is not quantized"
    ):
        loaded(folder)


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    save_file({"talker.codec_head.weight": torch.zeros(3072, 256)}, folder / "other.safetensors")
    with pytest.raises(
        KernbenchError, match=r"model\.safetensors both hold talker\.codec_head\.weight; keep one of them"
    ):
        loaded(folder)


def test_sizes_of_another_preset_are_named(folder: Path) -> None:
    other = json.loads(json.dumps(CONFIG))
    other["talker_config"]["hidden_size"] = 2048
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(KernbenchError, match="hidden_size of the talker is 2048, not 256; no preset fits"):
        loaded(folder)
    stack = dict.fromkeys(["num_attention_heads"], 16) | {"num_key_value_heads": 8, "head_dim": 128}
    fitting = {
        **stack, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "text_vocab_size": 151936,
        "num_code_groups": 16, "text_hidden_size": 2048, "vocab_size": 3072,
        "code_predictor_config": {
            **stack, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5, "vocab_size": 2048,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"talker_config": fitting}))
    with pytest.raises(KernbenchError, match="type --preset 1.7b"):
        loaded(folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "{}", "has no talker_config"),
        ("model.safetensors", "nonsense", "is no readable safetensors file"),
        ("model.safetensors.index.json", "[]", "holds no JSON object"),
    ],
)
def test_damaged_files_are_one_sentence(folder: Path, file: str, content: str, sentence: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(KernbenchError, match=sentence):
        loaded(folder)


def test_a_folder_without_weights_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KernbenchError, match="absent is no folder"):
        loaded(tmp_path / "absent")
    with pytest.raises(KernbenchError, match="has no .safetensors file"):
        loaded(tmp_path)


def words(folder: Path, vocabulary: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_tokenizer_beside_the_weights_is_used(folder: Path) -> None:
    words(folder, {"?": 7, "hello": 300, "world": 301})
    text = module("text")
    found = text.tokenize(b"hello new world", folder, vocabulary=512, most=10)
    assert found == ([300, 7, 301], "tokenizer.json")
    assert text.tokenize(b"hello new world", folder, vocabulary=512, most=2).ids == [300, 7]
    with pytest.raises(KernbenchError, match="gives id 301, and the text embedding has 301 rows"):
        text.tokenize(b"hello world", folder, vocabulary=301, most=10)


def test_a_tokenizer_is_given_whole_characters(folder: Path) -> None:
    words(folder, {"?": 7, "ü": 300})
    text = module("text")
    # The cut after 32 bytes halves the last character of them.
    assert text.tokenize(b" " * 29 + "ü".encode() + "ü".encode(), folder, vocabulary=512, most=2).ids == [300]
    assert text.tokenize("ü".encode(), folder, vocabulary=512, most=2).ids == [300]
    for damaged, byte in ((b"a\xff" + b"b" * 100, 1), (b"ab\xc3", 2)):
        with pytest.raises(KernbenchError, match=rf"the text is not UTF-8 \(byte {byte}\)"):
            text.tokenize(damaged, folder, vocabulary=512, most=2)
    with pytest.raises(KernbenchError, match="finds no token in the text"):
        text.tokenize(b" \n", folder, vocabulary=512, most=2)


def test_a_broken_tokenizer_is_one_sentence(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(KernbenchError, match="is no tokenizer"):
        loaded(folder)


def test_bytes_are_said_aloud(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "WARNINGS", [])
    loaded(folder)
    assert len(device.WARNINGS) == 1
    assert "a stand-in: there is no tokenizer.json" in device.WARNINGS[0]
    assert device.WARNINGS[0].endswith("; the checkpoint was trained on other tokens")
    words(folder, {"?": 7})
    device.WARNINGS.clear()
    loaded(folder)
    assert device.WARNINGS == []
    # With random weights, of a text of the user's only.
    decoder()
    assert device.WARNINGS == []
    decoder(data=__file__)
    assert device.WARNINGS == [module("workload").BYTES_SPOKEN]


def test_checkpoints_of_a_preset_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    stepped(loaded(folder), 1)
    bigger = dataclasses.replace(small(), groups=5)
    with pytest.raises(KernbenchError, match="lacks 2 tensors"):
        workload().build(preset=bigger, device=CPU, dtype=torch.float32, seed=3, data=None, weights=str(folder))
