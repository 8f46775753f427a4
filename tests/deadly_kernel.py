"""A user's kernel file for the tests: kernels that end, block or exhaust the process that calls them.

Each does its harm once per workspace, at the first call with the ragged case, and is right ever after; "always" does it
every time. A file named after the kernel, with the process id in it, says that the harm is done.
"""

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from kernbench.spec import Case, Cost, KernelSpec, Tolerance


def reference(x):
    return x * 3.0


def hang():
    while True:
        pass


def sleep():
    time.sleep(1000)


def read_nowhere():
    ctypes.string_at(0)


def take_all_memory():
    taken = []
    while True:
        taken.append(b"x" * (1 << 26))


def leave():
    os._exit(3)


def leave_politely():
    raise SystemExit(4)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hang_up():
    os.closerange(3, 1000)
    time.sleep(1000)


HARMS = {
    "hang": hang,
    "sleep": sleep,
    "read": read_nowhere,
    "memory": take_all_memory,
    "exit": leave,
    "quit": leave_politely,
    "kill": be_killed,
    "abort": os.abort,
    "hang_up": hang_up,
}


@dataclass(frozen=True)
class Harm:
    """The same as a job of its own."""

    imports: ClassVar = ()
    kind: str

    def run(self, tell):
        tell.begin("first")
        tell.send("hello")
        tell.begin("second", self.kind)
        HARMS[self.kind]()


def deadly(name, harm, x):
    marker = Path(os.environ["KERNBENCH_WORKSPACE"]) / f"{name}.pid"
    if x.shape[0] == 17 and (name == "always" or not marker.exists()):
        marker.write_text(str(os.getpid()))
        harm()
    return x * 3.0


def make_inputs(case, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(case["rows"], 8, generator=generator).to(device, dtype)}


def declared(name, function, **peers):
    return KernelSpec(
        name=name,
        reference=reference,
        optimized=function,
        make_inputs=make_inputs,
        cases=(Case("even", rows=16), Case("ragged", rows=17), Case("large", rows=33)),
        tolerance={"float32": Tolerance()},
        cost=lambda case, dtype: Cost(flops=1.0, bytes_read=1.0, bytes_written=1.0),
        peers=peers,
    )


def good(x):
    return x * 3.0


def with_harm(name, harm):
    """A declaration whose kernel is deadly to parity, and whose peer is deadly to bench."""
    function = partial(deadly, name, harm)
    return declared(name, function, deadly=function, good=good)


HANG = with_harm("hang", hang)
SLEEP = with_harm("sleep", sleep)
READ = with_harm("read", read_nowhere)
MEMORY = with_harm("memory", take_all_memory)
EXIT = with_harm("exit", leave)
ALWAYS = with_harm("always", leave)
GOOD = declared("good", good)
