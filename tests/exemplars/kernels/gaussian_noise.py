"""Normal noise added to a tensor: y = x + scale * tl.randn(seed, i) for element i, in float32, rounded once.

The reference draws the same uniform numbers from ``kernbench.philox``, and in float64 transforms them in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench import philox
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Stochastic, Values

from . import _shared

BLOCK = 2048


def gaussian_noise_reference(x: Tensor, scale: float, seed: int) -> Tensor:
    """In plain PyTorch; arguments as in :func:`gaussian_noise`."""
    wide = _shared.wide(x.dtype)
    offset = torch.arange(x.numel(), device=x.device).view(x.shape)
    return (x.to(wide) + scale * philox.randn(seed, offset, dtype=wide)).to(x.dtype)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _kernel(x, y, count, scale, seed, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK elements of x and y [count]; grid is count / BLOCK, rounded up."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    _shared.store(y + offset, value + scale * tl.randn(seed, offset), mask)


def gaussian_noise(x: Tensor, scale: float, seed: int) -> Tensor:
    """x of any shape and layout, plus noise with a standard deviation of scale.

    Raises:
        ValueError: x is no tensor that the kernel takes.
    """
    _shared.check("gaussian_noise", x=x)
    y: Tensor = _launch(x, scale, seed)
    return y


@torch.library.custom_op("kernbench_exemplars::gaussian_noise", mutates_args=())
def _launch(x: Tensor, scale: float, seed: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        _kernel[(triton.cdiv(count, BLOCK),)](x, y, count, scale, seed, BLOCK)
    return y


@_launch.register_fake
def _(x: Tensor, scale: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Small numbers beside the noise, so that low precision leaves much of it."""
    x = _shared.normal(torch.Generator(device).manual_seed(seed), (case["size"],), torch.float32) * 0.1
    return {"x": x.to(dtype), "scale": 0.5, "seed": 1000 * seed + 11}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read and y written once; a logarithm, a root and a cosine count as one operation each."""
    size = float(case["size"])
    return Cost(flops=6 * size, bytes_read=dtype.itemsize * size, bytes_written=dtype.itemsize * size)


SPEC = KernelSpec(
    name="gaussian_noise",
    reference=gaussian_noise_reference,
    optimized=gaussian_noise,
    make_inputs=make_inputs,
    cases=(
        Case("one", size=1),
        Case("ragged", size=4231),
        Case("large", large=True, size=2**25),
    ),
    tolerance=_shared.TOLERANCE,
    cost=cost,
    sizes={"size": Sizes(most=4300, block=BLOCK)},
    values={"scale": Values(fixed=True)},
    stochastic=Stochastic(
        seed="seed",
        law="normal",
        draws=lambda inputs, output: (output.float() - inputs["x"].float()) / inputs["scale"],
    ),
    source="Box and Muller, A Note on the Generation of Random Normal Deviates, 1958",
)
