"""The presynaptic recurrence: attention whose rows share one synapse per head, handed from row to row.

    y, C, BUF, RRP, RES, PR, E = presyn_recurrence(q, k, v, CL, carried)

Rule R3. Row t starts from what row t - 1 left, row 0 from ``carried``; with L = q k^T / sqrt(D), over keys j <= t:

    I_t = mean_j softplus(clip(L_tj, -20, 20)),  S_t = sum_j sigma(L_tj)
    C, BUF, PRm, Rr, RESm, Em by steps 2 to 4,  raw = f Rr,  used = min(raw S_t, Rr),  then RRP, RES, PR and E
    w_tj = ln(used / S_t sigma(L_tj) qamp + eps) - barrier (t - j) / T,  y = softmax(L + w) V

Both sums of a row need no state, so one kernel takes them for all rows at once; a second one walks the state from row
to row, a chain of T short steps that nothing shortens; a third one mixes values, with the bias made from one number a
row. Nothing of size (T, T) is made. Upstream's kernel adds the bias to logits in place and starts row 0 from constants,
which are :data:`START`; here the last row's state can be carried into the next call. Deterministic and forward only, as
upstream.

Cast order: the product q k^T is rounded to no dtype, weights are rounded to that of v before they mix values, the state
is float32.

Source: specification of bio-nanochat, section 2.4, rule R3.
Shapes: B batch, H heads, T tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _presyn, _rows
from . import _presyn_recurrence_kernels as kernels
from ._presyn_keys import Rates, constants_of

START = (0.0, 0.0, 0.8, 0.2, 0.6, 0.8)
"""C, BUF, RRP, RES, PR and E before the first row of a sequence."""
DEFAULT = Rates()
DRIVE_LIMIT = 20.0
ENERGY_LIMIT = 1.6
SCANNED = 1
"""Heads that one program walks through all rows: each step waits for the one before, so that more are not faster."""


def presyn_recurrence_reference(
    q: Tensor, k: Tensor, v: Tensor, clamp: Tensor, carried: Tensor, rates: Sequence[float] = DEFAULT
) -> tuple[Tensor, ...]:
    """In plain PyTorch; arguments as in :func:`presyn_recurrence`."""
    logits, bias, states = biased(q, k, clamp, carried, rates)
    weights = torch.softmax(logits + bias, -1)
    return weights.to(v.dtype) @ v, *states


def biased(
    q: Tensor, k: Tensor, clamp: Tensor, carried: Tensor, rates: Sequence[float] = DEFAULT
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Masked logits and bias [B, H, T, T], zero above the diagonal, and the state after each row."""
    r = Rates(*rates)
    tokens, wide = q.shape[2], torch.promote_types(carried.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) * q.shape[3] ** -0.5
    place = torch.arange(tokens, device=q.device)
    visible = place[:, None] >= place[None, :]
    drive = functional.softplus(scores.clamp(-DRIVE_LIMIT, DRIVE_LIMIT)) * visible
    influx = drive.sum(3) / (place + 1)
    docked = torch.sigmoid(scores) * visible
    state = tuple(carried.to(wide).unbind(0))
    states, rows = [], []
    for row in range(tokens):
        state, release = _row(state, clamp[:, :, row].to(wide), influx[:, :, row], docked[:, :, row], r)
        states.append(state)
        rows.append(release)
    weights = torch.stack(rows, 2) if rows else docked
    distance = (place[:, None] - place[None, :]) * (r.barrier_strength / max(1, tokens))
    bias = (torch.log(weights + r.epsilon) - distance).masked_fill(~visible, 0.0)
    stacked = tuple(torch.stack(entry, 2) for entry in zip(*states, strict=True))
    return scores.masked_fill(~visible, float("-inf")), bias, stacked or (influx,) * 6


def _row(
    state: tuple[Tensor, ...], clamp: Tensor, influx: Tensor, docked: Tensor, r: Rates
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The state [B, H] after a row, and what it released times its amplitude [B, H, T]."""
    calcium, buffer, pool, reserve, primed, energy = state
    bound, freed = r.alpha_buf_on * calcium * (1 - buffer), r.alpha_buf_off * buffer
    calcium = (math.exp(-1 / r.tau_c) * calcium + r.alpha_ca * influx - bound + freed).clamp(min=0)
    buffer = (math.exp(-1 / r.tau_buf) * buffer + bound - freed).clamp(0, 1)
    primed = (math.exp(-1 / r.tau_prime) * primed + r.alpha_prime * (1 - primed)).clamp(0, 1)
    pool = (math.exp(-1 / r.tau_rrp) * pool + r.alpha_refill * reserve).clamp(0, 1)
    reserve = (reserve * (1 - r.alpha_refill)).clamp(0, 1)
    energy = (math.exp(-1 / r.tau_energy) * energy + r.energy_in).clamp(0, ENERGY_LIMIT)
    sensor = 0.7 * calcium / (calcium + r.syt_fast_kd) + 0.3 * calcium / (calcium + r.syt_slow_kd)
    fire = torch.sigmoid(3 * sensor + 2 * primed - 2 * (clamp + r.complexin_bias))
    raw = (fire.unsqueeze(-1) * docked * pool.unsqueeze(-1)).clamp(0, 1)
    total = raw.sum(-1)
    scale = torch.where(total > 0, (pool / torch.where(total > 0, total, 1.0)).clamp(max=1), 1.0)
    used = total * scale
    reserve = (reserve + used).clamp(0, 1)
    energy = energy - r.energy_cost_rel * used - r.energy_cost_pump * (1 - reserve)
    energy = energy.clamp(0, ENERGY_LIMIT)
    after = (
        calcium, buffer, (pool - used).clamp(0, 1), reserve, (primed - r.alpha_unprime * used).clamp(0, 1), energy
    )  # fmt: skip
    return after, raw * (scale * r.qmax * torch.sigmoid(r.q_beta * (energy - 0.5))).unsqueeze(-1)


def start(q: Tensor) -> Tensor:
    """The state [6, B, H] before the first row, float32."""
    values = torch.tensor(START, dtype=torch.float32, device=q.device)
    return values[:, None, None].expand(6, *q.shape[:2]).contiguous()


def presyn_recurrence(
    q: Tensor, k: Tensor, v: Tensor, clamp: Tensor, carried: Tensor, rates: Sequence[float] = DEFAULT
) -> tuple[Tensor, ...]:
    """Attention biased by the recurrence, without gradients; no host sync.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16, D up to 128, k and v likewise; rows any distance apart.
        clamp: CL of each row [B, H, T], float32.
        carried: C, BUF, RRP, RES, PR and E that row 0 starts from, [6, B, H], float32: :func:`start`, or the entries
            of a call before at its last row, stacked.
        rates: a :class:`Rates`.

    Returns:
        y like q, then C, BUF, RRP, RES, PR and E after each row, [B, H, T] each, float32.

    Raises:
        ValueError: a shape, dtype or device is another, a rate is out of range, or a gradient is asked for.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v, clamp, carried)):
        raise ValueError("presyn_recurrence has no gradient, as upstream; detach its inputs, or use its reference")
    results: tuple[Tensor, ...] = torch.ops.kernbench.presyn_recurrence.default(q, k, v, clamp, carried, list(rates))
    return results


def _check(q: Tensor, k: Tensor, v: Tensor, clamp: Tensor, carried: Tensor, rates: Sequence[float]) -> None:
    _presyn.check_rows("presyn_recurrence", q, k, v, rates)
    for name, one, shape in (("clamp", clamp, q.shape[:3]), ("carried", carried, (6, *q.shape[:2]))):
        if one.shape != shape or one.dtype != torch.float32 or one.device != q.device:
            raise ValueError(
                f"presyn_recurrence takes {name} {tuple(shape)}, float32, on {q.device}; it is {tuple(one.shape)} "
                f"{one.dtype} on {one.device}"
            )


def _launch(
    q: Tensor, k: Tensor, v: Tensor, clamp: Tensor, carried: Tensor, rates: Sequence[float]
) -> tuple[Tensor, ...]:
    _check(q, k, v, clamp, carried, rates)
    batch, heads, tokens, dim = q.shape
    q, k, v = (_presyn.dense(one) for one in (q, k, v))
    y = torch.empty_like(q)
    states = q.new_empty(6, batch, heads, tokens, dtype=torch.float32)
    influx, release, slopes = (states.new_empty(states.shape[1:]) for _ in range(3))
    if q.numel():
        columns = max(16, triton.next_power_of_2(dim))
        scale, constants = math.log2(math.e) * dim**-0.5, constants_of(tuple(rates))
        multiplier = _presyn.multiplier(q.dtype, rates)
        tiles = _presyn.tiles_for(columns, q.itemsize, tokens)
        with _rows.on_device(q):
            sums, mix = tiles.forward_keys, tiles.forward_queries
            kernels.sums_kernel[(batch * heads * triton.cdiv(tokens, sums.keys),)](
                q, k, influx, release, *q.stride()[:3], *k.stride()[:3], tokens, heads, scale, dim, columns,
                sums.keys, sums.queries, num_warps=sums.warps, num_stages=sums.stages,
            )  # fmt: skip
            kernels.scan_kernel[(triton.cdiv(batch * heads, SCANNED),)](
                influx, release, clamp.contiguous(), carried.contiguous(), states, slopes, tokens, batch * heads,
                multiplier, constants, SCANNED, num_warps=1,
            )  # fmt: skip
            kernels.mix_kernel[(batch * heads * triton.cdiv(tokens, mix.queries),)](
                q, k, v, slopes, y, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], tokens, heads,
                scale, constants.epsilon * multiplier, constants.barrier_strength * math.log2(math.e) / tokens,
                dim, columns, mix.queries, mix.keys, num_warps=mix.warps, num_stages=mix.stages,
            )  # fmt: skip
    return y, *(entry.clone() for entry in states)


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(_presyn.dense(q)), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(6))


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "presyn_recurrence(Tensor q, Tensor k, Tensor v, Tensor clamp, Tensor carried, float[] rates) -> "
    f"({', '.join(['Tensor'] * 7)})",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("presyn_recurrence", _launch, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::presyn_recurrence", _fake, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Queries and keys as after a norm of heads, clamps that let some rows release less than the pool holds."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = tuple(case[name] for name in ("batch", "heads", "tokens", "dim"))
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    q, k = (one * torch.rsqrt(one.square().mean(-1, keepdim=True) + 1e-6) for one in (q, k))
    clamp = torch.rand(shape[:3], generator=generator, device=device) * 4
    carried = torch.rand((6, *shape[:2]), generator=generator, device=device)
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "clamp": clamp, "carried": carried}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Three products of what is on or below the diagonal, and 22 operations on each pair there."""
    rows = float(case["batch"] * case["heads"] * case["tokens"])
    pairs, numbers = rows * (case["tokens"] + 1) / 2, rows * case["dim"] * dtype.itemsize
    carried = 6 * 4.0 * case["batch"] * case["heads"]
    return Cost(
        flops=pairs * (3 * 2 * case["dim"] + 22),
        bytes_read=3 * numbers + 4 * rows + carried,
        bytes_written=numbers + 6 * 4 * rows,
    )


SPEC = KernelSpec(
    name="presyn_recurrence",
    reference=presyn_recurrence_reference,
    optimized=presyn_recurrence,
    make_inputs=make_inputs,
    cases=(
        Case("one", batch=1, heads=1, tokens=1, dim=16),
        Case("ragged", batch=2, heads=1, tokens=17, dim=24),
        Case("bench", large=True, batch=4, heads=12, tokens=2048, dim=64),
    ),
    # As of presyn_attention: two powers of two of 2 ulp each, where eager's exponential is good to 1 ulp.
    tolerance={"float32": Tolerance(floor_ulp=16.0), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=cost,
    sizes={
        "batch": Sizes(most=2),
        "heads": Sizes(least=1, most=2),
        "tokens": Sizes(most=24, block=16),
        "dim": Sizes(least=1, most=40),
    },
    values={
        "q": Values(least=-10, most=10),
        "k": Values(least=-10, most=10),
        "v": Values(least=-1e3, most=1e3),
        "clamp": Values(least=0, most=4),
        "carried": Values(least=0, most=1),
    },
    source="bio-nanochat, profile P and K, rule R3",
)
