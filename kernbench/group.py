"""One rank among several: it joins the others, keeps step with them, and brings their traces together.

What the measurement itself has to say goes through the store where the ranks met, not through the process group, so
that no trace shows a collective that the workload does not have.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from kernbench import device as devices
from kernbench import record
from kernbench.analysis import communication
from kernbench.errors import WorkloadFailed
from kernbench.ranks import LOOPBACK, Place
from kernbench.traces import trace
from kernbench.traces.trim import trim

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
"""What carries the collectives of a device's tensors."""
PIECE_BYTES = 4 << 20
"""The store takes values of 8 MiB at most."""
LOOK_SECONDS = 0.05
STARTED = "started"
ALL_STEPS = 1000
"""More than are ever traced."""


def connect(place: Place, seconds: float) -> Store:
    """The store where the ranks meet; rank 0 keeps it where nobody else does, as long as it holds what this returns.

    Args:
        seconds: how long whoever waits for a key there waits.

    Raises:
        WorkloadFailed: there is no store, or the port is taken.
    """
    keeps = place.rank == 0 and not place.hosted
    try:
        store = TCPStore(
            place.address, place.port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
    except distributed.DistError as error:
        first = (str(error).splitlines() or [""])[0]
        raise WorkloadFailed(
            f"rank {place.rank} cannot meet the others at {place.address}:{place.port}: {first}"
        ) from None
    return PrefixStore(f"kernbench/{place.attempt}", store)


def host_store(seconds: float) -> tuple[Store, int]:
    """A store in this process for ranks on this machine, at a free port."""
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    return store, store.port


def announce(store: Store) -> None:
    """Tell the other ranks that rank 0 is about to measure."""
    store.set(STARTED, "1")


def await_start(store: Store, place: Place, seconds: float) -> None:
    """Wait until rank 0 has measured the machine, which needs it for itself. A Ctrl-C gets through.

    Raises:
        WorkloadFailed: it does not begin.
    """
    deadline = time.monotonic() + seconds
    while not store.check([STARTED]):
        if time.monotonic() > deadline:
            raise WorkloadFailed(
                f"rank {place.rank} waited {seconds:g} s for rank 0, which did not begin; see its output"
            )
        time.sleep(LOOK_SECONDS)


class Group:
    """This rank among the others; every method is called by all ranks, in one order."""

    def __init__(self, place: Place, store: Store, device: torch.device) -> None:
        self.place = place
        self.store = store
        self.device = device
        self.exchanges = 0
        self.delivered = b""

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    def agree(self, seconds: float) -> float:
        return max(float(each) for each in self._exchange(repr(seconds).encode()))

    def wait(self) -> None:
        self.exchanges += 1
        here = f"wait/{self.exchanges}"
        if self.store.add(f"{here}/count", 1) == self.place.size:
            self.store.set(f"{here}/all", "1")
        self.store.wait([f"{here}/all"])

    def sides(self, seconds: float, units_per_step: float) -> record.Ranks:
        mine = record.RankSide(
            rank=self.place.rank,
            device=devices.name_of(self.device),
            step_seconds=seconds,
            units_per_step=units_per_step,
            trace=trace_name(self.place.rank),
        )
        told = self._exchange(msgspec.json.encode(mine))
        return record.Ranks(
            backend=BACKENDS[self.device.type], sides=[msgspec.json.decode(each, type=record.RankSide) for each in told]
        )

    def deliver(self, full: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kernbench-") as scratch:
            kept = Path(scratch) / full.name
            trim(full, kept, steps=ALL_STEPS)
            self.delivered = kept.read_bytes()

    def communication(self, folder: Path) -> record.Communication | None:
        self.exchanges += 1
        here = f"traces/{self.exchanges}"
        if not self.leads:
            self._put(f"{here}/{self.place.rank}", self.delivered)
            return None
        traces = []
        for rank in range(self.place.size):
            data = self._take(f"{here}/{rank}") if rank != self.place.rank else self.delivered
            path = folder / trace_name(rank)
            record.write_atomically(path, data)
            traces.append(trace.load(path))
        return communication.communication(traces)

    def _exchange(self, value: bytes) -> list[bytes]:
        """What every rank gives here, in order of rank."""
        self.exchanges += 1
        keys = [f"exchange/{self.exchanges}/{rank}" for rank in range(self.place.size)]
        _set(self.store, keys[self.place.rank], value)
        return [self.store.get(key) for key in keys]

    def _put(self, key: str, value: bytes) -> None:
        pieces = [value[start : start + PIECE_BYTES] for start in range(0, len(value), PIECE_BYTES)]
        for number, piece in enumerate(pieces):
            _set(self.store, f"{key}/{number}", piece)
        self.store.set(f"{key}/pieces", str(len(pieces)))

    def _take(self, key: str) -> bytes:
        count = int(self.store.get(f"{key}/pieces"))
        pieces = []
        for number in range(count):
            pieces.append(self.store.get(f"{key}/{number}"))
            self.store.delete_key(f"{key}/{number}")
        return b"".join(pieces)


def _set(store: Store, key: str, value: bytes) -> None:
    # The store takes bytes; its stub knows texts alone.
    store.set(key, value)  # type: ignore[arg-type]


def trace_name(rank: int) -> str:
    """The file of a rank's trace, in the run folder."""
    return f"trace-rank{rank}.json.gz"


@contextmanager
def joined(place: Place, device: torch.device, seconds: float) -> Iterator[Group]:
    """The group of all ranks, its collectives ready for the workload.

    Args:
        seconds: time limit of a stage of the measurement. A rank that hangs is found out by it, so that collectives and
            the store wait longer than that.

    Raises:
        WorkloadFailed: this rank cannot meet the others.
    """
    os.environ.update(place.environment())
    if place.address == LOOPBACK:
        # By itself gloo asks for the address of the machine's name, which not every machine knows.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = 2 * seconds + 60
    store = connect(replace(place, hosted=True), patience)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("workload", store),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=patience),
    )
    group = Group(place, store, device)
    yield group
    # Whoever left earlier would break a collective of those behind it.
    group.wait()
    distributed.destroy_process_group()
