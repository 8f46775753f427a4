"""The fused AdamW against torch.optim.AdamW and a float64 oracle: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernbench import device, registry
from kernbench.spec import Case, Inputs

DEVICE = device.resolve("auto")
SPEC = registry.kernel("fused_adamw").declaration
RAGGED = next(case for case in SPEC.cases if case.name == "ragged")
STATE = ("params", "exp_avgs", "exp_avg_sqs")
HYPER: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SIZES = [(), (0,), (1,), (17,), (61, 61)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel_module() -> ModuleType:
    return sys.modules[SPEC.optimized.__module__]


def copied(inputs: Inputs) -> Inputs:
    return {name: _mapped(value, Tensor.clone) for name, value in inputs.items()}


def in_float64(inputs: Inputs) -> Inputs:
    return {
        name: _mapped(value, lambda x: x.double() if x.is_floating_point() else x) for name, value in inputs.items()
    }


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, list):
        return [change(item) for item in value]
    return change(value) if isinstance(value, Tensor) else value


def flat(inputs: Inputs, name: str) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in inputs[name]])


def bits(inputs: Inputs) -> list[bytes]:
    return [
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name in (*STATE, "steps")
        for tensor in (inputs[name] if isinstance(inputs[name], list) else [inputs[name]])
    ]


def fresh(sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Parameters before their first update, all with one learning rate, as torch.optim.AdamW knows it."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    params = [torch.randn(size, device=DEVICE, generator=generator).to(dtype) for size in sizes]
    return {
        "params": params,
        "grads": [torch.randn(size, device=DEVICE, generator=generator).to(dtype) for size in sizes],
        "exp_avgs": [torch.zeros(size, device=DEVICE) for size in sizes],
        "exp_avg_sqs": [torch.zeros(size, device=DEVICE) for size in sizes],
        "steps": torch.zeros(len(sizes), device=DEVICE),
        "lrs": torch.full((len(sizes),), 1e-3, device=DEVICE),
        "ok": torch.tensor(True, device=DEVICE),
        **HYPER,
    }


def torch_adamw(params: list[Tensor]) -> torch.optim.AdamW:
    copies = [nn.Parameter(param.clone()) for param in params]
    betas = (HYPER["beta1"], HYPER["beta2"])
    return torch.optim.AdamW(copies, lr=1e-3, betas=betas, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"])


def torch_step(optimizer: torch.optim.AdamW, grads: list[Tensor]) -> None:
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad.to(param.dtype, copy=True)
    optimizer.step()


def torch_state(optimizer: torch.optim.AdamW) -> Inputs:
    params = optimizer.param_groups[0]["params"]
    return {
        "params": [param.detach() for param in params],
        "exp_avgs": [optimizer.state[param]["exp_avg"] for param in params],
        "exp_avg_sqs": [optimizer.state[param]["exp_avg_sq"] for param in params],
        "steps": torch.stack([optimizer.state[param]["step"].to(DEVICE) for param in params]),
    }


@pytest.mark.parametrize("updates", [1, 10, 100])
def test_follows_torch_adamw_as_closely_as_float32_allows(updates: int) -> None:
    inputs = fresh([(17,), (127, 3)])
    peer = torch_adamw(inputs["params"])
    oracle = torch_adamw([param.double() for param in inputs["params"]])
    for update in range(updates):
        SPEC.optimized(**inputs)
        torch_step(peer, inputs["grads"])
        torch_step(oracle, inputs["grads"])
        assert SPEC.next_inputs is not None
        SPEC.next_inputs(inputs, update)
    eager, exact = torch_state(peer), torch_state(oracle)
    for name in STATE:
        truth = flat(exact, name)
        floor = 4 * torch.finfo(torch.float32).eps * truth.square().mean().sqrt()
        allowed = 2 * (flat(eager, name) - truth).abs().max() + floor
        assert (flat(inputs, name) - truth).abs().max() <= allowed, name
    assert torch.equal(inputs["steps"], eager["steps"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in SPEC.cases if not case.large], ids=lambda case: case.name)
def test_error_is_bounded_by_that_of_the_reference(case: Any, dtype: torch.dtype) -> None:
    ours = SPEC.make_inputs(case, dtype, DEVICE, 0)
    eager, oracle = copied(ours), in_float64(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**eager)
    SPEC.reference(**oracle)
    for name in STATE:
        truth = flat(oracle, name)
        eps = torch.finfo(ours[name][0].dtype).eps
        allowed = 2 * (flat(eager, name) - truth).abs().max() + 4 * eps * truth.square().mean().sqrt()
        assert (flat(ours, name) - truth).abs().max() <= allowed, name
    assert torch.equal(ours["steps"], eager["steps"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_parameters_round_once_and_keep_float32_state(dtype: torch.dtype) -> None:
    ours = SPEC.make_inputs(RAGGED, dtype, DEVICE, 3)
    reference = copied(ours)
    for _ in range(4):
        SPEC.optimized(**ours)
        SPEC.reference(**reference)
    assert {tensor.dtype for tensor in ours["exp_avgs"]} == {torch.float32}
    gap = (flat(ours, "params") - flat(reference, "params")).abs()
    assert (gap <= torch.finfo(dtype).eps * flat(reference, "params").abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e19, -1e30, 1e-42])
def test_gradients_at_the_ends_of_the_range_do_what_they_do_in_the_reference(value: float, dtype: torch.dtype) -> None:
    ours = fresh([(40,)], dtype)
    ours["grads"][0][::3] = value
    ours["steps"].fill_(3.0)
    reference = copied(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    for name in STATE:
        torch.testing.assert_close(ours[name], reference[name], equal_nan=True)


def test_generated_sizes_may_leave_no_tensor_at_all() -> None:
    none = Case("none", edges=0, squares=0, vectors=0, side=1, rows=0, skip=0)
    inputs = SPEC.make_inputs(none, torch.float32, DEVICE, 0)
    for update in (SPEC.optimized, SPEC.reference):
        update(**inputs)
    assert inputs["params"] == []
    assert inputs["steps"].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [SPEC.optimized, SPEC.reference], ids=["optimized", "reference"])
def test_nothing_changes_unless_ok(update: Any, dtype: torch.dtype) -> None:
    inputs = SPEC.make_inputs(RAGGED, dtype, DEVICE, 0)
    for grad in inputs["grads"]:
        grad.fill_(float("nan"))
    before = bits(inputs)
    update(**{**inputs, "ok": torch.tensor(False, device=DEVICE)})
    assert bits(inputs) == before
    update(**inputs)
    assert bits(inputs) != before


def test_every_tensor_has_its_own_step_count_and_learning_rate() -> None:
    ours = fresh([(5,), (5,), (5,)])
    ours["steps"].copy_(torch.tensor([0.0, 7.0, 100_000.0]))
    ours["lrs"].copy_(torch.tensor([1e-3, 0.0, 1e-2]))
    oracle = in_float64(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**oracle)
    assert ours["steps"].tolist() == [1.0, 8.0, 100_001.0]
    for mine, truth in zip(ours["params"], oracle["params"], strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("column", ["params", "grads", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_at_unaligned_addresses(column: str, dtype: torch.dtype) -> None:
    size = 2 * kernel_module().CACHED.block + 3
    ours = SPEC.make_inputs(RAGGED, dtype, DEVICE, 0)
    for name in (*STATE, "grads"):
        like = dtype if name in ("params", "grads") else torch.float32
        ours[name] = [torch.rand(size, device=DEVICE).to(like)]
    ours["steps"], ours["lrs"] = ours["steps"][:1].clone(), ours["lrs"][:1].clone()
    base = torch.zeros(size + 2, dtype=ours[column][0].dtype, device=DEVICE)
    base[1:-1] = ours[column][0]
    reference = copied(ours)
    ours[column] = [base[1:-1]]
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    for name in STATE:
        torch.testing.assert_close(ours[name], reference[name])
    assert base[0] == 0
    assert base[-1] == 0


def test_many_tensors_of_both_dtypes_share_a_call() -> None:
    ours = fresh([(3, 5)] * 130)
    ours["params"][1::2] = [param.bfloat16() for param in ours["params"][1::2]]
    ours["grads"][1::2] = [grad.bfloat16() for grad in ours["grads"][1::2]]
    reference = copied(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    for name in STATE:
        torch.testing.assert_close(ours[name], reference[name])
    assert ours["steps"].tolist() == [1.0] * 130


def test_no_parameters_and_empty_parameters() -> None:
    SPEC.optimized(**fresh([]))
    empty = fresh([(0,), (0, 4)])
    SPEC.optimized(**empty)
    assert empty["steps"].tolist() == [1.0, 1.0]


def test_gradients_that_move_are_found() -> None:
    ours = fresh(SIZES)
    reference = copied(ours)
    old = ours["grads"]
    for update in range(3):
        ours["grads"] = [torch.full_like(grad, update + 1.0) for grad in old]
        reference["grads"] = ours["grads"]
        SPEC.optimized(**ours)
        SPEC.reference(**reference)
    for name in STATE:
        torch.testing.assert_close(ours[name], reference[name])


def test_parameter_whose_data_is_replaced_is_found() -> None:
    ours = fresh([(9,)])
    ours["params"] = [nn.Parameter(ours["params"][0])]
    SPEC.optimized(**ours)
    moved = torch.ones(9, device=DEVICE)
    ours["params"][0].data = moved
    SPEC.optimized(**ours)
    assert (moved != 1).all()


def test_another_tensor_at_a_known_address_is_checked_anew() -> None:
    memory = {name: torch.zeros(16, device=DEVICE) for name in (*STATE, "grads")}
    for size, dtype in ((5, torch.float32), (7, torch.float32), (7, torch.bfloat16)):
        ours = fresh([(size,)], dtype)
        for name, block in memory.items():
            ours[name] = [block.view(ours[name][0].dtype)[:size].copy_(ours[name][0])]
        reference = copied(ours)
        SPEC.optimized(**ours)
        SPEC.reference(**reference)
        torch.testing.assert_close(ours["params"], reference["params"])


def test_checkpoints_load_into_torch_adamw_and_back() -> None:
    inputs = fresh([(17,), (127, 3)])
    alone = torch_adamw(inputs["params"])
    ours = torch_adamw(inputs["params"])
    params = ours.param_groups[0]["params"]
    for index, param in enumerate(params):
        step = inputs["steps"][index]
        ours.state[param] = {
            "step": step,
            "exp_avg": inputs["exp_avgs"][index],
            "exp_avg_sq": inputs["exp_avg_sqs"][index],
        }
    inputs["params"] = params
    for _ in range(10):
        SPEC.optimized(**inputs)
        torch_step(alone, inputs["grads"])

    resumed = torch_adamw(params)
    resumed.load_state_dict(ours.state_dict())
    torch_step(resumed, inputs["grads"])
    torch_step(alone, inputs["grads"])
    torch.testing.assert_close(torch_state(resumed), torch_state(alone), rtol=1e-5, atol=1e-7)
    assert torch_state(resumed)["steps"].tolist() == [11.0, 11.0]

    inputs |= torch_state(resumed)
    SPEC.optimized(**inputs)
    torch_step(alone, inputs["grads"])
    torch.testing.assert_close(
        {name: inputs[name] for name in STATE}, {name: torch_state(alone)[name] for name in STATE}, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", list(SPEC.peers))
def test_peers_make_the_same_update(name: str) -> None:
    ours = fresh([(17,), (61, 61)])
    theirs = copied(ours)
    SPEC.optimized(**ours)
    SPEC.peers[name](**theirs)
    for key in (*STATE, "steps"):
        torch.testing.assert_close(ours[key], theirs[key])
    with pytest.raises(ValueError, match="torch's AdamW has no torch.bfloat16 parameters"):
        SPEC.peers[name](**fresh([(3,)], torch.bfloat16))


def strided(*shape: int) -> Tensor:
    return torch.zeros(shape[::-1], device=DEVICE).t()


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("params", 0, strided(4, 6), r"contiguous.*number 0 is strided"),
        ("params", 1, torch.zeros(3, device=DEVICE).double(), r"number 1 is.*float64"),
        ("exp_avgs", 1, torch.zeros(3, device=DEVICE).bfloat16(), r"exp_avgs number 1.*bfloat16"),
        ("exp_avg_sqs", 0, torch.zeros(6, 4, device=DEVICE), r"exp_avg_sqs number 0.*\(4, 6\)"),
        ("grads", 0, strided(4, 6), r"grads number 0.*strided"),
        ("grads", slice(1), [], r"2 params, 1 grads.*one of each"),
        ("steps", None, torch.zeros(2, device=DEVICE).long(), r"steps must be.*int64"),
        ("lrs", None, torch.zeros(1, device=DEVICE), r"lrs must be.*\(2,\)"),
        ("ok", None, torch.ones(1, device=DEVICE), r"ok must be.*torch.bool"),
    ],
)
def test_wrong_arguments_are_refused_with_nothing_changed(name: str, index: Any, value: Any, message: str) -> None:
    inputs = fresh([(4, 6), (3,)])
    if index is None:
        inputs[name] = value
    else:
        inputs[name][index] = value
    before = bits(inputs)
    with pytest.raises(ValueError, match=message):
        SPEC.optimized(**inputs)
    assert bits(inputs) == before


def test_operator_survives_tracing_and_torch_compile() -> None:
    inputs = fresh([(17,), (5, 3)])
    torch.library.opcheck(
        torch.ops.kernbench.fused_adamw.default,
        tuple(inputs[name] for name in (*_argument_names(), "ok")),
        test_utils=("test_schema", "test_faketensor"),
    )
    reference = copied(inputs)
    compiled = torch.compile(SPEC.optimized, backend="aot_eager", fullgraph=True)
    compiled(**inputs)
    SPEC.reference(**reference)
    torch.testing.assert_close(
        {name: inputs[name] for name in (*STATE, "steps")}, {name: reference[name] for name in (*STATE, "steps")}
    )


def _argument_names() -> tuple[str, ...]:
    return (*("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "lrs"), *HYPER)


def test_a_profile_shows_the_operator_by_name() -> None:
    inputs = fresh([(3,)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        SPEC.optimized(**inputs)
    assert "kernbench::fused_adamw" in {event.key for event in profile.key_averages()}


def test_parameters_count_as_modified_for_autograd() -> None:
    inputs = fresh([(3,)])
    param = nn.Parameter(inputs["params"][0])
    loss = (param * param).sum()
    SPEC.optimized(**{**inputs, "params": [param]})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)
