"""Which rank of how many this process is: told by torchrun in the environment, or asked for with ``--ranks``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kernbench.errors import KernbenchError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """One rank of a run, and where it meets the others.

    Attributes:
        hosted: somebody else, as torchrun's agent, keeps the store at ``address`` and ``port``.
        attempt: distinguishes what a restarted run leaves there from what it finds.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    hosted: bool = False
    attempt: str = "0"

    def environment(self) -> dict[str, str]:
        """What torchrun would tell the process of this rank."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launched(environment: Mapping[str, str] | None = None) -> Place | None:
    """The place that torchrun, or a launcher like it, gave this process; None without one.

    Raises:
        KernbenchError: what the launcher tells is incomplete or no number.
    """
    told = os.environ if environment is None else environment
    if "RANK" not in told or "WORLD_SIZE" not in told:
        return None
    numbers = {}
    for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", told["RANK"]), ("MASTER_PORT", "")):
        text = told.get(name, default)
        if not text.isdecimal():
            raise KernbenchError(
                f"RANK and WORLD_SIZE are set as by torchrun, but {name} is {text!r}; "
                "start with torchrun, or unset them"
            )
        numbers[name] = int(text)
    address, size = told.get("MASTER_ADDR", ""), numbers["WORLD_SIZE"]
    if not address or not numbers["RANK"] < size:
        wrong = f"RANK is {numbers['RANK']} of {size}" if address else "MASTER_ADDR is missing"
        raise KernbenchError(
            f"RANK and WORLD_SIZE are set as by torchrun, but {wrong}; start with torchrun, or unset them"
        )
    local_size = told.get("LOCAL_WORLD_SIZE", "")
    return Place(
        rank=numbers["RANK"],
        size=size,
        local_rank=numbers["LOCAL_RANK"],
        local_size=int(local_size) if local_size.isdecimal() else size,
        address=address,
        port=numbers["MASTER_PORT"],
        hosted=told.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=told.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def refuse(command: str) -> None:
    """Stop a command that several processes cannot run together.

    Raises:
        KernbenchError: there are several of them.
    """
    place = launched()
    if place is not None and place.size > 1:
        raise KernbenchError(
            f"kernbench {command} runs in one process, and this is rank {place.rank} of {place.size}; "
            "start it without torchrun (kernbench profile takes ranks)"
        )


def local_places(size: int, port: int) -> list[Place]:
    """The places of ranks that all run here."""
    return [
        Place(rank=rank, size=size, local_rank=rank, local_size=size, address=LOOPBACK, port=port, hosted=True)
        for rank in range(size)
    ]
