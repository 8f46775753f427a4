"""Times implementations side by side: of one kernel, on the measured roofline, or of a whole step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from kernbench.calls import AS_CALLED, ColdCalls, GraphCalls, HostCalls, InputSets
from kernbench.ceilings import cache_bytes, measure_ceilings
from kernbench.device import read_clocks
from kernbench.errors import KernbenchError
from kernbench.progress import Advance, Progress, Silent
from kernbench.record import Arm, BenchResult, Ceilings, Clocks
from kernbench.roofline import place
from kernbench.spec import Case, Cost, KernelSpec
from kernbench.statistics import bootstrap_median
from kernbench.timing import Interleaved as Interleaved
from kernbench.timing import interleave as interleave
from kernbench.timing import time_steps as time_steps
from kernbench.timing import timed_block as timed_block
from kernbench.timing import warm_up as warm_up

Blocks = Mapping[str, Callable[[int], float]]
Implementations = Mapping[str, Callable[..., object]]

ROUNDS = 20
LAUNCH_BOUND = "launch-bound"
IMPOSSIBLE = "impossible"
NOT_MEASURED = "not measured here"
FAILED = "failed"
INTERPRETED = "on the CPU a Triton kernel runs in its interpreter, whose speed says nothing of the kernel's"

# Up to this many launch floors, what is timed is mostly the launch.
LAUNCH_FLOORS = 3
# From this share of the device's time on, the time as called is shown beside it.
HOST_SHARE = 0.8
# Up to this, an event pair holds as much launch as kernel, so a replayed graph is shown beside it.
GRAPH_BELOW_SECONDS = 50e-6


@dataclass(frozen=True)
class Race:
    """Seconds per step and round of each arm that finished, and why the others did not."""

    arms: list[Arm]
    clocks: list[Clocks]
    dropped_rounds: int
    failed: dict[str, str]

    def seconds(self, name: str) -> list[float] | None:
        return next((arm.seconds for arm in self.arms if arm.name == name), None)


def race(arms: Blocks, *, device: torch.device, rounds: int, seed: int = 0, progress: Advance | None = None) -> Race:
    """Interleave the arms on a device; when one raises, all start over without it, so that the others stay paired.

    Raises:
        KernbenchError: the device was throttled in every round.
    """
    left = {name: _named(name, arm) for name, arm in arms.items()}
    failed: dict[str, str] = {}
    while True:
        try:
            measured, clocks, dropped = interleave(
                left, rounds=rounds, seed=seed, progress=progress, clocks=partial(read_clocks, device)
            )
            return Race(measured, clocks, dropped, failed)
        except _ArmFailed as failure:
            failed[failure.name] = failure.reason
            del left[failure.name]


def workload_results(
    finished: Race, names: Sequence[str], *, workload: str, preset: str, dtype: str, units_per_step: float
) -> list[BenchResult]:
    """One row per arm in the order of ``names``; speedups are paired by round with the first, failures are labelled."""
    rows = []
    for name in names:
        seconds = finished.seconds(name)
        middle, low, high = bootstrap_median(seconds) if seconds else (None, None, None)
        rows.append(
            BenchResult(
                kernel=workload,
                case=preset,
                dtype=dtype,
                implementation=name,
                seconds=middle,
                interval=None if low is None or high is None else (low, high),
                units_per_second=None if middle is None else units_per_step / middle,
                speedup=None if name == names[0] else _speedup(finished.seconds(names[0]), seconds),
                label=FAILED if name in finished.failed else "",
                note=finished.failed.get(name, ""),
            )
        )
    return rows


def bench_kernel(
    spec: KernelSpec,
    *,
    device: torch.device,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    rounds: int = ROUNDS,
    ceilings: Ceilings | None = None,
    progress: Progress | None = None,
    without: frozenset[str] = frozenset(),
    begin: Callable[[str], None] | None = None,
) -> Iterator[BenchResult]:
    """Time eager, torch.compile, Triton and the spec's peers on every case and dtype; forward only.

    An implementation that raises gives a result labelled "failed", and the others go on. On the CPU, Triton is not
    timed (its interpreter's speed says nothing), nor are large cases unless ``cases`` holds them.

    Args:
        dtypes: names; by default those that the spec states a tolerance for.
        cases: by default all of the spec.
        ceilings: the roofs; measured first if not given.
        without: implementations that are neither run nor given a row.
        begin: called with an implementation's name whenever that one is about to run, outside of what is timed; so
            who was told of the last one knows which it was that took the process down.

    Raises:
        KernbenchError: an unknown dtype, or the device was throttled in every round.
    """
    names = list(spec.tolerance) if dtypes is None else list(dtypes)
    for name in names:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise KernbenchError(f"there is no dtype {name!r}; use float32, bfloat16 or float16")
    bench = _KernelBench(
        spec,
        device,
        rounds=rounds,
        ceilings=ceilings or measure_ceilings(device),
        progress=progress or Silent(),
        without=without,
        begin=begin or (lambda _: None),
    )
    for case in spec.cases if cases is None else cases:
        for name in names:
            if cases is None and case.large and device.type == "cpu":
                note = f"a large case, meant for a GPU; on the CPU it is timed only if asked for (case {case.name})"
                yield bench.unmeasured(case, name, "eager", NOT_MEASURED, note)
            else:
                yield from bench.rows(case, name)


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """What became of one implementation: its rounds and eager's, or why there are none.

    ``host_seconds`` is what launching a call costs the host, None where that is not in the way.
    """

    implementation: str
    cache: str
    seconds: list[float] | None = None
    eager: list[float] | None = None
    host_seconds: float | None = None
    in_cache: bool = False
    failure: str = ""


class _KernelBench:
    """One kernel on one device; the roofs may rise while it runs, see ``rows``."""

    def __init__(
        self,
        spec: KernelSpec,
        device: torch.device,
        *,
        rounds: int,
        ceilings: Ceilings,
        progress: Progress,
        without: frozenset[str],
        begin: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.device = device
        self.rounds = rounds
        self.ceilings = ceilings
        self.progress = progress
        self.without = without
        self.begin = begin

    def rows(self, case: Case, dtype: str) -> list[BenchResult]:
        """All rows of one case in one dtype.

        If one passes its roof, the roofs are measured once more before it is called impossible: something else may have
        used the machine while they were measured first.
        """
        implementations = {"eager": self.spec.reference, "compile": torch.compile(self.spec.reference)}
        if self.device.type != "cpu":
            implementations["triton"] = self.spec.optimized
        implementations |= self.spec.peers
        implementations = {name: call for name, call in implementations.items() if name not in self.without}
        try:
            cost = self.spec.cost(case, getattr(torch, dtype))
            timed = self._time(case, dtype, implementations)
        except KernbenchError:
            raise
        except Exception as error:  # noqa: BLE001 - a case that cannot be set up is a result; other cases go on
            reason = f"its inputs could not be made: {_reason(error)}"
            return [self.unmeasured(case, dtype, name, FAILED, reason) for name in implementations]
        rows = [self._row(case, dtype, cost, entry) for entry in timed]
        if any(row.label == IMPOSSIBLE for row in rows):
            self.ceilings = _higher(self.ceilings, measure_ceilings(self.device))
            rows = [self._row(case, dtype, cost, entry) for entry in timed]
        if self.device.type == "cpu" and "triton" not in self.without:
            rows.insert(
                len({"eager", "compile"} - self.without),
                self.unmeasured(case, dtype, "triton", NOT_MEASURED, INTERPRETED),
            )
        return rows

    def unmeasured(
        self, case: Case, dtype: str, implementation: str, label: str, note: str, cache: str = ""
    ) -> BenchResult:
        """A row without a time."""
        return BenchResult(
            kernel=self.spec.name,
            case=case.name,
            dtype=dtype,
            implementation=implementation,
            seconds=None,
            cache=cache,
            label=label,
            note=note,
        )

    def _time(self, case: Case, dtype: str, implementations: Implementations) -> list[_Timed]:
        # A recompile limit that earlier cases used up would make torch.compile fall back to eager in silence; with a
        # fresh start and this setting it fails aloud instead.
        torch.compiler.reset()
        inputs = InputSets(self.spec, case, getattr(torch, dtype), self.device)
        title = f"{self.spec.name} {case.name} {dtype}"
        with (
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(),
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            self.progress.stage(title, self.rounds) as advance,
        ):
            if self.device.type == "cpu":
                calls = HostCalls(inputs)
                return self._race(calls, implementations, advance, in_cache=not inputs.exceeds_cache)
            timed = self._race(ColdCalls(inputs, self.device), implementations, advance)
            running = {one.implementation: implementations[one.implementation] for one in timed if one.seconds}
            if any(_held_up_by_host(one) for one in timed):
                timed += self._race(ColdCalls(inputs, self.device, queued=False), running, None)
            eager = next((one.seconds for one in timed if one.implementation == "eager"), None)
            if eager is None or median(eager) >= GRAPH_BELOW_SECONDS:
                return timed
            replayed = GraphCalls(inputs, self.device, median(eager))
            fits = inputs.bytes_per_set <= cache_bytes(self.device)
            return timed + self._race(replayed, running, None, in_cache=fits)

    def _race(
        self,
        calls: HostCalls | ColdCalls | GraphCalls,
        implementations: Implementations,
        advance: Advance | None,
        *,
        in_cache: bool = False,
    ) -> list[_Timed]:
        blocks: dict[str, Callable[[int], float]] = {}
        hosts: dict[str, float | None] = {}
        failures: dict[str, str] = {}
        for name, call in implementations.items():
            self.begin(name)
            try:
                blocks[name] = self._telling(name, calls.prepare(call))
                hosts[name] = calls.host_seconds(call)
            except Exception as error:  # noqa: BLE001 - an implementation that fails is a result; the others go on
                failures[name] = _reason(error)
                blocks.pop(name, None)
                self._free()
        finished = race(blocks, device=self.device, rounds=self.rounds, progress=advance)
        failures |= finished.failed
        return [
            _Timed(
                implementation=name,
                cache=calls.cache,
                seconds=finished.seconds(name),
                eager=finished.seconds("eager") if name != "eager" else None,
                host_seconds=hosts.get(name),
                in_cache=in_cache,
                failure=failures.get(name, ""),
            )
            for name in implementations
        ]

    def _telling(self, name: str, block: Callable[[int], float]) -> Callable[[int], float]:
        """A block that says whose it is before it runs."""

        def told(number: int) -> float:
            self.begin(name)
            return block(number)

        return told

    def _free(self) -> None:
        """Give back what a failed implementation held, so that the next one does not lack the memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _row(self, case: Case, dtype: str, cost: Cost, timed: _Timed) -> BenchResult:
        if timed.seconds is None:
            return self.unmeasured(case, dtype, timed.implementation, FAILED, timed.failure, timed.cache)
        middle, low, high = bootstrap_median(timed.seconds)
        stands = place(middle, cost, dtype, self.ceilings, in_cache=timed.in_cache)
        label, note = ("", stands.note)
        if stands.impossible:
            label = IMPOSSIBLE
        elif reason := self._launch_bound(middle, timed):
            label, note = LAUNCH_BOUND, reason
        return BenchResult(
            kernel=self.spec.name,
            case=case.name,
            dtype=dtype,
            implementation=timed.implementation,
            seconds=middle,
            interval=(low, high),
            bytes=cost.bytes_moved,
            flops=cost.flops,
            bytes_per_second=stands.bytes_per_second,
            flops_per_second=stands.flops_per_second,
            share_of_roof=stands.share,
            speedup=_speedup(timed.eager, timed.seconds),
            cache=timed.cache,
            label=label,
            note=note,
        )

    def _launch_bound(self, seconds: float, timed: _Timed) -> str:
        """Why the time is one of launching and not of the kernel; empty if it is the kernel's."""
        floor = self.ceilings.launch_seconds
        # The floor is one of launches from the host; replayed launches cost less, so only what is below it counts.
        times = 1 if timed.cache == GraphCalls.cache else LAUNCH_FLOORS
        if floor is not None and seconds < times * floor:
            return f"within {times} times the launch floor of {floor * 1e6:.1f} us"
        if timed.cache == AS_CALLED:
            share = (timed.host_seconds or 0.0) / seconds
            return f"launching takes the host {share * 100:.0f} % of this time" if share > HOST_SHARE else ""
        if timed.host_seconds is not None and timed.host_seconds > seconds:
            host, own = timed.host_seconds * 1e6, seconds * 1e6
            return f"the host needs {host:.0f} us to launch what the device does in {own:.0f} us"
        return ""


def _held_up_by_host(timed: _Timed) -> bool:
    """Whether launching takes long enough that a program which only calls this would see it in the time."""
    if timed.seconds is None or timed.host_seconds is None:
        return False
    return timed.host_seconds > HOST_SHARE * median(timed.seconds)


class _ArmFailed(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name = name
        self.reason = _reason(error)


def _named(name: str, arm: Callable[[int], float]) -> Callable[[int], float]:
    def block(number: int) -> float:
        try:
            return arm(number)
        except Exception as error:
            raise _ArmFailed(name, error) from error

    return block


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _speedup(baseline: list[float] | None, seconds: list[float] | None) -> tuple[float, float, float] | None:
    """Baseline over this, paired by round: median, low, high."""
    if not baseline or not seconds:
        return None
    return bootstrap_median([before / after for before, after in zip(baseline, seconds, strict=True)])


def _higher(first: Ceilings, second: Ceilings) -> Ceilings:
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
