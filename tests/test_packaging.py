from __future__ import annotations

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from kernbench import __version__

REPOSITORY = Path(__file__).parents[1]
HELP_SECONDS = 0.3
HELP_RUNS = 5

COMMANDS_WITHOUT_TORCH = (["--help"], ["--version"], ["list", "--runs"], ["journal"])


def run(command: list[str], cwd: Path, changes: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that starts from no workspace and no path of ours."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("KERNBENCH_WORKSPACE", "PYTHONPATH")
    }
    return subprocess.run(
        command, cwd=cwd, env={**environment, **(changes or {})}, capture_output=True, text=True, timeout=280
    )


def checked(command: list[str], cwd: Path, changes: Mapping[str, str] | None = None) -> str:
    done = run(command, cwd, changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that; made from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("kernbench", "kernels", "workloads", "tests"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    checked([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with the wheel in it; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = checked([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    # These come later on the path than the wheel, and their own .pth files are not read: an editable install stays out.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(where.strip(), "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(dependencies)))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    checked([*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder)
    return python


def relative_files(folder: str, suffixes: tuple[str, ...]) -> set[str]:
    files = (path for path in (REPOSITORY / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(REPOSITORY).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_kernbench_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"kernbench", f"kernbench-{__version__}.dist-info"}
    assert not [name for name in names if "test" in name.rpartition("/")[2]]


def test_the_wheel_holds_every_file_that_the_engine_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = relative_files("kernbench", (".py", ".html", ".css", ".js", ".j2", ".txt", ".typed")) | {
        "kernbench/py.typed"
    }
    assert not expected - names


def test_the_wheel_holds_every_builtin_kernel_and_workload(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = relative_files("kernels", (".py",)) | relative_files("workloads", (".py",))
    assert expected
    assert not {f"kernbench/builtin/{name}" for name in expected} - names


def test_the_sdist_holds_what_the_wheel_is_built_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/fused_adamw.py"} <= names
    assert "workloads/titan_mac/workload.py" in names


def test_the_constraints_pin_every_dependency_that_pyproject_names() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned)
    names = {_canonical(line.partition("==")[0]) for line in pinned}
    assert {_canonical(re.split(r"[^\w.-]", text)[0]) for text in wanted} <= names


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_folders_that_are_no_packages_stay_so() -> None:
    """With an __init__.py they would hide the PyPI package ``kernels`` whenever we are started from the repository."""
    for folder in ("kernels", "workloads", "tests"):
        assert not list((REPOSITORY / folder).rglob("__init__.py"))


def test_a_package_named_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHOSE = 'the other package'\n")
    code = (
        "import kernels; from kernbench import registry; "
        "assert 'fused_adamw' in registry.kernels(); import kernels as again; print(kernels.WHOSE, again is kernels)"
    )
    changes = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    assert checked([sys.executable, "-c", code], REPOSITORY, changes) == "the other package True\n"


def test_help_is_quick(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kernbench", "--help"]
    checked(command, tmp_path)
    seconds = []
    for _ in range(HELP_RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        checked(command, tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, because other tests share the cores and would be counted in elapsed time.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < HELP_SECONDS


@pytest.mark.parametrize("command", COMMANDS_WITHOUT_TORCH, ids=" ".join)
def test_commands_that_only_read_import_no_torch(command: list[str], tmp_path: Path) -> None:
    done = run([sys.executable, "-X", "importtime", "-m", "kernbench", *command], tmp_path)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    assert not imported & {"torch", "triton"}


def test_an_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = "import kernbench; from kernbench import registry; print(kernbench.__file__); print(registry.builtin().root)"
    package, builtin = checked([str(installed), "-c", code], tmp_path).split()
    assert Path(package).is_relative_to(installed.parents[1])
    assert Path(builtin) == Path(package).parent / "builtin"


def test_an_installed_wheel_profiles_a_builtin_workload_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = [str(installed.with_name("kernbench")), "profile", "titan-mac", "--preset", "tiny", "--steps", "3"]
    output = checked([*command, "--device", "cpu", "--json"], tmp_path)
    found = json.loads(output)
    assert (found["kind"], found["status"]) == ("profile", "complete")
    assert found["workload"]["name"] == "titan-mac"
    assert len(found["steps"]["seconds"]) == 3
    (report,) = tmp_path.glob("reports/titan-mac/*/report.html")
    assert report.stat().st_size > 10_000


def test_an_installed_wheel_starts_a_workspace(installed: Path, tmp_path: Path) -> None:
    checked([str(installed.with_name("kernbench")), "init"], tmp_path)
    listing = json.loads(checked([str(installed.with_name("kernbench")), "list", "--json"], tmp_path))
    assert "my-model" in json.dumps(listing)
    assert "my_kernel" in json.dumps(listing)
