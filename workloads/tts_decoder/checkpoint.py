"""Reads the weights of a checkpoint in the safetensors layout of Qwen3-TTS.

Source: specification, section 11. Parts that do not begin with ``talker.`` (speaker encoder, codec) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernbench.errors import KernbenchError

from .config import PRESETS, StackConfig, TtsConfig
from .speech import SpeechModel

PREFIX = "talker."
INDEX = "model.safetensors.index.json"
SHOWN = 3
"""Names that a sentence lists; the others are counted."""
# Where our modules lie in the layout, the longest name first.
PLACES = (
    ("talker.", "model."),
    ("codec_embedding.", "model.codec_embedding."),
    ("text_embedding.", "model.text_embedding."),
    ("text_projection.", "text_projection."),
    ("codec_head.", "codec_head."),
    ("predictor.", "code_predictor.model."),
    ("acoustic_embeddings.", "code_predictor.model.codec_embedding."),
    ("acoustic_heads.", "code_predictor.lm_head."),
    ("predictor_input.", "code_predictor.small_to_mtp_projection."),
)


@torch.no_grad()
def load(model: SpeechModel, folder: Path) -> None:
    """Overwrite all weights with those of the checkpoint in ``folder``, in the dtype of the model.

    Raises:
        KernbenchError: a file is absent or damaged, sizes are those of another preset, or tensors are missing, unknown
            or of another shape. Nothing is written then.
    """
    check_sizes(model.config, folder)
    weights = {layout_name(name): weight for name, weight in model.named_parameters()}
    where = _files_by_name(folder)
    _check_names(weights, where, folder)
    shapes = {name: shape for file, names in _by_file(where).items() for name, shape in _shapes(file, names)}
    wrong = [
        f"{name} is {shapes[name]} instead of {tuple(weight.shape)}"
        for name, weight in weights.items()
        if shapes[name] != tuple(weight.shape)
    ]
    if wrong:
        raise KernbenchError(f"the checkpoint in {folder} has tensors of another shape: {_listed(wrong)}")
    for file, names in _by_file(where).items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                weights[name].copy_(opened.get_tensor(name))


def layout_name(name: str) -> str:
    """What a weight of ``SpeechModel`` is called in the layout."""
    ours, theirs = next(place for place in PLACES if name.startswith(place[0]))
    return PREFIX + theirs + name.removeprefix(ours)


def check_sizes(config: TtsConfig, folder: Path) -> None:
    """Hold config.json, where there is one, against the preset.

    Raises:
        KernbenchError: they differ; the sentence says in what, and which preset would fit.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    found = _read_json(file)
    talker = _part(found, "talker_config", file)
    predictor = _part(talker, "code_predictor_config", file)
    differing = list(_differences(config, talker, predictor))
    if differing:
        fitting = [name for name, preset in PRESETS.items() if not list(_differences(preset, talker, predictor))]
        hint = f"type --preset {fitting[0]}" if fitting else f"no preset fits; there are {', '.join(PRESETS)}"
        raise KernbenchError(f"{file} describes a model of other sizes than this preset: {_listed(differing)}; {hint}")


def _differences(config: TtsConfig, talker: Mapping[str, Any], predictor: Mapping[str, Any]) -> Iterator[str]:
    expected = {
        **{("talker", name): value for name, value in _fields(config.talker).items()},
        **{("code predictor", name): value for name, value in _fields(config.predictor).items()},
        ("talker", "vocab_size"): config.codec_vocabulary,
        ("talker", "num_code_groups"): config.groups,
        ("talker", "text_vocab_size"): config.text_vocabulary,
        ("talker", "text_hidden_size"): config.text_hidden,
        ("code predictor", "vocab_size"): config.acoustic_vocabulary,
    }
    for (part, name), value in expected.items():
        given = (talker if part == "talker" else predictor).get(name, value)
        if given != value:
            yield f"{name} of the {part} is {given}, not {value}"


def _fields(stack: StackConfig) -> dict[str, float]:
    return {
        "hidden_size": stack.hidden,
        "intermediate_size": stack.intermediate,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_dim,
        "rms_norm_eps": stack.eps,
        "rope_theta": stack.theta,
    }


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernbenchError(f"{file} cannot be read as JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(found, dict):
        raise KernbenchError(f"{file} holds no JSON object; fetch the checkpoint again")
    return found


def _part(found: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    part = found.get(name)
    if not isinstance(part, dict):
        raise KernbenchError(
            f"{file} has no {name}, so this is no checkpoint of a Qwen3-TTS talker; name another folder"
        )
    return part


def _files_by_name(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of the talker: by the index, or else by looking into all files."""
    index = folder / INDEX
    if index.is_file():
        names = _part(_read_json(index), "weight_map", index)
        where = {name: folder / str(file) for name, file in names.items()}
        absent = sorted({file.name for file in where.values() if not file.is_file()})
        if absent:
            raise KernbenchError(f"{index} names files that are not there: {_listed(absent)}; fetch them too")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise KernbenchError(f"{folder} has no .safetensors file; --weights takes the folder of a checkpoint")
        where = {name: file for file in files for name in _names(file)}
    return {name: file for name, file in where.items() if name.startswith(PREFIX)}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise KernbenchError(f"{file} is no readable safetensors file ({error}); fetch it again") from None


def _shapes(file: Path, names: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    there = set(_names(file))
    lost = [name for name in names if name not in there]
    if lost:
        raise KernbenchError(f"{file} lacks tensors that {INDEX} says it has: {_listed(lost)}; fetch both again")
    with safe_open(file, framework="pt") as opened:
        for name in names:
            yield name, tuple(opened.get_slice(name).get_shape())


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing:
        raise KernbenchError(f"the checkpoint in {folder} lacks {len(missing)} tensors: {_listed(missing)}")
    if extra:
        raise KernbenchError(
            f"the checkpoint in {folder} has {len(extra)} tensors that this preset has no place for: {_listed(extra)}"
        )


def _by_file(where: Mapping[str, Path]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, file in where.items():
        files.setdefault(file, []).append(name)
    return files


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
