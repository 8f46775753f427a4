"""bio-nanochat's body, its training on real text, and that what it keeps is what it goes on from."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bio_parts import CPU, module, small, training

from kernbench import registry
from kernbench.errors import KernbenchError

WORKLOAD = "bio-nanochat"


def made(preset: str) -> Any:
    return registry.workload(WORKLOAD).declaration.make(preset, CPU, torch.float32, 0, None)


@pytest.mark.parametrize("preset", ["tiny-dense", "tiny", "tiny-k", "tiny-vanilla"])
def test_loss_falls_on_real_text(preset: str) -> None:
    built = made(preset)
    for index in range(40):
        built.step(index)
    losses = built.losses()
    # log(1024) = 6.9 is the loss of a uniform guess.
    assert 6.7 < losses[0] < 7.2
    assert sum(losses[-5:]) / 5 < 3.9


def test_plasticity_is_at_work_while_the_loss_falls() -> None:
    built = made("tiny")
    for index in range(12):
        built.step(index)
    mixture = built.model.blocks[1].mlp
    assert mixture.inner.hebbian.abs().max() > 0
    assert (mixture.inner.gate > 0.5).all()
    assert mixture.energy.max() < 1
    assert mixture.fatigue.min() > 0
    assert built.model.blocks[0].attention.mean_release > 0
    assert (built.scores[0].contribution > 0).all()


def test_upstreams_hebbian_rule_runs_away() -> None:
    """Why H is bounded: without, means feed the weights that they come from, and nothing is left within 20 steps."""
    losses = {}
    for limit in (1.0, math.inf):
        config = dataclasses.replace(module("config").PRESETS["tiny-dense"], hebbian_limit=limit)
        built = training(config, dtype=torch.float32)
        losses[limit] = [float(built.step(index)) for index in range(20)]
    assert max(losses[1.0]) < 7.2
    assert not all(math.isfinite(loss) for loss in losses[math.inf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("profile", ["SynapticConfig", "TopKConfig"])
@pytest.mark.parametrize("experts", [0, 3])
def test_every_organ_runs_in_every_dtype(profile: str, experts: int, dtype: torch.dtype) -> None:
    built = training(small(synapses=getattr(module("synapses"), profile)(), experts=experts), dtype=dtype)
    for index in range(2):
        loss = built.step(index)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert not loss.requires_grad
    assert torch.isfinite(loss)
    assert all(torch.isfinite(tensor).all() for tensor in built.model.state_dict().values())


def test_shared_keys_are_repeated() -> None:
    built = training(small(heads=4, kv_heads=2))
    attention = built.model.blocks[0].attention
    assert attention.key.weight.shape == (12, 24)
    q, k, v = attention.heads(torch.randn(2, 23, 24, dtype=torch.float64))
    assert q.shape == k.shape == v.shape == (2, 4, 23, 6)
    assert torch.equal(v[:, 0], v[:, 1])
    assert not torch.equal(v[:, 1], v[:, 2])


def test_rotary_embedding_rotates_halves_by_position() -> None:
    attention = module("attention")
    config = small()
    cosine, sine = attention.rotary_tables(config, device=CPU, dtype=torch.float64)
    x = torch.randn(1, 1, config.length, config.head_size, dtype=torch.float64)
    y = attention.rotate(x, cosine, sine)
    half = config.head_size // 2
    for place in (0, 1, 22):
        for feature in range(half):
            angle = torch.tensor(place * 10_000.0 ** (-feature / half), dtype=torch.float64)
            c, s = (float(value.to(torch.bfloat16)) for value in (angle.cos(), angle.sin()))
            first, second = float(x[0, 0, place, feature]), float(x[0, 0, place, half + feature])
            assert float(y[0, 0, place, feature]) == pytest.approx(first * c - second * s, abs=1e-12)
            assert float(y[0, 0, place, half + feature]) == pytest.approx(first * s + second * c, abs=1e-12)


def test_the_vanilla_model_sees_no_future() -> None:
    model = training(small(synapses=None)).model
    tokens = torch.randint(0, 256, (1, 23))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 256
    changed = (model(tokens)[0] != model(other)[0]).any(-1)[0]
    assert not changed[:9].any()
    assert changed[9]


def test_the_synapses_go_from_layer_to_layer() -> None:
    """Profile P hands its state on over depth: what the first layer's synapses held, the second's start from."""
    model = training(small()).model
    model.eval()
    seen: list[Any] = []
    attends = [block.attention.attend for block in model.blocks]
    for block, attend in zip(model.blocks, attends, strict=True):

        def watched(q: Any, k: Any, v: Any, state: Any, noise: Any, attend: Any = attend) -> Any:
            result = attend(q, k, v, state, noise)
            seen.append((state, result[1], noise))
            return result

        block.attention.attend = watched
    model(torch.randint(0, 256, (2, 23)))
    assert seen[0][0].calcium.abs().sum() == 0
    assert seen[1][0] is seen[0][1]
    assert seen[0][2] is None


def test_fields_are_read_but_for_the_named_ones() -> None:
    """Every field of both profiles steers something, except for those that are listed as steering nothing."""
    synapses = module("synapses")
    read: set[str] = set()
    for file in Path(str(synapses.__file__)).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if file.stem == "fused":
            read |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for profile in (synapses.SynapticConfig, synapses.TopKConfig):
        for field in dataclasses.fields(profile):
            if field.name not in synapses.UNREAD | set(synapses.SWITCHES):
                assert field.name in read, field.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 25}, "multiple"), ({"heads": 3, "kv_heads": 2}, "multiple"), ({"experts": 1}, "takes 2 of 1"),
        ({"experts": 4, "synapses": None}, "vanilla"), ({"vocabulary": 100}, "bytes"),
        ({"dock": "kq"}, "dock is 'kq'; it can be 'qk' or 'upstream'"), ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"dock": "upstream", "synapses": None}, "profile P"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_an_unknown_patch_of_the_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="patch is 'keep'; it can be 'zero' or 'inherit'"):
        module("config").StructureConfig(patch="keep")


def test_a_dtype_that_nothing_trains_in_is_refused() -> None:
    with pytest.raises(KernbenchError, match="does not train in torch.int8; use --dtype float32"):
        registry.workload(WORKLOAD).declaration.make("tiny", CPU, torch.int8, 0, None)


def test_bench_has_the_sizes_that_the_specification_measures() -> None:
    config = module("config").PRESETS["bench"]
    assert (config.layers, config.width, config.heads, config.length, config.batch) == (12, 768, 12, 2048, 4)
    assert registry.workload(WORKLOAD).declaration.default_dtype("bench") == "bfloat16"


def test_equal_seeds_make_equal_steps_and_others_do_not() -> None:
    first, again, other = (training(small(experts=3), seed=seed) for seed in (1, 1, 2))
    losses = [built.step(0) for built in (first, again, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("counted", [False, True])
def test_equal_steps_draw_equal_noise(counted: bool) -> None:
    built = [training(small()) for _ in range(2)]
    for one in built:
        one.model.counted_noise = counted
    torch.manual_seed(1)
    first = built[0].step(3)
    torch.manual_seed(2)
    assert torch.equal(first, built[1].step(3))


def test_dtypes_start_from_the_same_numbers() -> None:
    single, double = (
        training(small(experts=3), dtype=dtype).model.state_dict() for dtype in (torch.float32, torch.float64)
    )
    assert all(torch.equal(tensor.double(), double[name].double()) for name, tensor in single.items())


def test_text_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(250)))
    tokens, following = training(small(), data=str(file)).text.batch(1)
    assert tokens.tolist()[1] == list(range(125 + 23, 125 + 46))
    assert following.tolist()[1] == list(range(125 + 24, 125 + 47))
    file.write_bytes(b"short")
    with pytest.raises(KernbenchError, match="longer file"):
        training(small(), data=str(file))
    with pytest.raises(KernbenchError, match="cannot read"):
        training(small(), data=str(tmp_path / "none"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_round_and_training_continues(optimizer: str, tmp_path: Path) -> None:
    config = small(experts=3, optimizer=optimizer)
    first = training(config)
    for index in range(3):
        first.step(index)
    torch.save(first.state_dict(), tmp_path / "state")
    second = training(config, seed=5)
    second.load_state_dict(torch.load(tmp_path / "state"))
    second.seed = 0
    assert [float(first.step(index)) for index in (3, 4)] == [float(second.step(index)) for index in (3, 4)]


def test_muon_takes_matrices_and_makes_them_orthogonal() -> None:
    optimizers = module("optimizers")
    built = training(small(experts=3, optimizer="muon"))
    adamw, muon = built.optimizers
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    taken = {names[id(parameter)].rpartition(".")[2] for parameter in muon.param_groups[0]["params"]}
    assert taken == {"weight", "slow", "fast"}
    assert sum(len(group["params"]) for one in (adamw, muon) for group in one.param_groups) == len(names)
    assert [group["lr"] for group in adamw.param_groups[:2]] == pytest.approx(
        [0.004 * (24 / 768) ** -0.5, 0.2 * (24 / 768) ** -0.5]
    )
    stacked = torch.randn(3, 20, 30, dtype=torch.float64)
    together = optimizers.orthogonal(stacked)
    torch.testing.assert_close(together[1], optimizers.orthogonal(stacked[1]))
    torch.testing.assert_close(optimizers.orthogonal(stacked[0].T), together[0].T)
    values = torch.linalg.svdvals(together)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("profile", "experts"), [("SynapticConfig", 0), ("SynapticConfig", 3), ("TopKConfig", 3)])
def test_compiled_training_is_the_same(profile: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer of the baseline, without the compiler itself, whose building takes minutes, but with what it makes again
    in backward.

    Tracing takes most of the time, of two layers because each goes on from the other's synapses.
    """
    (peer,) = registry.workload(WORKLOAD).declaration.peers
    compiler = torch.compile
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda one, **kwargs: compiler(one, backend=backend, **kwargs))
    # Without noise: a counted seed moves in place too, and backward draws from the new one; timed noise is torch's own.
    calm = getattr(module("synapses"), profile)(stochastic_train_frac=0.0)
    sides = [training(small(synapses=calm, experts=experts)) for _ in range(2)]
    peer.prepare(sides[1])
    # No optimizer's step between: AdamW would make whole steps of gradients that are all rounding.
    for index in range(2):
        losses = [float(built.differentiate(*built.batch(index))) for built in sides]
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for (name, one), other in zip(
        sides[0].model.state_dict().items(), sides[1].model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, msg=name)
    for (name, one), other in zip(sides[0].model.named_parameters(), sides[1].model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12, msg=name)
