"""What seed_blend is tried and timed on: cases, inputs, and the work of each, the source document's sizes too."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernbench.spec import Case, Claim, Claims, Cost, Inputs, Sweep

from . import _seeds
from ._seeds import GRAFTING_TO_FINE_TUNING, NEAR_ZERO, TABLES

DOCUMENTED = 2
"""In a case's ``states``: seeds as the source document starts them, the first of them grafting."""
DOCUMENTED_SHARE = 0.3
LIFECYCLES = (2, 7, 0, 8, 1, 10, 9, 4, 6, 3, 5)
"""Of every second seed, in turn; first those beside the active ones, so that few seeds have them."""


def _case(name: str, batch: int, features: int, seeds: int, chunk: int, **more: int) -> Case:
    """A case for a GPU, with ten blueprints and every seed in some state of its life."""
    sizes = {"batch": batch, "features": features, "seeds": seeds, "chunk": chunk}
    return Case(name, large=True, **(sizes | {"blueprints": 10, "simple": 0, "states": 1} | more))


def documented(
    title: str, bytes_per_second: float, batch: int, features: int, seeds: int, chunk: int
) -> tuple[Case, Claim]:
    """One of the source document's sizes with what is stated for it.

    Counted are float32 numbers of S x C columns, three accesses to those of active seeds and two to the others.
    """
    case = _case(f"document-{title.lower()}", batch, features, seeds, chunk, states=DOCUMENTED)
    active = int(DOCUMENTED_SHARE * seeds)
    return case, Claim(
        case=case.name,
        title=title,
        bytes_per_second=bytes_per_second,
        counted_bytes=4.0 * batch * chunk * (3 * active + 2 * (seeds - active)),
        real_bytes=4.0 * (2 * batch * features + min(active * chunk, features)),
        why=f"{seeds * chunk:,} columns of {seeds:,} seeds, where x has {features:,}, those of {features // chunk}",
    )


DOCUMENTS = (
    documented("Small", 125e9, 32, 512, 100, 64),
    documented("Medium", 1239e9, 32, 1024, 500, 128),
    documented("Large", 2693e9, 16, 2048, 1000, 256),
    documented("Extreme", 4993e9, 8, 4096, 2000, 512),
)
CLAIMS = Claims(
    source="Phase 3 GPU Optimization report of 2025-01-24",
    device="an RTX 4060 Ti with 288 GB/s",
    roof_bytes_per_second=288e9,
    claims=tuple(claim for _, claim in DOCUMENTS),
)
CASES = (
    Case("one", batch=1, features=1, seeds=1, chunk=1, blueprints=1, simple=0, states=1),
    Case("ragged", batch=67, features=61, seeds=9, chunk=6, blueprints=3, simple=0, states=1),
    Case("simple", batch=5, features=100, seeds=12, chunk=8, blueprints=3, simple=1, states=0),
    Case("even", batch=16, features=64, seeds=4, chunk=16, blueprints=2, simple=0, states=1),
    Case("empty-seeds", batch=3, features=130, seeds=7, chunk=24, blueprints=2, simple=0, states=1),
    _case("small", 32, 512, 8, 64),
    _case("medium", 64, 4096, 64, 64),
    _case("large", 1024, 4096, 64, 64),
    _case("extreme", 4096, 8192, 128, 64),
    _case("extreme-simple", 4096, 8192, 128, 64, simple=1, states=0),
    _case("5000-seeds", 128, 640_000, 5000, 128),
    *(case for case, _ in DOCUMENTS),
)
SWEEP = Sweep(
    size="seeds",
    values=_seeds.SWEPT,
    sizes=lambda seeds: _seeds.swept_sizes(seeds) | {"blueprints": 10, "simple": 0, "states": 1},
    fixed=_seeds.SWEPT_FIXED,
)


def seeds_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Lifecycle and operator of every seed [S], and the lifecycles that blend, a bit each."""
    number = torch.arange(case["seeds"], device=device, dtype=torch.int32)
    if case["states"] == DOCUMENTED:
        lifecycle = (number < int(DOCUMENTED_SHARE * case["seeds"])).to(torch.int32) * 3
        return lifecycle, number % 3, GRAFTING_TO_FINE_TUNING
    others = torch.tensor(LIFECYCLES, device=device, dtype=torch.int32)[(number // 2 % len(LIFECYCLES)).long()]
    lifecycle = torch.where(number % 2 == 0, 3 + number // 2 % 4, others)
    return lifecycle, (number + number // 4) % 4, GRAFTING_TO_FINE_TUNING if case["states"] else 1 << 3 | 1 << 6


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Numbers with a mean, some next to zero; seeds of all kinds, and no blueprint for those that are not active."""
    generator = torch.Generator(device).manual_seed(seed)
    seeds, wide = case["seeds"], torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def drawn(below: int) -> Tensor:
        return torch.randint(below, (seeds,), generator=generator, device=device, dtype=torch.int32)

    lifecycle, operator, active_states = seeds_of(case, device)
    active = (lifecycle >= 3) & (lifecycle <= 6)
    x = normal(case["batch"], case["features"]) + 0.5
    x *= torch.rand(x.shape, generator=generator, device=device) > 0.1
    return {
        "x": torch.where(x == 0, normal(*x.shape).sign() * 5e-7, x).to(dtype).requires_grad_(),
        "bank": normal(case["blueprints"], case["features"]).to(wide).requires_grad_(),
        "lifecycle": lifecycle,
        "blueprint": torch.where(active, drawn(case["blueprints"]), drawn(20) - 1),
        "operator": operator,
        "alpha": torch.rand(seeds, generator=generator, device=device).to(wide).requires_grad_(),
        "chunk": case["chunk"],
        "table": TABLES[case["simple"]],
        "active_states": active_states,
        "near_zero": NEAR_ZERO,
    }


def columns_of(case: Case) -> tuple[int, int]:
    """Columns of active seeds, and those of them that are multiplied by their blueprint, so that x matters."""
    lifecycle, operator, active_states = seeds_of(case, torch.device("cpu"))
    start = torch.arange(case["seeds"]) * case["chunk"]
    width = (case["features"] - start).clamp(0, case["chunk"])
    active = (active_states >> lifecycle) & 1 == 1
    multiplied = active & (operator < (1 if case["simple"] else 2))
    return int(width[active].sum()), int(width[multiplied].sum())


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read and y written once; of the bank what active seeds read; statistics and state."""
    batch, features, seeds, chunk = (case[name] for name in ("batch", "features", "seeds", "chunk"))
    tiles = _seeds.tiles_of(batch, features, seeds, chunk)
    elements, live = float(batch * features), min(seeds, triton.cdiv(features, chunk))
    return Cost(
        flops=6 * elements,
        bytes_read=dtype.itemsize * elements + 4.0 * columns_of(case)[0] + 16 * live,
        bytes_written=dtype.itemsize * elements + 12.0 * tiles.parts * tiles.granules,
    )


def backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """dy, and x where a blueprint multiplies it, read once; dx and the gradients of the bank and alpha written."""
    batch, features, seeds, chunk = (case[name] for name in ("batch", "features", "seeds", "chunk"))
    elements, live = float(batch * features), min(seeds, triton.cdiv(features, chunk))
    active, multiplied = columns_of(case)
    return Cost(
        flops=elements + 2.0 * batch * active,
        bytes_read=dtype.itemsize * (elements + batch * multiplied) + 4.0 * active + 8 * live,
        bytes_written=dtype.itemsize * elements + 4.0 * (case["blueprints"] * features + seeds),
    )
