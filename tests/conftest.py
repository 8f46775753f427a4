"""Fixtures and marker rules that all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two test processes share two cores, and torch must learn of it before it is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

REPOSITORY = Path(__file__).parents[1]
NOBODY = 65534


def pytest_configure() -> None:
    """Whether Triton interprets is settled when it is first imported, which torch.compiler does; so before any test."""
    from kernbench import device

    device.resolve("auto")


def pytest_collection_finish() -> None:
    """What was imported until now stays, and no collection, as before each thing timed, looks at it any more."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need hardware or a browser skip with the reason; where CI promised the browser, its absence fails."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and there is none here")
    if item.get_closest_marker("browser") and not (shutil.which("chromium") or os.environ.get("KERNBENCH_CHROMIUM")):
        if os.environ.get("CI"):
            pytest.fail("needs Chromium, which .ci/run installs; apt-get install chromium")
        pytest.skip("needs Chromium: apt-get install chromium, or set KERNBENCH_CHROMIUM to one")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace that results of this test go to; it is the current folder too."""
    root = tmp_path / "workspace"
    (root / ".kernbench").mkdir(parents=True)
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(root))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that this process cannot write to while the test runs, not even as root."""
    folder = Path(tempfile.mkdtemp(prefix="kernbench-read-only-"))
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture
def toy_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace as a user has it: the toy workload, the toy kernel, reports and a journal; the current folder too."""
    for folder in ("workloads", "kernels", "reports"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPOSITORY / "tests" / "toy_workload.py", tmp_path / "workloads" / "toy.py")
    shutil.copy(REPOSITORY / "tests" / "toy_kernel.py", tmp_path / "kernels" / "toy_kernel.py")
    (tmp_path / "JOURNAL.md").write_text("# Journal\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
