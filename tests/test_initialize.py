from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from terminal import run

from kernbench import initialize, journal
from kernbench.children import isolation, jobs
from kernbench.children.worker import Tell
from kernbench.errors import KernbenchError
from kernbench.progress import Silent

CREATED = ["workloads/my_model.py", "kernels/my_kernel.py", "reports/.gitkeep", "JOURNAL.md", ".gitignore"]

COMPARE_ALL_CASES = """
import torch
from kernbench import registry

spec = registry.kernel("my_kernel").declaration
device = torch.device("cpu:0")

def outcome(implementation, inputs, upcast=False):
    leaves = [value.detach().to(torch.float64 if upcast else value.dtype).requires_grad_() for value in inputs.values()]
    output = implementation(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * weight).sum().backward()
    return [tensor.detach().double() for tensor in (output, *(leaf.grad for leaf in leaves))]

for case in spec.cases:
    for name in () if case.large else spec.tolerance:
        dtype = getattr(torch, name)
        inputs = spec.make_inputs(case, dtype, device, 3)
        oracle = outcome(spec.reference, inputs, upcast=True)
        eager = outcome(spec.reference, inputs)
        ours = outcome(spec.optimized, inputs)
        for exact, theirs, own in zip(oracle, eager, ours, strict=True):
            floor = 4 * torch.finfo(dtype).eps * exact.square().mean().sqrt()
            assert (own - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor, (case, name)
x = torch.tensor([[float("nan"), float("inf"), -1.0, -float("inf")]])
torch.testing.assert_close(
    spec.optimized(x, torch.zeros(4)), spec.reference(x, torch.zeros(4)), equal_nan=True
)
torch.library.opcheck(spec.optimized, (torch.randn(3, 5), torch.randn(5)))
print("compared")
"""

TRAIN_WITH_AND_WITHOUT_THE_KERNEL = """
import json
import torch
from kernbench import registry

found = registry.workload("my-model").declaration
spec = registry.kernel("my_kernel").declaration

def losses(*numbers):
    restore = []
    for phase in found.phases_numbered(numbers):
        for swap in phase.swaps:
            owner, name = swap.site
            restore.append((owner, name, getattr(owner, name)))
            setattr(owner, name, swap.use or swap.adapt(spec.optimized))
    built = found.make("tiny", torch.device("cpu:0"), torch.float32, 0, None)
    values = [float(built.step(index)) for index in range(12)]
    for owner, name, before in restore:
        setattr(owner, name, before)
    assert built.units_per_step == 128 and built.state_dict()
    return values

print(json.dumps({"before": losses(), "after": losses(0, 1)}))
"""


@dataclass(frozen=True)
class Program:
    """A job that returns what a program prints that runs in a process of its own."""

    imports: ClassVar[tuple[str, ...]] = jobs.COMPILER
    code: str

    def run(self, tell: Tell) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(self.code, {})
        return printed.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new workspace that is found because it is the current folder; its kernels are interpreted."""
    initialize.init(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERNBENCH_WORKSPACE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return tmp_path


def printed_by(code: str) -> str:
    found: str = isolation.run(Program(code), lambda said: None, isolation.Terms(200), Silent())
    return found


def test_a_workspace_appears_where_there_was_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "bench"
    assert initialize.init(folder) == [folder / name for name in CREATED]
    assert all((folder / name).is_file() for name in CREATED)
    assert (folder / ".gitignore").read_text() == ".kernbench/\n"
    assert (folder / "JOURNAL.md").read_text() == journal.HEADER


def test_files_that_exist_are_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "workloads").mkdir()
    mine = {"workloads/my_model.py": "mine", "JOURNAL.md": "my notes", ".gitignore": "*.pyc"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    notes: list[str] = []
    created = initialize.init(tmp_path, notes.append)
    assert created == [tmp_path / name for name in ("kernels/my_kernel.py", "reports/.gitkeep", ".gitignore")]
    assert notes == [f"kept {tmp_path / name}: it exists already" for name in ("workloads/my_model.py", "JOURNAL.md")]
    assert (tmp_path / "workloads/my_model.py").read_text() == "mine"
    assert (tmp_path / "JOURNAL.md").read_text() == "my notes"
    assert (tmp_path / ".gitignore").read_text() == "*.pyc\n.kernbench/\n"


def test_a_second_init_changes_nothing(tmp_path: Path) -> None:
    initialize.init(tmp_path)
    assert initialize.init(tmp_path) == []
    assert (tmp_path / ".gitignore").read_text() == ".kernbench/\n"


def test_a_read_only_folder_is_an_error_that_says_what_to_do(read_only_folder: Path) -> None:
    with pytest.raises(KernbenchError, match="choose a folder that you can write to"):
        initialize.init(read_only_folder / "bench")


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "workloads").write_text("")
    with pytest.raises(KernbenchError, match="cannot start a workspace"):
        initialize.init(tmp_path)


@pytest.mark.usefixtures("folder")
def test_the_kernel_agrees_with_its_reference_on_all_cases() -> None:
    assert printed_by(COMPARE_ALL_CASES) == "compared\n"


@pytest.mark.usefixtures("folder")
def test_the_model_learns_and_its_phases_do_not_change_what_it_learns() -> None:
    losses = json.loads(printed_by(TRAIN_WITH_AND_WITHOUT_THE_KERNEL))
    assert losses["before"][-1] < 0.9 * losses["before"][0]
    assert losses["after"] == pytest.approx(losses["before"], rel=1e-5)


def kernbench(*arguments: object) -> dict[str, Any]:
    """The record that a command prints. Whether a swap wins is not asked here, so exit code 1 is fine."""
    done = run(*arguments, "--device", "cpu", "--json", "--quiet")
    assert done.exit_code in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kernel_of_the_user_is_swapped_into_a_model_of_the_user(workspace: Path) -> None:
    initialize.init(workspace)
    found = kernbench("profile", "./workloads/my_model.py", "--steps", 3)
    (stall,) = (item for item in found["stalls"] if item["class"] != "cpu-tensor")  # AdamW's step counters
    assert (stall["source"], stall["count_per_step"]) == ("self.loss_sum += loss.item()", 1)
    found = kernbench("swap", "--phase", 1, "--steps", 3, "--rounds", 3)
    assert found["workload"]["name"] == "my-model"
    assert found["parity"]
    assert [result["reason"] for result in found["parity"] if not result["passed"]] == []
    assert [(hit["kernel"], hit["calls_per_step"]) for hit in found["receipt"]] == [("my_kernel", 2)]
    (entry,) = journal.entries(workspace / "JOURNAL.md")
    assert entry.run_id == found["run_id"]


def test_the_files_are_in_house_style(tmp_path: Path) -> None:
    initialize.init(tmp_path)
    settings = Path(__file__).parents[1] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(settings), "workloads", "kernels"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
