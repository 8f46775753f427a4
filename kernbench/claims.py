"""Figures that documents state for a kernel's cases, set beside the bytes that exist and the times measured here."""

from __future__ import annotations

from collections.abc import Sequence

from kernbench.record import BenchResult, Ceilings, ClaimCheck
from kernbench.report import units
from kernbench.spec import Claim, KernelSpec

DEVICE_TIME, CALLED_TIME = "cold", "cold, as called"
DTYPE = "float32"


def check(spec: KernelSpec, results: Sequence[BenchResult], ceilings: Ceilings | None) -> list[ClaimCheck]:
    """Every claim on a case that has rows among the results, timed or not."""
    if spec.claims is None:
        return []
    cases = {row.case for row in results if row.kernel == spec.name}
    roofs = ceilings or Ceilings()
    return [_checked(spec, claim, results, roofs) for claim in spec.claims.claims if claim.case in cases]


def _checked(spec: KernelSpec, claim: Claim, results: Sequence[BenchResult], roofs: Ceilings) -> ClaimCheck:
    assert spec.claims is not None
    times = {
        row.cache: row.seconds
        for row in results
        if (row.kernel, row.case, row.dtype, row.direction, row.implementation)
        == (spec.name, claim.case, DTYPE, "forward", "triton")
    }
    stated = claim.counted_bytes / claim.bytes_per_second
    seconds, called, speed = times.get(DEVICE_TIME), times.get(CALLED_TIME), roofs.copy_bytes_per_second
    copying = claim.real_bytes / speed if speed else None
    return ClaimCheck(
        kernel=spec.name,
        case=claim.case,
        source=spec.claims.source,
        title=claim.title,
        bytes_per_second=claim.bytes_per_second,
        counted_bytes=claim.counted_bytes,
        real_bytes=claim.real_bytes,
        stated_seconds=stated,
        device=spec.claims.device,
        roof_bytes_per_second=spec.claims.roof_bytes_per_second,
        seconds=seconds,
        called_seconds=called,
        launch_seconds=roofs.launch_seconds,
        copy_seconds=copying,
        sentence=_stated(claim, stated) + (_measured(claim, seconds, called, roofs) if seconds else ""),
    )


def _stated(claim: Claim, seconds: float) -> str:
    real = units.bytes_rate(claim.real_bytes / seconds)
    return (
        f"{claim.title}: its {units.bytes_rate(claim.bytes_per_second)} count {claim.why}: "
        f"{units.times(claim.counted_bytes / claim.real_bytes)} the {units.moved(claim.real_bytes)} that there are, "
        f"which are {real} over its {units.seconds(seconds)}."
    )


def _measured(claim: Claim, seconds: float, called: float | None, roofs: Ceilings) -> str:
    """What of the time here is launching, and what the document's way of counting would make of it."""
    launch, speed = roofs.launch_seconds, roofs.copy_bytes_per_second
    text = f" Here the device takes {units.seconds(seconds)}"
    text += f" and a call {units.seconds(called)}" if called else ""
    if launch:
        whole = called or seconds
        text += f"; launching nothing takes {units.seconds(launch)}, {units.share(min(launch / whole, 1.0))} of it"
    counted = claim.counted_bytes / seconds
    if speed:
        text += f", and copying what there is {units.seconds(claim.real_bytes / speed)}"
        text += f". Counted that way this would be {units.bytes_rate(counted)}"
        text += f", {units.times(counted / speed)} what this device copies" if counted > speed else ""
    return f"{text}."


def conclusion(found: Sequence[ClaimCheck]) -> str:
    """What follows from all claims of one document together."""
    first = found[0]
    factors = [claim.counted_bytes / claim.real_bytes for claim in found]
    stated = [claim.stated_seconds for claim in found]
    text = f"The bandwidths of {first.source} count bytes that do not exist, {_span(factors)} too many"
    most, roof = max(claim.bytes_per_second for claim in found), first.roof_bytes_per_second
    if roof and most > roof:
        text += f"; that, and no cache, is how {units.bytes_rate(most)} come out of {first.device}"
    if len(found) > 1:
        counted = max(claim.counted_bytes for claim in found) / min(claim.counted_bytes for claim in found)
        text += f". From its smallest size to its largest it counts {units.times(counted)} the bytes, and its time"
        text += f" stays at {_range(stated)}"
        ours = [claim.called_seconds or claim.seconds for claim in found]
        here = [seconds for seconds in ours if seconds is not None]
        if len(here) == len(found):
            text += f" (here {_range(here)})"
        text += ": that is what launching takes, not what moving bytes does"
    return f"{text}."


def _range(seconds: Sequence[float]) -> str:
    low, high = units.seconds(min(seconds)), units.seconds(max(seconds))
    return low if low == high else units.seconds_range(min(seconds), max(seconds))


def _span(factors: Sequence[float]) -> str:
    low, high = units.number(min(factors)), units.number(max(factors))
    return f"{low} times" if low == high else f"{low} to {high} times"
