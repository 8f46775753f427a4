"""Seeds blend vectors of a blueprint bank into their columns, with statistics of the input in the same pass.

Columns of seed s are those from s * chunk on; w = bank[blueprint of s] there, a = alpha[s], and by its operator

    table      0                    1        other
    "alpha"    a w x + (1 - a) x    x * w    x + w
    "simple"   x * w                x + w    x / 2 + w / 2

where its lifecycle is among the active ones (3 to 6). All else passes through bit for bit: other seeds, and columns
that no seed owns. Each operator is y = x * scale + shift with one scale and shift per column, so programs do not branch
on it; -0.0 is the shift that changes no number. A program handles rows x columns of x once; of each tile of one seed it
leaves the mean, the squared distances from it added up, which are shifted sums with the best of shifts, and how many
numbers are near zero. No atomics.

    dx = dy * scale;  t = sum over rows of dy * x, or dy where w is added;  dw = t times the factor of w;
    da = sum over columns of t * w - t

Cast order: scale and shift are float32, like the bank and alpha; x is cast up when read and y rounded once.

No library has this operator, or one that picks a vector by an index per column block, so that bench's only peer is
torch.compile of the reference.

Source: the second id table and the simple one of Kasmina's Triton kernels; Chan et al., 1979, for the statistics.
Shapes: B rows, H columns, S seeds, N blueprints, P x Q tiles as ``_seeds.tiles_of`` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernbench.spec import KernelSpec, Sizes, Tolerance, Values

from . import _rows, _seed_cases, _seed_gradients, _seeds
from ._rows import narrow
from ._seeds import GRAFTING_TO_FINE_TUNING, NEAR_ZERO, TABLES


def seed_blend_reference(
    x: Tensor, bank: Tensor, lifecycle: Tensor, blueprint: Tensor, operator: Tensor, alpha: Tensor, chunk: int,
    table: str = "alpha", active_states: int = GRAFTING_TO_FINE_TUNING, near_zero: float = NEAR_ZERO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`seed_blend`."""
    seeds = len(lifecycle)
    column = torch.arange(x.shape[-1], device=x.device)
    seed = (column // chunk).clamp(max=seeds - 1)
    chosen = (lifecycle >= 0) & (lifecycle < 32) & ((active_states >> lifecycle.clamp(0, 31)) & 1 == 1)
    active = (column < seeds * chunk) & chosen[seed]
    row, strategy = blueprint[seed], operator[seed]
    known = (row >= 0) & (row < bank.shape[0])
    weight = bank[torch.where(known, row, 0), column]
    weight = torch.where(active, torch.where(known, weight, float("nan")), 0.0)
    if table == "alpha":
        a = alpha[seed]
        scale = torch.where(strategy == 0, a * weight + (1 - a), torch.where(strategy == 1, weight, 1.0))
        shift = torch.where((strategy == 0) | (strategy == 1), -0.0, weight)
    else:
        scale = torch.where(strategy == 0, weight, torch.where(strategy == 1, 1.0, 0.5))
        shift = torch.where(strategy == 0, -0.0, torch.where(strategy == 1, weight, 0.5 * weight))
    wide = x.to(weight.dtype)
    y = torch.where(active, wide * scale + shift, wide).to(x.dtype)
    rows = wide.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return y, *_statistics(rows, seeds, chunk, near_zero)


def _statistics(x: Tensor, seeds: int, chunk: int, near_zero: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each tile of x [B, H] the mean, squared distances from it added up, and count of near zeros, [P, Q] each."""
    batch, features = x.shape
    rows, width, parts, granules = _seeds.tiles_of(batch, features, seeds, chunk)
    x = x[:, : granules * width]
    padding = (0, granules * width - x.shape[1], 0, parts * rows - batch)
    shape = (parts, rows, granules, width)
    tiles = torch.nn.functional.pad(x, padding).view(shape)
    inside = torch.nn.functional.pad(torch.ones_like(x, dtype=torch.bool), padding).view(shape)
    means = tiles.sum((1, 3)) / inside.sum((1, 3))
    distances = torch.where(inside, tiles - means[:, None, :, None], 0.0)
    zeros = ((tiles.abs() < near_zero) & inside).sum((1, 3))
    return means, distances.square().sum((1, 3)), zeros.to(means.dtype)


@triton.jit(do_not_specialize=["batch", "blocks", "granules", "bank_rows"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, bank, lifecycle, blueprint, operator, alpha, y, means, squares, zeros, choices,
    batch, features, blocks, granules, per_seed, bank_rows, near_zero,
    x_stride, bank_stride, lifecycle_stride, blueprint_stride, operator_stride, alpha_stride,
    SIMPLE: tl.constexpr, ACTIVE_STATES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr, STREAMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS rows and N granules of WIDTH columns of x and y [batch, features].

    Grid is the parts of ROWS rows times blocks of N granules; statistics are [parts, granules], and the first part
    leaves the choices [seeds] of those that own columns. ``EVEN`` says that rows and columns are all there,
    ``STREAMS`` that x and y are too large for the caches, ``OVERLAP`` that the next kernel may be set up meanwhile.
    """
    part = (tl.program_id(0) // blocks).to(tl.int64)
    granule = (tl.program_id(0) % blocks) * N + tl.arange(0, N)[None, :, None]
    row = part * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = granule.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = EVEN | ((row < batch) & (column < features))
    # Asked for first, because the blueprint's row is known only after two loads, one after the other.
    first: tl.constexpr = "evict_first" if STREAMS else ""
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0, eviction_policy=first).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    covered = EVEN | (granule < granules)
    seed = (granule // per_seed).to(tl.int64)
    choice = _seeds.choice_of(
        lifecycle, blueprint, operator, seed, covered, bank_rows,
        lifecycle_stride, blueprint_stride, operator_stride, ACTIVE_STATES,
    )  # fmt: skip
    a = tl.load(alpha + seed * alpha_stride, mask=covered, other=0.0)
    weight = _seeds.weight_of(bank, choice, column, features, bank_rows, bank_stride)
    scale, shift = _seeds.scale_and_shift(choice, a, weight, SIMPLE)
    blended = narrow(value * scale + shift, y.dtype.element_ty)
    tl.store(y + row * features + column, blended, mask=inside, cache_modifier=".cs" if STREAMS else "")
    # One program tells of a seed: that with its first granule, in the first part.
    leads = granule + part * granules == seed * per_seed
    tl.store(choices + seed, choice, mask=covered & leads)
    if EVEN:
        mean = _seeds.sum_of_granule(value, ROWS, N, WIDTH) * (1.0 / (ROWS * WIDTH))
        distance = value - mean
        near = tl.where(tl.abs(value) < near_zero, 1.0, 0.0)
    else:
        rows = tl.minimum(batch - part * ROWS, ROWS)
        columns = tl.minimum(features - granule.to(tl.int64) * WIDTH, WIDTH)
        mean = tl.math.div_rn(_seeds.sum_of_granule(value, ROWS, N, WIDTH), (rows * columns).to(tl.float32))
        distance = tl.where(inside, value - mean, 0.0)
        near = tl.where(inside & (tl.abs(value) < near_zero), 1.0, 0.0)
    place = part * granules + granule
    tl.store(means + place, mean, mask=covered)
    tl.store(squares + place, _seeds.sum_of_granule(distance * distance, ROWS, N, WIDTH), mask=covered)
    tl.store(zeros + place, _seeds.sum_of_granule(near, ROWS, N, WIDTH), mask=covered)


def seed_blend(
    x: Tensor, bank: Tensor, lifecycle: Tensor, blueprint: Tensor, operator: Tensor, alpha: Tensor, chunk: int,
    table: str = "alpha", active_states: int = GRAFTING_TO_FINE_TUNING, near_zero: float = NEAR_ZERO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The blend, and statistics of x for :func:`seed_telemetry`; differentiable in x, bank and alpha. No host sync.

    A blueprint that the bank does not have makes the columns of an active seed NaN, since the host does not know;
    nothing outside the bank is read. The host's own check belongs where a seed is activated.

    Args:
        x: [..., H], float32, bfloat16 or float16; rows may be any equal distance apart, other layouts are copied.
        bank: [N, H], float32, N at least 1.
        lifecycle: [S], int32, of any stride, so that it may be a column of a state, as all that follow; S at least 1.
        blueprint: row of the bank of each seed, [S], int32.
        operator: how each seed blends, [S], int32.
        alpha: [S], float32.
        chunk: columns of a seed, 1 or more; S * chunk may be less than H or more.
        table: what the operators mean: "alpha" or "simple".
        active_states: the lifecycles that blend, a bit each: those from 3 to 6 if not said otherwise.
        near_zero: numbers of x of less magnitude count as zeros.

    Returns:
        y like x, contiguous; then, [P, Q] each in float32 and without gradients, the mean of each tile, its squared
        distances from it added up, and how many of its numbers are near zero. B, of a tile, is all rows of x.

    Raises:
        ValueError: a shape, dtype or device is another, or there is no such table.
    """
    arguments = (x, bank, lifecycle, blueprint, operator, alpha, chunk, table, active_states, near_zero)
    if _rows.watched():
        results = torch.ops.kernbench.seed_blend.default(*arguments)
    elif torch.is_grad_enabled() and (x.requires_grad or bank.requires_grad or alpha.requires_grad):
        results = _SeedBlend.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        results = _forward(*arguments)
    y, means, squares, zeros, _ = results
    return y, means, squares, zeros


def _forward(
    x: Tensor, bank: Tensor, lifecycle: Tensor, blueprint: Tensor, operator: Tensor, alpha: Tensor, chunk: int,
    table: str, active_states: int, near_zero: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What :func:`seed_blend` returns, and the choices [S], which the backward pass needs as they were."""
    _check(x, bank, lifecycle, blueprint, operator, alpha, chunk, table)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    *rows, features = x.shape
    batch, seeds = math.prod(rows), lifecycle.shape[0]
    tiles, grid = _seeds.plan_of(batch, features, seeds, chunk, x.itemsize)
    shape = tiles.parts, tiles.granules
    means, squares, zeros = bank.new_empty(shape), bank.new_empty(shape), bank.new_empty(shape)
    choices = lifecycle.new_empty(seeds)
    if y.numel():
        x, x_stride = _rows.as_rows(x)
        bank, bank_stride = _rows.as_rows(bank)
        with _rows.on_device(x):
            _forward_kernel[(tiles.parts * grid.blocks,)](
                x, bank, lifecycle, blueprint, operator, alpha, y, means, squares, zeros, choices,
                batch, features, grid.blocks, tiles.granules, chunk // tiles.width, bank.shape[0], near_zero,
                x_stride, bank_stride, lifecycle.stride(0), blueprint.stride(0), operator.stride(0), alpha.stride(0),
                table == "simple", active_states, tiles.rows, grid.granules, tiles.width, grid.even,
                grid.streams, _rows.overlaps(), num_warps=grid.warps,
            )  # fmt: skip
    return y, means, squares, zeros, choices


def _check(
    x: Tensor, bank: Tensor, lifecycle: Tensor, blueprint: Tensor, operator: Tensor, alpha: Tensor, chunk: int,
    table: str,
) -> None:  # fmt: skip
    if table not in TABLES:
        raise ValueError(f"seed_blend knows the tables {' and '.join(TABLES)}, not {table!r}")
    if x.dtype not in _rows.DTYPES or not x.dim():
        raise ValueError(f"seed_blend takes float32, bfloat16 or float16 rows, not {tuple(x.shape)} {x.dtype}")
    shape, device = lifecycle.shape, x.get_device()
    fits = (
        bank.dim() == 2 and bank.shape[1] == x.shape[-1] and bank.shape[0] and chunk >= 1
        and len(shape) == 1 and shape[0] and blueprint.shape == operator.shape == alpha.shape == shape
        and bank.dtype == alpha.dtype == torch.float32
        and lifecycle.dtype == blueprint.dtype == operator.dtype == torch.int32
        and lifecycle.get_device() == blueprint.get_device() == operator.get_device() == device
        and bank.get_device() == alpha.get_device() == device
    )  # fmt: skip
    if not fits:
        tensors = (x, bank, lifecycle, blueprint, operator, alpha)
        described = ", ".join(f"{tuple(one.shape)} {one.dtype} on {one.device}" for one in tensors)
        raise ValueError(
            f"seed_blend takes x [..., H], a float32 bank [N, H], int32 lifecycle, blueprint and operator [S], float32 "
            f"alpha [S] and a chunk of at least 1, on one device; they are {described} and {chunk}"
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, bank, _, _, _, alpha, ctx.chunk, ctx.table, *_ = inputs
    # A layer may move its seeds on before the backward pass, so that is told what they were by the choices.
    ctx.save_for_backward(x, bank, output[4], alpha)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    to_x, to_bank, _, _, _, to_alpha = ctx.needs_input_grad[:6]
    backward = torch.ops.kernbench.seed_blend_backward.default if _rows.watched() else _seed_gradients.backward
    x, bank, choices, alpha = ctx.saved_tensors
    dx, dbank, dalpha = backward(dy, x, bank, choices, alpha, ctx.chunk, ctx.table, to_x, to_bank or to_alpha)
    gradients = (dx if to_x else None, dbank if to_bank else None, None, None, None, dalpha if to_alpha else None)
    return (*gradients, None, None, None, None)


class _SeedBlend(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than a launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients)


def _fake(x: Tensor, bank: Tensor, lifecycle: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shape = _seeds.tiles_of(math.prod(x.shape[:-1]), x.shape[-1], len(lifecycle), others[3])[2:]
    statistics = (bank.new_empty(shape) for _ in range(3))
    return x.new_empty(x.shape), *statistics, lifecycle.new_empty(lifecycle.shape)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation in (
    (
        "seed_blend",
        "(Tensor x, Tensor bank, Tensor lifecycle, Tensor blueprint, Tensor operator, Tensor alpha, int chunk, "
        "str table, int active_states, float near_zero) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _forward,
    ),
    (
        "seed_blend_backward",
        "(Tensor dy, Tensor x, Tensor bank, Tensor choices, Tensor alpha, int chunk, str table, bool to_x, "
        "bool to_seeds) -> (Tensor, Tensor, Tensor)",
        _seed_gradients.backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::seed_blend", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "kernbench::seed_blend_backward",
    lambda dy, x, bank, choices, alpha, chunk, table, to_x, to_seeds: (
        x.new_empty(x.shape if to_x else 0),
        bank.new_empty(bank.shape if to_seeds else 0),
        alpha.new_empty(alpha.shape if to_seeds else 0),
    ),
    lib=_LIBRARY,
)
torch.library.register_autograd("kernbench::seed_blend", _gradients, setup_context=_keep, lib=_LIBRARY)


SPEC = KernelSpec(
    name="seed_blend",
    reference=seed_blend_reference,
    optimized=seed_blend,
    make_inputs=_seed_cases.make_inputs,
    cases=_seed_cases.CASES,
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=_seed_cases.cost,
    backward_cost=_seed_cases.backward_cost,
    sizes={
        "batch": Sizes(most=150, block=_seeds.ROWS),
        "features": Sizes(most=400, block=_seeds.MOST_WIDTH),
        "seeds": Sizes(least=1, most=40),
        "chunk": Sizes(least=1, most=200, block=_seeds.MOST_WIDTH),
        "blueprints": Sizes(least=1, most=5),
        "simple": Sizes(most=1),
        "states": Sizes(most=1),
    },
    values={"x": Values(nonfinite=True)},
    differentiable=True,
    sweeps=(_seed_cases.SWEEP,),
    claims=_seed_cases.CLAIMS,
    source="Kasmina's Triton forward kernels (tachyon-beep/esperlite, RC1), with the same semantics for every size",
)
