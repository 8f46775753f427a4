"""Calls one kernel on a GPU and nothing else: the program that compute-sanitizer watches.

    python -m kernbench.parity.sanitized '{"kernel": "fused_adamw", "cases": ["ragged"], "dtypes": ["float32"]}'

Parity itself would be watched for hours, and its hostile kernels access wrongly on purpose.
"""

from __future__ import annotations

import sys

import msgspec
import torch

from kernbench import device, registry
from kernbench.parity import compare, modes
from kernbench.parity.sanitizer import RAN, Job
from kernbench.spec import Inputs, KernelSpec

SEED = 0


def main(job: Job) -> None:
    """Call the kernel forward, and backward if it has gradients, once per case and dtype."""
    where = device.resolve("cuda")
    spec = registry.kernel(job.kernel).declaration
    for case in spec.cases:
        for dtype in job.dtypes if case.name in job.cases else []:
            _call(spec, spec.make_inputs(case, getattr(torch, dtype), where, SEED))
            torch.cuda.synchronize()
    print(f"{RAN} {job.kernel}")


def _call(spec: KernelSpec, inputs: Inputs) -> None:
    with torch.no_grad():
        output = spec.optimized(**compare.clone(inputs))
    if spec.differentiable:
        upstream = modes.upstream(compare.leaves(output, "output"), SEED, expanded=False)
        wanted = modes.differentiable_names(inputs, spec.mutates)
        modes.Backward(wanted, upstream)(spec.optimized, compare.clone(inputs))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Job))
