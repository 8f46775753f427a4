"""The host's memory: what can still be taken, what a process holds, and whether the kernel had to end a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

RESERVE_SHARE = 0.05
RESERVE_BYTES = 512 << 20
"""Left to everything else on the machine: a share of what is free, and at least this much."""


def budget() -> int:
    """Bytes that one process may come to hold from now on."""
    free = min([_available(), *_groups()])
    return max(free - max(RESERVE_BYTES, int(free * RESERVE_SHARE)), free // 2)


def resident(pid: int) -> int:
    """Bytes that a process holds in memory; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def kills() -> int:
    """How many processes the kernel has ended on this machine for want of memory; 0 where it does not tell."""
    return _field(Path("/proc/vmstat"), "oom_kill") or 0


def _available() -> int:
    kibibytes = _field(Path("/proc/meminfo"), "MemAvailable:")
    return 1 << 62 if kibibytes is None else kibibytes << 10


def _groups() -> Iterator[int]:
    """What each control group around this process has left; a container's limit stands in one of them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = root / inside.strip("/")
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                # File pages count as used, but go as soon as someone needs the room.
                files = _field(group / "memory.stat", "inactive_file") or 0
                yield max(0, limit - used + files)


def _number(path: Path) -> int | None:
    """The one number in a file; None if there is no file, or the word "max" in it."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    """The number after a name in a file of one name per line."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(words[1]) for words in map(str.split, lines) if words[:1] == [name]), None)
