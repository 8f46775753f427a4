"""Sizes, inputs and costs that the declaration of presynaptic attention is checked and timed with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs

CASES = (
    Case("one", batch=1, heads=1, tokens=1, dim=16),
    Case("ragged", batch=1, heads=2, tokens=17, dim=24),
    Case("wide", batch=2, heads=1, tokens=5, dim=40),
    Case("bench", large=True, batch=4, heads=12, tokens=2048, dim=64),
    Case("T4096", large=True, batch=4, heads=12, tokens=4096, dim=64),
    Case("C1280", large=True, batch=4, heads=10, tokens=2048, dim=128),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Queries and keys of a root mean square of one, as after a norm of heads, and a state from all over its range.

    Half of the pools hold so much that they do not bind, which takes few tokens or much in them.
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
    return {"q": q, "k": k, "v": v, "calcium": uniform(1.5), **state, "energy": uniform(1.6)}


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
