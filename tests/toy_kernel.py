"""A user's kernel file for the tests: one declaration whose kernel cannot be launched."""

import torch

from kernbench.spec import Case, Cost, KernelSpec, Tolerance


def reference(x, weight):
    for _ in range(60):
        x = torch.tanh(x @ weight)
    return x


def broken(x, weight):
    raise RuntimeError("failed to compile: out of resource: shared memory")


def make_inputs(case, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case["rows"], 32, generator=generator)
    weight = torch.randn(32, 32, generator=generator) * 0.1
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}


SPEC = KernelSpec(
    name="toy_broken",
    reference=reference,
    optimized=broken,
    make_inputs=make_inputs,
    cases=(Case("ragged", rows=17),),
    tolerance={"float32": Tolerance()},
    cost=lambda case, dtype: Cost(flops=1.0, bytes_read=1.0, bytes_written=1.0),
)
