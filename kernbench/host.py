"""What the machine that runs kernbench is, as far as it can be told without torch."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import kernbench
from kernbench import record


def environment() -> record.Environment:
    """The machine and the versions installed on it, those of torch and Triton too; its GPUs are not asked."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return record.Environment(
        device=record.Device(type="cpu", name=cpu_model(), memory_bytes=max(0, pages * page_bytes)),
        python=platform.python_version(),
        torch=version("torch"),
        triton=version("triton") or version("pytorch-triton"),
        kernbench=kernbench.__version__,
        platform=platform_name(),
        cpu=cpu_model(),
        cpu_threads=len(os.sched_getaffinity(0)),
    )


def platform_name() -> str:
    """Operating system, architecture and C library: "Linux x86_64, glibc 2.36"."""
    return f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", ")


@functools.cache
def cpu_model() -> str:
    """The processor's name, as the kernel has it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def version(package: str) -> str:
    """The version of an installed package, of the loaded one where it is loaded; empty where it is neither."""
    loaded = sys.modules.get(package)
    if loaded is not None and hasattr(loaded, "__version__"):
        return str(loaded.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
