"""The timer on a GPU against other ways of timing the same kernel, and how often its statistics are right.

Run with ``-s``: each test prints what it measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.measurement import arms, calls, replays, timing
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Tolerance

LAUNCHES = 1000
CLEARED_LAUNCHES = 200
QUEUED_LAUNCHES = 200
ROUNDS = 30
REPETITIONS = 100
SLOWER = 1.02
WIDTH = 1536

pytestmark = pytest.mark.gpu


@triton.jit  # type: ignore[untyped-decorator]
def _double_kernel(x, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(out + offsets, tl.load(x + offsets, mask=inside) * 2, mask=inside)


def double(x: Tensor, out: Tensor) -> None:
    torch.add(x, x, out=out)


def double_in_triton(x: Tensor, out: Tensor) -> None:
    _double_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096, num_warps=8)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def spec_of(reference: Callable[..., Any], make_inputs: Callable[..., Inputs], mutates: tuple[str, ...]) -> KernelSpec:
    return KernelSpec(
        name="timed",
        reference=reference,
        optimized=lambda **_: None,
        make_inputs=make_inputs,
        cases=(Case("ragged", size=17, depth=17),),
        tolerance={"float32": Tolerance()},
        cost=lambda case, dtype: Cost(flops=1, bytes_read=1, bytes_written=1),
        mutates=mutates,
    )


def vectors(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x = torch.randn(case["size"], device=device, generator=torch.Generator(device).manual_seed(seed))
    return {"x": x, "out": torch.zeros_like(x)}


def matrices(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(WIDTH, case["depth"], device=device, generator=generator)
    return {"x": x, "weight": torch.randn(case["depth"], WIDTH, device=device, generator=generator)}


@pytest.fixture
def chosen() -> Iterator[torch.device]:
    chosen = torch.device("cuda", 0)
    with torch.cuda.device(chosen):
        yield chosen
    torch.cuda.empty_cache()


def captured(work: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """A graph of so many launches, written here and not taken from kernbench."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / launches


def compare(what: str, pairs: list[tuple[float, float]]) -> float:
    """Ours over theirs, of medians; printed."""
    ours, theirs = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    print(f"\n{what}: kernbench {ours * 1e6:.2f} us, graph {theirs * 1e6:.2f} us, {(ours / theirs - 1) * 100:+.2f} %")
    assert theirs > 5e-5, "too short for this comparison"
    return ours / theirs


def launched_seconds(work: Callable[[], object]) -> float:
    """Per launch of a run that is queued while the device waits."""
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(QUEUED_LAUNCHES):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / QUEUED_LAUNCHES


SIZES = [40_000_003, 64_000_000, 128_000_000]
KERNELS = [double, double_in_triton]


@pytest.mark.parametrize("call", KERNELS, ids=["torch", "triton"])
@pytest.mark.parametrize("size", SIZES)
def test_warm_replay_agrees_with_a_replay_of_1000_launches(
    call: Callable[..., None], size: int, chosen: torch.device
) -> None:
    inputs = calls.InputSets(spec_of(double, vectors, ("out",)), Case("c", size=size), torch.float32, chosen)
    block = replays.GraphCalls(inputs, chosen, 1e-4).prepare(call)
    graph = captured(lambda: call(**inputs.witness.inputs), LAUNCHES)
    pairs = [(block(number), replay_seconds(graph, LAUNCHES)) for number in range(10)]
    assert compare(f"{call.__name__} of {size}, same data again", pairs) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("call", KERNELS, ids=["torch", "triton"])
@pytest.mark.parametrize("size", SIZES)
def test_cold_events_agree_with_a_replay_that_clears_the_cache(
    call: Callable[..., None], size: int, chosen: torch.device
) -> None:
    inputs = calls.InputSets(spec_of(double, vectors, ("out",)), Case("c", size=size), torch.float32, chosen)
    cold = calls.ColdCalls(inputs, chosen)
    block = cold.prepare(call)

    def cleared() -> None:
        cold.scratch.zero_()
        call(**inputs[0])

    both = captured(cleared, CLEARED_LAUNCHES)
    clearing = captured(cold.scratch.zero_, CLEARED_LAUNCHES)
    pairs = []
    for number in range(10):
        ours = block(number)
        theirs = replay_seconds(both, CLEARED_LAUNCHES) - replay_seconds(clearing, CLEARED_LAUNCHES)
        pairs.append((ours, theirs))
    assert compare(f"{call.__name__} of {size}, cold", pairs) == pytest.approx(1, abs=0.03)


def test_identical_arms_show_nothing_and_two_percent_are_found(
    chosen: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "BLOCK_SECONDS", 1e-3)
    depth = _depth_of(200e-6, chosen)
    inputs = calls.InputSets(spec_of(product, matrices, ()), Case("c", depth=depth), torch.float32, chosen)
    slowed, truth = _slowed(inputs)
    cold = calls.ColdCalls(inputs, chosen)
    blocks = {"usual": cold.prepare(product), "slowed": cold.prepare(slowed)}
    held = found = dropped = 0
    floors, effects, usual = [], [], []
    for repetition in range(REPETITIONS):
        race = arms.race(blocks, device=chosen, rounds=ROUNDS, seed=repetition, twin=True)
        assert not race.failed
        assert race.identical is not None
        assert race.noise_floor is not None
        ratio, low, high = arms.speedup(race.seconds("usual"), race.seconds("slowed")) or (1.0, 1.0, 1.0)
        held += race.identical[0] <= 1 <= race.identical[1]
        found += high < 1 and 1 - ratio > race.noise_floor
        assert low <= ratio <= high
        dropped += race.dropped_rounds
        floors.append(race.noise_floor)
        effects.append(1 / ratio - 1)
        usual.append(median(race.seconds("usual") or [0.0]))
    print(
        f"\nproduct of {WIDTH} x {depth} x {WIDTH}, {median(usual) * 1e6:.1f} us; {REPETITIONS} races of {ROUNDS} "
        f"rounds ({dropped} dropped): the A/A interval held 1 in {held}, its floor was {median(floors) * 100:.3f} % "
        f"(at most {max(floors) * 100:.3f} %); a slowdown of {(truth - 1) * 100:.2f} % by long runs was measured as "
        f"{median(effects) * 100:.2f} % and found in {found}"
    )
    assert truth == pytest.approx(SLOWER, abs=0.002)
    assert 150e-6 < median(usual) < 300e-6
    assert median(effects) == pytest.approx(truth - 1, abs=0.005)
    assert held >= 95
    assert found >= 95


def _depth_of(seconds: float, device: torch.device) -> int:
    """The depth with which the product takes about so long: its time grows with the depth alone."""
    inputs = matrices(Case("c", depth=WIDTH), torch.float32, device, 0)
    took = replay_seconds(captured(lambda: product(**inputs), 100), 100)
    return int(WIDTH * seconds / took) // 64 * 64


def _slowed(inputs: calls.InputSets) -> tuple[Callable[..., Tensor], float]:
    """The product with a pause after it that makes it 2 % longer, and by how much long runs of launches say it is.

    Launches of a stream and not of a graph: there two launches are about a microsecond closer together.
    """

    def with_pause(cycles: int) -> Callable[..., Tensor]:
        def slowed(x: Tensor, weight: Tensor) -> Tensor:
            result = x @ weight
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            return result

        return slowed

    def times_longer(call: Callable[..., Tensor]) -> float:
        return median(
            launched_seconds(lambda: call(**inputs[0])) / launched_seconds(lambda: product(**inputs[0]))
            for _ in range(15)
        )

    cycles, now = 4000, 1.0
    for _ in range(6):
        now = times_longer(with_pause(cycles))
        if abs(now - SLOWER) < 5e-4:
            break
        # Of 200 us, at about two cycles a nanosecond.
        cycles = max(1, cycles + int((SLOWER - now) * 200e-6 * 1.9e9))
    return with_pause(cycles), now


def test_what_is_queued_ahead_costs_no_host_time(chosen: torch.device) -> None:
    inputs = calls.InputSets(spec_of(double, vectors, ("out",)), Case("c", size=1 << 20), torch.float32, chosen)

    def slow_to_launch(x: Tensor, out: Tensor) -> None:
        until = timing.now() + 300e-6
        while timing.now() < until:
            pass
        double(x, out)

    queued = calls.ColdCalls(inputs, chosen).prepare(slow_to_launch)
    called = calls.ColdCalls(inputs, chosen, queued=False).prepare(slow_to_launch)
    ours, theirs = (median(block(number) for number in range(5)) for block in (queued, called))
    print(f"\nqueued {ours * 1e6:.1f} us, as called {theirs * 1e6:.1f} us")
    assert ours < 50e-6
    assert 300e-6 < theirs < 450e-6
