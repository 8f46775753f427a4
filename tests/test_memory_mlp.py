"""The memory MLP's kernels against autograd and each other: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernbench import device, registry
from kernbench.spec import Case, Inputs

DEVICE = device.resolve("auto")
UPDATE: Any = registry.kernel("memory_mlp_update").declaration
LOSS: Any = registry.kernel("memory_mlp_loss").declaration
WEIGHTS = ("inner_weight", "inner_bias", "outer_weight", "outer_bias")
STATE = (*WEIGHTS, "momentum")


def module(spec: Any) -> ModuleType:
    return sys.modules[spec.optimized.__module__]


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(dtype or value.dtype)

    return {name: copy(value) for name, value in inputs.items()}


def drawn(spec: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Inputs:
    flags = {"clipped": 1, "given": 0} if spec is UPDATE else {"taken": 0}
    case = Case("drawn", large=False, **{**flags, **sizes})
    inputs: Inputs = spec.make_inputs(case, dtype, DEVICE, seed)
    return inputs


def by_autograd(inputs: Inputs) -> None:
    """The update as the specification has it: autograd, branches on the host, one weight after the other."""
    weights = [inputs[name].detach().requires_grad_() for name in WEIGHTS]
    hidden = functional.silu(functional.linear(inputs["key"], weights[0], weights[1]))
    loss = functional.mse_loss(functional.linear(hidden, weights[2], weights[3]), inputs["value"])
    gradient = torch.cat([one.reshape(-1) for one in torch.autograd.grad(loss, weights)])
    norm = gradient.norm()
    if norm > inputs["clip"]:
        gradient *= inputs["clip"] / norm
    if not gradient.isfinite().all():
        return
    with torch.no_grad():
        inputs["momentum"].copy_(inputs["decay"] * inputs["momentum"] - inputs["step_size"] * gradient)
        steps = inputs["momentum"].split([weight.numel() for weight in weights])
        for name, step in zip(WEIGHTS, steps, strict=True):
            inputs[name].copy_((1 - inputs["forget"]) * inputs[name] + step.view_as(inputs[name]))


@pytest.mark.parametrize(("implementation", "updates"), [("optimized", 10), ("reference", 100)])
def test_state_follows_autograd_in_float64(implementation: str, updates: int) -> None:
    """Parity holds the kernel against the reference for a hundred updates, which take the interpreter long."""
    ours = drawn(UPDATE, rows=9, width=5, hidden=7)
    # Some updates are clipped, and some are not.
    ours["clip"] = 0.2
    exact = copied(ours, torch.float64)
    for update in range(1, updates + 1):
        getattr(UPDATE, implementation)(**ours)
        by_autograd(exact)
        if update in (1, 10, 100):
            for name in STATE:
                size = float(exact[name].abs().max())
                torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-4, atol=1e-5 * size)
        UPDATE.next_inputs(ours, update)
        for name in ("key", "value", "forget", "decay"):
            exact[name].copy_(ours[name])


@pytest.mark.gpu
@pytest.mark.parametrize(("setting", "rtol", "atol"), [("ieee", 1e-4, 1e-6), ("tf32", 1e-2, 1e-3)])
@pytest.mark.parametrize("updates", [1, 10, 100])
def test_state_follows_autograd_at_full_size(updates: int, setting: str, rtol: float, atol: float) -> None:
    ours = drawn(UPDATE, rows=2048, width=512, hidden=512)
    exact = copied(ours, torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        for update in range(updates):
            UPDATE.optimized(**ours)
            by_autograd(exact)
            UPDATE.next_inputs(ours, update)
            for name in ("key", "value", "forget", "decay"):
                exact[name].copy_(ours[name])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name in STATE:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=rtol, atol=atol)


def bits(inputs: Inputs) -> list[bytes]:
    return [inputs[name].contiguous().view(torch.uint8).cpu().numpy().tobytes() for name in STATE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["key", "value", "gradient"])
def test_a_bad_gradient_changes_no_bit(dtype: torch.dtype, bad: float, where: str) -> None:
    inputs = drawn(UPDATE, dtype, rows=9, width=5, hidden=7, given=int(where == "gradient"))
    inputs["inner_weight"][0, 0] = -0.0
    inputs["momentum"][3] = float("nan")
    inputs[where].view(-1)[-1] = bad
    before = bits(inputs)
    UPDATE.optimized(**inputs)
    assert bits(inputs) == before
    inputs[where].view(-1)[-1] = 1.0
    UPDATE.optimized(**inputs)
    assert bits(inputs) != before


def test_a_huge_gradient_is_clipped_to_nothing() -> None:
    inputs = drawn(UPDATE, rows=3, width=4, hidden=5, given=1)
    inputs["gradient"].fill_(1e30)
    expected = copied(inputs)
    UPDATE.optimized(**inputs)
    UPDATE.reference(**expected)
    for name in STATE:
        torch.testing.assert_close(inputs[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("watched", [False, True])
def test_loss_and_update_agree_on_the_gradient(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module(LOSS)._rows, "watched", lambda: watched)
    whole = drawn(UPDATE, rows=33, width=6, hidden=11)
    halves = copied(whole)
    gradient = torch.full_like(whole["momentum"], float("nan"))
    batch = {name: halves[name] for name in ("key", "value", *WEIGHTS)}
    LOSS.optimized(**batch, gradient=gradient)
    UPDATE.optimized(**whole)
    UPDATE.optimized(**{**halves, "gradient": gradient})
    for name in STATE:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("taken", [False, True])
def test_gradients_of_the_loss_are_those_of_autograd(
    watched: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module(LOSS)._rows, "watched", lambda: watched)
    inputs = drawn(LOSS, rows=33, width=6, hidden=11)
    names = ("key", "value", *WEIGHTS)
    exact = {name: inputs[name].detach().double().requires_grad_() for name in names}
    expected = torch.autograd.grad(3 * LOSS.reference(**exact), list(exact.values()))
    gradient = torch.full((2 * 6 * 11 + 11 + 6,), float("nan"), device=DEVICE) if taken else None
    given = {name: inputs[name] for name in names}
    loss = LOSS.optimized(**given, gradient=gradient)
    if taken:
        # Written before the backward pass runs, as the memory is.
        with torch.no_grad():
            for name in WEIGHTS:
                given[name].mul_(0.5)
    found = torch.autograd.grad(3 * loss, list(given.values()))
    for name, ours, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_weights_written_before_their_gradient_is_taken_are_noticed() -> None:
    inputs = drawn(LOSS, rows=3, width=4, hidden=5)
    loss = LOSS.optimized(**inputs)
    with torch.no_grad():
        inputs["outer_weight"].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative_is_left_out_silently() -> None:
    inputs = drawn(LOSS, rows=3, width=4, hidden=5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(LOSS.optimized(**inputs), inputs["key"], create_graph=True)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("value", lambda one: one[:-1], "takes key"),
        ("inner_weight", lambda one: one.t().contiguous().t(), "contiguous weights"),
        ("outer_bias", lambda one: one.double(), "float64"),
        ("momentum", lambda one: one[:-1], "takes momentum"),
        ("momentum", lambda one: one.double(), "float32 and contiguous"),
        ("gradient", lambda one: one.repeat_interleave(2)[::2], "takes gradient"),
        ("decay", lambda one: one.expand(2), "takes decay as one number"),
        ("key", lambda one: one[:0], "not empty"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Any, words: str) -> None:
    inputs = drawn(UPDATE, rows=3, width=4, hidden=5, given=1)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=words):
        UPDATE.optimized(**inputs)


def test_precision_follows_both_interfaces_of_torch() -> None:
    chosen = module(UPDATE)._memory_mlp_plans.precision
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.allow_tf32 = True
        assert chosen(torch.float32) == "tf32"
        matmul.allow_tf32 = False
        assert chosen(torch.float32) != "tf32"
        matmul.fp32_precision = "tf32"
        assert chosen(torch.float32) == "tf32"
        assert chosen(torch.bfloat16) == "ieee"
        matmul.fp32_precision = "ieee"
        assert chosen(torch.float32) != "tf32"
    finally:
        matmul.fp32_precision = before
