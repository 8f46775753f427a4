"""kernbench analyze as a user types it: on traces with planted stalls, of several ranks, and on what is no trace."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kineto_builder import KinetoBuilder
from terminal import run

from kernbench import analyze, host, record
from kernbench.analysis import stalls
from kernbench.analysis.whole import enrich
from kernbench.progress import Silent
from kernbench.traces import trace

US = 1e-6


def reading_steps(count: int = 4, *, read: bool = True, length: float = 300.0) -> KinetoBuilder:
    """Steps of 1000 us: a kernel, a read that waits for it, host work on the drained device, and a second kernel."""
    builder = KinetoBuilder()
    for step in range(count):
        start = step * 1000
        builder.step(step, start, start + 990)
        builder.op("aten::mm", start + 10, start + 30)
        builder.launch("gemm", start + 15, start + 25, start + 25 + length)
        if read:
            builder.op("aten::item", start + 40, start + 60 + length)
            builder.op("aten::_local_scalar_dense", start + 41, start + 59 + length)
            copy = builder.call("cudaMemcpyAsync", start + 42, start + 46)
            builder.on_device(
                "gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 27 + length, start + 28 + length, copy
            )
            builder.call("cudaStreamSynchronize", start + 48, start + 50 + length)
        builder.op("aten::add", start + 600, start + 620)
        builder.launch("add_kernel", start + 605, start + 612, start + 980)
    return builder


def of_rank(path: Path, rank: int, builder: KinetoBuilder | None = None) -> Path:
    """A trace file that tells its rank, of two."""
    (builder or reading_steps()).write(path)
    document = json.loads(path.read_text())
    document["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": 2}
    path.write_text(json.dumps(document))
    return path


def found_in(workspace: Path) -> tuple[Path, record.AnalyzeRecord]:
    (path,) = workspace.glob("reports/analyze/*/record.json")
    found = record.read(path)
    assert isinstance(found, record.AnalyzeRecord)
    return path.parent, found


def test_a_trace_becomes_a_record_and_a_page(workspace: Path, tmp_path: Path) -> None:
    file = reading_steps().write(tmp_path / "mine.json.gz")
    done = run("analyze", file)
    assert done.exit_code == 0, done.stderr
    folder, found = found_in(workspace)
    assert found.status == "complete"
    assert found.analysis is not None
    assert [one.file for one in found.traces] == ["mine.json.gz"]
    assert found.step_seconds == pytest.approx([990 * US] * 4)
    assert (found.hotspots[0].name, found.hotspots[0].calls_per_step) == ("add_kernel", 1)
    (stall,) = found.stalls
    assert (stall.op, stall.klass, stall.count_per_step, stall.real) == ("aten::item", "drain", 1, True)
    assert found.idle is not None
    assert sum(part.seconds_per_step for part in found.breakdown) == pytest.approx(990 * US)
    assert found.analysis.headline in done.stdout.replace("\n", " ").replace("  ", " ")
    assert found.analysis.trace == found.traces[0]
    page = (folder / "report.html").read_text()
    assert "aten::item" in page
    assert (workspace / "reports" / "index.html").is_file()
    assert (folder / "mine.json.gz").resolve() == file.resolve()


def test_the_first_verdict_comes_before_the_rest(workspace: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Told(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    told: list[str] = []

    def late(*given: Any, **named: Any) -> record.TraceAnalysis:
        told.append("the rest")
        return enrich(*given, **named)

    monkeypatch.setattr(analyze, "enrich", late)
    outcome = analyze.analyze([reading_steps().write(tmp_path / "one.json")], "test", Told(), page=False)
    assert isinstance(outcome.record, record.AnalyzeRecord)
    assert outcome.record.analysis is not None
    first = told.index("the rest")
    assert first == 1
    assert "aten::item" in told[0]
    assert "aten::item" in outcome.record.analysis.headline


def test_json_is_the_record_and_nothing_else(workspace: Path, tmp_path: Path) -> None:
    file = reading_steps().write(tmp_path / "one.json")
    done = run("analyze", file, "--no-html", "--json", "--quiet")
    folder, _ = found_in(workspace)
    assert done.stdout == (folder / "record.json").read_text()
    assert done.stderr == ""
    assert sorted(path.name for path in folder.iterdir()) == ["one.json", "record.json"]
    assert not (workspace / "reports" / "index.html").exists()


def test_the_run_is_asked_and_rendered_later(workspace: Path, tmp_path: Path) -> None:
    file = reading_steps().write(tmp_path / "one.json")
    run("analyze", file, "--no-html")
    folder, _ = found_in(workspace)
    asked = run("query", folder.name, "select op, count(*) from kernels where kind = 'kernel' group by op order by op")
    assert asked.stdout.split() == ["op", "count_star()", "aten::add", "4", "aten::mm", "4"]
    saved = run("query", folder.name, "select op, saving_ns_per_step > 0 from stalls", "--json")
    assert json.loads(saved.stdout)["rows"] == [["aten::item", True]]
    assert run("report", folder.name).exit_code == 0
    assert "analyze" in run("list", "--runs").stdout
    file.unlink()
    gone = run("query", folder.name, "select 1")
    assert (gone.exit_code, gone.stderr.count("\n")) == (2, 1)
    assert "keeps no trace" in gone.stderr


def test_results_go_to_the_current_folder_where_there_is_no_workspace(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("KERNBENCH_WORKSPACE", raising=False)
    monkeypatch.chdir(tmp_path)
    reading_steps().write(tmp_path / "one.json")
    assert run("analyze", "one.json", "--no-html").exit_code == 0
    found_in(tmp_path)


def test_ranks_are_one_run(workspace: Path, tmp_path: Path) -> None:
    files = [of_rank(tmp_path / "b.json", 1), of_rank(tmp_path / "a.json", 0)]
    done = run("analyze", *files, "--no-html", "--json")
    assert done.exit_code == 0, done.stderr
    assert [one["rank"] for one in json.loads(done.stdout)["traces"]] == [0, 1]


def test_the_figures_are_those_of_the_rank_that_others_wait_for(workspace: Path, tmp_path: Path) -> None:
    files = []
    for rank, work in enumerate((100, 600)):
        builder = KinetoBuilder()
        for step in range(3):
            start = step * 1000
            builder.step(step, start, start + 990)
            builder.op("aten::mm", start + 10, start + 30)
            builder.launch("gemm", start + 15, start + 25, start + 25 + work)
            builder.op("c10d::allreduce_", start + 40, start + 60)
            builder.launch("ncclDevKernel_AllReduce_Sum_f32_RING_LL", start + 45, start + 30 + work, start + 700)
        files.append(of_rank(tmp_path / f"rank{rank}.json", rank, builder))
    assert run("analyze", *files, "--no-html", "--quiet").exit_code == 0
    folder, found = found_in(workspace)
    assert found.analysis is not None
    assert found.analysis.communication is not None
    assert found.analysis.communication.slowest_rank == 1
    assert found.analysis.trace == found.traces[1]
    assert found.hotspots[0].name == "gemm"
    assert (folder / "rank1.json").exists()
    asked = run("query", folder.name, "select max(duration_ns) from kernels where name = 'gemm'", "--json")
    assert json.loads(asked.stdout)["rows"] == [[600_000]]


def test_traces_that_are_no_ranks_of_one_run_are_refused(workspace: Path, tmp_path: Path) -> None:
    zero, other = of_rank(tmp_path / "zero.json", 0), of_rank(tmp_path / "other.json", 0)
    unknown = reading_steps().write(tmp_path / "unknown.json")
    for files, said in (
        ((zero, other), "both of rank 0"),
        ((zero, unknown), "does not tell its rank"),
        ((zero, zero), "twice"),
    ):
        done = run("analyze", *files)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 2), done.stderr
        assert said in done.stderr
    assert not (workspace / "reports").exists(), "nothing is half-written"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.json", None),
        ("empty.json", b""),
        ("text.json", b"hello"),
        ("list.json", b"[1, 2, 3]"),
        ("object.json", b'{"a": 1}'),
        ("nothing.json", b'{"traceEvents": []}'),
        ("cut.json", b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, '),
        ("cut.json.gz", b"\x1f\x8b\x08\x00\x00"),
        ("binary.json.gz", bytes(range(256))),
    ],
)
def test_what_is_no_trace_is_said_in_one_sentence(
    workspace: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("analyze", tmp_path / name, "--quiet")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert not (workspace / "reports").exists()


def test_a_folder_and_a_record_are_no_traces(workspace: Path, tmp_path: Path) -> None:
    assert run("analyze", tmp_path).exit_code == 2
    run("analyze", reading_steps().write(tmp_path / "one.json"), "--no-html")
    folder, _ = found_in(workspace)
    assert run("analyze", folder / "record.json").exit_code == 2
    assert run("analyze").exit_code == 2


def test_launches_without_any_kernel_are_refused(workspace: Path, tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 900)
    builder.op("aten::mm", 10, 30)
    builder.call("cudaLaunchKernel", 15, 20)
    file = builder.write(tmp_path / "blind.json")
    for command in (["analyze", file], ["compare", file, file], ["gate", "--baseline", file, file]):
        done = run(*command)
        assert done.exit_code == 2
        assert "no device event" in done.stderr


def test_a_trace_of_the_host_alone_is_analysed(workspace: Path, tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::mm", 10, 90)
    done = run("analyze", builder.write(tmp_path / "cpu.json"), "--json", "--quiet")
    found = json.loads(done.stdout)
    assert found["idle"] is None
    assert found["stalls"] == []
    assert found["hotspots"][0]["name"] == "aten::mm"
    assert found["analysis"]["whatif"] is None


def test_two_traces_are_compared(workspace: Path, tmp_path: Path) -> None:
    slow, fast = reading_steps().write(tmp_path / "slow.json"), reading_steps(read=False).write(tmp_path / "fast.json")
    done = run("compare", slow, fast, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    gone = {change["name"]: change["calls_per_step"] for change in found["difference"]["operators"]}
    assert gone["aten::item"] == [1, 0]
    assert len(found["difference"]["steps"]) == 4
    assert found["ratio"]["median"] == pytest.approx(1, abs=0.01)
    assert (workspace / "reports" / "compare" / found["run_id"] / "report.html").is_file()
    run("analyze", slow, "--no-html", "--quiet")
    folder, _ = found_in(workspace)
    assert run("compare", folder.name, fast).exit_code == 0, "an analyze run and a trace are of one kind"
    single = reading_steps(1).write(tmp_path / "single.json")
    alone = json.loads(run("compare", single, single, "--json").stdout)
    assert alone["ratio"] is None, "one step does not tell how much steps vary"


def test_a_trace_and_a_timed_run_are_not_compared(workspace: Path, tmp_path: Path) -> None:
    folder = workspace / "reports" / "toy" / "20260101-profile"
    stall = record.Stall(
        file="toy.py", line=3, source="if loss > 1e9:", op="aten::item", count_per_step=1, klass="drain", real=True
    )
    profiled = record.ProfileRecord(
        run_id=folder.name,
        created_utc="2026-01-01T00:00:00+00:00",
        command="kernbench profile toy",
        environment=host.environment(),
        status="complete",
        workload=record.WorkloadInfo(name="toy", preset="tiny", dtype="float32", seed=0, unit="rows"),
        steps=record.Steps(seconds=[1e-3] * 5, units_per_step=1),
        stalls=[stall],
    )
    record.write(profiled, folder / "record.json")
    reading_steps(1).write(folder / "trace.json.gz")
    mixed = run("compare", folder.name, folder / "trace.json.gz")
    assert mixed.exit_code == 2
    assert "name two traces" in mixed.stderr
    found = json.loads(run("compare", folder.name, folder.name, "--json").stdout)
    assert found["difference"]["operators"] == [], "a run's own trace is the same as itself"
    assert len(found["difference"]["steps"]) == 1
    rows = json.loads(run("query", folder.name, "select file, line, source from stalls", "--json").stdout)
    assert rows["rows"] == [["toy.py", 3, "if loss > 1e9:"]], "lines are those of the record"


def test_a_folder_that_cannot_be_written_is_said(workspace: Path, tmp_path: Path) -> None:
    (workspace / "reports").write_text("in the way")
    done = run("analyze", reading_steps().write(tmp_path / "one.json"), "--quiet")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "cannot write results" in done.stderr


def test_analysing_needs_no_torch(workspace: Path, tmp_path: Path) -> None:
    file = reading_steps().write(tmp_path / "one.json")
    script = f"""
import sys
from kernbench.cli import app
file = {str(file)!r}
commands = ["analyze", file], ["query", file, "select 1"], ["compare", file, file], ["gate", "--baseline", file, file]
for command in commands:
    try:
        app(command)
    except SystemExit as done:
        assert not done.code, done.code
assert "torch" not in sys.modules, "torch was imported"
assert "triton" not in sys.modules, "triton was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=os.environ.copy())


def test_enrich_takes_the_lines_of_the_line_pass(tmp_path: Path) -> None:
    loaded = trace.load(reading_steps().write(tmp_path / "one.json"))
    place = record.SourceLine(file="model.py", line=7, text="loss.item()", function="step")
    read = record.HostRead(step=0, line=0, op="aten::item", form="item", host_tensor=False, real=True)
    log = record.LineLog(steps=1, lines=[place], reads=[read])
    found = enrich(loaded, log, None, stalls.stalls(loaded, log))
    assert found.line_match == record.LineMatch(waits_per_step=1, matched_per_step=1)
    assert any(finding.source == place for finding in found.findings)
