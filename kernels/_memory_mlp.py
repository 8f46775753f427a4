"""How the kernels of the memory MLP are launched: forward, gradients, and the write.

Shapes: N rows, D width of keys, H hidden width, M width of values, P = H D + H + M H + M memory weights, in the order
W1 [H, D], b1 [H], W2 [M, H], b2 [M].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from . import _memory_mlp_kernels as kernels
from . import _memory_mlp_state_kernels as state_kernels
from . import _rows
from ._blocks import blocks_in
from ._memory_mlp_operands import Operands
from ._memory_mlp_plans import LIBRARY, Method, Tiles, launch

DTYPES = (torch.float32, torch.bfloat16)
_SMALL = _rows.INTERPRETED.value
BLOCK = 512 if _SMALL else 1024
SUM_ROWS, SUM_COLUMNS = (4, 32) if _SMALL else (32, 32)
MOST_SQUARES = 16 if _SMALL else 4096
"""So many sums of squares every program of the write adds up itself; of more it would read too much."""
LOSS_BLOCK = 16 if _SMALL else 1024


class Saved(NamedTuple):
    """What the forward pass leaves: z1 and silu(z1) [N, H], y - v [N, M], sums of its columns, and parts of the loss.

    ``error_ready`` [N, M] holds the same as products take it, where that is in TF32, ``hidden_turned`` [H, N] and
    ``error_turned`` [M, N] where the plan wants them; else these hold nothing. silu(z1) is wanted by products alone.
    """

    before: Tensor
    hidden: Tensor
    error: Tensor
    error_ready: Tensor
    error_sums: Tensor
    hidden_turned: Tensor
    error_turned: Tensor
    losses: Tensor


def gradient_of(key: Tensor, value: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The gradient of the memory's loss in plain PyTorch without autograd, flat [P] in ``dtype``."""
    inner_weight, inner_bias, outer_weight, outer_bias = weights
    before = functional.linear(key, inner_weight, inner_bias)
    hidden = functional.silu(before)
    error = functional.linear(hidden, outer_weight, outer_bias) - value
    dvalue = error * (2 / error.numel())
    sigmoid = torch.sigmoid(before)
    dbefore = dvalue @ outer_weight * (sigmoid * (1 + before * (1 - sigmoid)))
    parts = (dbefore.t() @ key, dbefore.sum(0), dvalue.t() @ hidden, dvalue.sum(0))
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def check(kernel: str, key: Tensor, value: Tensor, weights: Sequence[Tensor]) -> None:
    """Keys [N, D], values [N, M] and weights that fit, contiguous, of one dtype and device.

    Raises:
        ValueError: they are not.
    """
    inner_weight, inner_bias, outer_weight, outer_bias = weights
    hidden = inner_bias.numel()
    shapes = (key.dim(), value.dim()) == (2, 2) and (
        value.shape[0] == key.shape[0]
        and inner_weight.shape == (hidden, key.shape[1])
        and outer_weight.shape == (value.shape[1], hidden)
        and outer_bias.shape == (value.shape[1],)
        and inner_bias.dim() == 1
    )
    alike = all(one.dtype == key.dtype and one.get_device() == key.get_device() for one in (value, *weights))
    if shapes and alike and key.dtype in DTYPES and key.numel() and value.numel() and hidden:
        if all(weight.is_contiguous() for weight in weights):
            return
        raise ValueError(f"{kernel} takes contiguous weights")
    described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in (key, value, *weights))
    raise ValueError(
        f"{kernel} takes key [N, D], value [N, M], W1 [H, D], b1 [H], W2 [M, H] and b2 [M], not empty, of one device "
        f"and of one dtype, float32 or bfloat16; they are {described}"
    )


def check_flat(kernel: str, weights: Sequence[Tensor], **flat: Tensor | None) -> None:
    """What is given of these is [P], float32, contiguous, and beside the weights.

    Raises:
        ValueError: it is not.
    """
    size, device = sum(weight.numel() for weight in weights), weights[0].get_device()
    for name, one in flat.items():
        if one is None or (
            one.shape == (size,) and one.dtype == torch.float32 and one.is_contiguous() and one.get_device() == device
        ):
            continue
        raise ValueError(
            f"{kernel} takes {name} [{size}], float32 and contiguous, beside the weights on {weights[0].device}; it is "
            f"{tuple(one.shape)} {one.dtype} with strides {one.stride()} on {one.device}"
        )


def check_gates(kernel: str, weights: Sequence[Tensor], **gates: Tensor) -> None:
    """Each is one number of a floating dtype, beside the weights.

    Raises:
        ValueError: one is not.
    """
    for name, one in gates.items():
        if one.numel() != 1 or not one.is_floating_point() or one.get_device() != weights[0].get_device():
            raise ValueError(
                f"{kernel} takes {name} as one number on {weights[0].device}, not {tuple(one.shape)} {one.dtype} on "
                f"{one.device}"
            )


def _block(weights: int) -> int:
    """Elements of one program where every weight is one; the interpreter has few programs for many weights."""
    return BLOCK if not _SMALL or weights < 2**13 else 2**15


def _sizes(tiles: Tiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "INNER": tiles.inner}


def forward(value: Tensor, weights: Sequence[Tensor], operands: Operands, method: Method, *, keep_error: bool) -> Saved:
    """Two launches: z1 with its SiLU, and what is missing to the values, which need not be kept but for products."""
    key, inner, outer = operands.forward
    saved = empty_saved(key, value, inner.shape[0], method)
    if not keep_error and saved.error_ready.numel():
        saved = saved._replace(error=saved.error_ready)
    _hidden(method, key, inner, weights[1], saved)
    _error(method, outer, weights[3], value, saved, keep=saved.error is not saved.error_ready)
    return saved


def _hidden(method: Method, key: Tensor, weight: Tensor, bias: Tensor, saved: Saved) -> None:
    tiles, (rows, width), columns = method.plan.hidden, key.shape, saved.before.shape[1]
    if method.precision == LIBRARY:
        torch.mm(key, weight.t(), out=saved.before)
    across = blocks_in(columns, tiles.columns)
    launch(
        kernels.hidden_kernel,
        blocks_in(rows, tiles.rows) * across,
        (key, weight, bias, saved.before, saved.hidden, saved.hidden_turned, rows, width, columns, across),
        tiles,
        EVEN=width % tiles.inner == 0, TURNED=method.plan.turned, PRECISION=method.precision, **_sizes(tiles),
    )  # fmt: skip


def _error(method: Method, weight: Tensor, bias: Tensor, value: Tensor, saved: Saved, *, keep: bool) -> None:
    tiles, (rows, width), columns = method.plan.error, saved.hidden.shape, value.shape[1]
    if method.precision == LIBRARY:
        torch.mm(saved.hidden, weight.t(), out=saved.error)
    across = blocks_in(columns, tiles.columns)
    launch(
        kernels.error_kernel,
        saved.losses.numel(),
        (
            saved.hidden, weight, bias, value, saved.error, saved.error_ready, saved.error_turned, saved.losses,
            saved.error_sums, rows, width, columns, across,
        ),
        tiles,
        EVEN=width % tiles.inner == 0, TURNED=method.plan.turned, KEEP=keep, PRECISION=method.precision,
        **_sizes(tiles),
    )  # fmt: skip


def empty_saved(key: Tensor, value: Tensor, hidden_width: int, method: Method) -> Saved:
    """Memory for all of it."""
    plan, rows = method.plan, key.shape[0]
    before = key.new_empty(rows, hidden_width)
    down = blocks_in(rows, plan.error.rows)
    hidden_turned, error_turned = (key.new_empty((one.shape[1], rows) if plan.turned else 0) for one in (before, value))
    return Saved(
        before,
        torch.empty_like(before),
        torch.empty_like(value),
        torch.empty_like(value) if method.precision == "tf32" else value.new_empty(0),
        value.new_empty(down, value.shape[1], dtype=torch.float32),
        hidden_turned,
        error_turned,
        value.new_empty(down * blocks_in(value.shape[1], plan.error.columns), dtype=torch.float32),
    )


def loss_of(saved: Saved) -> Tensor:
    """The mean square of the error, 0-dim, in one launch."""
    loss = saved.error.new_empty(())
    launch(
        state_kernels.loss_kernel,
        1,
        (saved.losses, loss, float(saved.error.numel()), saved.losses.numel()),
        BLOCK=LOSS_BLOCK,
    )
    return loss


def gradients(
    key: Tensor, weights: Sequence[Tensor], operands: Operands, saved: Saved, gradient: Tensor, method: Method, *,
    with_key: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Three launches, and those of the library: fills gradient [P], float32; sums of squares of its blocks, and the
    keys' gradient.

    That one holds nothing unless it is wanted.
    """
    plan = method.plan
    rows, hidden_width, value_width = key.shape[0], weights[1].numel(), saved.error.shape[1]
    scale = 2.0 / saved.error.numel()
    hidden_sums = key.new_empty(blocks_in(rows, plan.outer.rows), hidden_width, dtype=torch.float32)
    splits = blocks_in(rows, plan.length)
    inner_partials = key.new_empty(splits, weights[0].numel(), dtype=torch.float32)
    outer_partials = key.new_empty(splits, weights[2].numel(), dtype=torch.float32)
    nothing = key.new_empty(0)
    through = torch.empty_like(saved.hidden) if with_key or not plan.turned else nothing
    through_turned = torch.empty_like(saved.hidden_turned)
    key_gradient = torch.empty_like(key) if with_key else nothing
    right, inner, outer = operands.backward
    error = saved.error_ready if saved.error_ready.numel() else saved.error
    hidden = saved.hidden_turned if plan.turned else saved.hidden
    shape = (rows, value_width, hidden_width)
    _backward(
        plan.outer, method, shape, error, saved.error_turned, outer, hidden, saved.before, through,
        through_turned, hidden_sums, outer_partials, scale, slope=True,
    )  # fmt: skip
    shape = (rows, hidden_width, key.shape[1])
    _backward(
        plan.inner, method, shape, through, through_turned, inner, right, nothing, key_gradient, nothing,
        hidden_sums, inner_partials, scale, slope=False,
    )  # fmt: skip
    sizes = (weights[0].numel(), hidden_width, weights[2].numel(), value_width)
    block = _block(gradient.numel())
    counts = [blocks_in(size, block) for size in sizes[::2]] + [blocks_in(size, SUM_COLUMNS) for size in sizes[1::2]]
    *ends, programs = accumulate(counts)
    squares = key.new_empty(programs, dtype=torch.float32)
    launch(
        state_kernels.gather_kernel,
        programs,
        (
            inner_partials, hidden_sums, outer_partials, saved.error_sums, gradient, squares, scale, *sizes,
            hidden_sums.shape[0], saved.error_sums.shape[0], *ends,
        ),
        SPLITS=splits, BLOCK=block, SUM_ROWS=SUM_ROWS, SUM_COLUMNS=SUM_COLUMNS,
    )  # fmt: skip
    return squares, key_gradient


def _backward(
    tiles: Tiles, method: Method, shape: tuple[int, int, int], left: Tensor, turned: Tensor, weight: Tensor,
    right: Tensor, before: Tensor, out: Tensor, out_turned: Tensor, sums: Tensor, partials: Tensor, scale: float,
    *, slope: bool,
) -> None:  # fmt: skip
    """Of a layer with shape (N, I, J); where neither out nor slope asks for them, the rows are left out."""
    rows, inner, columns = shape
    plan, precision = method
    across, down = blocks_in(columns, tiles.columns), blocks_in(inner, tiles.rows)
    weight_programs = down * across * partials.shape[0]
    if precision == LIBRARY:
        torch.mm(left.t(), right, out=partials.view(inner, columns))
        weight_programs = 0
        if slope or out.numel():
            torch.mm(left, weight, out=out)
    row_programs = blocks_in(rows, tiles.rows) * across if slope or out.numel() else 0
    launch(
        kernels.backward_kernel,
        weight_programs + row_programs,
        (
            left, turned, weight, right, before, out, out_turned, sums, partials, scale, rows, inner, columns,
            plan.length, across, down, weight_programs,
        ),
        tiles,
        EVEN=inner % tiles.inner == 0, EVEN_ROWS=plan.length % tiles.inner == rows % tiles.inner == 0, SLOPE=slope,
        TURNED=plan.turned, KEEP=out.numel() > 0, PRECISION=precision, **_sizes(tiles),
    )  # fmt: skip


def write(
    weights: Sequence[Tensor], momentum: Tensor, gradient: Tensor, squares: Tensor, forget: Tensor, decay: Tensor,
    step_size: float, clip: float,
) -> None:  # fmt: skip
    """One launch: clip, momentum and write. Many weights take one more, for the sum of squares."""
    sizes = [weight.numel() for weight in weights]
    if squares.numel() > MOST_SQUARES:
        squares = squares.sum().view(1)
    block = _block(momentum.numel())
    *ends, programs = accumulate(blocks_in(size, block) for size in sizes)
    count = squares.numel()
    launch(
        state_kernels.write_kernel,
        programs,
        (*weights, momentum, gradient, squares, forget, decay, step_size, clip, *sizes, *ends, count),
        PROGRAMS=triton.next_power_of_2(count), BLOCK=block,
    )  # fmt: skip


def squares_of(gradient: Tensor) -> Tensor:
    """Sums of squares of its blocks, in one launch."""
    block = _block(gradient.numel())
    programs = blocks_in(gradient.numel(), block)
    squares = gradient.new_empty(programs)
    launch(state_kernels.squares_kernel, programs, (gradient, squares, gradient.numel()), BLOCK=block)
    return squares


def scaled(upstream: Tensor, key_gradient: Tensor, error: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """One launch: the gradients of keys, values and weights of a loss whose own gradient is upstream."""
    out = empty_gradients(key_gradient, error, gradient)
    sizes = [one.numel() for one in out]
    block = _block(gradient.numel())
    *ends, programs = accumulate(blocks_in(size, block) for size in (*sizes[2:], *sizes[:2]))
    launch(
        state_kernels.scale_kernel,
        programs,
        (upstream, key_gradient, error, gradient, *out, 2.0 / error.numel(), *sizes, *ends),
        BLOCK=block,
    )
    return out


def empty_gradients(key_gradient: Tensor, error: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """For keys, values and weights, whose shapes follow from P: it is H D + H + M H + M."""
    width, value_width = key_gradient.shape[1], error.shape[1]
    hidden_width = (gradient.numel() - value_width) // (width + 1 + value_width)
    shapes = ((hidden_width, width), (hidden_width,), (value_width, hidden_width), (value_width,))
    return (torch.empty_like(key_gradient), torch.empty_like(error), *(error.new_empty(shape) for shape in shapes))
