"""What happens to one key's synapse in one call of rule R1, and the derivatives of that, in closed form.

    I = S1 / (T - j),  on = alpha_on C (1 - BUF),  off = alpha_off BUF
    C' = max(0, rho_c C + alpha_ca I - on + off),  BUF' = clip(rho_buf BUF + on - off)
    f = sigma(3 syt(C') + 2 PRm - 2 (CL + bias)),  g = f Rr,  total = g S2
    share = min(1, Rr / max(eps, total)),  used = share total,  a = g share max(qamp(E'), eps)

S1 and S2 are sums over the queries that see the key, of softplus(clip(L)) and of sigma(L). Where the pool binds, used
is Rr, and neither it nor a depends on g: the derivatives are written so that nothing has to cancel. Stochastic release
gives another total, which is g S2 and what noise adds.

Source: specification of the workload, section 2.3, steps 1 to 11.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ._presyn_parts import sigmoid


class Rates(NamedTuple):
    """The settings of rule R1 under their names upstream, those of profile P by default; tau_* in calls."""

    tau_c: float = 4.0
    tau_buf: float = 10.0
    alpha_ca: float = 0.25
    alpha_buf_on: float = 0.6
    alpha_buf_off: float = 0.1
    tau_prime: float = 18.0
    tau_rrp: float = 40.0
    alpha_prime: float = 0.10
    alpha_unprime: float = 0.04
    alpha_refill: float = 0.04
    tau_energy: float = 80.0
    energy_in: float = 0.03
    energy_cost_rel: float = 0.015
    energy_cost_pump: float = 0.006
    syt_fast_kd: float = 0.4
    syt_slow_kd: float = 3.0
    complexin_bias: float = 0.5
    qmax: float = 1.3
    q_beta: float = 2.0
    barrier_strength: float = 0.075
    epsilon: float = 1e-6
    stochastic_train_frac: float = 0.10
    stochastic_quanta: float = 8.0


class Constants(NamedTuple):
    """Rates with what is kept of a quantity from call to call in place of its time constant, as kernels take them."""

    keep_c: float
    keep_buf: float
    alpha_ca: float
    alpha_buf_on: float
    alpha_buf_off: float
    keep_prime: float
    keep_rrp: float
    alpha_prime: float
    alpha_unprime: float
    alpha_refill: float
    keep_energy: float
    energy_in: float
    energy_cost_rel: float
    energy_cost_pump: float
    syt_fast_kd: float
    syt_slow_kd: float
    complexin_bias: float
    qmax: float
    q_beta: float
    barrier_strength: float
    epsilon: float
    stochastic_train_frac: float
    stochastic_quanta: float


def constants_of(rates: tuple[float, ...]) -> Constants:
    named = Rates(*rates)._asdict()
    return Constants(*(math.exp(-1 / value) if name.startswith("tau_") else value for name, value in named.items()))


@triton.jit  # type: ignore[untyped-decorator]
def recovered(calcium, buffer, pool, reserve, primed, energy, influx, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Steps 2 to 4, before they are clipped: C', BUF', PRm, Rr, RESm, Em."""
    bound = R.alpha_buf_on * calcium * (1.0 - buffer)
    freed = R.alpha_buf_off * buffer
    return (
        R.keep_c * calcium + R.alpha_ca * influx - bound + freed,
        R.keep_buf * buffer + bound - freed,
        R.keep_prime * primed + R.alpha_prime * (1.0 - primed),
        R.keep_rrp * pool + R.alpha_refill * reserve,
        reserve * (1.0 - R.alpha_refill),
        R.keep_energy * energy + R.energy_in,
    )


@triton.jit  # type: ignore[untyped-decorator]
def fired(calcium, primed, clamp, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """f, from C' and PRm. Steps 6 and 7."""
    sensor = 0.7 * calcium / (calcium + R.syt_fast_kd) + 0.3 * calcium / (calcium + R.syt_slow_kd)
    return sigmoid(3.0 * sensor + 2.0 * primed - 2.0 * (clamp + R.complexin_bias))


@triton.jit  # type: ignore[untyped-decorator]
def share_of(pool, total, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """min(1, Rr / max(eps, total)), whether the pool binds, and whether it does below eps."""
    binds = (total >= R.epsilon) & (pool <= total)
    dry = (total < R.epsilon) & (pool <= R.epsilon)
    return tl.where(binds, pool / tl.where(binds, total, 1.0), tl.where(dry, pool / R.epsilon, 1.0)), binds, dry


@triton.jit  # type: ignore[untyped-decorator]
def settled(pool, reserve, primed, energy, used, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Step 10, before the clips: RRP', RES', PR', E'."""
    refilled = reserve + used
    spent = R.energy_cost_rel * used + R.energy_cost_pump * (1.0 - tl.clamp(refilled, 0.0, 1.0))
    return pool - used, refilled, primed - R.alpha_unprime * used, energy - spent


@triton.jit  # type: ignore[untyped-decorator]
def rested(  # type: ignore[no-untyped-def]
    calcium, buffer, pool, reserve, primed, clamp, energy, influx, R: tl.constexpr
):
    """C', BUF', PRm, Rr, RESm, Em and g of keys; all float32, of one shape. ``influx`` is S1 / (T - j)."""
    c, b, p, r, s, e = recovered(calcium, buffer, pool, reserve, primed, energy, influx, R)
    c, b = tl.maximum(c, 0.0), tl.clamp(b, 0.0, 1.0)
    p, r, s, e = tl.clamp(p, 0.0, 1.0), tl.clamp(r, 0.0, 1.0), tl.clamp(s, 0.0, 1.0), tl.clamp(e, 0.0, 1.6)
    return c, b, p, r, s, e, fired(c, p, clamp, R) * r


@triton.jit  # type: ignore[untyped-decorator]
def released(p, r, s, e, total, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """RRP', RES', PR', E', what was used, and what makes a weight of release before it is scaled."""
    share, binds, _ = share_of(r, total, R)
    used = tl.where(binds, r, share * total)
    pool, reserve, primed, energy = settled(r, s, p, e, used, R)
    energy = tl.clamp(energy, 0.0, 1.6)
    amplitude = tl.maximum(R.qmax * sigmoid(R.q_beta * (energy - 0.5)), R.epsilon)
    pool, reserve, primed = tl.clamp(pool, 0.0, 1.0), tl.clamp(reserve, 0.0, 1.0), tl.clamp(primed, 0.0, 1.0)
    return pool, reserve, primed, energy, used, share * amplitude


@triton.jit  # type: ignore[untyped-decorator]
def gradients(  # type: ignore[no-untyped-def]
    calcium, buffer, pool, reserve, primed, clamp, energy, influx, release, total,
    d_calcium, d_buffer, d_pool, d_reserve, d_primed, d_energy, d_a, d_slope, d_g, R: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Gradients of C, BUF, RRP, RES, PR, CL and E, of influx, and of sigma(L) through a key's sum.

    They come from those of the new state and of a. With ``STOCHASTIC`` also from those of slope (a / g) and of g for
    drawn queries; ``release`` is then without what a clip holds back, and total is what it is.
    """
    c0, b0, p0, r0, s0, e0 = recovered(calcium, buffer, pool, reserve, primed, energy, influx, R)
    c = tl.maximum(c0, 0.0)
    p, r, s, e = tl.clamp(p0, 0.0, 1.0), tl.clamp(r0, 0.0, 1.0), tl.clamp(s0, 0.0, 1.0), tl.clamp(e0, 0.0, 1.6)
    f = fired(c, p, clamp, R)
    g = f * r
    if not STOCHASTIC:
        total = g * release
    share, binds, dry = share_of(r, total, R)
    used = tl.where(binds, r, share * total)
    pool_after, reserve_after, primed_after, energy_after = settled(r, s, p, e, used, R)
    open_gate = sigmoid(R.q_beta * (tl.clamp(energy_after, 0.0, 1.6) - 0.5))
    amplitude = R.qmax * open_gate

    if STOCHASTIC:
        d_slope += d_a * g
    else:
        d_slope = d_a * g
    d_amplitude = tl.where(amplitude >= R.epsilon, d_slope * share, 0.0)
    d_energy += d_amplitude * amplitude * (1.0 - open_gate) * R.q_beta
    # Derivatives go through a clip where it changes nothing, bounds included, as in torch.clamp.
    de = tl.where(energy_after == tl.clamp(energy_after, 0.0, 1.6), d_energy, 0.0)
    dp = tl.where(primed_after == tl.clamp(primed_after, 0.0, 1.0), d_primed, 0.0)
    ds = tl.where(reserve_after == tl.clamp(reserve_after, 0.0, 1.0), d_reserve + R.energy_cost_pump * de, 0.0)
    dr = tl.where(pool_after == tl.clamp(pool_after, 0.0, 1.0), d_pool, 0.0)
    d_used = ds - R.energy_cost_rel * de - R.alpha_unprime * dp - dr

    amplitude = tl.maximum(amplitude, R.epsilon)
    d_share = d_slope * amplitude
    safe = tl.where(binds, total, 1.0)
    d_total = tl.where(binds, -d_share * share / safe, d_used * share)
    dr += tl.where(binds, d_share / safe + d_used, tl.where(dry, (d_share + d_used * total) / R.epsilon, 0.0))
    dg = d_a * share * amplitude + d_total * release
    if STOCHASTIC:
        dg += d_g
    else:
        dg = tl.where(binds, 0.0, dg)
    dr += dg * f
    dh = dg * r * f * (1.0 - f)
    dp += 2.0 * dh
    fast = c + R.syt_fast_kd
    slow = c + R.syt_slow_kd
    slope = 0.7 * R.syt_fast_kd / (fast * fast) + 0.3 * R.syt_slow_kd / (slow * slow)
    dc = tl.where(c0 >= 0.0, d_calcium + 3.0 * dh * slope, 0.0)
    db = tl.where(b0 == tl.clamp(b0, 0.0, 1.0), d_buffer, 0.0)
    dp, dr = tl.where(p == p0, dp, 0.0), tl.where(r == r0, dr, 0.0)
    ds, de = tl.where(s == s0, ds, 0.0), tl.where(e == e0, de, 0.0)
    d_bound = db - dc
    return (
        R.keep_c * dc + d_bound * R.alpha_buf_on * (1.0 - buffer),
        R.keep_buf * db - d_bound * (R.alpha_buf_on * calcium + R.alpha_buf_off),
        R.keep_rrp * dr,
        R.alpha_refill * dr + (1.0 - R.alpha_refill) * ds,
        (R.keep_prime - R.alpha_prime) * dp,
        -2.0 * dh,
        R.keep_energy * de,
        R.alpha_ca * dc,
        d_total * g,
    )  # fmt: skip
