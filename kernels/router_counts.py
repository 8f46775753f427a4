"""How many tokens each expert of a router got, and the gates that they came with, added up; the same in every run.

    count_e = #{(n, c): index[n, c] = e},  mass_e = sum of gates[n, c] over these;  dgates[n, c] = dmass[index[n, c]]

Programs count stretches of the choices by comparing each with every expert and leave their sums; a last program adds
these in order. No atomics, so equal inputs give equal bits. Choices of no expert count nowhere.

Cast order: sums are float32; a gradient is rounded to the dtype of the gates once.

Source: specification of bio-nanochat, section 5.2; Kernel plan, phase 2.
Shapes: N tokens, k choices of a token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance

from . import _rows
from ._rows import narrow

LARGEST = 1024
"""Experts that one program compares a choice with."""
TILE = 4096
"""Comparisons that one program makes at once."""
STRETCHES = 4
"""Tiles that one program goes through, so that few sums are left to add."""
BLOCK = 1024


def router_counts_reference(index: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; arguments as in :func:`router_counts`."""
    wide = torch.promote_types(gates.dtype, torch.float32)
    chosen = index.flatten().unsqueeze(-1) == torch.arange(experts, device=index.device)
    mass = gates.flatten().to(wide).unsqueeze(-1).expand(chosen.shape).masked_fill(~chosen, 0.0).sum(0)
    return chosen.sum(0), mass


@triton.jit(do_not_specialize=["choices"])  # type: ignore[untyped-decorator]
def _partial_kernel(  # type: ignore[no-untyped-def]
    index, gates, counts, masses, choices, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """One program handles STEPS * ROWS choices of index and gates [choices] and leaves its row of counts and masses
    [programs, experts]; grid is the stretches."""
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros([EXPERTS], dtype=tl.int32)
    mass = tl.zeros([EXPERTS], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * (STEPS * ROWS)
    for step in range(STEPS):
        choice = first + step * ROWS + tl.arange(0, ROWS)
        inside = choice < choices
        chosen = tl.load(index + choice, mask=inside, other=-1)[:, None] == expert[None, :]
        gate = tl.load(gates + choice, mask=inside, other=0.0).to(tl.float32)
        count += tl.sum(chosen.to(tl.int32), 0)
        mass += tl.sum(tl.where(chosen, gate[:, None], 0.0), 0)
    row = tl.program_id(0).to(tl.int64) * experts
    tl.store(counts + row + expert, count, mask=expert < experts)
    tl.store(masses + row + expert, mass, mask=expert < experts)


@triton.jit(do_not_specialize=["parts"])  # type: ignore[untyped-decorator]
def _total_kernel(  # type: ignore[no-untyped-def]
    counts, masses, count, mass, parts, experts, EXPERTS: tl.constexpr
):
    """One program adds the rows of counts and masses [parts, experts]; grid is one."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    total = tl.zeros([EXPERTS], dtype=tl.int64)
    weight = tl.zeros([EXPERTS], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(counts + part * experts + expert, mask=inside, other=0)
        weight += tl.load(masses + part * experts + expert, mask=inside, other=0.0)
    tl.store(count + expert, total, mask=inside)
    tl.store(mass + expert, weight, mask=inside)


@triton.jit(do_not_specialize=["choices"])  # type: ignore[untyped-decorator]
def _backward_kernel(index, dmass, dgates, choices, experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program handles BLOCK of index and dgates [choices], from dmass [experts]; grid is the blocks."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < choices
    expert = tl.load(index + choice, mask=inside, other=-1)
    known = (expert >= 0) & (expert < experts)
    gradient = tl.load(dmass + expert, mask=known, other=0.0).to(tl.float32)
    tl.store(dgates + choice, narrow(gradient, dgates.dtype.element_ty), mask=inside)


def router_counts(index: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Tokens and gates of every expert; differentiable in the gates, with no host sync.

    Args:
        index: who each choice is, [N, k] or any shape, int64 or int32.
        gates: of the same shape, float32, bfloat16 or float16.
        experts: E, up to 1024.

    Returns:
        count [E], int64, and mass [E], float32.

    Raises:
        ValueError: shape, dtype or device differ from this.
    """
    if index.shape != gates.shape or index.dtype not in (torch.int64, torch.int32) or not 1 <= experts <= LARGEST:
        raise ValueError(
            f"router_counts takes choices int32 or int64 with a gate each, and 1 to {LARGEST} experts; they are "
            f"{tuple(index.shape)} {index.dtype}, {tuple(gates.shape)} and {experts}"
        )
    if gates.dtype not in _rows.DTYPES or gates.get_device() != index.get_device():
        raise ValueError(
            f"router_counts takes gates of float32, bfloat16 or float16 on {index.device}, not {gates.dtype} on "
            f"{gates.device}"
        )
    if _rows.watched():
        count, mass = torch.ops.kernbench.router_counts.default(index, gates, experts)
    elif torch.is_grad_enabled() and gates.requires_grad:
        count, mass = _RouterCounts.apply(index, gates, experts)  # type: ignore[no-untyped-call]
    else:
        count, mass = _forward(index, gates, experts)
    return count, mass


def _forward(index: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    choices = index.numel()
    count = torch.empty(experts, dtype=torch.int64, device=index.device)
    mass = torch.empty(experts, dtype=torch.float32, device=index.device)
    if not choices:
        return count.zero_(), mass.zero_()
    columns = triton.next_power_of_2(experts)
    rows = max(1, TILE // columns)
    parts = triton.cdiv(choices, STRETCHES * rows)
    counts = torch.empty(parts, experts, dtype=torch.int32, device=index.device)
    masses = torch.empty(parts, experts, dtype=torch.float32, device=index.device)
    with _rows.on_device(index):
        _partial_kernel[(parts,)](
            index.contiguous(), gates.contiguous(), counts, masses, choices, experts, columns, rows, STRETCHES,
            num_warps=4,
        )  # fmt: skip
        _total_kernel[(1,)](counts, masses, count, mass, parts, experts, columns, num_warps=4)
    return count, mass


def _backward(index: Tensor, dmass: Tensor, like: Tensor) -> Tensor:
    dgates = torch.empty_like(like, memory_format=torch.contiguous_format)
    choices = index.numel()
    if choices:
        with _rows.on_device(index):
            _backward_kernel[(triton.cdiv(choices, BLOCK),)](
                index.contiguous(), dmass.contiguous(), dgates, choices, dmass.numel(), BLOCK, num_warps=4
            )
    return dgates


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.mark_non_differentiable(output[0])


def _gradients(ctx: Any, dcount: Tensor, dmass: Tensor) -> tuple[None, Tensor, None]:
    backward = torch.ops.kernbench.router_counts_backward.default if _rows.watched() else _backward
    index, gates = ctx.saved_tensors
    return None, backward(index, dmass, gates), None


class _RouterCounts(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcount: Tensor, dmass: Tensor) -> tuple[None, Tensor, None]:
        return _gradients(ctx, dcount, dmass)


def _fake(index: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return index.new_empty(experts, dtype=torch.int64), gates.new_empty(experts, dtype=torch.float32)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation in (
    ("router_counts", "(Tensor index, Tensor gates, int experts) -> (Tensor, Tensor)", _forward),
    ("router_counts_backward", "(Tensor index, Tensor dmass, Tensor like) -> Tensor", _backward),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("kernbench::router_counts", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "kernbench::router_counts_backward", lambda index, dmass, like: like.new_empty(like.shape), lib=_LIBRARY
)
torch.library.register_autograd("kernbench::router_counts", _gradients, setup_context=_keep, lib=_LIBRARY)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A router's choices, some experts more popular than others, and gates that sum up to one."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, experts, chosen = case["tokens"], case["experts"], min(case["chosen"], case["experts"])
    likely = torch.rand(experts, generator=generator, device=device)
    scores = torch.rand(tokens, experts, generator=generator, device=device) + likely
    top, index = scores.topk(chosen, dim=-1)
    return {"index": index, "gates": torch.softmax(top, -1).to(dtype).requires_grad_(), "experts": experts}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Choices and gates read once, two numbers of every expert written."""
    choices = float(case["tokens"] * min(case["chosen"], case["experts"]))
    return Cost(flops=2 * choices, bytes_read=(8 + dtype.itemsize) * choices, bytes_written=12.0 * case["experts"])


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Choices and a gradient of every expert read, gradients of the gates written."""
    choices = float(case["tokens"] * min(case["chosen"], case["experts"]))
    return Cost(flops=0.0, bytes_read=8 * choices + 4.0 * case["experts"], bytes_written=dtype.itemsize * choices)


SPEC = KernelSpec(
    name="router_counts",
    reference=router_counts_reference,
    optimized=router_counts,
    make_inputs=make_inputs,
    cases=(
        Case("one", tokens=1, chosen=1, experts=1),
        Case("ragged", tokens=37, chosen=2, experts=5),
        Case("many", tokens=300, chosen=3, experts=70),
        Case("moe-8", large=True, tokens=8192, chosen=2, experts=8),
        Case("moe-64", large=True, tokens=8192, chosen=2, experts=64),
        Case("moe-256", large=True, tokens=65_536, chosen=8, experts=256),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=cost,
    backward_cost=backward_cost,
    sizes={
        "tokens": Sizes(most=700),
        "chosen": Sizes(least=1, most=4),
        "experts": Sizes(least=1, most=70, block=64),
    },
    differentiable=True,
    source="bio-nanochat, section 5.2; kernel plan, phase 2",
)
