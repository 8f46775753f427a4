"""One step of a memory that is an MLP: gradient of its own loss, clip, momentum, decay, and the write, in place.

    z1 = k W1' + b1,  h = silu(z1),  y = h W2' + b2,  loss = mean((y - v)^2)
    g = the gradient of loss with respect to (W1, b1, W2, b2),  g <- g min(1, clip / ||g||)
    S <- decay S - step g,  W <- (1 - forget) W + S

Six launches: z1 and h; y - v; the gradient of W2 beside that of z1; the gradient of W1; their norm; the write. A
weight's gradient is a product over all rows: programs add up some rows each, and a later launch adds up the programs,
always in one order. In TF32 a seventh launch, the first, copies what products are given. Nothing is read by the host,
and nothing is written where g is not finite.

Cast order: z1, h, y, y - v and the gradient of z1 are rounded to the dtype, products are summed in float32; g and S
are float32, and W is rounded once. How float32 numbers are multiplied follows torch.backends.cuda.matmul: in TF32 where
that is allowed, each operand rounded to the nearest number of that format as in torch's products, else as three
products in TF32 of their halves, whose error is that of float32 products.

Source: Behrouz, Zhong and Mirrokni, Titans: Learning to Memorize at Test Time, 2024, equations 8 to 14.
Shapes: N rows, D width of keys, H hidden width, M width of values, P memory weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _memory_mlp, _memory_mlp_operands, _memory_mlp_plans, _rows


@torch.no_grad()
def memory_mlp_update_reference(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    momentum: Tensor, forget: Tensor, decay: Tensor, step_size: float, clip: float, gradient: Tensor | None = None,
) -> None:  # fmt: skip
    """In plain PyTorch, without autograd; arguments as in :func:`memory_mlp_update`."""
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    if gradient is None:
        gradient = _memory_mlp.gradient_of(key, value, weights, momentum.dtype)
    norm = gradient.norm()
    gradient = gradient * (clip / norm).masked_fill(~(norm > clip), 1.0)
    ok = torch.isfinite(gradient).all()
    sizes = [weight.numel() for weight in weights]
    written = decay.to(momentum.dtype) * momentum - step_size * gradient
    for weight, step in zip(weights, written.split(sizes), strict=True):  # type: ignore[no-untyped-call]
        kept = (1 - forget.to(momentum.dtype)) * weight.to(momentum.dtype)
        weight.copy_(torch.where(ok, (kept + step.view_as(weight)).to(weight.dtype), weight))
    momentum.copy_(torch.where(ok, written, momentum))


def memory_mlp_update(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    momentum: Tensor, forget: Tensor, decay: Tensor, step_size: float, clip: float, gradient: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes one batch of keys and values into the memory, in place; no host sync.

    Args:
        key: [N, D], float32 or bfloat16, on one device with all others; at least one row.
        value: [N, M], of its dtype.
        inner_weight: W1 [H, D], of the same dtype, contiguous, as are all that are written.
        inner_bias: b1 [H].
        outer_weight: W2 [M, H].
        outer_bias: b2 [M].
        momentum: S [P], float32, contiguous: of W1, b1, W2 and b2 in turn.
        forget: alpha, 0-dim, of the weights' dtype.
        decay: eta, 0-dim, of the weights' dtype.
        step_size: theta.
        clip: largest norm of g.
        gradient: g before the clip where it is known, [P], float32, contiguous; key and value do not count then.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device than said here.
    """
    call = torch.ops.kernbench.memory_mlp_update.default if _rows.watched() else _launch
    call(
        key, value, inner_weight, inner_bias, outer_weight, outer_bias, momentum, forget, decay, step_size, clip,
        gradient,
    )  # fmt: skip


def _launch(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    momentum: Tensor, forget: Tensor, decay: Tensor, step_size: float, clip: float, gradient: Tensor | None = None,
) -> None:  # fmt: skip
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    _memory_mlp.check("memory_mlp_update", key, value, weights)
    _memory_mlp.check_flat("memory_mlp_update", weights, momentum=momentum, gradient=gradient)
    _memory_mlp.check_gates("memory_mlp_update", weights, forget=forget, decay=decay)
    with _rows.on_device(momentum):
        if gradient is None:
            key, value = key.contiguous(), value.contiguous()
            method = _memory_mlp_plans.method_for(key, value, inner_weight.shape[0])
            operands = _memory_mlp_operands.operands(key, weights, method, forward=True, backward=True, with_key=False)
            saved = _memory_mlp.forward(value, weights, operands, method, keep_error=False)
            gradient = torch.empty_like(momentum)
            squares, _ = _memory_mlp.gradients(key, weights, operands, saved, gradient, method, with_key=False)
        else:
            squares = _memory_mlp.squares_of(gradient)
        _memory_mlp.write(weights, momentum, gradient, squares, forget, decay, step_size, clip)
    torch.autograd.graph.increment_version([*weights, momentum])


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "memory_mlp_update(Tensor key, Tensor value, Tensor(a!) inner_weight, Tensor(b!) inner_bias, "
    "Tensor(c!) outer_weight, Tensor(d!) outer_bias, Tensor(e!) momentum, Tensor forget, Tensor decay, "
    "float step_size, float clip, Tensor? gradient=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("memory_mlp_update", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A memory in the middle of a run, and a batch whose gradient is above the clip or far below it."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width, hidden = case["rows"], case["width"], case["hidden"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    state = torch.promote_types(dtype, torch.float32)
    size = 2 * width * hidden + hidden + width
    given = normal(size, scale=size**-0.5) if case["given"] else None
    return {
        "key": normal(rows, width).to(dtype),
        "value": normal(rows, width).to(dtype),
        "inner_weight": normal(hidden, width, scale=width**-0.5).to(dtype),
        "inner_bias": normal(hidden, scale=0.1).to(dtype),
        "outer_weight": normal(width, hidden, scale=hidden**-0.5).to(dtype),
        "outer_bias": normal(width, scale=0.1).to(dtype),
        "momentum": normal(size, scale=1e-3).to(state),
        "forget": torch.sigmoid(normal()).to(dtype),
        "decay": torch.sigmoid(normal()).to(dtype),
        "step_size": 0.05,
        # The norm of the gradient falls with the number of values, whose errors cancel.
        "clip": 0.3 * width**-0.5 if case["clipped"] else 10.0,
        "gradient": None if given is None else given.to(state),
    }


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The batch and the gates of the next update, in place."""
    generator = torch.Generator(inputs["key"].device).manual_seed(seed)
    for name in ("key", "value"):
        inputs[name].normal_(generator=generator)
    for name in ("forget", "decay"):
        inputs[name].uniform_(0.2, 0.8, generator=generator)
    if inputs["gradient"] is not None:
        inputs["gradient"].normal_(0.0, inputs["gradient"].numel() ** -0.5, generator=generator)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Five products of 2 N D H operations; keys, values and state once. What stays between launches does not count."""
    rows, width, hidden = case["rows"], case["width"], case["hidden"]
    weights = 2.0 * width * hidden + hidden + width
    state = 4.0 * weights
    read = 0.0 if case["given"] else 2.0 * dtype.itemsize * rows * width
    return Cost(
        flops=8 * weights + (0.0 if case["given"] else 10.0 * rows * width * hidden),
        bytes_read=read + dtype.itemsize * weights + state * (2 if case["given"] else 1),
        bytes_written=dtype.itemsize * weights + state,
    )


def _by_autograd(
    key: Tensor, value: Tensor, inner_weight: Tensor, inner_bias: Tensor, outer_weight: Tensor, outer_bias: Tensor,
    momentum: Tensor, forget: Tensor, decay: Tensor, step_size: float, clip: float, gradient: Tensor | None = None,
) -> None:  # fmt: skip
    """As a program does it that leaves the gradient to autograd, but for its reads by the host."""
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    if gradient is None:
        with torch.enable_grad():
            leaves = [one.detach().requires_grad_() for one in weights]
            hidden = functional.silu(functional.linear(key, *leaves[:2]))
            loss = functional.mse_loss(functional.linear(hidden, *leaves[2:]), value)
            parts = torch.autograd.grad(loss, leaves)
        gradient = torch.cat([part.reshape(-1) for part in parts]).to(momentum.dtype)
    memory_mlp_update_reference(
        key, value, inner_weight, inner_bias, outer_weight, outer_bias, momentum, forget, decay, step_size, clip,
        gradient,
    )  # fmt: skip


SPEC = KernelSpec(
    name="memory_mlp_update",
    reference=memory_mlp_update_reference,
    optimized=memory_mlp_update,
    make_inputs=make_inputs,
    cases=(
        Case("one", rows=1, width=1, hidden=1, clipped=0, given=0),
        Case("ragged", rows=61, width=19, hidden=37, clipped=1, given=0),
        Case("aligned", rows=64, width=32, hidden=16, clipped=0, given=0),
        Case("given", rows=1, width=17, hidden=23, clipped=1, given=1),
        Case("2048-rows", large=True, rows=2048, width=512, hidden=512, clipped=0, given=0),
        Case("2080-rows", large=True, rows=2080, width=512, hidden=512, clipped=1, given=0),
        Case("2048-given", large=True, rows=2048, width=512, hidden=512, clipped=0, given=1),
        Case("16384-rows", large=True, rows=16384, width=512, hidden=512, clipped=0, given=0),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance()},
    cost=cost,
    mutates=("inner_weight", "inner_bias", "outer_weight", "outer_bias", "momentum"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={
        "rows": Sizes(least=1, most=70, block=_memory_mlp_plans.INTERPRETED.length),
        "width": Sizes(least=1, most=40, block=_memory_mlp_plans.INTERPRETED.hidden.rows),
        "hidden": Sizes(least=1, most=40, block=_memory_mlp_plans.INTERPRETED.hidden.rows),
        "clipped": Sizes(most=1),
        "given": Sizes(most=1),
    },
    values={
        "key": Values(least=-1e3, most=1e3, nonfinite=True),
        "value": Values(least=-1e3, most=1e3, nonfinite=True),
        "inner_weight": Values(least=-10, most=10),
        "inner_bias": Values(least=-10, most=10),
        "outer_weight": Values(least=-10, most=10),
        "outer_bias": Values(least=-10, most=10),
        "momentum": Values(least=-10, most=10),
        "forget": Values(least=0, most=1),
        "decay": Values(least=0, most=1),
        "gradient": Values(least=-1e3, most=1e3, nonfinite=True),
    },
    peers={"autograd": _by_autograd},
    source="Behrouz, Zhong and Mirrokni, Titans: Learning to Memorize at Test Time, 2024, equations 8 to 14",
)
