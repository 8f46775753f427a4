"""Presynaptic attention: causal attention whose keys are synapses, with their state's step, forward and backward.

    y, C', BUF', RRP', RES', PR', E', used = presyn_attention(q, k, v, C, BUF, RRP, RES, PR, CL, E)

Rule R1 with dock="qk". With L = q k^T / sqrt(D), causal, i a query and j a key:

    S1_j = sum_i softplus(clip(L_ij, -20, 20)),  S2_j = sum_i sigma(L_ij)
    the state's step gives a_j from both sums: see _presyn_keys
    y_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(L_ij) (a_j sigma(L_ij) + eps) exp(barrier (j - T) / T)

That is softmax(L + ln(release qamp + eps) - barrier |i - j| / T) V: the release before it is scaled is a product of
factors below one, so its clip never acts and its sum is f Rr S2; of the barrier the query's part falls out of the
softmax.

Nothing of size (T, T) is made. A kernel streams queries past keys for the sums and the state, a second one keys past
queries for y. Backward, one streams queries past keys, for dk, dv and the state, a second one does dq; nothing is added
atomically, so that results are the same from run to run.

With a seed release is stochastic, step 8 of the rule: noise on some queries, from Philox streams that the reference
repeats; only their pairs pay for random numbers. See _presyn_drawn_kernels.

Special functions, of which a multiprocessor does 16 a clock, are counted: of each pair 1.5 over keys (an exponential;
four pairs share a reciprocal and a logarithm) and 2 over queries; backward 3 over keys and 3 over queries. At B 4,
H 12, T 2048 one a pair is 24 us of an H200 at 1.98 GHz, so these are at least 36, 48, 72 and 72 us; beside them and the
products run 9, 16, 28 and 25 instructions a pair, 3 us each.

Cast order: the product q k^T is rounded to no dtype, weights are rounded to that of v before they mix values, and near
the diagonal they do so once more with what rounding left; the state's arithmetic is float32, and it is rounded to its
own dtype when stored.

Source: specification of bio-nanochat, section 2.3 (rule R1), profile P; Dao, FlashAttention-2, 2023, for the streaming.
Shapes: B batch, H heads, T tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernbench import philox
from kernbench.spec import KernelSpec, Sizes, Tolerance, Values

from . import _presyn, _presyn_cases, _rows
from ._presyn_keys import Rates

DRIVE_LIMIT = 20.0
ENERGY_LIMIT = 1.6
PAIRS_STREAM = 1 << 32
"""Added to the seed for the noise of pairs; rows are drawn by the seed itself."""
DEFAULT = Rates()


def presyn_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, calcium: Tensor, buffer: Tensor, pool: Tensor, reserve: Tensor, primed: Tensor,
    clamp: Tensor, energy: Tensor, rates: Sequence[float] = DEFAULT, seed: Tensor | None = None, dock: str = "qk",
) -> tuple[Tensor, ...]:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`presyn_attention`, but that ``dock`` may be "upstream" too."""
    logits, bias, after, used = released(
        q, k, (calcium, buffer, pool, reserve, primed, clamp, energy), rates, seed, dock
    )
    weights = torch.softmax(logits + bias, -1)
    return weights.to(v.dtype) @ v, *after, used.detach()


def released(
    q: Tensor, k: Tensor, state: Sequence[Tensor], rates: Sequence[float] = DEFAULT, seed: Tensor | None = None,
    dock: str = "qk",
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """Masked logits and bias [B, H, T, T], the new state without the clamp, and what was used by key."""
    r = Rates(*rates)
    dtype = state[0].dtype
    wide = torch.promote_types(torch.promote_types(q.dtype, dtype), torch.float32)
    calcium, buffer, pool, reserve, primed, clamp, energy = (one.to(wide) for one in state)
    tokens, root = q.shape[2], q.shape[3] ** -0.5
    place = torch.arange(tokens, device=q.device)
    visible = place[:, None] >= place[None, :]
    scores = (q @ k.transpose(-2, -1)).to(wide) * root
    logits = scores.masked_fill(~visible, float("-inf"))
    drive = functional.softplus(scores.clamp(-DRIVE_LIMIT, DRIVE_LIMIT)) * visible
    influx = drive.sum(2) / (tokens - place)
    bound, freed = r.alpha_buf_on * calcium * (1 - buffer), r.alpha_buf_off * buffer
    new_calcium = (math.exp(-1 / r.tau_c) * calcium + r.alpha_ca * influx - bound + freed).clamp(min=0)
    new_buffer = (math.exp(-1 / r.tau_buf) * buffer + bound - freed).clamp(0, 1)
    primed = (math.exp(-1 / r.tau_prime) * primed + r.alpha_prime * (1 - primed)).clamp(0, 1)
    pool = (math.exp(-1 / r.tau_rrp) * pool + r.alpha_refill * reserve).clamp(0, 1)
    reserve = (reserve * (1 - r.alpha_refill)).clamp(0, 1)
    energy = (math.exp(-1 / r.tau_energy) * energy + r.energy_in).clamp(0, ENERGY_LIMIT)
    # Position i's key with position j's query, transposed, is what upstream has.
    docked = torch.sigmoid(scores if dock == "qk" else scores.transpose(-2, -1))
    fast, slow = new_calcium / (new_calcium + r.syt_fast_kd), new_calcium / (new_calcium + r.syt_slow_kd)
    fire = torch.sigmoid(3 * (0.7 * fast + 0.3 * slow) + 2 * primed - 2 * (clamp + r.complexin_bias))
    raw = (fire.unsqueeze(2) * docked * visible * pool.unsqueeze(2)).clamp(0, 1)
    if seed is not None:
        raw = torch.where(visible, _moved(raw, seed, r), 0.0)
    share = (pool / raw.sum(2).clamp(min=r.epsilon)).clamp(max=1)
    release = raw * share.unsqueeze(2)
    used = release.sum(2)
    new_reserve = (reserve + used).clamp(0, 1)
    spent = r.energy_cost_rel * used + r.energy_cost_pump * (1 - new_reserve)
    new_energy = (energy - spent).clamp(0, ENERGY_LIMIT)
    amplitude = (r.qmax * torch.sigmoid(r.q_beta * (new_energy - 0.5))).clamp(min=r.epsilon)
    distance = (place[:, None] - place[None, :]).abs() * (r.barrier_strength / max(1, tokens))
    bias = torch.log(release * amplitude.unsqueeze(2) + r.epsilon) - distance
    new_pool, new_primed = (pool - used).clamp(0, 1), (primed - r.alpha_unprime * used).clamp(0, 1)
    after = [new_calcium, new_buffer, new_pool, new_reserve, new_primed, new_energy]
    return logits, bias, [one.to(dtype) for one in after], used


def _moved(raw: Tensor, seed: Tensor, r: Rates) -> Tensor:
    """raw [B, H, T, T] with noise on the rows that are drawn. Step 8."""
    row = torch.arange(raw.shape[:3].numel(), device=raw.device).view(raw.shape[:3])
    pair = torch.arange(raw.numel(), device=raw.device).view(raw.shape)
    drawn = philox.rand(seed, row) < r.stochastic_train_frac
    noise = (philox.rand(seed + PAIRS_STREAM, pair).to(raw.dtype) - 0.5) / r.stochastic_quanta
    return torch.where(drawn.unsqueeze(-1), (raw + noise).clamp(0, 1), raw)


def presyn_attention(
    q: Tensor, k: Tensor, v: Tensor, calcium: Tensor, buffer: Tensor, pool: Tensor, reserve: Tensor, primed: Tensor,
    clamp: Tensor, energy: Tensor, rates: Sequence[float] = DEFAULT, seed: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention biased by release, and the synapses after it; differentiable in all tensors, with no host sync.

    Rows of q, k and v may be any distance apart, as they are in a transposed view; other layouts are copied.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16, D up to 128 (16, 32, 64 and 128 waste nothing).
        k: as q, v likewise; its heads repeated to H.
        calcium: C, [B, H, T], of one floating dtype with the rest of the state, float32 where it counts. Not negative.
        buffer: BUF, from 0 to 1, as the next four.
        pool: RRP.
        reserve: RES.
        primed: PR.
        clamp: CL, which stays as it is.
        energy: E, from 0 to 1.6.
        rates: a :class:`Rates`; a kernel is built for each that is used.
        seed: one int64 on the device, for stochastic release; None for a deterministic one.

    Returns:
        y like q and laid out like it; C', BUF', RRP', RES', PR' and E' like the state; and, float32 without a gradient,
        what each key used [B, H, T].

    Raises:
        ValueError: a shape, dtype or device is another, or a rate is out of range.
    """
    tensors = (q, k, v, calcium, buffer, pool, reserve, primed, clamp, energy)
    differentiated = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    arguments = (*tensors, list(rates), seed, differentiated)
    if _rows.watched():
        results = torch.ops.kernbench.presyn_attention.default(*arguments)
    elif differentiated:
        results = _PresynAttention.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        results = _presyn.forward(*arguments)
    return tuple(results[:8])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.rates, seed, _ = inputs
    ctx.save_for_backward(*tensors, seed, output[0], *output[8:])
    ctx.mark_non_differentiable(*output[7:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *d_after: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(gradient is None for gradient in (dy, *d_after[:6])):
        return (None,) * 13
    backward = torch.ops.kernbench.presyn_attention_backward.default if _rows.watched() else _presyn.backward
    q, k, v, *state, seed, y, rest, sums, factors, normalizers, drawn = ctx.saved_tensors
    gradients = backward(
        dy, list(d_after[:6]), q, k, v, state, y, rest, sums, factors, normalizers, drawn, ctx.rates, seed
    )
    return (*gradients, None, None, None)


class _PresynAttention(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _presyn.forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients)


def _fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    state = others[:6]
    used = q.new_empty(q.shape[:3], dtype=torch.float32)
    after = [one.new_empty(one.shape) for one in state]
    y, seed, keep = torch.empty_like(_presyn.dense(q)), others[8], others[9]
    rest = torch.empty_like(y) if keep and q.itemsize < 4 else q.new_empty(0)
    return y, *after, used, rest, *_presyn.left_behind(used, seed)


def _fake_backward(
    dy: Tensor | None, d_after: list[Tensor | None], q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], *others: Any
) -> tuple[Tensor, ...]:
    rows = (torch.empty_like(_presyn.dense(one)) for one in (q, k, v))
    return *rows, *(one.new_empty(one.shape) for one in state)


_ROWS, _STATE = "Tensor q, Tensor k, Tensor v, ", "".join(f"Tensor {name}, " for name in _presyn.STATE)
_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation in (
    (
        "presyn_attention",
        f"({_ROWS}{_STATE}float[] rates, Tensor? seed, bool keep) -> ({', '.join(['Tensor'] * 13)})",
        _presyn.forward,
    ),
    (
        "presyn_attention_backward",
        f"(Tensor? dy, Tensor?[] d_after, {_ROWS}Tensor[] state, Tensor y, Tensor rest, Tensor sums, Tensor factors, "
        f"Tensor normalizers, Tensor drawn, float[] rates, Tensor? seed) -> ({', '.join(['Tensor'] * 10)})",
        _presyn.backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::presyn_attention", _fake, lib=_LIBRARY)
torch.library.register_fake("kernbench::presyn_attention_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("kernbench::presyn_attention", _gradients, setup_context=_keep, lib=_LIBRARY)


SPEC = KernelSpec(
    name="presyn_attention",
    reference=presyn_attention_reference,
    optimized=presyn_attention,
    make_inputs=_presyn_cases.make_inputs,
    cases=_presyn_cases.CASES,
    # In float32 a weight is made of powers of two, of 2 ulp each in one special-function operation, and relative to a
    # logarithm; gradients of the state are differences of sums of them. Eager's exponential is good to 1 ulp.
    tolerance={"float32": Tolerance(floor_ulp=16.0), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=_presyn_cases.cost,
    backward_cost=_presyn_cases.backward_cost,
    sizes={
        "batch": Sizes(most=2),
        "heads": Sizes(least=1, most=2),
        "tokens": Sizes(most=20, block=16),
        "dim": Sizes(least=1, most=40),
        "noise": Sizes(most=1),
    },
    values={
        "q": Values(least=-10, most=10),
        "k": Values(least=-10, most=10),
        "v": Values(least=-1e3, most=1e3),
        "calcium": Values(least=0, most=4),
        "energy": Values(least=0, most=1.6),
        "rates": Values(fixed=True),
        **{name: Values(least=0, most=1) for name in ("buffer", "pool", "reserve", "primed", "clamp")},
    },
    allowed={
        "spills": "of the backward pass over keys, which holds up to six tiles, the stochastic and the float32 variant "
        "spill some bytes; tiles half as wide would take twice as many products of half the size"
    },
    differentiable=True,
    sweeps=(_presyn_cases.SWEEP,),
    peers={"flex_attention, given our step": _presyn_cases.flex_attention},
    source='bio-nanochat, profile P, rule R1 with dock="qk"; Dao, FlashAttention-2, 2023',
)
