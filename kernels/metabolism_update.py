"""Fatigue and energy of a router's experts after a call, by rates decoded from their genomes; all in one launch.

    u = max(1, count) / tokens,   fatigue' = (1 - g0) fatigue + g0 u,   energy' = (1 - g1) energy + g1 (1 - u)
    g0 = 0.01 (2 sigma(xi0) + 0.1),   g1 = 0.005 (2 sigma(xi1) + 0.1)

One program handles all experts of a block. Arithmetic is float32.

Source: specification of bio-nanochat, section 5.2; kernel plan, phase 3.
Shapes: E experts, X genes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _rows
from ._genes import GENES, decoded_reference, rates

BLOCK = 256


@torch.no_grad()
def metabolism_update_reference(genome: Tensor, count: Tensor, fatigue: Tensor, energy: Tensor, tokens: int) -> None:
    """In plain PyTorch; arguments as in :func:`metabolism_update`."""
    genes = decoded_reference(genome)
    used = count.clamp(min=1).to(fatigue.dtype) / tokens
    fatigue.copy_((1 - genes[0]) * fatigue + genes[0] * used)
    energy.copy_((1 - genes[1]) * energy + genes[1] * (1 - used))


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _kernel(genome, count, fatigue, energy, tokens, experts, xi, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK experts of genome [experts, xi], count, fatigue and energy [experts]."""
    expert = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = expert < experts
    tires, feeds = rates(genome + expert * xi, there)
    used = tl.maximum(tl.load(count + expert, mask=there, other=1), 1).to(tl.float32) / tokens
    tired = (1.0 - tires) * tl.load(fatigue + expert, mask=there, other=0.0) + tires * used
    fed = (1.0 - feeds) * tl.load(energy + expert, mask=there, other=0.0) + feeds * (1.0 - used)
    tl.store(fatigue + expert, tired, mask=there)
    tl.store(energy + expert, fed, mask=there)


def metabolism_update(genome: Tensor, count: Tensor, fatigue: Tensor, energy: Tensor, tokens: int) -> None:
    """Move both, in place, with no host sync.

    Args:
        genome: [E, X], float32, of at least four genes.
        count: tokens of each expert in this call, [E], int64.
        fatigue, energy: [E], float32, contiguous.
        tokens: of the call, at least 1.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    state = (fatigue, energy)
    if not (
        genome.dim() == 2 and genome.shape[1] >= GENES and genome.dtype == torch.float32 and tokens >= 1
        and count.shape == (len(genome),) and count.dtype == torch.int64
        and all(one.shape == count.shape and one.dtype == torch.float32 for one in state)
        and all(one.get_device() == genome.get_device() for one in (count, *state))
    ):  # fmt: skip
        raise ValueError(
            "metabolism_update takes float32 genome [E, X], int64 count [E] and float32 fatigue and energy [E] of at "
            f"least one token; genome is {tuple(genome.shape)} {genome.dtype}, count {tuple(count.shape)} {count.dtype}"
        )
    if not (fatigue.is_contiguous() and energy.is_contiguous()):
        raise ValueError("metabolism_update writes into fatigue and energy, which have to be contiguous")
    if _rows.watched():
        with torch.no_grad():
            torch.ops.kernbench.metabolism_update.default(genome, count, fatigue, energy, tokens)
    else:
        _launch(genome, count, fatigue, energy, tokens)


def _launch(genome: Tensor, count: Tensor, fatigue: Tensor, energy: Tensor, tokens: int) -> None:
    experts, xi = genome.shape
    if not experts:
        return
    with _rows.on_device(genome):
        _kernel[(triton.cdiv(experts, BLOCK),)](
            genome.contiguous(), count.contiguous(), fatigue, energy, tokens, experts, xi, BLOCK, num_warps=2
        )
    torch.autograd.graph.increment_version([fatigue, energy])


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "metabolism_update(Tensor genome, Tensor count, Tensor(a!) fatigue, Tensor(b!) energy, int tokens) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("metabolism_update", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Experts in the middle of a run."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, tokens = case["experts"], case["tokens"]

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return {
        "genome": 4 * drawn(experts, GENES) - 2,
        "count": torch.randint(tokens + 1, (experts,), generator=generator, device=device),
        "fatigue": drawn(experts), "energy": drawn(experts), "tokens": tokens,
    }  # fmt: skip


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The next call's counts, in place."""
    generator = torch.Generator(inputs["count"].device).manual_seed(seed)
    inputs["count"].random_(0, inputs["tokens"] + 1, generator=generator)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two genes, the count and both states read, the states written."""
    experts = float(case["experts"])
    return Cost(flops=12 * experts, bytes_read=(8 + 4 * 4) * experts, bytes_written=8 * experts)


SPEC = KernelSpec(
    name="metabolism_update",
    reference=metabolism_update_reference,
    optimized=metabolism_update,
    make_inputs=make_inputs,
    cases=(
        Case("one", experts=1, tokens=1),
        Case("ragged", experts=37, tokens=100),
        Case("moe-64", large=True, experts=64, tokens=8192),
        Case("many", large=True, experts=1000, tokens=65_536),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("fatigue", "energy"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={"experts": Sizes(most=600, block=BLOCK), "tokens": Sizes(least=1, most=1000)},
    values={
        "genome": Values(least=-20, most=20),
        "fatigue": Values(least=0, most=1),
        "energy": Values(least=0, most=1),
    },
    source="bio-nanochat, section 5.2; kernel plan, phase 3",
)
