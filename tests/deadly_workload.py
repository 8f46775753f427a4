"""A user's workload file for the tests: steps, phases and peers that end the process. ``DEADLY`` names who does."""

import ctypes
import os
import time

import torch

from kernbench.workload import Peer, Phase, Swap, Workload


class Training:
    units_per_step = 4.0

    def __init__(self, device, dtype):
        self.weight = torch.ones(8, 8, device=device, dtype=dtype)
        self.unwell = ""

    def multiply(self):
        return (self.weight @ self.weight).mean()

    def step(self, index):
        harm(f"step {index}")
        harm(f"{self.unwell} {index}")
        if torch.autograd._profiler_enabled():
            harm("traced step")
        return self.multiply()

    def state_dict(self):
        return {"weight": self.weight}


def harm(name):
    wanted, _, how = os.environ.get("DEADLY", "").partition(":")
    if name == wanted:
        match how:
            case "read":
                ctypes.string_at(0)
            case "hang":
                time.sleep(1000)
            case "raise":
                raise RuntimeError("not today")


def otherwise(self):
    harm("phase")
    return (self.weight @ self.weight).mean()


def prepare(name):
    def install(built):
        harm(f"prepare {name}")
        built.unwell = name

    return install


def build(*, preset, device, dtype, seed, data):
    return Training(device, dtype)


WORKLOAD = Workload(
    name="deadly",
    unit="rows",
    summary="a step that may end the process",
    presets={"one": 1},
    build=build,
    phases=(
        Phase(number=0, title="otherwise", swaps=(Swap(site=(Training, "multiply"), use=otherwise),), predicts="a"),
    ),
    peers=(Peer(name="first", prepare=prepare("first")), Peer(name="second", prepare=prepare("second"))),
)
