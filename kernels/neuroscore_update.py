"""The scores of a router's experts after a step: contribution, frequency, efficiency, resilience; all in one launch.

    c' = d c + (1 - d) mass / tokens,   f' = d f + (1 - d) count / tokens,   efficiency = c' / (energy + 1e-6)
    resilience' = d resilience + (1 - d) / (|c' - earlier| + 1e-6) where c' > 1e-6,   earlier' = c';   d = 0.99

One program handles all experts of a block. Arithmetic is float32.

Source: specification of bio-nanochat, section 6, with the guard of its reference; kernel plan, phase 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _rows

DECAY = 0.99
SMALL = 1e-6
BLOCK = 256


def neuroscore_update_reference(
    count: Tensor, mass: Tensor, energy: Tensor, contribution: Tensor, frequency: Tensor, efficiency: Tensor,
    resilience: Tensor, earlier: Tensor, tokens: int,
) -> None:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`neuroscore_update`."""
    dtype = contribution.dtype
    contribution.mul_(DECAY).add_((1 - DECAY) / tokens * mass.to(dtype))
    frequency.mul_(DECAY).add_((1 - DECAY) / tokens * count.to(dtype))
    efficiency.copy_(contribution / (energy.to(dtype) + SMALL))
    moved = DECAY * resilience + (1 - DECAY) / ((contribution - earlier).abs() + SMALL)
    resilience.copy_(torch.where(contribution > SMALL, moved, resilience))
    earlier.copy_(contribution)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    count, mass, energy, contribution, frequency, efficiency, resilience, earlier, experts, scale,
    KEEP: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK experts of all tensors [experts]; scale is (1 - d) / tokens."""
    expert = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = expert < experts
    c = tl.load(contribution + expert, mask=inside, other=0.0) * KEEP
    c += scale * tl.load(mass + expert, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(frequency + expert, mask=inside, other=0.0) * KEEP
    f += scale * tl.load(count + expert, mask=inside, other=0).to(tl.float32)
    held = tl.load(resilience + expert, mask=inside, other=0.0)
    change = tl.abs(c - tl.load(earlier + expert, mask=inside, other=0.0))
    moved = KEEP * held + (1.0 - KEEP) / (change + LEAST)
    energies = tl.load(energy + expert, mask=inside, other=1.0).to(tl.float32)
    tl.store(contribution + expert, c, mask=inside)
    tl.store(frequency + expert, f, mask=inside)
    tl.store(efficiency + expert, c / (energies + LEAST), mask=inside)
    tl.store(resilience + expert, tl.where(c > LEAST, moved, held), mask=inside)
    tl.store(earlier + expert, c, mask=inside)


def neuroscore_update(
    count: Tensor, mass: Tensor, energy: Tensor, contribution: Tensor, frequency: Tensor, efficiency: Tensor,
    resilience: Tensor, earlier: Tensor, tokens: int,
) -> None:  # fmt: skip
    """Move the scores, in place, with no host sync.

    Args:
        count: tokens of each expert in this step, [E], int64.
        mass: gates of each expert in this step, added up, [E], float32.
        energy: what each expert has left, [E], float32.
        contribution, frequency, efficiency, resilience, earlier: the scores, [E], float32, contiguous.
        tokens: of the step, at least 1.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    scores = (contribution, frequency, efficiency, resilience, earlier)
    alike = all(
        one.shape == count.shape and one.dtype == torch.float32 and one.get_device() == count.get_device()
        for one in (mass, energy, *scores)
    )
    if count.dim() != 1 or count.dtype != torch.int64 or not alike or tokens < 1:
        raise ValueError(
            f"neuroscore_update takes int64 counts [E] with float32 tensors beside them, of at least one token; counts "
            f"are {tuple(count.shape)} {count.dtype} on {count.device}, of {tokens} tokens"
        )
    if not all(one.is_contiguous() for one in scores):
        raise ValueError("neuroscore_update writes into the scores, which have to be contiguous")
    arguments = (count, mass, energy, *scores, tokens)
    if _rows.watched():
        torch.ops.kernbench.neuroscore_update.default(*arguments)
    else:
        _launch(*arguments)


def _launch(
    count: Tensor, mass: Tensor, energy: Tensor, contribution: Tensor, frequency: Tensor, efficiency: Tensor,
    resilience: Tensor, earlier: Tensor, tokens: int,
) -> None:  # fmt: skip
    experts = count.numel()
    if not experts:
        return
    scores = [contribution, frequency, efficiency, resilience, earlier]
    with _rows.on_device(count):
        _kernel[(triton.cdiv(experts, BLOCK),)](
            count.contiguous(), mass.contiguous(), energy.contiguous(), *scores, experts, (1 - DECAY) / tokens,
            DECAY, SMALL, BLOCK, num_warps=2,
        )  # fmt: skip
    torch.autograd.graph.increment_version(scores)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "neuroscore_update(Tensor count, Tensor mass, Tensor energy, Tensor(a!) contribution, Tensor(b!) frequency, "
    "Tensor(c!) efficiency, Tensor(d!) resilience, Tensor(e!) earlier, int tokens) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("neuroscore_update", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Scores in the middle of a run."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, tokens = case["experts"], case["tokens"]

    def drawn(scale: float) -> Tensor:
        return torch.rand(experts, generator=generator, device=device, dtype=torch.float32).to(dtype) * scale

    count = torch.randint(tokens + 1, (experts,), generator=generator, device=device)
    return {
        "count": count, "mass": count * drawn(1.0), "energy": drawn(1.0), "contribution": drawn(0.5),
        "frequency": drawn(1.0), "efficiency": drawn(2.0), "resilience": drawn(1e3), "earlier": drawn(0.5),
        "tokens": tokens,
    }  # fmt: skip


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The next step's counts, in place."""
    generator = torch.Generator(inputs["count"].device).manual_seed(seed)
    inputs["count"].random_(0, inputs["tokens"] + 1, generator=generator)
    share = torch.rand(inputs["count"].shape, generator=generator, device=inputs["count"].device)
    inputs["mass"].copy_(inputs["count"] * share)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Seven vectors and the counts read, five written."""
    experts = float(case["experts"])
    return Cost(flops=12 * experts, bytes_read=(8 + 6 * 4) * experts, bytes_written=5 * 4 * experts)


SPEC = KernelSpec(
    name="neuroscore_update",
    reference=neuroscore_update_reference,
    optimized=neuroscore_update,
    make_inputs=make_inputs,
    cases=(
        Case("one", experts=1, tokens=1),
        Case("ragged", experts=37, tokens=100),
        Case("moe-64", large=True, experts=64, tokens=8192),
        Case("many", large=True, experts=1000, tokens=65_536),
    ),
    tolerance={"float32": Tolerance()},
    cost=cost,
    mutates=("contribution", "frequency", "efficiency", "resilience", "earlier"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={"experts": Sizes(most=600, block=BLOCK), "tokens": Sizes(least=1, most=1000)},
    values={
        "energy": Values(least=0, most=1),
        "contribution": Values(least=0, most=1),
        "frequency": Values(least=0, most=1),
        "earlier": Values(least=0, most=1),
        "mass": Values(least=0, most=1e4),
        "resilience": Values(least=0, most=1e6),
    },
    source="bio-nanochat, section 6; kernel plan, phase 2",
)
