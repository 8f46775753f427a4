"""TitanMAC's model, memory, data and training loop."""

from __future__ import annotations

import dataclasses
import importlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernbench import registry
from kernbench.errors import KernbenchError

CPU = torch.device("cpu:0")
VARIANTS = ("mag", "mac", "mal")


def module(name: str) -> ModuleType:
    build: Any = registry.workload("titan-mac").declaration.build
    return importlib.import_module(f"{build.__module__.rpartition('.')[0]}.{name}")


def small(**changes: Any) -> Any:
    """A config that is quick in float64 and has sizes that are no multiples of each other."""
    sizes: dict[str, Any] = {
        "width": 16, "heads": 2, "feed_forward": 24, "length": 23, "batch": 2, "persistent": 3, "window": 7, "block": 5,
        "segment": 9, "memory_tokens": 2, "gate_width": 6, "layers": 3, "base_lr": 3e-3,
    }  # fmt: skip
    return module("config").TitanConfig(**{**sizes, **changes})


def training(config: Any, *, dtype: torch.dtype = torch.float64, seed: int = 0, data: str | None = None) -> Any:
    return module("training").Training(config, device=CPU, dtype=dtype, seed=seed, data=data)


@pytest.mark.parametrize("preset", ["tiny", "tiny-mac", "tiny-mal"])
def test_loss_falls_on_real_text(preset: str) -> None:
    built: Any = registry.workload("titan-mac").declaration.make(preset, CPU, torch.float32, 0, None)
    for index in range(40):
        built.step(index)
    losses = built.losses()
    assert len(losses) == 40
    # log(256) = 5.5 is the loss of a uniform guess.
    assert 5.3 < losses[0] < 5.8
    assert sum(losses[-5:]) / 5 < 3.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["windowed", "block"])
def test_every_dataflow_runs_in_every_dtype(variant: str, attention: str, dtype: torch.dtype) -> None:
    built = training(small(variant=variant, attention=attention), dtype=dtype)
    before = built.model.memory.inner.weight.clone()
    for index in range(2):
        loss = built.step(index)
    assert loss.dtype == dtype
    assert not loss.requires_grad
    assert torch.isfinite(loss)
    assert built.model.memory.momentum.abs().sum() > 0
    assert not torch.equal(before, built.model.memory.inner.weight)


def first_changed(model: Any, tokens: torch.Tensor, position: int) -> int:
    """The first position whose logits change when the token at ``position`` does."""
    memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, _ = model(tokens)
    model.load_state_dict(memory)
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % 256
    after, _ = model(other)
    model.load_state_dict(memory)
    return int((before != after).any(dim=-1).any(dim=0).nonzero()[0])


@pytest.mark.parametrize("variant", ["mag", "mal"])
@pytest.mark.parametrize("attention", ["windowed", "block"])
@pytest.mark.parametrize("persistent", [0, 3])
def test_no_token_sees_the_future(variant: str, attention: str, persistent: int) -> None:
    # The memory is written from the whole batch, but after everything that this step reads from it.
    built = training(small(variant=variant, attention=attention, persistent=persistent))
    tokens = built.batch(0)
    for position in (1, 9, 22):
        assert first_changed(built.model, tokens, position) == position


@pytest.mark.parametrize("attention", ["windowed", "block"])
def test_no_segment_of_mac_sees_a_later_one(attention: str) -> None:
    config = small(variant="mac", attention=attention)
    built = training(config)
    for position in (3, 12, 22):
        start = position // config.segment * config.segment
        # Within a segment its mean, recalled before it, tells of its later tokens: that is the dataflow.
        assert first_changed(built.model, built.batch(0), position) == start


@pytest.mark.parametrize("attention", ["windowed", "block"])
def test_blocks_are_causal_through_the_persistent_rows(attention: str) -> None:
    config = small(attention=attention)
    model = training(config).model
    x_BSD = torch.randn(1, config.persistent + config.length, config.width, dtype=torch.float64)
    other = x_BSD.clone()
    other[:, config.persistent + 10] += 1
    changed = (model.through_blocks(x_BSD) != model.through_blocks(other)).any(dim=-1)[0]
    assert not changed[: config.persistent + 10].any()
    assert changed[config.persistent + 10]


@pytest.mark.parametrize("attention", ["windowed", "block"])
def test_a_token_far_behind_is_out_of_the_window(attention: str) -> None:
    config = small(attention=attention, layers=1)
    layer = training(config).model.blocks[0].attention
    x_BSD = torch.randn(1, config.persistent + config.length, config.width, dtype=torch.float64)
    other = x_BSD.clone()
    other[:, config.persistent] += 1
    changed = (layer(layer.qkv(x_BSD)) != layer(layer.qkv(other))).any(dim=-1)[0, config.persistent :]
    # Block attention reaches back from the block's start, and its convolutions three further.
    reach = config.window if attention == "windowed" else config.window + config.block - 1 + 3
    assert changed[0]
    assert not changed[reach + 1 :].any()


def test_both_attentions_agree_where_their_masks_do() -> None:
    attention = module("attention")
    config = small(window=64)
    windowed = attention.WindowedAttention(config, device=CPU, dtype=torch.float64)
    block = attention.BlockAttention(config, device=CPU, dtype=torch.float64)
    with torch.no_grad():
        block.qkv.weight.copy_(windowed.qkv.weight)
        block.output.weight.copy_(windowed.output.weight)
        for convolution in block.convolutions:
            # Only the tap on the position itself: the convolution passes its input on.
            convolution.weight.zero_()[..., -1] = 1
    x_BSD = torch.randn(2, config.persistent + config.length, config.width, dtype=torch.float64)
    torch.testing.assert_close(windowed(windowed.qkv(x_BSD)), block(block.qkv(x_BSD)), rtol=1e-12, atol=1e-12)


def test_window_mask_by_definition() -> None:
    mask = module("attention").window_mask(torch.zeros(1), 9, 2, 3)
    for row in range(9):
        for column in range(9):
            assert mask[row, column] == (column < 2 or (row >= 2 and 0 <= row - column <= 3))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_memory_update_is_the_formula(clip: float) -> None:
    config = small(memory_clip=clip)
    memory = module("memory").NeuralMemory(config, device=CPU, dtype=torch.float64)
    memory.momentum.normal_(0, 0.1)
    x_BTD = torch.randn(2, 11, config.width, dtype=torch.float64)
    with torch.no_grad():
        k, v = memory.key(x_BTD).flatten(0, 1), memory.value(x_BTD).flatten(0, 1)
        w1, b1, w2, b2 = (weight.clone() for weight in memory.weights())
        z1 = k @ w1.T + b1
        s = torch.sigmoid(z1)
        h = z1 * s
        y = h @ w2.T + b2
        dy = 2 * (y - v) / y.numel()
        dz1 = (dy @ w2) * s * (1 + z1 * (1 - s))
        g = torch.cat([(dz1.T @ k).flatten(), dz1.sum(0), (dy.T @ h).flatten(), dy.sum(0)])
        g = g * min(1.0, clip / float(g.norm()))
        mean = x_BTD.mean(1)
        alpha, eta = memory.forget_gate(mean).mean(), memory.decay_gate(mean).mean()
        momentum = eta * memory.momentum - config.memory_step * g
        written = (1 - alpha) * torch.cat([w1.flatten(), b1, w2.flatten(), b2]) + momentum
    loss = memory.update(x_BTD)
    torch.testing.assert_close(loss.detach(), (y - v).square().mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(memory.momentum, momentum, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        torch.cat([weight.detach().flatten() for weight in memory.weights()]), written, rtol=1e-12, atol=1e-15
    )


def test_the_memory_loss_is_differentiated_at_the_weights_it_was_taken_with() -> None:
    config = small()
    memory = module("memory").NeuralMemory(config, device=CPU, dtype=torch.float64)
    x_BTD = torch.randn(2, 11, config.width, dtype=torch.float64, requires_grad=True)
    memory.eval()
    expected = torch.autograd.grad(memory.update(x_BTD), [x_BTD, *memory.weights()])
    memory.train()
    found = torch.autograd.grad(memory.update(x_BTD), [x_BTD, *memory.weights()])
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-13, atol=0)


def test_evaluation_writes_nothing() -> None:
    built = training(small(variant="mac"))
    before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    with torch.no_grad():
        built.model(built.batch(0))
    built.model.eval()
    built.model(built.batch(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.model.state_dict().items())


def test_controller_and_groups_are_those_of_the_specification() -> None:
    built = training(small())
    assert sum(parameter.numel() for parameter in built.optimizer.controller.parameters()) == 4385
    core, embed = (group["params"] for group in built.optimizer.adamw.param_groups)
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    core_names, embed_names = {names[id(p)] for p in core}, {names[id(p)] for p in embed}
    assert {"embedding.weight", "position.weight", "persistent", "memory.inner.weight"} <= core_names
    assert {"gate_proj.weight", "memory.forget_gate.hidden.weight", "norm.scale"} <= embed_names
    assert all(parameter.dim() == 2 for parameter in core)
    depth = module("optimizer").depth
    assert [depth(name, 4) for name in ("embedding.weight", "blocks.1.mlp.inner.bias", "norm.scale", "persistent")] == [
        0.0, 0.5, 1.0, 0.5,
    ]  # fmt: skip


def test_learning_rates_stay_within_the_controllers_range() -> None:
    built = training(small(meta_update_freq=3))
    for index in range(7):
        built.step(index)
    for group in built.optimizer.adamw.param_groups:
        assert 0.1 * 3e-3 <= group["lr"] <= 2.0 * 3e-3


def test_bad_statistics_count_as_one() -> None:
    built = training(small())
    built.loss(built.batch(0)).backward()
    built.model.norm.scale.grad.fill_(float("nan"))
    statistics = built.optimizer.group_statistics()
    assert statistics[1, 0] == 1.0
    assert torch.isfinite(statistics).all()
    assert torch.equal(built.optimizer.controller(statistics * float("nan")), torch.ones(2, dtype=torch.float64))


def test_equal_seeds_make_equal_steps_and_others_do_not() -> None:
    first, again, other = (training(small(), seed=seed) for seed in (1, 1, 2))
    losses = [built.step(0) for built in (first, again, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_dtypes_start_from_the_same_numbers() -> None:
    single, double = (training(small(), dtype=dtype).model.state_dict() for dtype in (torch.float32, torch.float64))
    assert all(torch.equal(tensor.double(), double[name]) for name, tensor in single.items())


def test_text_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(250)))
    built = training(small(), data=str(file))
    assert built.batch(0).tolist()[0] == list(range(23))
    assert built.batch(1).tolist()[1] == list(range(125 + 23, 125 + 46))
    # Five windows of 23 fit into 125 bytes; the sixth batch is the first again.
    assert torch.equal(built.batch(5), built.batch(0))
    assert built.batch(0).data_ptr() == built.streams_BN.data_ptr()
    file.write_bytes(b"short")
    with pytest.raises(KernbenchError, match="longer file"):
        training(small(), data=str(file))
    with pytest.raises(KernbenchError, match="cannot read"):
        training(small(), data=str(tmp_path / "none"))


def test_seed_preset_has_the_documents_sizes() -> None:
    config = registry.workload("titan-mac").declaration.presets["seed"]
    assert (config.width, config.layers, config.batch, config.length, config.variant) == (512, 6, 4, 512, "mag")
    with torch.device("meta"):
        model = module("model").TitanMac(
            dataclasses.replace(config, vocabulary=50257), device=torch.device("meta"), dtype=torch.float32, seed=0
        )
    assert len(list(model.parameters())) == 74
    assert model.memory.momentum.numel() == 525_312


def test_a_tiny_step_is_quick() -> None:
    built: Any = registry.workload("titan-mac").declaration.make("tiny", CPU, torch.float32, 0, None)
    seconds = []
    for index in range(6):
        start = time.perf_counter()
        built.step(index)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_state_goes_round_and_training_continues(tmp_path: Path) -> None:
    first = training(small())
    for index in range(3):
        first.step(index)
    torch.save(first.state_dict(), tmp_path / "state")
    second = training(small(), seed=5)
    second.load_state_dict(torch.load(tmp_path / "state"))
    second.seed = 0
    assert [float(first.step(index)) for index in (3, 4)] == [float(second.step(index)) for index in (3, 4)]
