"""What README.md tells people to type works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n# (?P<path>\S+)\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture
def examples(workspace: Path) -> Path:
    """A workspace with the files that README.md shows."""
    for block in BLOCK.finditer(README):
        path = workspace / block["path"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block["code"])
    return workspace


def kernbench(*arguments: str) -> dict[str, Any]:
    """The record that a command prints; it runs in a process of its own, as a user's would."""
    done = subprocess.run(
        [sys.executable, "-m", "kernbench", *arguments, "--device", "cpu", "--json"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_workload_of_the_readme_is_profiled(examples: Path) -> None:
    found = kernbench("profile", "./workloads/mine.py", "--steps", "3")
    assert found["workload"]["name"] == "mine"
    assert found["steps"]["units_per_step"] == 256
    assert found["stalls"] == []


def test_the_kernel_of_the_readme_passes_parity(examples: Path) -> None:
    results = kernbench("parity", "triple")["results"]
    assert results
    assert all(result["passed"] for result in results)


def test_every_command_of_the_readme_exists() -> None:
    """The table and the program name the same commands."""
    shown = set(re.findall(r"^\| `kernbench ([a-z]+)", README, re.MULTILINE))
    help_text = subprocess.run(
        [sys.executable, "-m", "kernbench", "--help"], capture_output=True, text=True, check=True
    ).stdout
    offered = set(re.findall(r"^  ([a-z]+)  ", help_text.partition("Commands:")[2], re.MULTILINE))
    assert shown == offered


def test_every_file_that_the_documents_name_is_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
        named = set(re.findall(r"`((?:kernbench|\.ci)/[\w./]+)`", prose))
        named |= set(re.findall(r"\]\(((?!http)[^)]+)\)", prose))
        assert not [path for path in named if not (REPOSITORY / path).exists()]


def test_make_has_a_help_line_for_every_target() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    helped = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z-]+) ", helped, re.MULTILINE)) == set(phony.split())
    assert {"make demo", "make test", "make check", "make gpu-test"} <= set(re.findall(r"make [a-z-]+", README))


def test_ci_runs_what_the_readme_says() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make check\nmake test")
