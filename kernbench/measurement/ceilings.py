"""The roofs of this device, measured and not read from a table: memory, matrix products, and the cost of a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kernbench.measurement import timing
from kernbench.record import Ceilings

QUICK_SECONDS = 0.1
THOROUGH_SECONDS = 2.0
LEAST_REPEATS = 5
MOST_REPEATS = 200
LAUNCHES = 1000

# Memory is measured on buffers of at least this many times the last cache: of the two of a copy none stays there.
TIMES_THE_CACHE = 2
RANDOM_NUMBERS = 1 << 20
CPU_BUFFER_BYTES = (64 << 20, 256 << 20)
CUDA_BUFFER_BYTES = (512 << 20, 2 << 30)
CPU_MATMUL_SIZES = (1024,)
CUDA_MATMUL_SIZES = (4096, 8192)
UNKNOWN_CACHE_BYTES = 32 << 20


def measure_ceilings(device: torch.device, *, quick: bool = True) -> Ceilings:
    """Measure the roofs: best of several repeats, since a roof is what the device can do at all. Quick takes under 2 s.

    Data is random: products of zeros run faster than real ones. A figure that does not fit in free memory is left out.
    """
    seconds = QUICK_SECONDS if quick else THOROUGH_SECONDS
    with torch.no_grad():
        copy, triad = _memory(device, seconds)
        found = Ceilings(
            copy_bytes_per_second=copy,
            triad_bytes_per_second=triad,
            matmul_flops_per_second=_matmul(device, seconds),
            launch_seconds=_launch(device),
        )
    if device.type == "cuda":
        # What the buffers took goes back to the device, so that the workload after this finds all of its memory.
        torch.cuda.empty_cache()
    return found


def cache_bytes(device: torch.device) -> int:
    """Size of the cache before memory: L2 on a GPU, the last level on the CPU (a usual size where it does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(map(cpu_cache_bytes, (2, 3, 4))) or UNKNOWN_CACHE_BYTES


@functools.cache
def cpu_cache_bytes(level: int) -> int:
    """Size of one CPU cache of that level; 0 where the system does not tell."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((folder / "level").read_text()) == level:
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 0


def free_bytes(device: torch.device) -> int:
    """Memory that a measurement may take: what the GPU has free; on the CPU, what the system calls available."""
    if device.type == "cuda":
        # What the allocator holds in reserve counts as free: it will be handed out first.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 1 << 30


def _memory(device: torch.device, seconds: float) -> tuple[float | None, float | None]:
    """Copy (read + written) and triad (two read, one written) in bytes per second."""
    least, most = CUDA_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
    size = min(max(least, TIMES_THE_CACHE * cache_bytes(device)), most, free_bytes(device) // 8)
    if size < TIMES_THE_CACHE * cache_bytes(device):
        return None, None
    # As many as make no pattern; for a CPU all of them would take longer to draw than to copy.
    first = torch.rand(min(RANDOM_NUMBERS, size // 4), device=device).repeat(max(1, size // 4 // RANDOM_NUMBERS))
    second = first.clone()
    result = torch.empty_like(first)
    copy = _best_seconds(lambda: result.copy_(first), device, seconds)
    triad = _best_seconds(lambda: torch.add(first, second, alpha=0.5, out=result), device, seconds)
    moved = first.numel() * first.element_size()
    return 2 * moved / copy, 3 * moved / triad


def _matmul(device: torch.device, seconds: float) -> dict[str, float]:
    """Matrix product in flops per second by dtype; "float32" is IEEE arithmetic, "tf32" rounds its operands."""
    kinds: dict[str, tuple[torch.dtype, str]] = {"float32": (torch.float32, "ieee")}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        kinds |= {"tf32": (torch.float32, "tf32"), "bfloat16": (torch.bfloat16, "ieee")}
    found: dict[str, float] = {}
    for name, (dtype, precision) in kinds.items():
        for size in CUDA_MATMUL_SIZES if device.type == "cuda" else CPU_MATMUL_SIZES:
            if 4 * 3 * size**2 * dtype.itemsize > free_bytes(device):
                continue
            rate = _matmul_rate(device, size, dtype, precision, seconds / 2)
            found[name] = max(rate, found.get(name, 0.0))
    return found


def _matmul_rate(device: torch.device, size: int, dtype: torch.dtype, precision: str, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    with _float32_products(precision, device):
        return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device, seconds)


@contextmanager
def _float32_products(precision: str, device: torch.device) -> Iterator[None]:
    # The per-backend switch, restored to exactly what it was: the older global one cannot be read once a user has set
    # this one, and raises.
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend = backend.matmul
    was = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = was


def _launch(device: torch.device) -> float:
    """Seconds per call of a one-element operator in a tight loop: what a launch costs host and device at the least."""
    value = torch.rand(1, device=device)

    def loop() -> None:
        for _ in range(LAUNCHES):
            value.add_(1)

    return min(_host_seconds(loop, device) for _ in range(LEAST_REPEATS + 1)) / LAUNCHES


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of as many repeats as fit into ``seconds``, after two calls that warm up."""
    call()
    estimate = _host_seconds(call, device)
    repeats = int(min(MOST_REPEATS, max(LEAST_REPEATS, seconds / max(estimate, 1e-9))))
    if device.type != "cuda":
        return min(_host_seconds(call, device) for _ in range(repeats))
    marks = [timing.event() for _ in range(repeats + 1)]
    with torch.cuda.device(device):
        timing.mark(marks[0])
        for mark in marks[1:]:
            call()
            timing.mark(mark)
        timing.synchronize(device)
    return min(timing.seconds_between(begin, end) for begin, end in pairwise(marks))


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    timing.synchronize(device)
    start = timing.now()
    call()
    timing.synchronize(device)
    return timing.now() - start
