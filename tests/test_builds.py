"""The compile matrix on kernels that spill, that take too much shared memory, that do not compile, and on our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernbench import registry
from kernbench.compilation import builds
from kernbench.compilation.uncomputed import Uncomputed
from kernbench.errors import KernbenchError, WorkloadFailed
from kernbench.record import Build
from kernbench.spec import KernelSpec

HEAD = """
import os
import torch
import triton
import triton.language as tl
from kernbench.spec import Case, Cost, KernelSpec, Tolerance

def make_inputs(case, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return {"x": torch.randn(case["rows"], 64, device=device, generator=generator).to(dtype)}

def declared(name, optimized, reference=lambda x: x, cases=(Case("ragged", rows=17), Case("aligned", rows=32)), **more):
    return KernelSpec(
        name=name, reference=reference, optimized=optimized, make_inputs=make_inputs, cases=cases,
        tolerance={"float32": Tolerance()}, cost=lambda case, dtype: Cost(flops=1, bytes_read=1, bytes_written=1),
        **more,
    )
"""
GOOD = """
@triton.jit
def _double(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count) * 2, mask=at < count)

def good(x):
    y = torch.empty_like(x)
    _double[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), 128)
    return y

GOOD = declared("good", good, cases=(Case("ragged", rows=17), Case("huge", large=True, rows=2**31)))
"""
SPILLS = """
@triton.jit
def _spilling(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second, third = tl.load(x + at), tl.load(x + SIZE + at), tl.load(x + 2 * SIZE + at)
    tl.debug_barrier()
    total = tl.sum(first) + tl.sum(second) + tl.sum(third)
    tl.store(y + at, first * total + second / total)
    tl.store(y + SIZE + at, second * total + third / total)

def spills(x):
    _spilling[(1,)](x, x, 8192, num_warps=1)
    return x

SPILLS = declared("spills", spills)
ALLOWED = declared("allowed", spills, allowed={"spills": "one block in a step"})
WRONG = declared("wrong", spills, allowed={"shared memory": "something else"})
"""
SHARED = """
@triton.jit
def _product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(16):
        left = tl.load(a + m[:, None] * 64 + k[None, :] + step * K)
        right = tl.load(b + k[:, None] * 64 + n[None, :] + step * K)
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * 64 + n[None, :], total)

def product(x):
    _product[(1,)](x, x, x, 128, 128, 32, num_warps=8, num_stages=7)
    return x

SHARED = declared("shared", product)
"""
BROKEN = """
@triton.jit
def _helper(x):
    return x + tl.arange(0, 48)

@triton.jit
def _broken(x, y):
    tl.store(y, _helper(tl.load(x)))

def broken(x):
    _broken[(1,)](x, x)
    return x

BROKEN = declared("broken", broken)
"""
TUNED = """
@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=1), triton.Config({"BLOCK": 256}, num_warps=8)], key=["count"])
@triton.heuristics({"EVEN": lambda arguments: arguments["count"] % arguments["BLOCK"] == 0})
@triton.jit
def _tuned(x, y, count, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count) * 2, mask=at < count)

@triton.jit
def _gradient(dy, dx, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dx + at, tl.load(dy + at, mask=at < count) * 2, mask=at < count)

class Double(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        y = torch.empty_like(x)
        _tuned[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
        return y

    @staticmethod
    def backward(context, dy):
        dx = torch.empty_like(dy)
        _gradient[(triton.cdiv(dy.numel(), 128),)](dy, dx, dy.numel(), 128)
        return dx

TUNED = declared("tuned", Double.apply, differentiable=True)
"""
OTHERS = """
def nothing(x):
    return x + 1

def raising(x):
    if x.device.type != "cuda":
        raise ValueError(f"needs a GPU, not {x.device}")

def dying(x):
    os.abort()

def hanging(x):
    import time
    time.sleep(100)

NOTHING = declared("nothing", nothing)
RAISING = declared("raising", raising)
DYING = declared("dying", dying, cases=(Case("ragged", rows=17),))
HANGING = declared("hanging", hanging, cases=(Case("ragged", rows=17),))
"""


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the kernel files of a workspace that has one for each part above, and is the current one."""
    folder = tmp_path_factory.mktemp("workspace") / "kernels"
    folder.mkdir()
    parts = {"good": GOOD, "spills": SPILLS, "shared": SHARED, "broken": BROKEN, "tuned": TUNED, "others": OTHERS}
    for name, part in parts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(HEAD + part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNBENCH_WORKSPACE", str(folder.parent))
        yield folder


@pytest.fixture(scope="module")
def rows(declared: Path) -> list[Build]:
    """Everything above that comes to an end, built by one process."""
    names = ("good", "spills", "allowed", "wrong", "shared", "broken", "tuned", "nothing", "raising")
    return list(builds.compile_kernels([spec(name) for name in names]))


def spec(name: str) -> KernelSpec:
    return registry.kernel(name).declaration


def of(rows: list[Build], name: str, arch: str = "sm_90") -> list[Build]:
    return [row for row in rows if row.kernel == name and row.arch == arch]


def test_a_good_kernel_is_built_once_for_each_size_that_triton_tells_apart(rows: list[Build]) -> None:
    # 17 * 64 elements are divisible by 16 and fit 32 bits; 2**37 do not.
    found = [row for row in rows if row.kernel == "good"]
    assert {(row.arch, *row.cases) for row in found} == {
        (arch, case) for case in ("ragged", "huge") for arch in builds.ARCHS
    }
    for row in found:
        assert row.passed, row
        assert not row.reason
        assert (row.function, row.dtype, row.warps) == ("_double", "float32", 4)
        assert (row.spill_bytes, row.shared_bytes) == (0, 0)
        assert row.registers is not None
        assert 4 < row.registers < 64
        assert row.instructions is not None
        assert 10 < row.instructions < 500
        assert row.seconds > 0


def test_spills_fail_with_numbers_unless_they_are_allowed(rows: list[Build]) -> None:
    for arch in builds.ARCHS:
        (row,) = of(rows, "spills", arch)
        assert not row.passed
        assert row.spill_bytes
        assert row.reason == f"each thread spills {row.spill_bytes} bytes from registers to memory"
        assert row.cases == ["ragged", "aligned"]
        (allowed,) = of(rows, "allowed", arch)
        assert allowed.passed
        assert allowed.spill_bytes == row.spill_bytes
        assert allowed.reason == f"{row.reason}; allowed: one block in a step"
        (wrong,) = of(rows, "wrong", arch)
        assert not wrong.passed


def test_shared_memory_counts_by_what_the_architecture_has(rows: list[Build]) -> None:
    (row,) = of(rows, "shared", "sm_80")
    limit = 163 * 1024
    assert row.shared_bytes is not None
    assert row.shared_bytes > limit
    assert not row.passed
    assert row.reason == (
        f"takes {row.shared_bytes} bytes of shared memory, {row.shared_bytes - limit} more than a block can have on "
        "sm_80"
    )
    assert of(rows, "shared", "sm_90")[0].passed


def test_a_compile_error_names_the_line_in_the_helper(rows: list[Build], declared: Path) -> None:
    (row,) = of(rows, "broken")
    line = 1 + (declared / "broken.py").read_text().splitlines().index("    return x + tl.arange(0, 48)")
    assert not row.passed
    assert row.function == "_broken"
    assert re.fullmatch(rf"does not compile: .*broken\.py:{line}: .*power of 2.*", row.reason), row.reason


def test_every_configuration_and_the_backward_are_built(rows: list[Build]) -> None:
    found = of(rows, "tuned")
    assert all(row.passed for row in found), found
    assert {(row.function, row.warps) for row in found} == {
        ("_tuned(BLOCK=64, EVEN=True, num_warps=1)", 1),
        ("_tuned(BLOCK=256, EVEN=False, num_warps=8)", 8),
        ("_tuned(BLOCK=256, EVEN=True, num_warps=8)", 8),
        ("_gradient", 4),
    }
    assert [row.cases for row in found if row.function == "_gradient"] == [["ragged", "aligned"]]


def test_a_call_that_raises_or_launches_nothing_is_a_failed_result(rows: list[Build]) -> None:
    for arch in builds.ARCHS:
        (nothing,) = of(rows, "nothing", arch)
        assert (nothing.passed, nothing.reason) == (False, "launches no Triton function")
        (raising,) = of(rows, "raising", arch)
        assert not raising.passed
        assert raising.reason.startswith("the call raised ValueError: needs a GPU, not cpu")
        assert "leave refusing those to Triton" in raising.reason
        assert raising.cases == ["ragged", "aligned"]


def test_a_process_that_dies_or_hangs_costs_one_kernel(declared: Path) -> None:
    specs = [spec("dying"), spec("hanging"), spec("good")]
    found = list(builds.compile_kernels(specs, archs=("sm_90",), silent_seconds=15.0))
    assert [(row.kernel, row.passed, row.reason) for row in found[:2]] == [
        ("dying", False, "its process was ended by signal 6 (Aborted)"),
        ("hanging", False, "its process did not answer for 15 s"),
    ]
    assert [row.kernel for row in found[2:]] == ["good", "good"]


def test_a_file_that_fails_without_the_interpreter_says_why(workspace: Path) -> None:
    (workspace / "kernels").mkdir()
    guard = "import os\nassert os.environ.get('TRITON_INTERPRET') == '1', 'interpreted alone'\n"
    (workspace / "kernels" / "guarded.py").write_text(guard + HEAD + GOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        guarded = spec("good")
        with pytest.raises(WorkloadFailed, match=r"exit code 1 before it had called one: .*interpreted alone"):
            list(builds.compile_kernels([guarded]))


def test_unknown_names_are_refused_with_the_nearest(declared: Path) -> None:
    with pytest.raises(KernbenchError, match="no architecture named 'sm_91'; did you mean 'sm_9?0'"):
        builds.compile_kernels([spec("good")], archs=("sm_91",))
    with pytest.raises(KernbenchError, match="no case of good named 'raged'; did you mean 'ragged'"):
        builds.compile_kernels([spec("good")], cases=["raged"])
    with pytest.raises(KernbenchError, match="no dtype of good named 'float16'"):
        builds.compile_kernels([spec("good")], dtypes=[torch.float16])


SHIPPED = sorted(path.stem for path in (registry.builtin().root / "kernels").glob("[!_]*.py"))
GROUPS = 4


def first_and_last(declaration: KernelSpec) -> tuple[str, ...]:
    return tuple(sorted({min(declaration.tolerance), max(declaration.tolerance)}))


@pytest.mark.parametrize("group", range(GROUPS))
def test_kernels_that_ship_build_for_all_architectures(group: int) -> None:
    """Their first cases, in the first and last dtype; ``kernbench bench --compile-only`` has the whole matrix."""
    # In one process, which takes longer to start than to build most of them.
    specs = [spec(name) for name in SHIPPED[group::GROUPS]]
    firsts = {declaration.name: [declaration.cases[0].name] for declaration in specs}
    dtypes = {declaration.name: first_and_last(declaration) for declaration in specs}
    rows = list(builds.compile_kernels(specs, cases=firsts, dtypes=dtypes))
    assert [row for row in rows if not row.passed] == []
    served = {(row.kernel, row.arch, row.dtype, case) for row in rows for case in row.cases}
    assert served == {
        (name, arch, dtype, case) for name, [case] in firsts.items() for arch in builds.ARCHS for dtype in dtypes[name]
    }


def test_the_exemplars_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(Path(__file__).parent / "exemplars"))
    specs = [found.declaration for found in registry.kernels().values() if found.workspace != registry.builtin()]
    found = list(builds.compile_kernels(specs, archs=("sm_90",), dtypes=["bfloat16"]))
    assert {row.kernel for row in found} == {declaration.name for declaration in specs}
    assert [row for row in found if not row.passed] == []
    assert {row.function.partition("(")[0] for row in of(found, "rms_norm")} == {
        "_forward_kernel", "_backward_x_kernel", "_backward_weight_kernel",
    }  # fmt: skip


COUNTED = """
import pathlib, subprocess, sys, tempfile
import triton
from kernbench.compilation import binaries
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernbench import registry
module = sys.modules[registry.kernel("good").declaration.optimized.__module__]
for capability in (80, 90, 100):
    types = {"x": "*fp32", "y": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    source = ASTSource(module._double, types, {"BLOCK": 64})
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        print(binaries.instructions(cubin), "sass follows", flush=True)
        subprocess.run([tool, "-sass", file.name], check=True)
"""


def test_instructions_are_those_of_the_disassembler(declared: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, env=environment, timeout=100, check=True
    )
    parts = re.split(r"(\d+) sass follows\n", done.stdout)[1:]
    assert len(parts) == 6
    for counted, listing in zip(parts[::2], parts[1::2], strict=True):
        operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", listing, re.MULTILINE)
        while operations[-1].strip() == "NOP":
            operations.pop()
        assert int(counted) == len(operations)


def test_large_tensors_take_no_memory_and_small_ones_keep_their_values() -> None:
    with Uncomputed():
        large = torch.randn(2**20, 2**20)
        assert large.data_ptr() % 512 == 0
        total = (large.to(torch.bfloat16)[:, 1:] @ large[1:].bfloat16()).sum(0)
        assert total.shape == (2**20,)
        assert torch.arange(5).cumsum(0).tolist() == [0, 1, 3, 6, 10]
        weight = torch.ones(2**20, requires_grad=True)
        torch.autograd.backward((large * weight).sum())
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert large.add_(1) is large
        assert torch.repeat_interleave(torch.tensor([2, 1])).tolist() == [0, 0, 1]
        with pytest.raises(RuntimeError, match="must match"):
            large + torch.zeros(3)
