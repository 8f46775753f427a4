"""The workspace loader: declarations found by file, errors that name the file and the way out."""

import sys
from pathlib import Path

import pytest

from kernbench import registry
from kernbench.errors import KernbenchError, WorkloadFailed

DECLARATION = """
from kernbench.workload import Workload

{name} = Workload(name={label!r}, unit="items", summary="toy", presets={{"one": 1}}, build=lambda **_: None)
"""


def write_workload(path: Path, *labels: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(DECLARATION.format(name=f"W{index}", label=label) for index, label in enumerate(labels)))
    return path


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "JOURNAL.md").write_text("# Journal\n")
    (tmp_path / "workloads").mkdir()
    return tmp_path


def test_finds_builtin_and_current_workspace(workspace):
    write_workload(workspace / "workloads" / "mine.py", "mine")
    found = registry.workloads()
    assert found["mine"].file == workspace / "workloads" / "mine.py"
    assert "titan-mac" in found


def test_new_file_appears_without_reinstall(workspace):
    assert "late" not in registry.workloads()
    write_workload(workspace / "workloads" / "late.py", "late")
    assert "late" in registry.workloads()


def test_private_files_are_no_declarations_but_can_be_imported(workspace):
    (workspace / "workloads" / "_shared.py").write_text("NAME = 'shared'\n")
    text = "from ._shared import NAME\n" + DECLARATION.format(name="W", label="x").replace("'x'", "NAME")
    (workspace / "workloads" / "user.py").write_text(text)
    assert "shared" in registry.workloads()


def test_duplicate_name_names_both_files(workspace):
    first = write_workload(workspace / "workloads" / "a.py", "same")
    second = write_workload(workspace / "workloads" / "b.py", "same")
    with pytest.raises(KernbenchError, match="declared twice") as caught:
        registry.workloads()
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_unknown_name_suggests_the_nearest(workspace):
    with pytest.raises(KernbenchError, match="did you mean 'titan-mac'"):
        registry.workload("titanmac")


def test_file_with_one_declaration(workspace):
    path = write_workload(workspace / "solo.py", "solo")
    assert registry.workload(f"./{path.name}").declaration.name == "solo"


def test_file_with_two_declarations_asks_which(workspace):
    write_workload(workspace / "two.py", "first", "second")
    with pytest.raises(KernbenchError, match=r"two\.py:first or .*two\.py:second"):
        registry.workload("./two.py")
    assert registry.workload("./two.py:second").declaration.name == "second"
    with pytest.raises(KernbenchError, match="did you mean 'second'"):
        registry.workload("./two.py:secnd")


def test_file_without_declaration_says_what_to_add(workspace):
    (workspace / "empty.py").write_text("x = 1\n")
    with pytest.raises(KernbenchError, match="declares no workload"):
        registry.workload("./empty.py")


def test_missing_file(workspace):
    with pytest.raises(KernbenchError, match="there is no file"):
        registry.workload("./absent.py")


def test_file_that_raises_keeps_its_traceback(workspace):
    (workspace / "broken.py").write_text("1 / 0\n")
    with pytest.raises(WorkloadFailed, match="ZeroDivisionError") as caught:
        registry.workload("./broken.py")
    assert "1 / 0" in caught.value.traceback_text


def test_a_workspace_file_is_imported_once(workspace):
    path = write_workload(workspace / "workloads" / "once.py", "once")
    by_name = registry.workloads()["once"].declaration
    assert registry.workload(str(path)).declaration is by_name


def test_workspace_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(tmp_path))
    assert registry.current().root == tmp_path
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(tmp_path / "absent"))
    with pytest.raises(KernbenchError, match="which is no folder"):
        registry.current()


def test_no_top_level_kernels_or_workloads_module(workspace):
    registry.workloads()
    registry.kernels()
    assert "kernels" not in sys.modules
    assert "workloads" not in sys.modules
