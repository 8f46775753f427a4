"""What works here: each part that kernbench leans on is tried for real, and a failure is told in its own words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernbench import nvml


class Capability(NamedTuple):
    name: str
    works: bool
    detail: str


def capabilities(device: torch.device) -> list[Capability]:
    """Try every part once. The first torch.compile on a machine may take half a minute."""
    return [attempt(name, probe, device) for name, probe in PROBES.items()]


def attempt(name: str, probe: Callable[[torch.device], str], device: torch.device) -> Capability:
    """Run one probe; what it returns or what it raised becomes the detail."""
    try:
        return Capability(name, True, probe(device))
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the answer to report
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Capability(name, False, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def triton(device: torch.device) -> str:
    """Launch a kernel of ours and check its result."""
    from kernbench import probe_kernel

    source = torch.rand(100, device=device)
    target = torch.full_like(source, float("nan"))
    start = time.perf_counter()
    probe_kernel.double[(2,)](source, target, source.numel(), BLOCK=64)
    if not torch.equal(target, 2 * source):
        raise RuntimeError("the kernel ran and its result is wrong")
    how = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    return f"{how} and launched in {time.perf_counter() - start:.2g} s"


def compiler(device: torch.device) -> str:
    """Compile and run a tiny function; on the CPU this needs a C++ compiler."""
    values = torch.rand(64, device=device)
    start = time.perf_counter()
    result = torch.compile(lambda x: (2 * x + 1).sin())(values)
    torch.testing.assert_close(result, (2 * values + 1).sin())
    return f"a tiny function took {time.perf_counter() - start:.2g} s"


def profiler(device: torch.device) -> str:
    """Trace one operator and look for it, and on a GPU for its kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    values = torch.rand(1000, device=device)
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:
        values.sin()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = trace.events() or []
    if not any(event.name == "aten::sin" for event in events):
        raise RuntimeError("the trace lacks the operator that ran")
    kernels = sum(event.device_type.name == "CUDA" for event in events)
    if device.type == "cuda" and not kernels:
        raise RuntimeError(
            "the trace holds operators and no kernels; CUPTI may be missing or in use by another profiler"
        )
    return f"{len(events)} events" + (f", {kernels} on the device" if kernels else "")


def nvtx_ranges(device: torch.device) -> str:
    """Push and pop a range."""
    import nvtx

    nvtx.push_range("kernbench")
    nvtx.pop_range()
    return "ranges are sent" if nvtx.enabled() else "ranges cost nothing and go nowhere: NVTX is switched off"


def management(device: torch.device) -> str:
    """Ask the driver for its version, and a GPU for its clocks."""
    version = nvml.driver_version()
    if device.type != "cuda":
        return f"driver {version}"
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    clocks = nvml.read(uuid, device.index or 0)
    told = [
        name
        for name in ("sm_hz", "memory_hz", "power_watts", "temperature_celsius")
        if getattr(clocks, name) is not None
    ]
    return f"driver {version}; tells {', '.join(told) or 'no clocks'}"


def plots(device: torch.device) -> str:
    """Render a chart of one point."""
    import vl_convert

    chart = {"data": {"values": [{"x": 1}]}, "mark": "point", "encoding": {"x": {"field": "x", "type": "quantitative"}}}
    picture = vl_convert.vegalite_to_svg(chart)
    return f"vl-convert drew {len(picture)} bytes of SVG"


PROBES: dict[str, Callable[[torch.device], str]] = {
    "Triton": triton,
    "torch.compile": compiler,
    "profiler": profiler,
    "NVTX": nvtx_ranges,
    "NVML": management,
    "plots": plots,
}
