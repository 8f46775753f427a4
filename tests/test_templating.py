"""Compiled templates: kept, used again, compiled anew when they are not right, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import report_records as samples
from jinja2.bccache import Bucket

from kernbench.report import html, templating
from kernbench.report.templating import Compiled, Templates


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder for what is compiled, and the names of the templates that were compiled so far."""
    names: list[str] = []
    compile_ = jinja2.Environment.compile

    def counted(self: Any, source: Any, name: Any = None, *rest: Any, **named: Any) -> Any:
        names.append(name)
        return compile_(self, source, name, *rest, **named)

    monkeypatch.setattr(jinja2.Environment, "compile", counted)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path / "templates", names


def styles(folder: Path) -> str:
    """A template that needs neither filters nor names, through the cache in ``folder``."""
    return Templates({}, {}, Compiled(folder)).render("style.css")


def test_a_template_is_compiled_once(compiled: tuple[Path, list[str]]) -> None:
    folder, names = compiled
    first = styles(folder)
    assert names == ["style.css"]
    assert styles(folder) == first
    assert names == ["style.css"]
    assert [path.parent.name for path in folder.glob("**/*.pyc")] == ["__pycache__"]


def test_what_is_damaged_or_of_another_source_is_compiled_again(compiled: tuple[Path, list[str]]) -> None:
    folder, names = compiled
    first = styles(folder)
    (kept,) = folder.glob("**/*.pyc")
    whole = kept.read_bytes()
    for wrong in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        kept.write_bytes(wrong)
        assert styles(folder) == first
        assert kept.read_bytes() == whole
    assert names == ["style.css"] * 4
    environment = jinja2.Environment()
    other = Compiled(folder).get_bucket(environment, "style.css", None, "another source")
    assert other.code is None


def test_nothing_is_written_where_that_is_not_wanted_or_not_allowed(
    compiled: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = compiled
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first = styles(folder)
    assert not folder.exists()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    barred = tmp_path / "file"
    barred.write_text("no folder")
    assert styles(barred / "templates") == first


def test_options_of_the_templates_are_part_of_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = Bucket(jinja2.Environment(), "page.html", "")
    before = Compiled(tmp_path)._file(bucket)
    monkeypatch.setitem(templating._OPTIONS, "trim_blocks", False)
    assert Compiled(tmp_path)._file(bucket) != before


def test_a_page_of_compiled_templates_is_the_page(tmp_path: Path) -> None:
    """In processes of their own: one that compiles, and one that finds everything compiled."""
    program = (
        "import sys, jinja2, report_records\n"
        "from kernbench.report import html\n"
        "page = html.render(report_records.profile())\n"
        "if sys.argv[1] == 'again':\n"
        "    jinja2.Environment.compile = None\n"
        "    html._templates.cache_clear()\n"
        "    assert html.render(report_records.profile()) == page\n"
        "sys.stdout.write(page)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    command = [sys.executable, "-c", program]
    folder = Path(samples.__file__).parent
    pages = [
        subprocess.run([*command, how], check=True, capture_output=True, env=environment, cwd=folder, text=True).stdout
        for how in ("first", "again")
    ]
    assert pages[0] == pages[1] == html.render(samples.profile())


def test_processes_that_measure_load_no_templates() -> None:
    program = "import sys, kernbench.children.jobs; assert not {'jinja2', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
