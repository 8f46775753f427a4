"""Sizes, inputs and costs that the declaration of presynaptic attention is checked and timed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, Sweep

from . import _presyn, _rows
from ._presyn_keys import Rates

DEFAULT = Rates()
CASES = (
    Case("one", batch=1, heads=2, tokens=1, dim=16, noise=0),
    Case("ragged", batch=1, heads=1, tokens=17, dim=24, noise=1),
    Case("wide", batch=2, heads=1, tokens=5, dim=40, noise=0),
    Case("bench", large=True, batch=4, heads=12, tokens=2048, dim=64, noise=0),
    Case("bench-noise", large=True, batch=4, heads=12, tokens=2048, dim=64, noise=1),
    Case("T4096", large=True, batch=4, heads=12, tokens=4096, dim=64, noise=0),
    Case("C1280", large=True, batch=4, heads=10, tokens=2048, dim=128, noise=0),
)
SWEEP = Sweep(
    size="tokens",
    values=(1024, 2048, 4096, 8192, 16384),
    sizes=lambda tokens: {"batch": 1, "heads": 2, "tokens": tokens, "dim": 64, "noise": 0},
    fixed="one sequence, two heads of 64: so few that eager's matrices of all pairs fit a GPU to the end",
)

TELLING = Rates(epsilon=0.02, barrier_strength=0.5, stochastic_train_frac=1 / 3)
"""In few tokens nobody could tell whether the default barrier, epsilon, or qmax beside it counts."""


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Queries and keys of a root mean square of one, as after a norm of heads, and a state from all over its range.

    Few tokens leave some pools that do not bind. Rates are the default ones in large cases alone: see ``TELLING``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = tuple(case[name] for name in ("batch", "heads", "tokens", "dim"))

    def normed() -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return (drawn * torch.rsqrt(drawn.square().mean(-1, keepdim=True) + 1e-6)).to(dtype).requires_grad_()

    def uniform(most: float = 1.0) -> Tensor:
        return (torch.rand(shape[:3], generator=generator, device=device) * most).requires_grad_()

    q, k = normed(), normed()
    v = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    state = {name: uniform() for name in ("buffer", "pool", "reserve", "primed", "clamp")}
    given: Inputs = {"q": q, "k": k, "v": v, "calcium": uniform(1.5), **state, "energy": uniform(1.6)}
    if not case.large:
        given["rates"] = TELLING
    if case["noise"]:
        given["seed"] = torch.tensor(1000 * seed + 7, device=device)
    return given


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Three products of what is on or below the diagonal, and 22 operations on each pair there.

    q, k, v and seven quantities of the state are read; y, six of them and what was used are written.
    """
    keys, pairs = _counted(case)
    rows = keys * case["dim"] * dtype.itemsize
    return Cost(
        flops=pairs * (3 * 2 * case["dim"] + 22),
        bytes_read=3 * rows + 7 * 4 * keys,
        bytes_written=rows + 7 * 4 * keys,
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Five products of pairs for weights, and one more each for dq and dk would do for the sums; 30 operations a pair.

    q, k, v, dy, y, the state and six of its gradients are read, with what the forward pass left (five numbers a key);
    gradients of q, k, v and the state are written.
    """
    keys, pairs = _counted(case)
    rows = keys * case["dim"] * dtype.itemsize
    return Cost(
        flops=pairs * (5 * 2 * case["dim"] + 30),
        bytes_read=5 * rows + (7 + 6 + 5) * 4 * keys,
        bytes_written=3 * rows + 7 * 4 * keys,
    )


def _counted(case: Case) -> tuple[float, float]:
    """Keys, and pairs of them with queries that see them."""
    keys = float(case["batch"] * case["heads"] * case["tokens"])
    return keys, keys * (case["tokens"] + 1) / 2


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Rates = DEFAULT, seed: Tensor | None = None, **state: Any
) -> tuple[Tensor, ...]:
    """FlexAttention with the same bias as a score modifier, given the numbers per key by our step; forward alone.

    FlexAttention itself has no place for a sum over queries that the bias depends on.

    Raises:
        NotImplementedError: release is stochastic.
    """
    if seed is not None:
        raise NotImplementedError("a score modifier draws no random numbers")
    ordered = [state[name] for name in _presyn.STATE]
    after = [torch.empty_like(one) for one in ordered[:6]]
    used = torch.empty_like(ordered[0])
    sums, factors, _, drawn = _presyn.left_behind(used, None)
    tokens = q.shape[2]
    with _rows.on_device(q):
        tile = _presyn.tiles_for(q.shape[3], q.itemsize, tokens).forward_keys
        _presyn.step(q, k, ordered, after, used, sums, factors, drawn, None, rates, tile)
    # What is known of a key is its a, the factor's ratio to that of epsilon.
    slope = factors[0] / factors[1] * rates.epsilon
    barrier = rates.barrier_strength / tokens

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        biased = torch.log(slope[batch, head, key] * torch.sigmoid(score) + rates.epsilon)
        return score + biased - barrier * (query - key)

    flex, mask = _flex(tokens, q.device)
    return flex(q, k, v, score_mod=score_mod, block_mask=mask), *after, used


@cache
def _flex(tokens: int, device: torch.device) -> tuple[Callable[..., Any], Any]:
    """FlexAttention compiled, and its causal mask."""
    # Takes seconds to import, and only bench calls it.
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, query, key: query >= key, None, None, tokens, tokens, device=device)
    return torch.compile(flex.flex_attention, dynamic=False), mask
