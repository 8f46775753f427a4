"""A user's kernel file for the tests on a GPU: as ``deadly_kernel``, with harm done on the device."""

import os
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from kernbench.spec import Case, Cost, KernelSpec, Tolerance


@triton.jit  # type: ignore[untyped-decorator]
def times_three_kernel(x_pointer, out_pointer, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out_pointer + offsets, tl.load(x_pointer + offsets, mask=mask) * 3.0, mask=mask)


@triton.jit
def wait_kernel(flag_pointer, out_pointer):
    value = tl.load(flag_pointer, volatile=True)
    while value == 0:
        value = tl.load(flag_pointer, volatile=True)
    tl.store(out_pointer, value)


@triton.jit
def store_far_kernel(out_pointer, offset):
    tl.store(out_pointer + offset, 1.0)


def reference(x):
    return x * 3.0


def times_three(x):
    out = torch.empty_like(x)
    times_three_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return out


def wait_for_ever(x):
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    wait_kernel[(1,)](flag, torch.zeros_like(flag))


def store_far(x):
    store_far_kernel[(1,)](torch.zeros(1, device=x.device), 1 << 40)


def take_all_memory(x):
    taken = []
    while True:
        taken.append(torch.ones(1 << 30, device=x.device))


def leave(x):
    os._exit(3)


def abort(x):
    os.abort()


def deadly(name, harm, x):
    marker = Path(os.environ["KERNBENCH_WORKSPACE"]) / f"{name}.pid"
    if x.shape[0] == 17 and not marker.exists():
        marker.write_text(str(os.getpid()))
        harm(x)
    return times_three(x)


def make_inputs(case, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(case["rows"], 8, generator=generator).to(device, dtype)}


def declared(name, function):
    return KernelSpec(
        name=name,
        reference=reference,
        optimized=function,
        make_inputs=make_inputs,
        cases=(Case("even", rows=16), Case("ragged", rows=17), Case("third", rows=33)),
        tolerance={"float32": Tolerance()},
        cost=lambda case, dtype: Cost(flops=1.0, bytes_read=1.0, bytes_written=1.0),
    )


GPU_HANG = declared("gpu_hang", partial(deadly, "gpu_hang", wait_for_ever))
GPU_STORE = declared("gpu_store", partial(deadly, "gpu_store", store_far))
GPU_MEMORY = declared("gpu_memory", partial(deadly, "gpu_memory", take_all_memory))
GPU_EXIT = declared("gpu_exit", partial(deadly, "gpu_exit", leave))
GPU_ABORT = declared("gpu_abort", partial(deadly, "gpu_abort", abort))
GPU_GOOD = declared("gpu_good", times_three)
