"""compute-sanitizer: what its reports become, and that nothing but a kernel that ran without errors passes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from kernbench import device
from kernbench.errors import KernbenchError
from kernbench.parity import sanitizer
from kernbench.record import SanitizerResult

DEVICE = device.resolve("auto")
CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": (
        "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    ),
}
OUT_OF_BOUNDS = "========= COMPUTE-SANITIZER\n" + "".join(
    "========= Invalid __global__ read of size 16 bytes\n"
    "=========     at _norm_kernel+0xec0 in rms_norm.py:43\n"
    f"=========     by thread ({thread},0,0) in block (10,0,0)\n"
    f"=========     Access to {0x74505BCCCCA0 + 16 * thread:#x} is out of bounds\n"
    "=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes\n"
    "=========\n"
    for thread in range(3)
) + (
    "========= Invalid __global__ write of size 4 bytes\n"
    "=========     at 0x160 in /somewhere/kernels/scale.py:6:_scale_kernel(float *, int)\n"
    "=========     by thread (0,0,0) in block (0,0,0)\n"
    "=========     Address 0x7f6510c00001 is misaligned\n"
    "=========\n"
    "========= Target application returned an error\n"
    "========= ERROR SUMMARY: 4 errors\n"
)  # fmt: skip
RACE = (
    "========= COMPUTE-SANITIZER\n"
    "========= Error: Race reported between Write access at _sum_kernel(int *, int *)+0x90 in /a/b/sum.py:41\n"
    "=========     and Read access at _sum_kernel(int *, int *)+0x100 in /a/b/sum.py:51 [508 hazards]\n"
    "=========\n"
    "========= Warning: Race reported between Read access at _dot_kernel+0x260\n"
    "=========     and Write access at _dot_kernel+0x200 [4 hazards]\n"
    "=========\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
)
UNTRACKED = (
    "========= COMPUTE-SANITIZER\n"
    "========= Internal Sanitizer Error: The Sanitizer encountered an error while launching _norm_kernel and didn't "
    "track the launch. Errors might go undetected. (Unable to allocate enough memory)\n"
    "========= ERROR SUMMARY: 0 errors\n"
)
NEVER_STARTED = (
    "========= COMPUTE-SANITIZER\n"
    "========= Error: process didn't terminate successfully\n"
    "========= Error: Target application terminated before first instrumented API call\n"
    "========= Tracking kernels launched by child processes requires the --target-processes all option.\n"
)
UNSUPPORTED = (
    "========= COMPUTE-SANITIZER\n"
    "========= Error: Device not supported. Please refer to the \"Supported Devices\" section of the documentation\n"
    "========= ERROR SUMMARY: 0 errors\n"
)  # fmt: skip
FAKE = """#!{python}
import os, pathlib, subprocess, sys, time
options = sys.argv[1:]
tool = options[options.index("--tool") + 1]
log = pathlib.Path(options[options.index("--log-file") + 1])
program = options[options.index(sys.executable):]
folder = pathlib.Path(__file__).parent
(folder / (tool + ".called")).write_text(repr((options, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"))))
if (folder / "sleeps").exists():
    (folder / "sleeps").write_text(str(os.getpid()))
    time.sleep(600)
if (folder / (tool + ".log")).exists():
    log.write_text((folder / (tool + ".log")).read_text())
if (folder / "runs").exists():
    sys.exit(subprocess.run(program).returncode)
print((folder / "says").read_text())
print((folder / "complains").read_text() if (folder / "complains").exists() else "", file=sys.stderr)
sys.exit(int((folder / "code").read_text()))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a compute-sanitizer that writes what lies beside it, on a machine that seems to have a GPU."""
    folder = tmp_path / "fake"
    folder.mkdir()
    executable = folder / "compute-sanitizer"
    executable.write_text(FAKE.format(python=sys.executable))
    executable.chmod(0o755)
    for tool, text in CLEAN.items():
        (folder / f"{tool}.log").write_text(text)
    (folder / "says").write_text("kernbench ran fused_adamw")
    (folder / "code").write_text("0")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return folder


def results(seconds: float = 60.0, dtype: str | None = "float32") -> dict[str, SanitizerResult]:
    return {
        result.tool: result for result in sanitizer.sanitize(["fused_adamw"], dtype=dtype, case=None, seconds=seconds)
    }


def test_clean_reports_of_a_kernel_that_ran_pass(fake: Path) -> None:
    found = results()
    assert list(found) == ["memcheck", "racecheck"]
    for result in found.values():
        assert (result.kernel, result.passed, result.errors) == ("fused_adamw", True, 0)
        assert result.findings == [] and result.reason == ""
    options = (fake / "memcheck.called").read_text()
    job = '{"kernel":"fused_adamw","cases":["one","ragged","aligned","skipped"],"dtypes":["float32"]}'
    assert f"'-m', 'kernbench.parity.sanitized', '{job}'], '1')" in options
    assert "'--padding', '512'" in options
    assert "--padding" not in (fake / "racecheck.called").read_text()


def test_accesses_out_of_bounds_are_told_once_each_with_kernel_and_line(fake: Path) -> None:
    (fake / "memcheck.log").write_text(OUT_OF_BOUNDS)
    (fake / "says").write_text("")
    (fake / "code").write_text("1")
    result = results()["memcheck"]
    assert (result.passed, result.errors, result.reason) == (False, 4, "")
    assert result.findings == [
        "invalid __global__ read of size 16 bytes in _norm_kernel (rms_norm.py:43), out of bounds, and is 161 bytes "
        "after the nearest allocation of size 1,024 bytes (3 times)",
        "invalid __global__ write of size 4 bytes in _scale_kernel (scale.py:6), misaligned",
    ]


def test_races_fail_and_warnings_of_races_are_told(fake: Path) -> None:
    (fake / "racecheck.log").write_text(RACE)
    found = results()
    assert found["memcheck"].passed
    assert (found["racecheck"].passed, found["racecheck"].errors) == (False, 1)
    assert found["racecheck"].findings == [
        "race between write in _sum_kernel (sum.py:41) and read in _sum_kernel (sum.py:51) [508 hazards]",
        "warning: race between read in _dot_kernel and write in _dot_kernel [4 hazards]",
    ]


def test_warnings_alone_pass_and_are_told(fake: Path) -> None:
    text = RACE[RACE.index("========= Warning") :].replace(
        "2 hazards displayed (1 error", "1 hazard displayed (0 errors"
    )
    (fake / "racecheck.log").write_text(text)
    result = results()["racecheck"]
    assert (result.passed, result.errors) == (True, 0)
    assert result.findings == ["warning: race between read in _dot_kernel and write in _dot_kernel [4 hazards]"]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (UNTRACKED, "Internal Sanitizer Error: The Sanitizer encountered an error while launching _norm_kernel"),
        (NEVER_STARTED, "Target application terminated before first instrumented API call"),
        (UNSUPPORTED, "Device not supported."),
        ("", "gave no summary and ended with exit code 0"),
        ("========= COMPUTE-SANITIZER\n", "gave no summary"),
    ],
)
def test_a_tool_that_fails_is_no_pass(fake: Path, log: str, words: str) -> None:
    (fake / "memcheck.log").write_text(log)
    result = results()["memcheck"]
    assert not result.passed
    assert words in result.reason


def test_no_errors_in_a_kernel_that_did_not_run_is_no_pass(fake: Path) -> None:
    (fake / "says").write_text("")
    result = results()["memcheck"]
    assert (result.passed, result.reason) == (False, "the kernel did not run to its end under the tool: exit code 0")
    (fake / "says").write_text("kernbench ran fused_adamw")
    (fake / "complains").write_text("Traceback ...\nRuntimeError: out of resource: shared memory")
    (fake / "code").write_text("1")
    assert results()["racecheck"].reason.endswith("RuntimeError: out of resource: shared memory")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs a machine without a GPU, so that the program fails")
def test_the_program_under_the_tool_says_why_it_failed(fake: Path) -> None:
    (fake / "runs").touch()
    result = results()["memcheck"]
    assert not result.passed
    assert result.reason.startswith("the kernel did not run to its end under the tool: kernbench.errors.KernbenchError")
    assert "--device cuda" in result.reason


def test_a_tool_that_hangs_is_stopped(fake: Path) -> None:
    (fake / "sleeps").touch()
    started = time.perf_counter()
    result = next(sanitizer.sanitize(["fused_adamw"], dtype="float32", seconds=2.0))
    assert time.perf_counter() - started < 30
    assert (result.passed, result.reason) == (False, "did not end within 2 s")
    pid = int((fake / "sleeps").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_many_findings_are_cut() -> None:
    text = "".join(
        f"========= Invalid __global__ read of size 4 bytes\n=========     at _kernel+0x{line:x}0 in x.py:{line}\n"
        for line in range(1, 15)
    )
    report = sanitizer.read_report(text + "========= ERROR SUMMARY: 14 errors\n")
    assert len(report.findings) == sanitizer.SHOWN + 1
    assert report.findings[-1] == "and 4 more"
    assert report.errors == 14


def test_hazards_one_by_one_are_read_too() -> None:
    text = (
        "========= ERROR: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :\n"
        "=========     Write Thread (0,0,0) at _kernel+0x2f0 in x.py:20\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    report = sanitizer.read_report(text)
    assert report.errors == 1 and report.complete
    assert report.findings == ["potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :"]


def test_all_dtypes_of_a_kernel_are_run_by_default(fake: Path) -> None:
    results(dtype=None)
    assert '"dtypes":["float32","bfloat16","float16"]' in (fake / "memcheck.called").read_text()


def test_wrong_names_are_refused_before_anything_runs(fake: Path) -> None:
    with pytest.raises(KernbenchError, match="did you mean 'fused_adamw'"):
        list(sanitizer.sanitize(["fused_adam"]))
    with pytest.raises(KernbenchError, match="there is no case of fused_adamw named 'raged'"):
        list(sanitizer.sanitize(["fused_adamw"], case="raged"))
    with pytest.raises(KernbenchError, match="states no tolerance for float64"):
        list(sanitizer.sanitize(["fused_adamw"], dtype="float64"))
    assert not (fake / "memcheck.called").exists()


def test_without_the_tool_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sanitizer, "TOOLKITS", tmp_path)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(KernbenchError, match="pip install nvidia-cuda-sanitizer-api"):
        list(sanitizer.sanitize(["fused_adamw"]))
    for version in ("cuda-12.4", "cuda-13.0"):
        (tmp_path / version / "bin").mkdir(parents=True)
        executable = tmp_path / version / "bin" / "compute-sanitizer"
        executable.touch()
        executable.chmod(0o755)
    assert sanitizer.find() == tmp_path / "cuda-13.0" / "bin" / "compute-sanitizer"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-12.4"))
    assert sanitizer.find().parts[-3] == "cuda-12.4"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs a machine without a GPU")
def test_without_a_gpu_one_sentence() -> None:
    with pytest.raises(KernbenchError, match="on a GPU, and PyTorch sees none; leave --sanitize out"):
        list(sanitizer.sanitize(["fused_adamw"]))


PLANTED = '''
"""Reads past the end, and races in shared memory behind Triton's back."""

import torch
import triton
import triton.language as tl

from kernbench.spec import Case, Cost, KernelSpec, Tolerance

RACE = """{ .shared .align 4 .b32 raced; st.shared.b32 [raced], $1; ld.shared.b32 $0, [raced]; }"""


@triton.jit
def _past_the_end_kernel(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets) * 2, mask=offsets < n)


@triton.jit
def _racing_kernel(x, y, n, RACE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    raced = tl.inline_asm_elementwise(RACE, "=r,r", [offsets], dtype=tl.int32, is_pure=False, pack=1)
    value = tl.load(x + offsets, mask=offsets < n) * 2 + tl.where(raced < 0, 1.0, 0.0)
    tl.store(y + offsets, value, mask=offsets < n)


@triton.jit
def _right_kernel(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


def past_the_end(x):
    y = torch.empty_like(x)
    _past_the_end_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), 256)
    return y


def racing(x):
    y = torch.empty_like(x)
    _racing_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), RACE, 256)
    return y


def right(x):
    y = torch.empty_like(x)
    _right_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), 256)
    return y


def declared(name, optimized):
    return KernelSpec(
        name=name,
        reference=lambda x: x * 2,
        optimized=optimized,
        make_inputs=lambda case, dtype, device, seed: {"x": torch.ones(case["size"], device=device)},
        cases=(Case("ragged", size=703),),
        tolerance={"float32": Tolerance()},
        cost=lambda case, dtype: Cost(flops=1.0, bytes_read=1.0, bytes_written=1.0),
    )


PAST = declared("past_the_end", past_the_end)
RACING = declared("racing", racing)
RIGHT = declared("right", right)
'''


@pytest.mark.gpu
def test_planted_faults_are_found_on_a_gpu(workspace: Path) -> None:
    try:
        sanitizer.find()
    except KernbenchError as error:
        pytest.skip(str(error))
    (workspace / "kernels").mkdir()
    (workspace / "kernels" / "planted.py").write_text(PLANTED)
    names = ["past_the_end", "racing", "right"]
    found = {(result.kernel, result.tool): result for result in sanitizer.sanitize(names)}
    past = found["past_the_end", "memcheck"]
    assert not past.passed and past.errors > 0
    assert any("invalid __global__ read" in text and "_past_the_end_kernel" in text for text in past.findings), past
    race = found["racing", "racecheck"]
    assert any("_racing_kernel" in text for text in race.findings), race
    for tool in sanitizer.TOOLS:
        assert found["right", tool].passed, found["right", tool]
