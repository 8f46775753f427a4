"""Choosing and describing the device, its clocks, its ceilings, and the probes behind ``kernbench doctor``."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from kernbench import device, nvml, probes
from kernbench.errors import KernbenchError
from kernbench.measurement import ceilings, timing
from kernbench.record import Clocks

CPU = torch.device("cpu", 0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """resolve() writes TRITON_INTERPRET; this puts back what the session had, and forgets what NVML answered."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    nvml._start.cache_clear()
    nvml._handle.cache_clear()
    monkeypatch.setattr(device, "WARNINGS", [])


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["auto", "cpu", "cpu:0"])
def test_the_cpu_has_an_index_and_interprets_triton(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_cuda(monkeypatch)
    chosen = device.resolve(name)
    assert (chosen.type, chosen.index) == ("cpu", 0)
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_gpu_takes_triton_out_of_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    os.environ["TRITON_INTERPRET"] = "1"
    assert device.resolve("auto") == device.resolve("cuda") == torch.device("cuda", 0)
    assert device.resolve("cuda:1") == torch.device("cuda", 1)
    assert "TRITON_INTERPRET" not in os.environ
    with pytest.raises(KernbenchError, match="there are 2 CUDA devices"):
        device.resolve("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda:x", ""])
def test_a_device_that_is_not_here_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_cuda(monkeypatch)
    with pytest.raises(KernbenchError, match="use (--device cpu|auto)"):
        device.resolve(name)


def test_the_fingerprint_names_machine_and_versions() -> None:
    found = device.fingerprint(CPU)
    assert found.device.type == "cpu"
    assert found.device.name == found.cpu != ""
    assert found.device.memory_bytes > 1 << 28
    assert found.torch == torch.__version__
    assert found.triton
    assert found.kernbench
    assert found.cpu_threads == torch.get_num_threads()


def test_synchronizing_the_cpu_does_nothing() -> None:
    timing.synchronize(CPU)


def test_git_tells_commit_and_changes(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert device.git(tmp_path) is None
    run("init", "-q")
    assert device.git(tmp_path) is None, "a repository without a commit has nothing to name"
    (tmp_path / "file").write_text("1")
    run("add", "file")
    run("commit", "-qm", "one")
    found = device.git(tmp_path)
    assert found is not None
    assert found.commit == run("rev-parse", "HEAD")
    assert not found.dirty
    (tmp_path / "file").write_text("2")
    found = device.git(tmp_path)
    assert found is not None
    assert found.dirty


def test_git_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.git(Path(__file__).parent) is None


def test_ceilings_of_the_cpu_are_measured_quickly() -> None:
    # Best of two: other work on this machine may hold one of them up.
    spent = []
    for _ in range(2):
        start = time.process_time()
        found = device.measure_ceilings(CPU)
        spent.append(time.process_time() - start)
    assert min(spent) < 2 * torch.get_num_threads()
    assert found.copy_bytes_per_second is not None
    assert 1e8 < found.copy_bytes_per_second < 1e13
    assert found.triad_bytes_per_second is not None
    assert 1e8 < found.triad_bytes_per_second < 1e13
    assert set(found.matmul_flops_per_second) == {"float32"}
    assert 1e8 < found.matmul_flops_per_second["float32"] < 1e15
    assert found.launch_seconds is not None
    assert 1e-8 < found.launch_seconds < 1e-3


def test_without_memory_the_copy_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "free_bytes", lambda _: 1 << 20)
    found = device.measure_ceilings(CPU)
    assert found.copy_bytes_per_second is None
    assert found.triad_bytes_per_second is None
    assert found.matmul_flops_per_second == {}
    assert found.launch_seconds is not None


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_measuring_leaves_the_float32_precision_as_it_was(precision: str) -> None:
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for kind in (CPU, torch.device("cuda", 0)):
            with pytest.raises(ZeroDivisionError), ceilings._float32_products("ieee", kind):
                raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "high")
    finally:
        torch.set_float32_matmul_precision(was)


def test_the_cpu_tells_no_clocks() -> None:
    assert device.read_clocks(CPU) is None
    assert device.WARNINGS == []


class Driver:
    """Stands in for NVML: one GPU that answers most questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reasons: int) -> None:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": self.handle,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetPowerUsage": lambda handle: 350_500,
            "nvmlDeviceGetTemperature": self.refuse,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: reasons,
        }
        self.asked: list[str] = []
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"0000-{index}"), raising=True
        )
        device._uuid.cache_clear()

    def handle(self, name: str) -> str:
        self.asked.append(name)
        return name

    def refuse(self, *_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_clocks_come_in_units_and_reasons_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, reasons=0x1 | 0x4 | 0x40)
    assert device.read_clocks(torch.device("cuda", 1)) == Clocks(
        sm_hz=1980e6,
        memory_hz=3201e6,
        power_watts=350.5,
        temperature_celsius=None,
        throttle_reasons=["software power cap", "hardware thermal slowdown"],
    )
    device.read_clocks(torch.device("cuda", 1))
    assert driver.asked == ["GPU-0000-1"], "the handle is looked up once, by UUID"
    device._uuid.cache_clear()


@pytest.mark.parametrize(
    ("mask", "held_down"),
    [(0x0, False), (0x1, False), (0x4, False), (0x2, False), (0x8, True), (0x20, True), (0x40, True), (0x84, True)],
)
def test_heat_and_power_faults_hold_a_device_down_and_its_power_cap_does_not(mask: int, held_down: bool) -> None:
    assert nvml.throttled(Clocks(throttle_reasons=nvml.decode(mask))) is held_down


def test_an_unknown_reason_is_shown_as_it_is() -> None:
    assert nvml.decode(0x1) == []
    assert nvml.decode(0x4 | 0x1000) == ["software power cap", "reason 0x1000"]


def test_why_there_are_no_clocks_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    monkeypatch.setattr(device, "_uuid", lambda index: "")
    for _ in range(2):
        assert device.read_clocks(torch.device("cuda", 0)) is None
    assert len(device.WARNINGS) == 1
    assert "clocks and throttling are not recorded" in device.WARNINGS[0]


def test_every_capability_is_tried_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = {name: (works, detail) for name, works, detail in device.capabilities(CPU)}
    assert set(found) == {"Triton", "torch.compile", "profiler", "NVTX", "NVML", "plots"}
    for name in ("Triton", "profiler", "NVTX", "plots"):
        assert found[name][0], found[name]
    assert all(detail for _, detail in found.values())


def test_a_probe_that_fails_tells_its_own_error() -> None:
    def broken(_: torch.device) -> str:
        raise RuntimeError("\n  no C++ compiler found\nlong story")

    assert probes.attempt("torch.compile", broken, CPU) == (
        "torch.compile",
        False,
        "RuntimeError: no C++ compiler found",
    )


def test_a_wrong_kernel_result_is_no_working_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernbench import probe_kernel

    monkeypatch.setattr(probe_kernel, "double", {(2,): lambda *_, **__: None})
    name, works, detail = probes.attempt("Triton", probes.triton, CPU)
    assert not works
    assert "wrong" in detail


@pytest.mark.gpu
def test_a_gpu_is_described_measured_and_asked() -> None:
    chosen = device.resolve("cuda")
    found = device.fingerprint(chosen)
    assert found.device.type == "cuda"
    assert found.device.l2_bytes > 0
    assert found.device.driver
    assert found.device.runtime == torch.version.cuda
    clocks = device.read_clocks(chosen)
    assert clocks is not None, device.WARNINGS
    assert clocks.sm_hz
    start = time.perf_counter()
    roofs = device.measure_ceilings(chosen)
    print(f"ceilings took {time.perf_counter() - start:.2f} s: {roofs}")
    assert roofs.copy_bytes_per_second is not None
    assert roofs.launch_seconds is not None
    assert roofs.launch_seconds < 1e-4
    again = device.measure_ceilings(chosen)
    assert again.copy_bytes_per_second == pytest.approx(roofs.copy_bytes_per_second, rel=0.03)


@pytest.mark.gpu
def test_everything_works_on_a_gpu() -> None:
    failing = [found for found in device.capabilities(device.resolve("cuda")) if not found.works]
    assert [found for found in failing if found.name not in ("plots", "Triton")] == []
