"""A user's workload file for the tests: a tiny training step with a slow layer, a read, and phases good and bad.

``TOY_PADDING`` in the environment is how many operators pad a step, not 200. ``TOY_FAULT`` makes a step misbehave:
``raise:3``, ``oom:3``, ``nan:3``, ``interrupt:3`` at step 3.
"""

import os

import torch

from kernbench.workload import Phase, Swap, Workload


class Layer:
    """Multiplies by a power of a matrix, one multiplication at a time."""

    def forward(self, x, weight):
        for _ in range(60):
            x = torch.tanh(x @ weight)
        return x


def fewer(self, x, weight):
    for _ in range(6):
        x = torch.tanh(x @ weight)
    return x


def without_padding(self):
    return None


class Training:
    units_per_step = 16.0

    def __init__(self, device, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        self.weight = (torch.randn(32, 32, generator=generator) * 0.1).to(device=device, dtype=dtype)
        self.inputs = torch.randn(16, 32, generator=generator).to(device=device, dtype=dtype)
        self.layer = Layer()

    def padding(self):
        waste = self.inputs
        for _ in range(int(os.environ.get("TOY_PADDING", "200"))):
            waste = torch.sin(waste)

    def unused(self):
        return None

    def step(self, index):
        kind, _, when = os.environ.get("TOY_FAULT", "").partition(":")
        if kind and index >= int(when):
            if kind == "raise":
                raise RuntimeError("the toy broke")
            if kind == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "nan":
                return self.inputs.sum() * float("nan")
        self.padding()
        loss = self.layer.forward(self.inputs, self.weight).square().mean()
        if loss > 1e9:
            raise AssertionError("diverged")
        self.weight.mul_(1 - 1e-3 * torch.sign(loss))
        return loss.detach()

    def state_dict(self):
        return {"weight": self.weight}


def build(*, preset, device, dtype, seed, data):
    return Training(device, dtype, seed)


WORKLOAD = Workload(
    name="toy",
    unit="rows",
    summary="a tiny step for the tests",
    presets={"one": 1, "two": 2},
    build=build,
    phases=(
        Phase(
            number=0,
            title="no padding",
            flag="TOY_NO_PADDING",
            swaps=(Swap(site=(Training, "padding"), use=without_padding),),
            predicts="a",
        ),
        Phase(number=1, title="wrong", swaps=(Swap(site=(Layer, "forward"), use=fewer),), predicts="b"),
        Phase(number=2, title="absent", swaps=(Swap(site=(Layer, "backward"), use=fewer),), predicts="c"),
        Phase(number=3, title="broken", swaps=(Swap(site=(Layer, "forward"), kernel="toy_broken"),), predicts="d"),
        Phase(
            number=4,
            title="never reached",
            swaps=(Swap(site=(Training, "unused"), use=without_padding),),
            predicts="e",
        ),
    ),
)
