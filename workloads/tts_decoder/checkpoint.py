"""Reads the weights of a checkpoint in the safetensors layout of Qwen3-TTS.

Source: specification, section 11. Parts that do not begin with ``talker.`` (speaker encoder, codec) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from kernbench.errors import KernbenchError

from .config import PRESETS, StackConfig, TtsConfig
from .speech import SpeechModel

PREFIX = "talker."
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""Of weights, as safetensors calls them; others are numbers of a quantized model, which mean nothing without scales."""
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
        KernbenchError: the folder or a file is absent or damaged, sizes are those of another preset, or tensors are
            missing, unknown, there twice, or of another shape or kind. Nothing is written then.
    """
    if not folder.is_dir():
        raise KernbenchError(f"{folder} is no folder; --weights takes the one that holds the checkpoint")
    check_sizes(model.config, folder)
    weights = {layout_name(name): weight for name, weight in model.named_parameters()}
    where = _files_by_name(folder)
    _check_names(weights, where, folder)
    stored = {entry.name: entry for file, names in _by_file(where).items() for entry in _stored(file, names)}
    wrong = [
        f"{name} is {stored[name].shape} instead of {tuple(weight.shape)}"
        for name, weight in weights.items()
        if stored[name].shape != tuple(weight.shape)
    ]
    if wrong:
        raise KernbenchError(f"the checkpoint in {folder} has tensors of another shape: {_listed(wrong)}")
    other = [f"{entry.name} is {entry.dtype}" for entry in stored.values() if entry.dtype not in DTYPES]
    if other:
        raise KernbenchError(
            f"the checkpoint in {folder} has tensors that are no plain floating-point weights: {_listed(other)}; "
            f"fetch one that is not quantized ({', '.join(DTYPES)})"
        )
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
        where = {}
        for file in files:
            names_here = _names(file)
            if twice := sorted(where.keys() & set(names_here)):
                raise KernbenchError(
                    f"{file} and {where[twice[0]].name} both hold {_listed(twice)}; keep one of them, or add {INDEX}"
                )
            where |= dict.fromkeys(names_here, file)
    return {name: file for name, file in where.items() if name.startswith(PREFIX)}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise KernbenchError(f"{file} is no readable safetensors file ({error}); fetch it again") from None


class _Stored(NamedTuple):
    """What a file says of one of its tensors; ``dtype`` in the terms of safetensors."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def _stored(file: Path, names: Sequence[str]) -> Iterator[_Stored]:
    there = set(_names(file))
    lost = [name for name in names if name not in there]
    if lost:
        raise KernbenchError(f"{file} lacks tensors that {INDEX} says it has: {_listed(lost)}; fetch both again")
    with safe_open(file, framework="pt") as opened:
        for name in names:
            part = opened.get_slice(name)
            yield _Stored(name, tuple(part.get_shape()), part.get_dtype())


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing:
        raise KernbenchError(f"the checkpoint in {folder} lacks {_counted(missing)}: {_listed(missing)}")
    if extra:
        raise KernbenchError(
            f"the checkpoint in {folder} has {_counted(extra)} that this preset has no place for: {_listed(extra)}"
        )


def _by_file(where: Mapping[str, Path]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, file in where.items():
        files.setdefault(file, []).append(name)
    return files


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
