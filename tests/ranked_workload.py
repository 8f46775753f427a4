"""A user's workload file for the tests: data parallel, gradients averaged by itself.

``RANKED_FAULT`` in the environment is a fault and the rank that has it: ``raise:1``, ``kill:0``, ``hang:1``,
``interrupt:1``; ``slow:1`` lets that rank come late to every step's collective.
"""

import ctypes
import os
import time
from pathlib import Path

import torch
from torch import distributed

from kernbench.workload import Workload

LATE_SECONDS = 0.05
FAULTY_FROM = 4
HANGS = Path("a-rank-hangs")
"""There, in the current folder, once a rank does."""


class Training:
    units_per_step = 16.0

    def __init__(self, device, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.weight = torch.randn(64, 64, generator=generator).to(device=device, dtype=dtype).requires_grad_()
        self.inputs = torch.randn(16, 64, generator=generator).to(device=device, dtype=dtype) + self.rank

    def step(self, index):
        loss = torch.tanh(self.inputs @ self.weight).square().mean()
        [gradient] = torch.autograd.grad(loss, self.weight)
        kind, _, who = os.environ.get("RANKED_FAULT", "").partition(":")
        if kind and int(who) == self.rank and index >= FAULTY_FROM:
            misbehave(kind)
        if self.ranks > 1:
            distributed.all_reduce(gradient)
        with torch.no_grad():
            self.weight -= 0.1 * gradient / self.ranks
        return loss.detach()

    def state_dict(self):
        return {"weight": self.weight}


def misbehave(kind):
    if kind == "raise":
        raise ValueError("this rank broke")
    if kind == "kill":
        ctypes.string_at(0)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "slow":
        time.sleep(LATE_SECONDS)
    while kind == "hang":
        HANGS.touch()
        time.sleep(1)


def build(*, preset, device, dtype, seed, data):
    return Training(device, dtype, seed)


WORKLOAD = Workload(name="ranked", unit="rows", summary="data parallel", presets={"only": None}, build=build)
