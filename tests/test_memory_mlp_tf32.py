"""The memory MLP's kernels where float32 products are taken in TF32, against those products emulated.

Interpreted products cut the last bits off their operands, as tensor cores do, so that an operand that nobody has
rounded shows on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_memory_mlp import DEVICE, LOSS, UPDATE, WEIGHTS, copied, drawn, module
from torch import Tensor
from torch.nn import functional

from kernbench.parity import compare
from kernbench.parity.subject import Truth, judge_all
from kernbench.spec import Inputs

RAGGED, EVEN = (61, 19, 37), (256, 64, 64)
"""Rows, width and hidden width."""
OPERANDS = ("k", "W1", "h", "W2", "e", "W2 back", "e turned", "h turned", "d", "k turned", "d back", "W1 back")
NAMES = ("key", "value", *WEIGHTS)
LIMIT = 1.1
"""Twelve operands are rounded; one that is cut instead is 1.2 times as bad or worse."""
Rounding = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def inputs_of(spec: Any, sizes: tuple[int, int, int] = RAGGED) -> Inputs:
    rows, width, hidden = sizes
    return drawn(spec, rows=rows, width=width, hidden=hidden)


def nearest(x: Tensor) -> Tensor:
    """Ten bits of mantissa are kept; in float64, which holds each product of such numbers as it is."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def cut(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).trunc() / 2**11, exponent)


def exactly(x: Tensor) -> Tensor:
    return x.double()


def emulated(inputs: Inputs, rounding: Rounding, **others: Rounding) -> dict[str, Tensor]:
    """Gradients with operands rounded, some of them otherwise; sums are in float64, and what is stored in float32."""
    stored: Callable[[Tensor], Tensor] = exactly if rounding is exactly else Tensor.float
    r = dict.fromkeys(OPERANDS, rounding) | others
    key, value, w1, b1, w2, b2 = (inputs[name].detach() for name in NAMES)
    z = stored(r["k"](key) @ r["W1"](w1).t() + b1)
    sigmoid = torch.sigmoid(z)
    h = functional.silu(z)
    e = stored(stored(r["h"](h) @ r["W2"](w2).t() + b2) - value)
    d = stored(stored(r["e"](e) @ r["W2 back"](w2)) * (sigmoid * (1 + z * (1 - sigmoid))))
    scale = 2 / e.numel()
    found = {
        "inner_weight": r["d"](d).t() @ r["k turned"](key),
        "inner_bias": d.double().sum(0),
        "outer_weight": r["e turned"](e).t() @ r["h turned"](h),
        "outer_bias": e.double().sum(0),
        "key": r["d back"](d) @ r["W1 back"](w1),
        "value": -e.double(),
    }
    return {name: stored(one * scale) for name, one in found.items()}


def share(found: dict[str, Tensor], inputs: Inputs) -> float:
    """The error to float64, as a multiple of that of a float32 program on a GPU that allows TF32."""
    names = found.keys()
    eager, oracle = ({name: emulated(inputs, how)[name] for name in names} for how in (nearest, exactly))
    return max(item.excess for item in judge_all(found, Truth(eager, oracle), compare.Rule(1.0, 0.0)))


def taken(inputs: Inputs) -> dict[str, Tensor]:
    """All gradients, from a loss that takes them in its forward pass."""
    flat = torch.full((sum(inputs[name].numel() for name in WEIGHTS),), float("nan"), device=DEVICE)
    given = [inputs[name] for name in NAMES]
    loss = LOSS.optimized(**dict(zip(NAMES, given, strict=True)), gradient=flat)
    return dict(zip(NAMES, torch.autograd.grad(loss, given), strict=True))


def left(inputs: Inputs) -> dict[str, Tensor]:
    """The same from its backward pass."""
    given = [inputs[name] for name in NAMES]
    loss = LOSS.optimized(**dict(zip(NAMES, given, strict=True)))
    return dict(zip(NAMES, torch.autograd.grad(loss, given), strict=True))


def updated(inputs: Inputs) -> dict[str, Tensor]:
    """Those of the weights, from a step of one without a clip."""
    weights = [inputs[name].detach() for name in WEIGHTS]
    state = {name: one for name, one in copied(inputs).items() if name in NAMES}
    momentum = torch.zeros(sum(weight.numel() for weight in weights), device=DEVICE)
    half = torch.tensor(0.5, device=DEVICE)
    UPDATE.optimized(**state, momentum=momentum, forget=half, decay=half, step_size=1.0, clip=float("inf"))
    steps = torch.split(-momentum, [weight.numel() for weight in weights])
    return {name: step.view_as(one) for name, step, one in zip(WEIGHTS, steps, weights, strict=True)}


@pytest.mark.parametrize("sizes", [RAGGED, EVEN])
@pytest.mark.parametrize("gradients", [taken, left, updated])
def test_gradients_are_as_exact_as_those_of_rounded_operands(gradients: Any, sizes: tuple[int, int, int]) -> None:
    inputs = inputs_of(LOSS, sizes)
    assert share(gradients(inputs), inputs) < LIMIT


@pytest.mark.parametrize("operand", OPERANDS)
def test_one_operand_that_is_cut_is_more_than_is_allowed(operand: str) -> None:
    inputs = inputs_of(LOSS)
    assert share(emulated(inputs, nearest, **{operand: cut}), inputs) > LIMIT


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a compiled kernel keeps the function that it was compiled with")
@pytest.mark.parametrize("gradients", [taken, left, updated])
def test_kernels_that_do_not_round_are_found(gradients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = module(UPDATE)._memory_mlp.kernels
    monkeypatch.setattr(kernels, "tf32_nearest", kernels._tf32_cut)
    inputs = inputs_of(LOSS)
    assert share(gradients(inputs), inputs) > LOSS.tolerance["float32"].gradient


def test_the_backward_pass_multiplies_as_the_forward_pass_did() -> None:
    inputs = drawn(LOSS, rows=33, width=6, hidden=11)
    given = [inputs[name] for name in NAMES]
    found = []
    for later in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        loss = LOSS.optimized(**dict(zip(NAMES, given, strict=True)))
        torch.backends.cuda.matmul.fp32_precision = later
        found.append(torch.autograd.grad(loss, given))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1 + 2**-11, 1.0),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-23, 1 + 2**-10),
        (-1 - 2**-11 - 2**-23, -1 - 2**-10),
        (2 - 2**-23, 2.0),
        (float("inf"), float("inf")),
        (float("nan"), float("nan")),
    ],
)
def test_operands_are_rounded_to_the_nearest_even_on_ties(given: float, expected: float) -> None:
    key = torch.full((1, 1), given, device=DEVICE)
    weights = [torch.zeros(1, 1, device=DEVICE)] * 4
    method = module(UPDATE)._memory_mlp_plans.method_for(key, key, 1)
    found = module(UPDATE)._memory_mlp_operands.operands(
        key, weights, method, forward=True, backward=True, with_key=False
    )
    for one in (found.forward[0], found.backward[0]):
        torch.testing.assert_close(one.cpu(), torch.full((1, 1), expected), rtol=0, atol=0, equal_nan=True)
