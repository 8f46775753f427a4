"""Overlap and the slowest rank, of traces with planted collectives. Times in the traces are in microseconds."""

from pathlib import Path

import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis import communication
from kernbench.record import Communication
from kernbench.traces import trace

US = 1e-6
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*, unsigned long, ncclWork*)"


def load(tmp_path: Path, builder: KinetoBuilder, rank: int | None = None) -> trace.Trace:
    if rank is not None:
        builder.metadata["distributedInfo"] = {"rank": rank, "world_size": 2, "backend": "nccl"}
    return trace.load(builder.write(tmp_path / f"rank{rank}.json"))


def rank_of(tmp_path: Path, rank: int, arrivals: list[float], ends: list[float], clock: float = 0) -> trace.Trace:
    """Two steps of 1000 us; in each a kernel until the rank arrives in the collective, which ends for all at once."""
    builder = KinetoBuilder(offset_us=4_458_676_000_000.0 + clock)
    for step, (arrival, end) in enumerate(zip(arrivals, ends, strict=True)):
        begin = step * 1000
        builder.step(step, begin, begin + 1000)
        builder.launch("gemm", begin, begin + 10, begin + arrival)
        builder.launch(ALL_REDUCE, begin + 5, begin + arrival, begin + end, stream=20)
    return load(tmp_path, builder, rank)


def test_overlap_is_what_computing_covers(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.launch("gemm", 90, 100, 400)
    builder.launch(ALL_REDUCE, 95, 300, 700, stream=20)
    found = communication.communication([load(tmp_path, builder)])
    assert found is not None
    [rank] = found.ranks
    assert rank.step_seconds == pytest.approx(1000 * US)
    assert rank.compute_seconds_per_step == pytest.approx(300 * US)
    assert rank.communication_seconds_per_step == pytest.approx(400 * US)
    assert rank.exposed_seconds_per_step == pytest.approx(300 * US)
    assert found.overlap_share == pytest.approx(0.25)
    assert found.collectives == pytest.approx({"all_reduce": 400 * US})
    assert (rank.wait_seconds_per_step, found.slowest_rank, found.lag_seconds_per_step) == (None, None, None)


def test_the_rank_that_the_other_waits_for_is_the_slowest(tmp_path: Path) -> None:
    # The clocks of the two are a minute apart. Rank 1 arrives 300 and 100 us later; the exchange takes 50.
    ranks = [
        rank_of(tmp_path, 0, [400, 500], [750, 650]),
        rank_of(tmp_path, 1, [700, 600], [750, 650], clock=60e6),
    ]
    found = communication.communication(ranks)
    assert found is not None
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert [rank.wait_seconds_per_step for rank in found.ranks] == pytest.approx([200 * US, 0])
    assert found.slowest_rank == 1
    assert found.lag_seconds_per_step == pytest.approx(200 * US)
    assert communication.communication(ranks[::-1]) == found


def test_no_rank_stands_out_where_they_take_turns(tmp_path: Path) -> None:
    ranks = [rank_of(tmp_path, 0, [400, 700], [750, 750]), rank_of(tmp_path, 1, [700, 400], [750, 750])]
    found = communication.communication(ranks)
    assert found is not None
    assert [rank.wait_seconds_per_step for rank in found.ranks] == pytest.approx([150 * US, 150 * US])
    assert (found.slowest_rank, found.lag_seconds_per_step) == (None, None)


def test_collectives_that_do_not_match_are_not_compared(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    for step in range(2):
        builder.step(step, step * 1000, step * 1000 + 1000)
        for start in (100, 300, 600):
            builder.launch(ALL_REDUCE, step * 1000 + 5, step * 1000 + start, step * 1000 + start + 50, stream=20)
    ranks = [rank_of(tmp_path, 0, [400, 500], [750, 650]), load(tmp_path, builder, 1)]
    found = communication.communication(ranks)
    assert found is not None
    assert [rank.wait_seconds_per_step for rank in found.ranks] == [None, None]
    assert found.slowest_rank is None


def test_messages_between_two_ranks_are_no_collectives(tmp_path: Path) -> None:
    def sending(rank: int, length: float) -> trace.Trace:
        builder = KinetoBuilder()
        builder.step(0, 0, 1000)
        builder.launch("ncclDevKernel_SendRecv(ncclDevComm*)", 0, 100, 100 + length, stream=20)
        return load(tmp_path, builder, rank)

    found = communication.communication([sending(0, 500), sending(1, 50)])
    assert found is not None
    assert found.slowest_rank is None
    assert found.ranks[0].communication_seconds_per_step == pytest.approx(500 * US)


def test_ranks_that_do_not_tell_are_numbered_by_their_place(tmp_path: Path) -> None:
    def untold(name: str) -> trace.Trace:
        builder = KinetoBuilder()
        builder.launch(ALL_REDUCE, 0, 10, 50, stream=20)
        return trace.load(builder.write(tmp_path / name))

    found = communication.communication([untold("a.json"), untold("b.json")])
    assert found is not None
    assert [rank.rank for rank in found.ranks] == [0, 1]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_silence_without_collectives(tmp_path: Path, on_gpu: bool) -> None:
    builder = KinetoBuilder()
    builder.op("aten::mm", 0, 100)
    if on_gpu:
        builder.launch("gemm", 10, 20, 90)
    found: Communication | None = communication.communication([load(tmp_path, builder)])
    assert found is None


def gloo_rank(tmp_path: Path, rank: int, arrival: float) -> trace.Trace:
    """A step of 1000 us on the CPU: gloo's thread exchanges from the arrival until 700, for 100 beside an operator."""
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.op("aten::mm", 10, 110)
    builder.op("c10d::allreduce_", arrival - 5, arrival - 1)
    builder.annotation("gloo:all_reduce", arrival, 700, tid=300)
    builder.op("aten::mul", 550, 650)
    # Waiting in a hook: the engine computes nothing meanwhile.
    builder.op("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 660, 900)
    return load(tmp_path, builder, rank)


def test_without_a_device_gloo_communicates_and_operators_compute(tmp_path: Path) -> None:
    found = communication.communication([gloo_rank(tmp_path, 0, 200), gloo_rank(tmp_path, 1, 500)])
    assert found is not None
    assert found.collectives == pytest.approx({"all_reduce": 350 * US})
    first, second = found.ranks
    assert first.step_seconds == pytest.approx(1000 * US)
    assert first.compute_seconds_per_step == pytest.approx(200 * US)
    assert first.communication_seconds_per_step == pytest.approx(500 * US)
    assert first.exposed_seconds_per_step == pytest.approx(400 * US)
    assert (first.wait_seconds_per_step, second.wait_seconds_per_step) == pytest.approx((300 * US, 0))
    assert found.slowest_rank == 1
    assert found.lag_seconds_per_step == pytest.approx(300 * US)


def test_a_trace_without_collectives_tells_nothing_of_ranks(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.op("aten::mm", 10, 110)
    assert communication.communication([load(tmp_path, builder)]) is None
