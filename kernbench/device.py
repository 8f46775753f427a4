"""The device: choosing it, saying what it is, asking its clocks, and measuring its ceilings."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import kernbench
from kernbench import host, interpreting, nvml, record
from kernbench.errors import KernbenchError
from kernbench.measurement.ceilings import cpu_cache_bytes
from kernbench.measurement.ceilings import measure_ceilings as measure_ceilings
from kernbench.probes import capabilities as capabilities

GIT_TIMEOUT_SECONDS = 30

WARNINGS: list[str] = []
"""What a reader of results must know: which question the device did not answer, which fallback ran; each once.

A record's ``warnings`` take them over.
"""


def warn_once(reason: str) -> None:
    """Add ``reason`` to the warnings, unless it is among them."""
    if reason not in WARNINGS:
        WARNINGS.append(reason)


def resolve(name: str) -> torch.device:
    """The device for "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1".

    The CPU comes as ``cpu:0`` and sets TRITON_INTERPRET=1, for kernels loaded afterwards, and makes the interpreter
    quicker. A GPU unsets it: an interpreted kernel there would be timed as if it were compiled.

    Raises:
        KernbenchError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in ("cpu", "cpu:0"):
        os.environ["TRITON_INTERPRET"] = "1"
        interpreting.quicken()
        return torch.device("cpu", 0)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise KernbenchError(f"there is no device {name!r}; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        raise KernbenchError(
            f"--device {name}: {built}; use --device cpu, or install a PyTorch with CUDA and its driver"
        )
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise KernbenchError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices; count from cuda:0")
    os.environ.pop("TRITON_INTERPRET", None)
    return torch.device("cuda", index)


def fingerprint(device: torch.device, *, ceilings: record.Ceilings | None = None) -> record.Environment:
    """Everything about this machine and software that a time depends on."""
    return record.Environment(
        device=_cuda(device) if device.type == "cuda" else _cpu(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=host.version("triton") or host.version("pytorch-triton"),
        kernbench=kernbench.__version__,
        platform=host.platform_name(),
        cpu=host.cpu_model(),
        cpu_threads=torch.get_num_threads(),
        ceilings=ceilings,
    )


def name_of(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else host.cpu_model()


def read_clocks(device: torch.device) -> record.Clocks | None:
    """Clocks, power, temperature and throttle reasons now; None on the CPU, or where the driver does not answer."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        return nvml.read(_uuid(index), index)
    except nvml.UnavailableError as error:
        warn_once(f"clocks and throttling are not recorded: {error}")
        return None


def git(root: Path) -> record.Git | None:
    """Commit of the repository around ``root``, and whether it has changes; None where there is no repository.

    Results do not count as changes: they say what was measured, not what was run.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(root, "status", "--porcelain", "--", ".", ":!reports", ":!JOURNAL.md")
    return record.Git(commit=commit, dirty=changes != "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda(device: torch.device) -> record.Device:
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = nvml.driver_version()
    except nvml.UnavailableError as error:
        warn_once(f"the driver's version is not recorded: {error}")
        driver = ""
    return record.Device(
        type="cuda",
        name=properties.name,
        count=torch.cuda.device_count(),
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=driver,
        runtime=torch.version.cuda or "",
    )


def _cpu() -> record.Device:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return record.Device(
        type="cpu", name=host.cpu_model(), memory_bytes=max(0, pages * page_bytes), l2_bytes=cpu_cache_bytes(2)
    )


@functools.cache
def _uuid(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
