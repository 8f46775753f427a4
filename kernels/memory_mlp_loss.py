"""How badly a memory that is an MLP recalls its values: forward pass and loss, and the gradients of both.

    z1 = k W1' + b1,  h = silu(z1),  y = h W2' + b2,  loss = mean((y - v)^2)

Three launches: z1 and h; y - v with parts of the loss; the loss. The backward pass takes four more: the gradient of W2
beside that of z1; that of W1 beside that of k; sums over programs; all times what arrives. In float32 without TF32 the
products are launches of torch's library, two and four: sums on tensor cores are not exact enough for these gradients.

Who writes into the weights before the backward pass runs gives a buffer for the memory's gradient. Then all gradients
are taken in the forward pass, of the weights that the loss is of, and the backward pass only multiplies, in one launch.

Cast order: as in :mod:`.memory_mlp_update`, whose gradient is that of the buffer.

Source: Behrouz, Zhong and Mirrokni, Titans: Learning to Memorize at Test Time, 2024, equation 12.
Shapes: N rows, D width of keys, H hidden width, M width of values, P memory weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _memory_mlp, _memory_mlp_operands, _memory_mlp_plans, _rows
from ._memory_mlp import Saved


def memory_mlp_loss_reference(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    gradient: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`memory_mlp_loss`."""
    if gradient is not None:
        with torch.no_grad():
            weights = (inner_weight, inner_bias, outer_weight, outer_bias)
            gradient.copy_(_memory_mlp.gradient_of(key, value, weights, gradient.dtype))
        inner_weight, outer_weight = inner_weight.clone(), outer_weight.clone()
    hidden = functional.silu(functional.linear(key, inner_weight, inner_bias))
    return functional.mse_loss(functional.linear(hidden, outer_weight, outer_bias), value)


def memory_mlp_loss(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    gradient: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean squared error of what the memory recalls, 0-dim, in the dtype of the keys; no host sync.

    Args:
        key: [N, D], float32 or bfloat16, on one device with all others; at least one row.
        value: [N, M], of its dtype.
        inner_weight: W1 [H, D], of the same dtype.
        inner_bias: b1 [H].
        outer_weight: W2 [M, H].
        outer_bias: b2 [M].
        gradient: gets the gradient of the loss with respect to W1, b1, W2 and b2 in turn, [P], float32, contiguous. It
            must stay as it is until the backward pass has run; the weights need not.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here.
    """
    key, value = key.contiguous(), value.contiguous()
    weights = tuple(one.contiguous() for one in (inner_weight, inner_bias, outer_weight, outer_bias))
    _memory_mlp.check("memory_mlp_loss", key, value, weights)
    _memory_mlp.check_flat("memory_mlp_loss", weights, gradient=gradient)
    if _rows.watched():
        results = torch.ops.kernbench.memory_mlp_loss.default(key, value, *weights, gradient is not None)
        if gradient is not None:
            gradient.copy_(results[-1].detach())
        return results[0]  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(one.requires_grad for one in (key, value, *weights)):
        return _MemoryLoss.apply(key, value, *weights, gradient)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(key, value, weights, gradient)[0]


def _forward(key: Tensor, value: Tensor, weights: tuple[Tensor, ...], gradient: Tensor | None) -> tuple[Tensor, ...]:
    """The loss, and all but the last of :class:`Saved`; with ``gradient`` the gradient of the keys too."""
    method = _method_for(key, value, weights[0].shape[0])
    taken = gradient is not None
    with _rows.on_device(key):
        operands = _memory_mlp_operands.operands(key, weights, method, forward=True, backward=taken, with_key=taken)
        saved = _memory_mlp.forward(value, weights, operands, method, keep_error=True)
        loss = _memory_mlp.loss_of(saved)
        found = [loss, *saved[:-1]]
        if gradient is not None:
            found.append(_memory_mlp.gradients(key, weights, operands, saved, gradient, method, with_key=True)[1])
    return tuple(found)


def _method_for(
    key: Tensor, value: Tensor, hidden_width: int, *, allowed: bool | None = None
) -> _memory_mlp_plans.Method:
    """How products are taken; in float32 by the library, since these gradients are what the caller sees."""
    chosen = _memory_mlp_plans.precision(key.dtype, allowed=allowed, nearest=True)
    return _memory_mlp_plans.method_for(key, value, hidden_width, chosen)


def _backward(
    dloss: Tensor, key: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    before: Tensor, hidden: Tensor, error: Tensor, error_ready: Tensor, error_sums: Tensor, hidden_turned: Tensor,
    error_turned: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    # As in the forward pass, whatever torch's setting has become: what that left is laid out for it.
    method = _method_for(key, error, hidden.shape[1], allowed=error_ready.numel() > 0)
    gradient = key.new_empty(sum(weight.numel() for weight in weights), dtype=torch.float32)
    saved = Saved(
        before, hidden, error, error_ready, error_sums, hidden_turned, error_turned, losses=error_sums
    )  # fmt: skip
    with _rows.on_device(key):
        operands = _memory_mlp_operands.operands(key, weights, method, forward=False, backward=True, with_key=True)
        _, dkey = _memory_mlp.gradients(key, weights, operands, saved, gradient, method, with_key=True)
        return _memory_mlp.scaled(dloss, dkey, error, gradient)


def _scaled(dloss: Tensor, dkey: Tensor, error: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    with _rows.on_device(error):
        return _memory_mlp.scaled(dloss, dkey, error, gradient)


class _MemoryLoss(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        *weights, gradient = rest
        loss, *saved = _forward(key, value, tuple(weights), gradient)
        if gradient is not None:
            saved = [*saved, gradient]
        _keep(ctx, key, weights, saved, taken=gradient is not None)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _rows.refuse_second_derivative("memory_mlp_loss")
        return (*_gradients(ctx, dloss), None)


def _keep(ctx: Any, key: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], *, taken: bool) -> None:
    """What the backward pass needs; where the gradients are taken already, no weight, so that these may be written."""
    ctx.taken = taken
    *forward, key_gradient, gradient = saved if taken else (*saved, None, None)
    ctx.save_for_backward(*((key_gradient, forward[2], gradient) if taken else (key, *weights, *forward)))


def _gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor, ...]:
    operators = torch.ops.kernbench
    found: tuple[Tensor, ...]
    if _rows.watched():
        call = operators.memory_mlp_loss_scaled if ctx.taken else operators.memory_mlp_loss_backward
        found = call.default(dloss, *ctx.saved_tensors)
    else:
        found = (_scaled if ctx.taken else _backward)(dloss, *ctx.saved_tensors)
    return found


def _operator(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    taken: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As :func:`_forward`, with buffers of its own, and empty ones where nothing is taken."""
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    size = sum(weight.numel() for weight in weights) if taken else 0
    gradient = key.new_empty(size, dtype=torch.float32)
    found = _forward(key, value, weights, gradient if taken else None)
    return (*found, gradient) if taken else (*found, key.new_empty(0), gradient)


def _operator_fake(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    taken: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    method = _method_for(key, value, inner_weight.shape[0])
    saved = _memory_mlp.empty_saved(key, value, inner_weight.shape[0], method)
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    size = sum(weight.numel() for weight in weights) if taken else 0
    return (
        key.new_empty(()), *saved[:-1],
        torch.empty_like(key) if taken else key.new_empty(0), key.new_empty(size, dtype=torch.float32),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    key, _, *weights, taken = inputs
    ctx.set_materialize_grads(False)
    _keep(ctx, key, weights, output[1:] if taken else output[1:-2], taken=taken)


def _operator_gradients(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 7 if dloss is None else (*_gradients(ctx, dloss), None)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_WEIGHTS = "Tensor inner_weight, Tensor inner_bias, Tensor outer_weight, Tensor outer_bias"
for _name, _schema, _implementation in (
    (
        "memory_mlp_loss",
        f"(Tensor key, Tensor value, {_WEIGHTS}, bool taken) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _operator,
    ),
    (
        "memory_mlp_loss_backward",
        f"(Tensor dloss, Tensor key, {_WEIGHTS}, Tensor before, Tensor hidden, Tensor error, "
        "Tensor error_ready, Tensor error_sums, Tensor hidden_turned, Tensor error_turned) -> " + _SIX,
        _backward,
    ),
    ("memory_mlp_loss_scaled", "(Tensor dloss, Tensor dkey, Tensor error, Tensor gradient) -> " + _SIX, _scaled),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::memory_mlp_loss", _operator_fake, lib=_LIBRARY)
torch.library.register_fake(
    "kernbench::memory_mlp_loss_backward",
    lambda dloss, key, w1, b1, w2, b2, before, hidden, error, *_: tuple(
        map(torch.empty_like, (key, error, w1, b1, w2, b2))
    ),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "kernbench::memory_mlp_loss_scaled",
    lambda dloss, dkey, error, gradient: _memory_mlp.empty_gradients(dkey, error, gradient),
    lib=_LIBRARY,
)
torch.library.register_autograd("kernbench::memory_mlp_loss", _operator_gradients, setup_context=_setup, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A batch, and a memory that keeps its size; a buffer of NaN where gradients are taken at once."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width, hidden = case["rows"], case["width"], case["hidden"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype).requires_grad_()

    size = 2 * width * hidden + hidden + width
    state = torch.promote_types(dtype, torch.float32)
    return {
        "key": normal(rows, width),
        "value": normal(rows, width),
        "inner_weight": normal(hidden, width, scale=width**-0.5),
        "inner_bias": normal(hidden, scale=0.1),
        "outer_weight": normal(width, hidden, scale=hidden**-0.5),
        "outer_bias": normal(width, scale=0.1),
        "gradient": torch.full((size,), torch.nan, dtype=state, device=device) if case["taken"] else None,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products of 2 N D H operations, and four more where gradients are taken; what is kept is written."""
    rows, width, hidden = case["rows"], case["width"], case["hidden"]
    weights = 2.0 * width * hidden + hidden + width
    taken = case["taken"]
    return Cost(
        flops=(12.0 if taken else 4.0) * rows * width * hidden,
        bytes_read=dtype.itemsize * (2.0 * rows * width + weights),
        bytes_written=4.0 * weights if taken else float(dtype.itemsize),
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Four products, of keys, z1, h and y - v; one factor of six tensors where they are taken already."""
    rows, width, hidden = case["rows"], case["width"], case["hidden"]
    weights = 2.0 * width * hidden + hidden + width
    written = dtype.itemsize * (2.0 * rows * width + weights)
    if case["taken"]:
        return Cost(
            flops=2.0 * rows * width + weights,
            bytes_read=dtype.itemsize * 2.0 * rows * width + 4.0 * weights,
            bytes_written=written,
        )
    return Cost(
        flops=8.0 * rows * width * hidden,
        bytes_read=dtype.itemsize * (2.0 * rows * (width + hidden) + weights),
        bytes_written=written,
    )


SPEC = KernelSpec(
    name="memory_mlp_loss",
    reference=memory_mlp_loss_reference,
    optimized=memory_mlp_loss,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, width=1, hidden=1, taken=0),
        Case("ragged", rows=61, width=19, hidden=37, taken=0),
        Case("taken", rows=37, width=17, hidden=40, taken=1),
        Case("2048-rows", large=True, rows=2048, width=512, hidden=512, taken=0),
        Case("2048-taken", large=True, rows=2048, width=512, hidden=512, taken=1),
        Case("16384-rows", large=True, rows=16384, width=512, hidden=512, taken=0),
        Case("16384-taken", large=True, rows=16384, width=512, hidden=512, taken=1),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance()},
    cost=cost,
    backward_cost=backward_cost,
    mutates=("gradient",),
    sizes={
        "rows": Sizes(least=1, most=70, block=_memory_mlp_plans.INTERPRETED.length),
        "width": Sizes(least=1, most=40, block=_memory_mlp_plans.INTERPRETED.hidden.rows),
        "hidden": Sizes(least=1, most=40, block=_memory_mlp_plans.INTERPRETED.hidden.rows),
        "taken": Sizes(most=1),
    },
    values={
        "key": Values(least=-1e3, most=1e3),
        "value": Values(least=-1e3, most=1e3),
        "inner_weight": Values(least=-10, most=10),
        "inner_bias": Values(least=-10, most=10),
        "outer_weight": Values(least=-10, most=10),
        "outer_bias": Values(least=-10, most=10),
        "gradient": Values(fixed=True),
    },
    differentiable=True,
    source="Behrouz, Zhong and Mirrokni, Titans: Learning to Memorize at Test Time, 2024, equation 12",
)
