"""Implementations that are right when they are looked at and not when they are timed: bench gives them no time."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import bench
from kernbench.measurement import calls, timing
from kernbench.measurement.witness import Witness, WrongResult, slower_when_checked
from kernbench.record import BenchResult, Ceilings
from kernbench.spec import Case, Cost, Inputs, KernelSpec, Peer, Tolerance

CPU = torch.device("cpu", 0)
ROOFS = Ceilings(launch_seconds=1e-9)
CASE = Case("ragged", rows=127)
ROUNDS = 4


def reference(x: Tensor, total: Tensor) -> Tensor:
    total.add_(x)
    return torch.sin(x) * 2 + 1


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case["rows"], 64, generator=generator, device=device).to(dtype)
    return {"x": x, "total": torch.ones_like(x)}


def spec_of(peer: Callable[..., Any], **changes: Any) -> KernelSpec:
    settings: dict[str, Any] = {
        "name": "toy",
        "reference": reference,
        "optimized": lambda x, total: None,
        "make_inputs": make_inputs,
        "cases": (CASE,),
        "tolerance": {"float32": Tolerance(), "bfloat16": Tolerance()},
        "cost": lambda case, dtype: Cost(flops=1, bytes_read=1, bytes_written=1),
        "mutates": ("total",),
        "peers": {"peer": peer},
    }
    return KernelSpec(**settings | changes)


@pytest.fixture(autouse=True)
def two_small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "cache_bytes", lambda _: 2 * CASE["rows"] * 64 * 4)
    monkeypatch.setattr(calls, "MOST_CALLS", 8)


def row_of(
    peer: Callable[..., Any],
    *,
    rounds: int = ROUNDS,
    dtype: str = "float32",
    device: torch.device = CPU,
    **changes: Any,
) -> BenchResult:
    rows = bench.bench_kernel(
        spec_of(peer, **changes),
        device=device,
        dtypes=[dtype],
        rounds=rounds,
        ceilings=ROOFS,
        without=frozenset({"compile", "triton"}),
    )
    by_name: dict[str, BenchResult] = {}
    for row in rows:
        by_name.setdefault(row.implementation, row)
    assert by_name["eager"].seconds is not None, by_name["eager"]
    return by_name["peer"]


def wrong(peer: Callable[..., Any], **arguments: Any) -> str:
    row = row_of(peer, **arguments)
    assert (row.label, row.seconds, row.interval, row.speedup) == ("wrong", None, None, None), row
    return row.note


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_rounding_is_right(dtype: str) -> None:
    def wide(x: Tensor, total: Tensor) -> Tensor:
        total.copy_(total.double() + x.double())
        return (torch.sin(x.double()) * 2 + 1).to(x.dtype)

    row = row_of(wide, dtype=dtype)
    assert (row.label, row.note) == ("", "")
    assert row.seconds is not None


def test_rounding_where_eager_does_not_round_is_right() -> None:
    def exact(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return x * 4

    def rounds(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return x * 3 + x

    row = row_of(rounds, reference=exact)
    assert (row.label, row.note) == ("", "")


def test_a_buffer_that_is_returned_again_and_again_is_right() -> None:
    kept: dict[torch.Size, Tensor] = {}

    def reuses(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return torch.add(torch.sin(x) * 2, 1, out=kept.setdefault(x.shape, torch.empty_like(x)))

    assert row_of(reuses).label == ""


def test_an_output_that_is_an_argument_is_not_overwritten() -> None:
    def in_place(x: Tensor, total: Tensor) -> Tensor:
        return total.add_(x)

    row = row_of(lambda x, total: total.add_(x), reference=in_place)
    assert row.label == "", row


def test_a_wrong_result_has_no_time() -> None:
    def off(x: Tensor, total: Tensor) -> Tensor:
        return reference(x, total) * 1.001

    assert wrong(off).startswith("after warm-up, output max error ")


def slightly_off(x: Tensor, total: Tensor) -> Tensor:
    return reference(x, total) * 1.0001


def declared(call: Callable[..., Any], ulp: float) -> Peer:
    return Peer(call=call, tolerance=Tolerance(floor_ulp=ulp), because="a narrow accumulator")


def test_less_exact_by_declaration_has_a_time_and_says_how_far_off() -> None:
    assert "output max error" in wrong(slightly_off)
    row = row_of(declared(slightly_off, ulp=4000))
    assert row.label == "less exact"
    assert row.seconds is not None
    off, why = row.note.split(": ")
    assert re.fullmatch(r"output has a max error of 0\.0001 where eager's own is \d\S*e-0[78]", off), off
    assert why == "a narrow accumulator"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_declaration_that_was_not_needed_says_nothing(dtype: str) -> None:
    row = row_of(declared(reference_twin, ulp=4000), dtype=dtype)
    assert (row.label, row.note) == ("", "")


def test_further_off_than_declared_is_wrong() -> None:
    assert wrong(declared(slightly_off, ulp=100)).startswith("after warm-up, output ")
    lost = wrong(declared(lambda x, total: reference(x, total).to(torch.bfloat16), ulp=1e9))
    assert "output has dtype torch.bfloat16" in lost


def test_what_a_declared_peer_may_miss_no_other_may() -> None:
    rows = {
        row.implementation: row
        for row in bench.bench_kernel(
            spec_of(reference_twin, peers={"declared": declared(slightly_off, ulp=4000), "not": slightly_off}),
            device=CPU,
            dtypes=["float32"],
            rounds=ROUNDS,
            ceilings=ROOFS,
            without=frozenset({"compile", "triton"}),
        )
    }
    assert [rows[name].label for name in ("eager", "declared", "not")] == ["", "less exact", "wrong"]


def test_being_less_exact_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="because of what"):
        Peer(call=reference, tolerance=Tolerance(), because=" ")


def test_an_argument_that_should_have_been_written_counts() -> None:
    assert wrong(lambda x, total: torch.sin(x) * 2 + 1).startswith("after warm-up, total max error ")


def test_work_skipped_from_some_call_on_is_seen_in_a_timed_call() -> None:
    numbers = itertools.count()

    def counts(x: Tensor, total: Tensor) -> Tensor:
        return reference(x, total) if next(numbers) < 12 else torch.empty_like(x)

    assert wrong(counts).startswith("in timed call ")


def test_what_the_memory_held_is_no_result() -> None:
    numbers = itertools.count()
    buffer = torch.empty(CASE["rows"], 64)

    def leaves_it(x: Tensor, total: Tensor) -> Tensor:
        if next(numbers) < 12:
            buffer.copy_(reference(x, total))
        return buffer

    assert wrong(leaves_it).endswith("output is NaN at 8128 of 8128 places where the oracle is not")


def test_a_kernel_that_watches_the_stack_is_seen() -> None:
    def watches(x: Tensor, total: Tensor) -> Tensor:
        timed = any(frame.function == "_seconds" for frame in inspect.stack(0))
        return x if timed else reference(x, total)

    assert wrong(watches).startswith("in timed call ")


def test_results_kept_by_address_are_stale() -> None:
    kept: dict[int, Tensor] = {}

    def caches(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = torch.sin(x) * 2 + 1
        return kept[x.data_ptr()].clone()

    assert "output max error" in wrong(caches)


def test_results_kept_by_address_and_version_save_nothing() -> None:
    kept: dict[tuple[int, int], Tensor] = {}
    worked = []

    def caches(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        key = x.data_ptr(), x._version
        worked.append(key not in kept)
        if key not in kept:
            kept[key] = torch.sin(x) * 2 + 1
        return kept[key].clone()

    assert row_of(caches).label == ""
    assert sum(worked) > 0.8 * len(worked), "every timed call finds a version that it has not seen"


def test_a_result_that_computes_when_it_is_read_is_refused() -> None:
    class Lazy(Tensor):
        pass

    def lazy(x: Tensor, total: Tensor) -> Tensor:
        return reference(x, total).as_subclass(Lazy)

    assert wrong(lazy) == "after warm-up, output is a Lazy, which may do the work when it is read"


def test_a_kernel_that_knows_its_inputs_again_is_found_by_its_time() -> None:
    usual: set[float] = set()

    def recognises(x: Tensor, total: Tensor) -> Tensor:
        # What was warmed up on comes back; values that come once a block are worked on.
        key = float(x[0, 0])
        if len(usual) < 2:
            usual.add(key)
        if key not in usual:
            until = time.perf_counter() + 1e-3
            while time.perf_counter() < until:
                pass
        return reference(x, total)

    assert "where its result is checked" in wrong(recognises, rounds=30)


def test_being_slower_when_checked_needs_many_blocks() -> None:
    slower = (8e-6, [2e-6, 2.1e-6, 1.9e-6])
    equal = (2e-6, [2e-6, 2e-6, 2e-6])
    assert slower_when_checked([equal] * 100) == ""
    assert slower_when_checked([slower] * 9) == ""
    words = slower_when_checked([slower] * 10)
    assert words.startswith("takes 8.0 us where its result is checked and 2.0 us elsewhere")
    assert slower_when_checked([slower] * 20 + [equal] * 2)
    assert slower_when_checked([slower] * 10 + [equal] * 10) == ""
    assert slower_when_checked([(2.9e-6, [2e-6] * 3)] * 100) == "", "less than 1.5 times as long"


def test_what_the_timer_cannot_tell_is_no_difference() -> None:
    blocks = [(1.6e-6, [0.8e-6] * 3)] * 30
    assert slower_when_checked(blocks, resolution=1e-6) == ""
    assert slower_when_checked(blocks, resolution=5e-7)


def test_without_a_clock_that_tells_zeros_are_equal() -> None:
    assert slower_when_checked([(0.0, [0.0] * 3)] * 30) == ""


def host_bound(draw: random.Random) -> float:
    """As called: some backwards find the thread of autograd awake, others wake it."""
    return draw.gauss(4.1e-4, 2e-5) if draw.random() < 0.4 else draw.gauss(1.3e-4, 1e-5)


def wild(draw: random.Random) -> float:
    """So far apart that of two times one is almost always 1.5 times the other: the worst there is."""
    return math.exp(draw.uniform(-14, 14))


@pytest.mark.parametrize("took", [host_bound, wild])
def test_times_that_scatter_give_no_false_alarm(took: Callable[[random.Random], float]) -> None:
    """The bound for ``wild`` is 20 looks x 1e-6 a race: 0.006 alarms in these 300 races."""
    draw = random.Random(0)
    for _ in range(300):
        blocks = [(took(draw), [took(draw) for _ in range(3)]) for _ in range(20)]
        assert not any(slower_when_checked(blocks[:count]) for count in range(10, 21))


def test_skipped_work_shows_through_times_that_scatter() -> None:
    draw = random.Random(0)

    def blocks(rounds: int) -> list[tuple[float, list[float]]]:
        return [(host_bound(draw) + 1e-3, [host_bound(draw) for _ in range(3)]) for _ in range(rounds)]

    assert all(slower_when_checked(blocks(12)) for _ in range(100))


def test_a_load_that_slows_down_is_not_taken_for_work_that_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying inputs leaves the host's threads asleep and the caches full of something else."""
    disturbed = []
    load = Witness.load

    def loading(self: Witness, **arguments: Any) -> Inputs:
        disturbed.append(True)
        return load(self, **arguments)

    def after_a_load(x: Tensor, total: Tensor) -> Tensor:
        until = time.perf_counter() + 1e-3 * len(disturbed)
        disturbed.clear()
        while time.perf_counter() < until:
            pass
        return reference(x, total)

    monkeypatch.setattr(Witness, "load", loading)
    row = row_of(after_a_load, rounds=30)
    assert (row.label, row.note) == ("", "")
    assert row.seconds is not None
    assert row.seconds < 5e-4, "the time of a call that nothing was loaded for"


def test_calls_to_check_and_their_controls_are_different_and_drawn_anew() -> None:
    inputs = make_inputs(CASE, torch.float32, CPU, 0)
    spec = spec_of(reference_twin)
    witness = Witness(spec, inputs, lambda seed: make_inputs(CASE, torch.float32, CPU, seed), torch.float32, CPU)
    drawn = [witness.places(6) for _ in range(200)]
    assert all(len(set(places)) == 4 and set(places) <= set(range(6)) for places in drawn)
    assert {places[0] for places in drawn} == set(range(6))
    assert [len(witness.places(count)) for count in (1, 2, 3, 50)] == [1, 1, 2, 4]
    usual = inputs["x"].clone()
    fresh = witness.load()["x"].clone()
    assert not torch.equal(fresh, usual)
    assert torch.equal(witness.load(usual=True)["x"], usual)
    assert torch.equal(witness.load()["x"], fresh)


def test_a_call_that_seems_to_take_no_time_takes_what_the_timer_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    pair_of_nothing = {
        "event": lambda: object(), "mark": lambda at: None, "synchronize": lambda device: None,
        "_spin": lambda cycles: None, "seconds_between": lambda begin, end: 1e-6,
    }  # fmt: skip
    for name, value in pair_of_nothing.items():
        monkeypatch.setattr(calls, name, value)
    monkeypatch.setattr(calls, "LEAST_CLEAR_BYTES", 1024)
    monkeypatch.setattr(calls.ColdCalls, "_calibrate_pair", lambda self: (2e-6, 0.0))
    inputs = calls.InputSets(spec_of(reference_twin), CASE, torch.float32, CPU)
    block = calls.ColdCalls(inputs, CPU).prepare(reference)
    assert [block(number) for number in range(12)] == [calls.EVENT_RESOLUTION] * 12


def test_a_kernel_that_replaces_the_clock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", honest)

    def patches(x: Tensor, total: Tensor) -> Tensor:
        time.perf_counter = lambda: 0.0
        timing._perf_counter = lambda: 0.0
        return reference(x, total)

    note = wrong(patches)
    assert "replaces" in note
    assert "time.perf_counter" in note
    assert "kernbench.measurement.timing._perf_counter" in note
    assert time.perf_counter is honest


def test_state_is_checked_from_a_known_start() -> None:
    stateful: dict[str, Any] = {"stateful": True, "next_inputs": lambda inputs, seed: None}
    assert row_of(reference_twin, **stateful).label == ""

    def forgets(x: Tensor, total: Tensor) -> Tensor:
        total.copy_(total + x * 0.9)
        return torch.sin(x) * 2 + 1

    assert "total max error" in wrong(forgets, **stateful)


def reference_twin(x: Tensor, total: Tensor) -> Tensor:
    return reference(x, total)


def test_several_updates_in_a_row_are_compared_with_as_many_of_the_reference() -> None:
    spec = spec_of(reference_twin)
    inputs = make_inputs(CASE, torch.float32, CPU, 0)
    witness = Witness(spec, inputs, lambda seed: make_inputs(CASE, torch.float32, CPU, seed), torch.float32, CPU)
    for updates in (3, 1):
        witness.load()
        output = None
        for _ in range(updates):
            output = reference(**inputs)
        witness.check(witness.take(output), "replayed", calls=updates)
    witness.load()
    with pytest.raises(WrongResult, match="replayed, total max error"):
        witness.check(witness.take(reference(**inputs)), "replayed", calls=2)


def test_a_peer_that_overwrites_its_argument_goes_on_from_there() -> None:
    def halves(x: Tensor) -> Tensor:
        return x * 0.5 + 1

    spec = spec_of(halves, reference=halves, mutates=())
    inputs = {"x": make_inputs(CASE, torch.float32, CPU, 0)["x"]}
    witness = Witness(
        spec, inputs, lambda seed: {"x": make_inputs(CASE, torch.float32, CPU, seed)["x"]}, torch.float32, CPU
    )
    assert witness.in_place(halves(**inputs)) == ()
    witness.load()
    for _ in range(3):
        output = inputs["x"].mul_(0.5).add_(1)
    in_place = witness.in_place(output)
    assert in_place == (("output", "x"),)
    got = witness.take(output)
    with pytest.raises(WrongResult, match="replayed, output max error"):
        witness.check(witness.take(output), "replayed", calls=2, in_place=in_place)
    witness.check(got, "replayed", calls=3, in_place=in_place)
    witness.load()
    witness.check(witness.take(halves(**inputs)), "replayed", calls=3)


def test_an_input_that_is_expanded_stays_what_it_is() -> None:
    def expanded(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = make_inputs(case, dtype, device, seed)
        return inputs | {"x": inputs["x"][:1].expand(case["rows"], 64)}

    assert row_of(reference_twin, make_inputs=expanded).label == ""


def test_a_reference_without_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def heavy(x: Tensor, total: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return reference(x, total)

    row = row_of(reference_twin, reference=heavy)
    assert row.seconds is not None
    assert row.note == "not compared with eager while timed: too large for that"


GPU = torch.device("cuda", 0)
WIDE = (Case("wide", rows=1 << 19), CASE)


@pytest.mark.gpu
def test_work_on_another_stream_is_seen() -> None:
    side = torch.cuda.Stream(GPU)  # type: ignore[no-untyped-call]

    def elsewhere(x: Tensor, total: Tensor) -> Tensor:
        result = torch.empty_like(x)
        with torch.cuda.stream(side):
            total.add_(x)
            for _ in range(5):
                torch.sin(x, out=result)
            result.mul_(2).add_(1)
        return result

    note = wrong(elsewhere, device=GPU, cases=WIDE)
    assert "error" in note or "NaN" in note


@pytest.mark.gpu
@pytest.mark.parametrize("skips_from", [12, 40])
def test_work_skipped_from_some_call_on_is_seen_on_a_gpu(skips_from: int) -> None:
    numbers = itertools.count()

    def counts(x: Tensor, total: Tensor) -> Tensor:
        return reference(x, total) if next(numbers) < skips_from else torch.empty_like(x)

    assert wrong(counts, device=GPU, rounds=10)


@pytest.mark.gpu
def test_a_replayed_graph_is_checked_with_its_updates() -> None:
    for changes in ({}, {"stateful": True, "next_inputs": lambda inputs, seed: None}):
        rows = bench.bench_kernel(
            spec_of(reference_twin, **changes),
            device=GPU,
            dtypes=["float32"],
            rounds=3,
            ceilings=ROOFS,
            without=frozenset({"compile", "triton"}),
        )
        replayed = [row for row in rows if row.cache == "graph"]
        assert [row.implementation for row in replayed] == ["eager", "peer"]
        assert all(
            row.seconds and row.label in ("", "launch-bound") and "compared" not in row.note for row in replayed
        ), replayed
