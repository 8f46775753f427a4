"""The source document's 4993 GB/s on a card of 288: how such a number arises, and that bench refuses it.

Its layer has B rows of H columns. S seeds of C columns each are counted, of which only H / C exist, and one launch
takes about 15 us whatever the size. So the bytes of S C columns are divided by the time of a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernbench import bench
from kernbench.measurement import calls, timing
from kernbench.record import BenchResult, Ceilings
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Tolerance

CPU = torch.device("cpu", 0)
SECONDS = 15.1e-6
CARD = Ceilings(copy_bytes_per_second=288e9, launch_seconds=7e-6)
H200 = Ceilings(copy_bytes_per_second=4.2e12, launch_seconds=7e-6)

# The document's configurations with what it claims, in GB/s.
CLAIMS = {"Small": 125, "Medium": 1239, "Large": 2693, "Extreme": 4993}
CASES = (
    Case("Small", rows=32, columns=512, seeds=100, chunk=64),
    Case("Medium", rows=32, columns=1024, seeds=500, chunk=128),
    Case("Large", rows=16, columns=2048, seeds=1000, chunk=256),
    Case("Extreme", rows=8, columns=4096, seeds=2000, chunk=512),
    Case("ragged", rows=3, columns=100, seeds=10, chunk=10),
)


def reference(x: Tensor, bank: Tensor, alpha: Tensor) -> Tensor:
    """out[b, j] = (1 - a) x[b, j] + a x[b, j] w[j], with a of the seed that holds column j."""
    spread = alpha.repeat_interleave(-(-x.shape[1] // alpha.shape[0]))[: x.shape[1]]
    return torch.lerp(x, x * bank, spread)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    live = case["columns"] // case["chunk"]
    alpha = torch.rand(live, generator=generator, device=device).to(dtype)
    return {"x": normal(case["rows"], case["columns"]), "bank": normal(case["columns"]), "alpha": alpha}


def as_documented(case: Case, dtype: torch.dtype) -> Cost:
    """Element visits: three for each element of an active seed, 30 % of them, two for the others."""
    visits = case["seeds"] * case["chunk"] * case["rows"] * dtype.itemsize
    return Cost(flops=0, bytes_read=1.3 * visits, bytes_written=visits)


def honest(case: Case, dtype: torch.dtype) -> Cost:
    elements = case["rows"] * case["columns"]
    vectors = case["columns"] + case["columns"] // case["chunk"]
    size = dtype.itemsize
    return Cost(flops=3 * elements, bytes_read=(elements + vectors) * size, bytes_written=elements * size)


def spec_with(cost: Callable[[Case, torch.dtype], Cost]) -> KernelSpec:
    return KernelSpec(
        name="seeds",
        reference=reference,
        optimized=lambda x, bank, alpha: x,
        make_inputs=make_inputs,
        cases=CASES,
        tolerance={"float32": Tolerance()},
        cost=cost,
    )


@pytest.fixture(autouse=True)
def every_call_takes_what_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock moves by the document's time whenever it is read, so each call lasts that long."""
    readings = iter(range(10**9))
    monkeypatch.setattr(timing, "_perf_counter", lambda: SECONDS * next(readings))
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 1)
    monkeypatch.setattr(bench, "cache_bytes", lambda _: 32 << 20)
    yield


def rows_of(cost: Callable[[Case, torch.dtype], Cost], roofs: Ceilings, patch: pytest.MonkeyPatch) -> list[BenchResult]:
    patch.setattr(bench, "measure_ceilings", lambda _: roofs)
    rows = bench.bench_kernel(
        spec_with(cost),
        device=CPU,
        cases=[case for case in CASES if case.name in CLAIMS],
        rounds=3,
        ceilings=roofs,
        without=frozenset({"compile", "triton"}),
    )
    return list(rows)


@pytest.mark.parametrize("roofs", [CARD, H200], ids=["its card", "a faster card"])
def test_the_documents_figures_arise_and_are_refused(roofs: Ceilings, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(as_documented, roofs, monkeypatch)
    for row in rows:
        assert row.bytes_per_second is not None
        # The document rounds its times to 10 us; all four sizes take 14 to 15.2.
        assert row.bytes_per_second / 1e9 == pytest.approx(CLAIMS[row.case], rel=0.09)
        assert row.label == "impossible"
        assert "times the bytes that its tensors hold" in row.note
        assert "visits, not bytes that move" in row.note
    extreme = rows[-1]
    assert extreme.bytes_per_second == pytest.approx(4993e9, rel=0.005)
    assert "counts 271 times the bytes" in extreme.note
    assert extreme.note.startswith("above the measured copy roof: ")
    assert "its 0.279 MB fit into the cache of 33.6 MB" in extreme.note


def test_the_honest_cost_is_accepted_and_shows_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in rows_of(honest, CARD, monkeypatch):
        assert row.label == "launch-bound"
        assert row.note.startswith("within 3 times the launch floor of 7.0 us")
        assert row.bytes_per_second is not None
        assert 8e9 < row.bytes_per_second < 19e9
        assert row.share_of_roof is not None
        assert row.share_of_roof < 0.07


def test_a_launch_that_is_never_waited_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_phantom_bytes.SECONDS", 2e-7)
    (extreme,) = [row for row in rows_of(honest, CARD, monkeypatch) if row.case == "Extreme"]
    assert extreme.label == "impossible"
    assert "its 0.2 us are less than launching nothing takes (7 us)" in extreme.note
