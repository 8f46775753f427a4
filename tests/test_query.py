"""SQL and pandas over the tables of a trace with known rows, and every way to ask wrongly."""

import json
import re
import sys
from pathlib import Path

import pandas
import pytest
from kineto_builder import KinetoBuilder
from terminal import run

from kernbench import query, tables
from kernbench.errors import KernbenchError

TABLES = ("events", "kernels", "stalls", "steps")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two steps of two kernels each: a product, and an addition after a read; the first step is numbered 7."""
    builder = KinetoBuilder()
    for step in range(2):
        start = step * 1000
        builder.step(7 + step, start, start + 900)
        builder.op("aten::mm", start + 10, start + 30)
        builder.launch("gemm", start + 15, start + 40, start + 140)
        builder.op("aten::item", start + 35, start + 160)
        builder.call("cudaStreamSynchronize", start + 36, start + 150)
        builder.op("aten::add", start + 170, start + 190)
        builder.launch("add_kernel", start + 175, start + 200, start + 220, stream=9)
    return builder.write(tmp_path / "two.json")


def test_tables_hold_the_events_in_whole_nanoseconds(file: Path) -> None:
    made = tables.frames(file)
    assert tuple(made) == TABLES
    for name, frame in made.items():
        assert list(frame.columns) == list(tables.COLUMNS[name])
        assert all(
            pandas.api.types.is_integer_dtype(frame[column])
            for column in tables.COLUMNS[name]
            if column.endswith("_ns")
        )
    events, kernels, stalls, steps = made.values()
    assert kernels.name.tolist() == ["gemm", "add_kernel"] * 2
    assert kernels.duration_ns.tolist() == [100_000, 20_000] * 2
    assert kernels.op.tolist() == ["aten::mm", "aten::add"] * 2
    assert kernels.step.tolist() == [7, 7, 8, 8]
    assert kernels.stream.tolist() == [7, 9] * 2
    launched = events.set_index("id").loc[kernels.call]
    assert launched.name.tolist() == ["cudaLaunchKernel"] * 4
    assert launched.start_ns.tolist() == kernels.launched_ns.tolist()
    assert launched.op.tolist() == kernels.op.tolist()
    assert events.parent.isna().sum() == 8, "two steps, and three operators in each, have no operator around"
    wait = events[events.name == "cudaStreamSynchronize"]
    assert wait.duration_ns.tolist() == [114_000] * 2
    assert wait.self_ns.isna().all()
    assert events[events.name == "aten::item"].self_ns.tolist() == [125_000] * 2
    assert (steps.step.tolist(), steps.launches.tolist(), steps.waits.tolist()) == ([7, 8], [2, 2], [1, 1])
    assert (steps.wait_ns.tolist(), steps.busy_ns.tolist()) == ([114_000] * 2, [120_000] * 2)
    assert (steps.window_ns - steps.busy_ns == steps.idle_ns).all()
    assert (stalls.op.tolist(), stalls.wait_ns_per_step.tolist()) == (["aten::item"], [114_000])
    assert stalls.file.isna().all()


def test_sql_sees_the_same_tables(file: Path) -> None:
    answer = query.query(file, "select op, sum(duration_ns) as ns from kernels group by op order by ns desc")
    assert answer == query.Answer(["op", "ns"], [("aten::mm", 200_000), ("aten::add", 40_000)])
    ordered = query.query(file, "select distinct name from events where kind = 'op' order by name desc")
    assert ordered.rows == [("aten::mm",), ("aten::item",), ("aten::add",)], "text is ordered as text"
    assert query.query(file, "select count(*) from events where name = 'absent'").rows == [(0,)]
    joined = query.query(
        file, "select k.name, e.name from kernels k join events e on k.call = e.id where k.step = 8 order by k.start_ns"
    )
    assert joined.rows == [("gemm", "cudaLaunchKernel"), ("add_kernel", "cudaLaunchKernel")]


def test_a_trace_without_a_device_has_empty_tables(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 10, 30)
    path = builder.write(tmp_path / "cpu.json")
    assert query.query(path, "select * from kernels where name like 'gemm%'").rows == []
    assert query.query(path, "select file, line from stalls where file like '%.py'").rows == []
    assert query.query(path, "select step, busy_ns, launches from steps").rows == [(0, None, 0)]


@pytest.mark.parametrize(
    ("sql", "hint"),
    [
        ("", "one SELECT"),
        (";", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("drop table events", "one SELECT"),
        ("create table mine as select 1", "one SELECT"),
        ("copy events to 'stolen.csv'", "one SELECT"),
        ("set enable_external_access = true", "one SELECT"),
        ("selec name from events", "syntax"),
        ("select name from event", 'Did you mean "events"; kernbench query RUN alone'),
        ("select nam from events", 'Candidate bindings: "name"'),
        ("select * from 'secret.csv'", "file system"),
        ("select * from read_text('secret.csv')", "file system"),
        ("select name + 1 from events", "shows tables and columns"),
        ("select 'open", "unterminated"),
    ],
)
def test_a_wrong_statement_is_one_sentence(file: Path, sql: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    (file.parent / "secret.csv").write_text("secret\n1\n")
    with pytest.raises(KernbenchError, match=f"(?i){hint}") as caught:
        query.query(file, sql)
    assert "\n" not in str(caught.value)
    assert not (file.parent / "stolen.csv").exists()


def test_the_command_prints_rows_tables_and_json(workspace: Path, file: Path) -> None:
    shown = run("query", file, "select name, duration_ns as ns from kernels order by start_ns limit 2")
    assert shown.exit_code == 0
    assert shown.stdout == "name            ns\ngemm        100000\nadd_kernel   20000\n"
    listed = run("query", file)
    assert all(table in listed.stdout for table in TABLES)
    assert "duration_ns" in listed.stdout
    sql = (
        "select name, null as nothing, 'nan'::double as d, [1, 2] as l, {'a': 1} as s, interval 1 day as i from kernels"
    )
    found = json.loads(run("query", file, sql, "--json").stdout)
    assert found["columns"] == ["name", "nothing", "d", "l", "s", "i"]
    assert found["rows"][0] == ["gemm", None, "nan", [1, 2], {"a": 1}, "1 day, 0:00:00"]
    assert not list(workspace.glob("reports/*")), "a query leaves nothing behind"


def test_names_cannot_drive_the_terminal(workspace: Path, tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("evil\x1b[2Jname\nline", 0, 10)
    shown = run("query", builder.write(tmp_path / "evil.json"), "select name from events").stdout
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2


def test_a_long_name_moves_no_other_row(workspace: Path, tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.op("short", 0, 10)
    builder.op("x" * 300, 20, 30)
    file = builder.write(tmp_path / "long.json")
    head, *rows = run("query", file, "select name, duration_ns as ns from events order by start_ns").stdout.splitlines()
    assert rows[0] == "short".ljust(query.WIDEST) + "  10000"
    assert rows[1] == "x" * 300 + "  10000", "whole"
    assert len(head) == query.WIDEST + 7
    assert "an empty text is not one SELECT" in run("query", file, " ").stderr


@pytest.mark.parametrize("reference", ["absent", "empty.json", "text.json", "."])
def test_what_is_no_run_is_said(workspace: Path, reference: str) -> None:
    (workspace / "empty.json").write_text("")
    (workspace / "text.json").write_text("no trace")
    result = run("query", reference, "select 1")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert run("query", "absent").exit_code == 2


def test_what_the_documentation_shows_works(workspace: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "analysis.md").read_text()
    (sql,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    assert query.query(file, sql).columns == ["op", "kernels", "kernel_ns", "launch_ns"]
    (typed,) = re.findall(r'kernbench query RUN "(select [^…]*?)"$', text, re.MULTILINE)
    assert query.query(file, typed).rows == [("gemm", 200_000), ("add_kernel", 40_000)]
    (python,) = re.findall(r"```python\n(from kernbench.*?)```", text, re.DOTALL)
    monkeypatch.chdir(file.parent)
    exec(python.replace("trace.json.gz", file.name), {})
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert tuple(named) == tuple(tables.COLUMNS)
    of_other_commands = {"--steps", "--hta-python"}
    options = set(re.findall(r"`?(--[a-z][a-z-]+)", text)) - of_other_commands
    shown = "".join(run(command, "--help").stdout for command in ("analyze", "query", "gate"))
    assert not [option for option in options if option not in shown]


def test_without_its_engine_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    monkeypatch.delitem(sys.modules, "kernbench.query")
    monkeypatch.delattr("kernbench.query")
    done = run("query", file, "select 1")
    assert done.exit_code == 2
    said = "there is no package 'duckdb'; pip install it, or kernbench again, which brings it"
    assert done.stderr == f"kernbench: {said}\n"
