"""A router's logits with all that the experts' genes, embeddings and metabolism add to them, in one launch.

    logits_ne = router_ne + 0.05 (g1 - g0)_e + 0.02 mean(x_n) (1 + |Z_e|) + 0.02 cos(probe_n, Z_e)
                + 0.1 energy_e - 0.1 fatigue_e
    g0 = 0.01 (2 sigma(xi0) + 0.1),  g1 = 0.005 (2 sigma(xi1) + 0.1),  g2 = sp(xi2 + 1),  g3 = sp(xi3 + 0.5)

The genome xi is decoded where its bias is added; the four rates are written once, for the experts themselves. Backward
gives gradients of router, x, probe and genome. That of x is the same for all of a token's features, so it is one number
expanded. Sums over tokens are taken by program and then in order, so that equal inputs give equal bits.

Cast order: arithmetic is float32, gradients are rounded to the dtype of their tensor once.

Source: specification of bio-nanochat, section 5.2; kernel plan, phase 3.
Shapes: N tokens, C width, E experts, Z features of the embedding, X genes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernbench.spec import Case, KernelSpec, Sizes, Tolerance, Values

from . import _router_cases, _rows
from ._genes import GENES, decoded, decoded_reference
from ._rows import narrow

LARGEST = 256
"""Experts, and features of an embedding."""
GENE_WEIGHT, MEAN_WEIGHT, MATCH_WEIGHT, METABOLISM = (tl.constexpr(weight) for weight in (0.05, 0.02, 0.02, 0.1))
LEAST_NORM = tl.constexpr(1e-12)
FATIGUE_SPAN, ENERGY_SPAN = tl.constexpr(0.02), tl.constexpr(0.01)
"""What the first two rates are of a sigmoid."""
WARPS = 4
MOST_ROWS = 32
"""Tokens of a program; with 64, and 64 experts, registers spill on sm_80."""
SUMMED = 4096
"""Sums over tokens that are loaded at once."""


def router_genetics_reference(
    router: Tensor, x: Tensor, probe: Tensor, genome: Tensor, embedding: Tensor, energy: Tensor, fatigue: Tensor,
    metabolic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`router_genetics`."""
    genes = decoded_reference(genome)
    logits = router.to(genome.dtype) + GENE_WEIGHT.value * (genes[1] - genes[0])
    mean = x.mean(-1, keepdim=True, dtype=genome.dtype)
    logits = logits + MEAN_WEIGHT.value * mean * (1 + embedding.norm(dim=-1))
    match = functional.normalize(probe.to(genome.dtype), dim=-1) @ functional.normalize(embedding, dim=-1).T
    logits = logits + MATCH_WEIGHT.value * match
    if metabolic:
        logits = logits + METABOLISM.value * energy - METABOLISM.value * fatigue
    return logits, genes.detach()


@triton.jit  # type: ignore[untyped-decorator]
def _vectors(base, row, rows, features, Z: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some rows [.., Z] of base [rows, features] in float32 and their norms, zero beyond its ends."""
    column = tl.arange(0, Z)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    value = tl.load(base + row[:, None].to(tl.int64) * features + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    return value, tl.sqrt_rn(tl.sum(value * value, 1))


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    router, x, probe, genome, embedding, energy, fatigue, logits, genes, tokens, width, experts, features, xi,
    METABOLIC: tl.constexpr, E: tl.constexpr, Z: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS tokens of router, logits [tokens, experts], x [tokens, width], probe [tokens, features].

    The first one also writes genes [4, experts], decoded from genome [experts, xi]; embedding is [experts, features].
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E)
    inside, there = token < tokens, expert < experts
    g0, g1, g2, g3 = decoded(genome, expert, there, xi)
    if tl.program_id(0) == 0:
        tl.store(genes + expert, g0, mask=there)
        tl.store(genes + experts + expert, g1, mask=there)
        tl.store(genes + 2 * experts + expert, g2, mask=there)
        tl.store(genes + 3 * experts + expert, g3, mask=there)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        value = tl.load(x + token[:, None].to(tl.int64) * width + column, mask=mask, other=0.0)
        total += tl.sum(value.to(tl.float32), 1)
    place, length = _vectors(embedding, expert, experts, features, Z)
    asked, norm = _vectors(probe, token, tokens, features, Z)
    place = place / tl.maximum(length, LEAST_NORM)[:, None]
    asked = asked / tl.maximum(norm, LEAST_NORM)[:, None]
    match = tl.dot(asked, tl.trans(place), input_precision="ieee")
    at = token[:, None].to(tl.int64) * experts + expert[None, :]
    mask = inside[:, None] & there[None, :]
    logit = tl.load(router + at, mask=mask, other=0.0).to(tl.float32) + ((g1 - g0) * GENE_WEIGHT)[None, :]
    logit += (total / width * MEAN_WEIGHT)[:, None] * (1.0 + length)[None, :]
    logit += match * MATCH_WEIGHT
    if METABOLIC:
        fed = tl.load(energy + expert, mask=there, other=0.0)
        tired = tl.load(fatigue + expert, mask=there, other=0.0)
        logit = logit + (fed * METABOLISM)[None, :] - (tired * METABOLISM)[None, :]
    tl.store(logits + at, logit, mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dlogits, probe, embedding, drouter, dmean, dprobe, sums, tokens, width, experts, features,
    E: tl.constexpr, Z: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program handles ROWS tokens of dlogits, drouter [tokens, experts], dprobe [tokens, features], dmean [tokens].

    It leaves its sum of dlogits over tokens in its row of sums [programs, experts].
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, column = tl.arange(0, E), tl.arange(0, Z)
    inside, there = token < tokens, expert < experts
    at = token[:, None].to(tl.int64) * experts + expert[None, :]
    mask = inside[:, None] & there[None, :]
    gradient = tl.load(dlogits + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(drouter + at, narrow(gradient, drouter.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0) * experts + expert, tl.sum(gradient, 0), mask=there)
    place, length = _vectors(embedding, expert, experts, features, Z)
    mean = tl.sum(gradient * (1.0 + length)[None, :], 1) * MEAN_WEIGHT / width
    tl.store(dmean + token, narrow(mean, dmean.dtype.element_ty), mask=inside)
    place = place / tl.maximum(length, LEAST_NORM)[:, None]
    wanted = tl.dot(gradient, place, input_precision="ieee") * MATCH_WEIGHT
    asked, norm = _vectors(probe, token, tokens, features, Z)
    least = tl.maximum(norm, LEAST_NORM)
    asked = asked / least[:, None]
    # Below the least norm the probe is divided by a constant, so that nothing is projected out.
    along = tl.where(norm > LEAST_NORM, tl.sum(asked * wanted, 1), 0.0)
    dvalue = (wanted - asked * along[:, None]) / least[:, None]
    spot = token[:, None].to(tl.int64) * features + column[None, :]
    known = inside[:, None] & (column < features)[None, :]
    tl.store(dprobe + spot, narrow(dvalue, dprobe.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["parts"])  # type: ignore[untyped-decorator]
def _genome_kernel(  # type: ignore[no-untyped-def]
    sums, genome, dgenome, parts, experts, xi, E: tl.constexpr, PARTS: tl.constexpr
):
    """One program adds sums [parts, experts] in order and fills dgenome [experts, xi] by the rule of genome."""
    expert = tl.arange(0, E)
    there = expert < experts
    total = tl.zeros([E], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & there[None, :]
        total += tl.sum(tl.load(sums + part[:, None] * experts + expert[None, :], mask=mask, other=0.0), 0)
    row = genome + expert * xi
    fatigue = tl.sigmoid(tl.load(row, mask=there, other=0.0))
    energy = tl.sigmoid(tl.load(row + 1, mask=there, other=0.0))
    total *= GENE_WEIGHT
    row = dgenome + expert * xi
    tl.store(row, -total * FATIGUE_SPAN * fatigue * (1.0 - fatigue), mask=there)
    tl.store(row + 1, total * ENERGY_SPAN * energy * (1.0 - energy), mask=there)
    for gene in range(2, xi):
        tl.store(row + gene, tl.zeros([E], tl.float32), mask=there)


def router_genetics(
    router: Tensor, x: Tensor, probe: Tensor, genome: Tensor, embedding: Tensor, energy: Tensor, fatigue: Tensor,
    metabolic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logits that a router chooses by, and the experts' rates; no host sync.

    Args:
        router: x times the router's weights, [N, E], float32, bfloat16 or float16.
        x: tokens, [N, C], of the same dtype.
        probe: x times the probe's weights, [N, Z], of the same dtype.
        genome: [E, X], float32, of at least four genes.
        embedding: [E, Z], float32.
        energy: [E], float32, as is
        fatigue: [E].
        metabolic: whether energy and fatigue count.

    Returns:
        logits [N, E], float32, differentiable in router, x, probe and genome; and genes [4, E], float32, which are not.

    Raises:
        ValueError: a tensor has another shape, dtype or device, or there are more than 256 experts or features.
    """
    _check(router, x, probe, genome, embedding, energy, fatigue)
    arguments = (router, x, probe, genome, embedding, energy, fatigue, metabolic)
    if _rows.watched():
        logits, genes, _ = torch.ops.kernbench.router_genetics.default(*arguments)
    elif torch.is_grad_enabled() and any(one.requires_grad for one in (router, x, probe, genome)):
        logits, genes = _RouterGenetics.apply(*arguments)[:2]  # type: ignore[no-untyped-call]
    else:
        logits, genes, _ = _forward(*arguments)
    return logits, genes


def _check(
    router: Tensor, x: Tensor, probe: Tensor, genome: Tensor, embedding: Tensor, energy: Tensor, fatigue: Tensor
) -> None:
    tokens, experts = router.shape if router.dim() == 2 else (0, 0)
    features = embedding.shape[-1]
    device = router.get_device()
    wide = (genome, embedding, energy, fatigue)
    if not (
        x.dim() == 2 and len(x) == tokens and probe.shape == (tokens, features) and genome.dim() == 2
        and len(genome) == experts and genome.shape[1] >= GENES and embedding.shape == (experts, features)
        and energy.shape == fatigue.shape == (experts,) and router.dtype == x.dtype == probe.dtype
        and router.dtype in _rows.DTYPES and all(one.dtype == torch.float32 for one in wide)
        and all(one.get_device() == device for one in (x, probe, *wide))
    ):  # fmt: skip
        raise ValueError(
            "router_genetics takes router [N, E], x [N, C] and probe [N, Z] of one dtype, and float32 genome [E, X], "
            f"embedding [E, Z], energy and fatigue [E], on one device; they are "
            f"{', '.join(f'{tuple(one.shape)} {one.dtype}' for one in (router, x, probe, *wide))}"
        )
    if not (1 <= experts <= LARGEST and 1 <= features <= LARGEST and x.shape[1]):
        raise ValueError(f"router_genetics takes 1 to {LARGEST} experts and features; they are {experts}, {features}")


def _tile(experts: int, features: int) -> tuple[int, int, int]:
    """Experts and features as powers of two, and tokens of a program: as many as keep its products in registers."""
    e, z = (max(16, triton.next_power_of_2(size)) for size in (experts, features))
    return e, z, max(16, min(MOST_ROWS, 4096 // max(e, z)))


def _forward(
    router: Tensor, x: Tensor, probe: Tensor, genome: Tensor, embedding: Tensor, energy: Tensor, fatigue: Tensor,
    metabolic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits and genes; and a copy of the embedding, which moves before backward comes by."""
    (tokens, experts), features = router.shape, embedding.shape[1]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=router.device)
    genes = torch.empty(GENES, experts, dtype=torch.float32, device=router.device)
    e, z, rows = _tile(experts, features)
    with _rows.on_device(router):
        _forward_kernel[(max(1, triton.cdiv(tokens, rows)),)](
            router.contiguous(), x.contiguous(), probe.contiguous(), genome.contiguous(), embedding.contiguous(),
            energy.contiguous(), fatigue.contiguous(), logits, genes, tokens, x.shape[1], experts, features,
            genome.shape[1], metabolic, e, z, rows, min(128, triton.next_power_of_2(x.shape[1])), num_warps=WARPS,
        )  # fmt: skip
    return logits, genes, embedding.clone(memory_format=torch.contiguous_format)


def _backward(
    dlogits: Tensor, probe: Tensor, genome: Tensor, place: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = dlogits.shape
    features, xi = place.shape[1], genome.shape[1]
    drouter = torch.empty(tokens, experts, dtype=probe.dtype, device=probe.device)
    dmean = torch.empty(tokens, dtype=probe.dtype, device=probe.device)
    dprobe = torch.empty(tokens, features, dtype=probe.dtype, device=probe.device)
    dgenome = torch.empty(experts, xi, dtype=torch.float32, device=probe.device)
    e, z, rows = _tile(experts, features)
    parts = triton.cdiv(tokens, rows)
    sums = torch.empty(parts, experts, dtype=torch.float32, device=probe.device)
    with _rows.on_device(probe):
        if parts:
            _backward_kernel[(parts,)](
                dlogits.contiguous(), probe.contiguous(), place, drouter, dmean, dprobe, sums, tokens, width, experts,
                features, e, z, rows, num_warps=WARPS,
            )  # fmt: skip
        _genome_kernel[(1,)](sums, genome.contiguous(), dgenome, parts, experts, xi, e, SUMMED // e, num_warps=WARPS)
    return drouter, dmean, dprobe, dgenome


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, x, probe, genome, *_ = inputs
    ctx.width = x.shape[1]
    ctx.save_for_backward(probe, genome, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, dlogits: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    backward = torch.ops.kernbench.router_genetics_backward.default if _rows.watched() else _backward
    probe, genome, place = ctx.saved_tensors
    drouter, dmean, dprobe, dgenome = backward(dlogits, probe, genome, place, ctx.width)
    return drouter, dmean.unsqueeze(1).expand(-1, ctx.width), dprobe, dgenome, None, None, None, None


class _RouterGenetics(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dlogits, *rest)


def _fake(
    router: Tensor, x: Tensor, probe: Tensor, genome: Tensor, embedding: Tensor, energy: Tensor, fatigue: Tensor,
    metabolic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = router.new_empty(router.shape, dtype=torch.float32)
    return logits, genome.new_empty(GENES, len(genome)), embedding.new_empty(embedding.shape)


def _fake_backward(
    dlogits: Tensor, probe: Tensor, genome: Tensor, place: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = len(probe)
    return (
        probe.new_empty(dlogits.shape), probe.new_empty(tokens), probe.new_empty(probe.shape),
        genome.new_empty(genome.shape),
    )  # fmt: skip


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _implementation, _shape in (
    (
        "router_genetics",
        "(Tensor router, Tensor x, Tensor probe, Tensor genome, Tensor embedding, Tensor energy, Tensor fatigue, "
        "bool metabolic) -> (Tensor, Tensor, Tensor)",
        _forward,
        _fake,
    ),
    (
        "router_genetics_backward",
        "(Tensor dlogits, Tensor probe, Tensor genome, Tensor place, int width) -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation, _key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kernbench::{_name}", _shape, lib=_LIBRARY)
torch.library.register_autograd("kernbench::router_genetics", _gradients, setup_context=_keep, lib=_LIBRARY)


SPEC = KernelSpec(
    name="router_genetics",
    reference=router_genetics_reference,
    optimized=router_genetics,
    make_inputs=_router_cases.make_inputs,
    cases=(
        Case("one", tokens=1, width=3, experts=1, features=2, metabolic=1),
        Case("ragged", tokens=37, width=50, experts=5, features=24, metabolic=1),
        Case("plain", tokens=70, width=16, experts=20, features=7, metabolic=0),
        Case("moe-8", large=True, tokens=8192, width=768, experts=8, features=24, metabolic=1),
        Case("moe-64", large=True, tokens=8192, width=768, experts=64, features=24, metabolic=1),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=_router_cases.cost,
    backward_cost=_router_cases.backward_cost,
    sizes={
        "tokens": Sizes(most=150, block=MOST_ROWS),
        "width": Sizes(least=1, most=150, block=128),
        "experts": Sizes(least=1, most=40),
        "features": Sizes(least=1, most=40),
        "metabolic": Sizes(most=1),
    },
    values={
        "genome": Values(least=-20, most=20),
        "embedding": Values(fixed=True),
        "probe": Values(fixed=True),
        "energy": Values(least=0, most=1),
        "fatigue": Values(least=0, most=1),
    },
    differentiable=True,
    source="bio-nanochat, section 5.2; kernel plan, phase 3",
)
