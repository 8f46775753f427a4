"""Where a timed kernel stands under the measured roofs, and whether its figure can be true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernbench.record import Ceilings
from kernbench.spec import Cost

# Above this share of a measured roof a figure is wrong rather than good: the roofs themselves repeat within about 1 %.
IMPOSSIBLE_SHARE = 1.02

# float16 runs on the same units and at the same rate as bfloat16, and only the latter is measured.
SAME_RATE = {"float16": "bfloat16"}


@dataclass(frozen=True)
class Held:
    """What one call's tensors hold: the most bytes that it can move at all, each read once and written once; and the
    size of the cache before memory. None where it is not known."""

    bytes_per_call: float | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Rates of one call and its share of the nearer roof, None where the roof is unknown or does not bind.

    ``phantom`` says that more bytes are counted than there are.
    """

    bytes_per_second: float | None
    flops_per_second: float | None
    share: float | None
    bound: str
    note: str = ""
    phantom: bool = False

    @property
    def impossible(self) -> bool:
        return self.phantom or (self.share is not None and self.share > IMPOSSIBLE_SHARE)


def place(
    seconds: float,
    cost: Cost,
    dtype: str,
    ceilings: Ceilings,
    *,
    in_cache: bool = False,
    held: Held = Held(),  # noqa: B008 - frozen
) -> Place:
    """Set a call's rates against the roofs.

    Args:
        in_cache: the data never leaves the cache, so that the memory roof does not bind; no share of it is stated then.
        held: what the call's tensors hold; a cost that counts more bytes is impossible, however slow the call is.
    """
    bytes_rate = cost.bytes_moved / seconds if cost.bytes_moved else None
    flops_rate = cost.flops / seconds if cost.flops else None
    memory_share = _share(bytes_rate, ceilings.copy_bytes_per_second)
    flops_share, arithmetic = _compute_share(flops_rate, dtype, ceilings)
    memory_bound = (memory_share or 0.0) >= (flops_share or 0.0)
    share = memory_share if memory_bound else flops_share
    note = "" if memory_bound else arithmetic
    if memory_bound and in_cache and memory_share is not None:
        share, note = None, "the data stays in the cache, where the memory roof does not bind"
    phantom = _phantom(cost, held)
    if share is not None and share > IMPOSSIBLE_SHARE:
        note = _memory_reason(seconds, cost, ceilings, held) if memory_bound else _compute_reason(dtype)
    elif phantom:
        note = phantom
    return Place(
        bytes_per_second=bytes_rate,
        flops_per_second=flops_rate,
        share=share,
        bound="memory" if memory_bound else "compute",
        note=note,
        phantom=bool(phantom),
    )


def _share(rate: float | None, roof: float | None) -> float | None:
    return rate / roof if rate is not None and roof else None


def _compute_share(rate: float | None, dtype: str, ceilings: Ceilings) -> tuple[float | None, str]:
    """Share of the dtype's matrix-product roof; float32 beyond its IEEE roof is measured against tf32, and says so."""
    roofs = ceilings.matmul_flops_per_second
    share = _share(rate, roofs.get(dtype) or roofs.get(SAME_RATE.get(dtype, "")))
    rounded = _share(rate, roofs.get("tf32"))
    if dtype == "float32" and share is not None and rounded is not None and share > IMPOSSIBLE_SHARE:
        return rounded, "faster than IEEE float32 can be here, so it multiplies in tf32; the share is of the tf32 roof"
    return share, ""


def _phantom(cost: Cost, held: Held) -> str:
    """In words that a cost counts bytes which no tensor of the call has; empty if it does not."""
    if not held.bytes_per_call or cost.bytes_moved <= IMPOSSIBLE_SHARE * held.bytes_per_call:
        return ""
    times = cost.bytes_moved / held.bytes_per_call
    sizes = f"{_megabytes(cost.bytes_moved)} of {_megabytes(held.bytes_per_call)}"
    return f"its cost counts {times:.3g} times the bytes that its tensors hold ({sizes}): visits, not bytes that move"


def _memory_reason(seconds: float, cost: Cost, ceilings: Ceilings, held: Held) -> str:
    """Why a figure is above the memory roof: all that speaks for itself, else what it can be."""
    likely = [_phantom(cost, held)]
    if ceilings.launch_seconds and seconds < ceilings.launch_seconds:
        floor = ceilings.launch_seconds * 1e6
        likely.append(f"its {seconds * 1e6:.2g} us are less than launching nothing takes ({floor:.2g} us)")
    if held.cache_bytes and held.bytes_per_call and held.bytes_per_call <= held.cache_bytes:
        sizes = f"its {_megabytes(held.bytes_per_call)} fit into the cache of {_megabytes(held.cache_bytes)}"
        likely.append(f"{sizes}, where they may still have been")
    if not any(likely):
        likely.append("bytes are counted that were never moved, the data was still in a cache, or the clock is wrong")
    if cost.bytes_read > 4 * cost.bytes_written:
        likely.append("it mostly reads, which can pass a copy by some percent")
    return f"above the measured copy roof: {'; '.join(filter(None, likely))}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB"


def _compute_reason(dtype: str) -> str:
    return (
        f"above the measured {dtype} matrix-product roof: flops are counted that were never done, the arithmetic is "
        "of a lower precision, or the clock is wrong"
    )


def higher(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of two measurements of each roof; the launch floor is the lower."""

    def pick(one: float | None, other: float | None, best: Callable[..., float]) -> float | None:
        known = [figure for figure in (one, other) if figure is not None]
        return best(known) if known else None

    products = {
        name: max(rates.get(name, 0.0) for rates in (first.matmul_flops_per_second, second.matmul_flops_per_second))
        for name in {**first.matmul_flops_per_second, **second.matmul_flops_per_second}
    }
    return Ceilings(
        copy_bytes_per_second=pick(first.copy_bytes_per_second, second.copy_bytes_per_second, max),
        triad_bytes_per_second=pick(first.triad_bytes_per_second, second.triad_bytes_per_second, max),
        matmul_flops_per_second=products,
        launch_seconds=pick(first.launch_seconds, second.launch_seconds, min),
    )
