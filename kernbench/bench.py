"""Times implementations side by side: of one kernel, on the measured roofline, or of a whole step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from kernbench.errors import KernbenchError
from kernbench.measurement.arms import FAILED as FAILED
from kernbench.measurement.arms import WRONG as WRONG
from kernbench.measurement.arms import Race as Race
from kernbench.measurement.arms import race as race
from kernbench.measurement.arms import reason, speedup
from kernbench.measurement.arms import workload_results as workload_results
from kernbench.measurement.backward import BACKWARD, BOTH, FORWARD, backward_of, compiled
from kernbench.measurement.backward import Direction as Direction
from kernbench.measurement.calls import AS_CALLED, ColdCalls, HostCalls, InputSets
from kernbench.measurement.ceilings import cache_bytes, measure_ceilings
from kernbench.measurement.replays import GraphCalls
from kernbench.measurement.roofline import Held, higher, place
from kernbench.measurement.statistics import bootstrap_median
from kernbench.measurement.timing import Interleaved as Interleaved
from kernbench.measurement.timing import interleave as interleave
from kernbench.measurement.timing import time_steps as time_steps
from kernbench.measurement.timing import timed_block as timed_block
from kernbench.measurement.timing import warm_up as warm_up
from kernbench.measurement.witness import Allowance, WrongResult
from kernbench.parity.integrity import Watch, watched
from kernbench.progress import Advance, Progress, Silent
from kernbench.record import BenchResult, Ceilings, Clocks
from kernbench.spec import Case, Cost, KernelSpec, Peer

Implementations = Mapping[str, Callable[..., object]]

ROUNDS = 20
LAUNCH_BOUND = "launch-bound"
IMPOSSIBLE = "impossible"
LESS_EXACT = "less exact"
NOT_MEASURED = "not measured here"
LARGE = "a large case, meant for a GPU; on the CPU it is timed only if asked for with --case"
LARGE_SWEEP = "the sizes of this sweep are meant for a GPU, and so they are not timed on the CPU"
INTERPRETED = "on the CPU a Triton kernel runs in its interpreter, whose speed says nothing of the kernel's"

# Implementations that kernbench makes itself, which are not suspected of anything.
OURS = ("eager", "compile")

# Up to this many launch floors, what is timed is mostly the launch.
LAUNCH_FLOORS = 3
# From this share of the device's time on, the time as called is shown beside it.
HOST_SHARE = 0.8
# Up to this, launching may cost as much as what is launched, so a replayed graph is shown beside it.
GRAPH_BELOW_SECONDS = 200e-6


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
    directions: Sequence[str] | None = None,
) -> Iterator[BenchResult]:
    """Time eager, torch.compile, Triton and the spec's peers on every case and dtype, forward and backward.

    An implementation that raises gives a result labelled "failed", one whose timed calls do not give what eager's do
    one labelled "wrong"; neither has a time, and the others go on. Eager, or the first that runs, goes twice in every
    round: the interval of that A/A pair is the noise floor of all rows of its race. On the CPU, Triton is not timed
    (its interpreter's speed says nothing), nor are large cases unless ``cases`` holds them.

    Args:
        dtypes: names; by default those that the spec states a tolerance for.
        cases: by default all of the spec.
        ceilings: the roofs; measured first if not given.
        without: implementations that are neither run nor given a row.
        begin: called with an implementation's name whenever that one is about to run, outside of what is timed; so
            who was told of the last one knows which it was that took the process down.
        directions: "forward", "backward"; by default both of a differentiable kernel. Each has its own rows.

    Raises:
        KernbenchError: an unknown dtype, or the device was throttled in every round.
    """
    names = list(spec.tolerance) if dtypes is None else list(dtypes)
    for name in names:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise KernbenchError(f"there is no dtype {name!r}; use float32, bfloat16 or float16")
    bench = _KernelBench(
        spec=spec,
        device=device,
        rounds=rounds,
        ceilings=ceilings or measure_ceilings(device),
        progress=progress or Silent(),
        without=without,
        begin=begin or (lambda _: None),
    )
    for case in spec.cases if cases is None else cases:
        for name in names:
            if cases is None and case.large and device.type == "cpu":
                yield bench.unmeasured(case, name, "eager", NOT_MEASURED, LARGE)
                continue
            for direction in directions_of(spec) if directions is None else directions:
                yield from bench.rows(case, name) if direction == FORWARD else bench.backward_rows(case, name)


def directions_of(spec: KernelSpec, asked: str = BOTH) -> tuple[Direction, ...]:
    """The directions in which a kernel can be timed, of those asked for: "forward", "backward" or "both"."""
    able: tuple[Direction, ...] = (FORWARD, BACKWARD) if spec.differentiable else (FORWARD,)
    return tuple(direction for direction in able if asked in (BOTH, direction))


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """What became of one implementation: its rounds and eager's, or why there are none.

    ``host_seconds`` is what launching a call costs the host, None where that is not in the way. ``label`` and ``note``
    say why there are no rounds, ``note`` alone what else there is to say. ``held`` is what a call's tensors hold.
    ``peak_bytes`` is the most that a call holds at one time beside what it is given, None where nobody counts it.
    ``less_exact`` is how far off a peer is that is so by declaration; empty if it is as exact as the others.
    """

    implementation: str
    cache: str
    held: Held
    seconds: list[float] | None = None
    eager: list[float] | None = None
    host_seconds: float | None = None
    peak_bytes: int | None = None
    noise_floor: float | None = None
    clocks: Clocks | None = None
    in_cache: bool = False
    label: str = ""
    note: str = ""
    less_exact: str = ""


@dataclass(kw_only=True)
class _KernelBench:
    """One kernel on one device; the roofs may rise while it runs, see ``rows``."""

    spec: KernelSpec
    device: torch.device
    rounds: int
    ceilings: Ceilings
    progress: Progress
    without: frozenset[str]
    begin: Callable[[str], None]
    backward: bool = False

    def backward_rows(self, case: Case, dtype: str) -> list[BenchResult]:
        """As :meth:`rows`, of the backward pass."""
        inner = replace(self, backward=True)
        names = [name for name in ("eager", "compile", "triton", *self.spec.peers) if name not in self.without]
        if "eager" in self.without:
            why = "eager is left out, and its outputs say which gradients arrive"
            return [inner.unmeasured(case, dtype, name, NOT_MEASURED, why) for name in names]
        self.begin("eager")
        try:
            with self._on_device():
                inner.spec = backward_of(self.spec, case, getattr(torch, dtype), self.device)
        except Exception as error:  # noqa: BLE001 - as in rows
            why = f"eager's backward fails, which says what gradients arrive: {reason(error)}"
            return [inner.unmeasured(case, dtype, name, FAILED, why) for name in names]
        rows = inner.rows(case, dtype)
        self.ceilings = inner.ceilings
        return rows

    def rows(self, case: Case, dtype: str) -> list[BenchResult]:
        """All rows of one case in one dtype.

        If one passes its roof, the roofs are measured once more before it is called impossible: something else may have
        used the machine while they were measured first.
        """
        implementations = {"eager": self.spec.reference, "compile": compiled(self.spec.reference)}
        if self.device.type != "cpu":
            implementations["triton"] = self.spec.optimized
        peers = self.spec.peers.items()
        implementations |= {name: peer.call if isinstance(peer, Peer) else peer for name, peer in peers}
        implementations = {name: call for name, call in implementations.items() if name not in self.without}
        try:
            cost = self.spec.cost(case, getattr(torch, dtype))
            timed = self._time(case, dtype, implementations)
        except KernbenchError:
            raise
        except Exception as error:  # noqa: BLE001 - a case that cannot be set up is a result; other cases go on
            why = f"its inputs could not be made: {reason(error)}"
            return [self.unmeasured(case, dtype, name, FAILED, why) for name in implementations]
        rows = [self._row(case, dtype, cost, entry) for entry in timed]
        if any(row.label == IMPOSSIBLE for row in rows):
            self.ceilings = higher(self.ceilings, measure_ceilings(self.device))
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
            direction=self._direction,
            cache=cache,
            label=label,
            note=note,
        )

    def _time(self, case: Case, dtype: str, implementations: Implementations) -> list[_Timed]:
        # A recompile limit that earlier cases used up would make torch.compile fall back to eager in silence; with a
        # fresh start and this setting it fails aloud instead.
        torch.compiler.reset()
        known = "eager" not in self.without
        if known:
            self.begin("eager")
        inputs = InputSets(self.spec, case, getattr(torch, dtype), self.device, run_reference=known)
        title = f"{self.spec.name} {case.name} {dtype}{' backward' if self.backward else ''}"
        with (
            self._on_device(),
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            self.progress.stage(title, self.rounds) as advance,
        ):
            if self.device.type == "cpu":
                calls = HostCalls(inputs)
                return self._race(calls, implementations, advance, in_cache=not inputs.exceeds_cache)
            timed = self._race(ColdCalls(inputs, self.device), implementations, advance)
            running = {one.implementation: implementations[one.implementation] for one in timed if one.seconds}
            fastest = min((median(one.seconds) for one in timed if one.seconds), default=GRAPH_BELOW_SECONDS)
            if any(_held_up_by_host(one) for one in timed):
                timed += self._race(ColdCalls(inputs, self.device, queued=False), running, None)
            if fastest >= GRAPH_BELOW_SECONDS:
                return timed
            replayed = GraphCalls(inputs, self.device, fastest, backward=self.backward)
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
        peaks: dict[str, int | None] = {}
        failed: dict[str, str] = {}
        wrong: set[str] = set()
        allowances = {
            name: Allowance(peer.tolerance, peer.because)
            for name, peer in self.spec.peers.items()
            if isinstance(peer, Peer)
        }
        for name, call in implementations.items():
            self.begin(name)
            try:
                blocks[name] = self._telling(name, self._prepared(calls, name, call, allowances.get(name)))
                hosts[name], peaks[name] = calls.host_seconds(call), calls.peak_bytes(call)
            except Exception as error:  # noqa: BLE001 - an implementation that fails is a result; the others go on
                failed[name] = reason(error)
                wrong |= {name} if isinstance(error, WrongResult) else set()
                blocks.pop(name, None)
                self._free()
        ran = race(blocks, device=self.device, rounds=self.rounds, progress=advance, twin=True)
        ran = replace(ran, failed=ran.failed | failed, wrong=ran.wrong | wrong)
        remarks = "; ".join(filter(None, (calls.inputs.witness.unchecked, ran.warning)))
        return [
            _Timed(
                implementation=name,
                cache=calls.cache,
                held=Held(calls.inputs.bytes_per_call, cache_bytes(self.device)),
                seconds=ran.seconds(name),
                eager=ran.seconds("eager") if name != "eager" else None,
                host_seconds=hosts.get(name),
                peak_bytes=peaks.get(name),
                noise_floor=ran.noise_floor,
                clocks=ran.usual_clocks,
                in_cache=in_cache,
                label=ran.label(name),
                note=ran.failed.get(name, remarks),
                less_exact=allowances[name].found if name in allowances else "",
            )
            for name in implementations
        ]

    def _prepared(
        self,
        calls: HostCalls | ColdCalls | GraphCalls,
        name: str,
        call: Callable[..., object],
        allowance: Allowance | None,
    ) -> Callable[[int], float]:
        """The block of an implementation, warm and right so far.

        Raises:
            WrongResult: its first calls give something else than eager, or replace functions that measure.
        """
        if name in OURS:
            return calls.prepare(call)
        watch = Watch()
        try:
            with watched() as watch:
                return calls.prepare(call, allowance)
        finally:
            # What it leaves changed besides is for parity to say: a library may draw random numbers.
            if watch.replaced:
                raise WrongResult(Watch(replaced=watch.replaced).reason)

    def _telling(self, name: str, block: Callable[[int], float]) -> Callable[[int], float]:
        """A block that says whose it is before it runs."""

        def told(number: int) -> float:
            self.begin(name)
            return block(number)

        return told

    @property
    def _direction(self) -> Direction:
        return BACKWARD if self.backward else FORWARD

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _free(self) -> None:
        """Give back what a failed implementation held, so that the next one does not lack the memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _row(self, case: Case, dtype: str, cost: Cost, timed: _Timed) -> BenchResult:
        if timed.seconds is None:
            return self.unmeasured(case, dtype, timed.implementation, timed.label, timed.note, timed.cache)
        middle, low, high = bootstrap_median(timed.seconds)
        stands = place(middle, cost, dtype, self.ceilings, in_cache=timed.in_cache, held=timed.held)
        label, note = ("", stands.note)
        if stands.impossible:
            label = IMPOSSIBLE
        elif why := self._launch_bound(middle, timed):
            label, note = LAUNCH_BOUND, why
        if timed.less_exact and label != IMPOSSIBLE:
            label = LESS_EXACT
        return BenchResult(
            kernel=self.spec.name,
            case=case.name,
            dtype=dtype,
            implementation=timed.implementation,
            seconds=middle,
            direction=self._direction,
            interval=(low, high),
            bytes=cost.bytes_moved or None,
            flops=cost.flops or None,
            bytes_per_second=stands.bytes_per_second,
            flops_per_second=stands.flops_per_second,
            share_of_roof=stands.share,
            speedup=speedup(timed.eager, timed.seconds),
            peak_bytes=timed.peak_bytes,
            noise_floor=timed.noise_floor,
            clocks=timed.clocks,
            cache=timed.cache,
            label=label,
            note="; ".join(filter(None, (timed.less_exact, note, timed.note))),
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
