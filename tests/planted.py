"""A small simulator of a host and its device that writes Kineto traces: planted faults whose cost is known exactly.

It knows nothing of the analyses. A program is a list of host actions; a queue of events decides when each piece of
device work starts: it was launched, its stream has reached it, and the events that it waits for have happened. Every
duration carries jitter of a few percent if asked for. Times are microseconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kineto_builder import KinetoBuilder

from kernbench.record import Cause, Change

COMPUTE, SIDE = 7, 20
# Measured on one H200 under the profiler: a launch call, its way to the device, waking up, the pause between kernels.
CALL, LATENCY, WAKE, PAUSE = 3.5, 5.0, 8.0, 1.0


@dataclass
class Machine:
    """Clocks of the host and of each stream. ``now`` is the host's."""

    jitter: float = 0.0
    seed: int = 0
    now: float = 0.0
    builder: KinetoBuilder = field(default_factory=lambda: KinetoBuilder(offset_us=1_000_000.0))
    streams: dict[int, float] = field(default_factory=dict)
    held: dict[int, float] = field(default_factory=dict)
    steps: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def about(self, duration: float) -> float:
        """The duration, a few percent longer or shorter, in whole nanoseconds as a profiler records it."""
        return round(duration * (1 + self.random.uniform(-self.jitter, self.jitter)), 3)

    # What the host does.

    def work(self, duration: float) -> None:
        """Python between operators."""
        self.now += self.about(duration)

    @contextmanager
    def op(self, name: str, before: float = 4.0, after: float = 2.0) -> Iterator[None]:
        start = self.now
        self.now += self.about(before)
        yield
        self.now += self.about(after)
        self.builder.op(name, start, self.now)

    @contextmanager
    def annotation(self, name: str) -> Iterator[None]:
        start = self.now
        yield
        self.builder.annotation(name, start, self.now)

    def call(self, name: str, duration: float) -> int:
        start = self.now
        self.now += self.about(duration)
        return self.builder.call(name, start, self.now)

    def kernel(self, name: str, duration: float, *, stream: int = COMPUTE, op: str = "aten::mul") -> float:
        """An operator that launches one kernel; returns when it ends on the device."""
        with self.op(op):
            issued = self.now
            correlation = self.call("cudaLaunchKernel", CALL)
            return self._run("kernel", name, duration, issued, correlation, stream)

    def copy(self, kind: str, duration: float, *, stream: int = COMPUTE) -> float:
        """A copy call without an operator around it."""
        issued = self.now
        return self._run("gpu_memcpy", f"Memcpy {kind}", duration, issued, self.call("cudaMemcpyAsync", CALL), stream)

    def _run(self, category: str, name: str, duration: float, issued: float, correlation: int, stream: int) -> float:
        free = self.streams.get(stream, float("-inf"))
        start = max(issued + self.about(LATENCY), free + PAUSE, self.held.pop(stream, float("-inf")))
        end = start + self.about(duration)
        self.builder.on_device(category, name, start, end, correlation, stream)
        self.streams[stream] = end
        return end

    def synchronize(self, stream: int = COMPUTE) -> None:
        """Wait for all that the stream was given."""
        self._wait("cudaStreamSynchronize", self.streams.get(stream, self.now))

    def synchronize_device(self) -> None:
        self._wait("cudaDeviceSynchronize", max(self.streams.values(), default=self.now))

    def _wait(self, name: str, until: float) -> None:
        start = self.now
        self.now = max(start + self.about(3.0), until + self.about(WAKE) if until > start else start)
        self.builder.call(name, start, self.now)

    def item(self) -> None:
        """``tensor.item()``: a copy of four bytes, and a wait for it."""
        with self.op("aten::item", 2, 1), self.op("aten::_local_scalar_dense", 2, 1):
            self.copy("DtoH (Device -> Pinned)", 1.5)
            self.synchronize()

    def stream_wait(self, waiting: int, on: int) -> None:
        """``waiting.wait_stream(on)``: what comes next there starts after all that is queued here."""
        self.call("cudaEventRecord", 1.5)
        self.held[waiting] = max(self.held.get(waiting, 0.0), self.streams.get(on, 0.0) + PAUSE)
        self.call("cudaStreamWaitEvent", 1.0)

    # Steps.

    def run(self, step: Callable[[Machine], None], count: int) -> None:
        """``count`` steps with their marks."""
        for number in range(count):
            start = self.now
            step(self)
            self.steps.append((start, self.now))
            self.builder.step(number, start, self.now)

    @property
    def done(self) -> float:
        """When host and device have nothing left to do."""
        return max(self.now, *self.streams.values())


Step = Callable[[Machine], None]


def forward(machine: Machine, kernels: int, duration: float, python: float = 6.0) -> None:
    """A chain of operators, with a little Python between them."""
    for number in range(kernels):
        machine.work(python)
        machine.kernel(f"gemm_{number % 4}", duration)


@dataclass(frozen=True)
class Scenario:
    """``step`` has the fault, ``fixed`` is the same step without it; None for one that is healthy.

    ``cause`` is what a finding must say, ``change`` the estimate that must foretell the saving. ``others`` are the
    steps that the other ranks of the run take beside it.
    """

    name: str
    cause: Cause
    step: Step
    fixed: Step | None
    change: Change | None = None
    others: tuple[Step, ...] = ()


def _host_bound(machine: Machine) -> None:
    forward(machine, 32, 17, python=10)


def _host_bound_read(machine: Machine) -> None:
    for _ in range(8):
        forward(machine, 4, 17, python=10)
        machine.item()


def _device_bound(machine: Machine) -> None:
    forward(machine, 40, 60)


def _device_bound_read(machine: Machine) -> None:
    for _ in range(8):
        forward(machine, 5, 60)
        machine.item()


def _loading(machine: Machine, duration: float) -> None:
    with machine.annotation("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"):
        machine.work(duration)
    forward(machine, 30, 50)


def _pageable(machine: Machine) -> None:
    for _ in range(4):
        with machine.op("aten::to", 2, 1), machine.op("aten::_to_copy", 2, 1), machine.op("aten::copy_", 2, 1):
            machine.copy("HtoD (Pageable -> Device)", 40)
            machine.synchronize()
        forward(machine, 8, 40)


def _pinned(machine: Machine) -> None:
    for _ in range(4):
        with machine.op("aten::to", 2, 1), machine.op("aten::_to_copy", 2, 1), machine.op("aten::copy_", 2, 1):
            machine.copy("HtoD (Pinned -> Device)", 40)
        forward(machine, 8, 40)


def _mask(machine: Machine, *, waits: bool) -> None:
    for _ in range(5):
        forward(machine, 6, 45)
        with machine.op("aten::index", 3, 3):
            with machine.op("aten::nonzero", 3, 3):
                issued = machine.now
                machine._run("kernel", "DeviceSelectSweep", 6, issued, machine.call("cudaLaunchKernel", CALL), COMPUTE)
                if waits:
                    machine.copy("DtoH (Device -> Pageable)", 1.5)
                    machine.synchronize()
            issued = machine.now
            machine._run("kernel", "index_kernel", 10, issued, machine.call("cudaLaunchKernel", CALL), COMPUTE)


def _chain(machine: Machine) -> None:
    forward(machine, 200, 2.0, python=3)


def _chain_graph(machine: Machine) -> None:
    machine.work(3)
    issued = machine.now
    correlation = machine.call("cudaGraphLaunch", 10)
    for number in range(200):
        machine._run("kernel", f"gemm_{number % 4}", 2.0, issued, correlation, COMPUTE)


def _churn(machine: Machine, *, allocates: bool) -> None:
    for _ in range(6):
        machine.work(5)
        if allocates:
            with machine.op("aten::empty", 2, 1):
                machine.call("cudaMalloc", 120)
        forward(machine, 4, 30)
        if allocates:
            # Freeing waits for all that runs.
            start = machine.now
            machine.now = max(start + 20, max(machine.streams.values()) + WAKE)
            machine.builder.call("cudaFree", start, machine.now)


def _streams(machine: Machine, *, serial: bool) -> None:
    for number in range(8):
        if serial:
            machine.stream_wait(SIDE, COMPUTE)
        machine.work(4)
        with machine.op("aten::copy_"):
            machine.copy("HtoD (Pinned -> Device)", 150, stream=SIDE)
        machine.stream_wait(COMPUTE, SIDE)
        machine.kernel(f"gemm_{number % 4}", 200)


def _collective(machine: Machine, compute: float, duration: float) -> None:
    """A rank's step; ``duration`` holds the wait for the last rank, then 100 for the exchange."""
    forward(machine, 20, compute)
    with machine.op("c10d::allreduce_"), machine.op("record_param_comms"):
        issued = machine.now
        correlation = machine.call("cudaLaunchKernelExC", CALL)
        machine.stream_wait(SIDE, COMPUTE)
        machine._run("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", duration, issued, correlation, SIDE)
    machine.stream_wait(COMPUTE, SIDE)
    forward(machine, 4, 40)


SCENARIOS = (
    Scenario("read in a host-bound loop", "host read", _host_bound_read, _host_bound, "without all stalls"),
    Scenario("read in a device-bound loop", "host read", _device_bound_read, _device_bound, "without all stalls"),
    Scenario(
        "slow data loading",
        "data loading",
        lambda machine: _loading(machine, 2500),
        lambda machine: _loading(machine, 0),
        "without data loading",
    ),
    Scenario("pageable copies", "pageable copy", _pageable, _pinned, "without all stalls"),
    Scenario(
        "implicit sync by mask",
        "implicit sync",
        lambda machine: _mask(machine, waits=True),
        lambda machine: _mask(machine, waits=False),
        "without all stalls",
    ),
    Scenario("launch-bound chain", "launch-bound", _chain, _chain_graph, "graph"),
    Scenario(
        "allocator churn",
        "allocator",
        lambda machine: _churn(machine, allocates=True),
        lambda machine: _churn(machine, allocates=False),
        "without allocation",
    ),
    Scenario(
        "serialised streams",
        "serialised streams",
        lambda machine: _streams(machine, serial=True),
        lambda machine: _streams(machine, serial=False),
        "without stream waits",
    ),
    Scenario(
        "slow rank",
        "slow rank",
        lambda machine: _collective(machine, 60, 800),
        lambda machine: _collective(machine, 60, 100),
        others=(lambda machine: _collective(machine, 95, 100), lambda machine: _collective(machine, 62, 760)),
    ),
    Scenario("healthy", "device-bound", _device_bound, None),
)


def simulate(step: Step, *, steps: int = 4, jitter: float = 0.0, seed: int = 0) -> Machine:
    """Run steps on a fresh machine."""
    machine = Machine(jitter=jitter, seed=seed)
    machine.run(step, steps)
    return machine


def trace_of(step: Step, path: Path, *, steps: int = 4, jitter: float = 0.0, seed: int = 0) -> Path:
    """The Kineto trace of a few simulated steps."""
    return simulate(step, steps=steps, jitter=jitter, seed=seed).builder.write(path)


def window_of(step: Step, path: Path, *, first: int, steps: int, jitter: float = 0.0, seed: int = 0) -> Path:
    """The trace of a profiler that is switched on when step ``first`` begins, while the device has work left to do.

    The host's events from before are not in it, nor what the device had begun with by then.
    """
    machine = simulate(step, steps=first + steps, jitter=jitter, seed=seed)
    begin = machine.builder.offset_us + machine.steps[first][0]
    machine.builder.events = [event for event in machine.builder.events if event["ph"] == "M" or event["ts"] >= begin]
    return machine.builder.write(path)


def step_seconds(step: Step, *, jitter: float = 0.0, seed: int = 0) -> float:
    """Seconds per step over many steps, the first ones left out."""
    machine = simulate(step, steps=12, jitter=jitter, seed=seed)
    middle = simulate(step, steps=4, jitter=jitter, seed=seed)
    return (machine.done - middle.done) / 8 * 1e-6


def true_saving(scenario: Scenario, *, jitter: float = 0.0, seed: int = 0) -> float:
    """Seconds per step that the fault really costs: both simulated, none predicted."""
    assert scenario.fixed is not None
    return step_seconds(scenario.step, jitter=jitter, seed=seed) - step_seconds(
        scenario.fixed, jitter=jitter, seed=seed + 1
    )
