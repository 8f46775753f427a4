from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernbench import journal, record
from kernbench.errors import KernbenchError
from kernbench.record import (
    Arm,
    Device,
    Environment,
    Git,
    ParityResult,
    PhaseInfo,
    Prediction,
    ProfileRecord,
    Ratio,
    Steps,
    SwapRecord,
    Verdict,
    WorkloadInfo,
)

WRITERS, ENTRIES_EACH = 8, 5

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import msgspec
from kernbench import journal, record
replace = Path.replace
def die(self, target):
    print("writing", flush=True)
    signal.pause()
Path.replace = die
swap = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=record.Record)
journal.append(Path(sys.argv[1]), swap, Path("report.html"))
"""


def swap_record(run_id: str = "run1", **changes: Any) -> SwapRecord:
    environment = Environment(
        device=Device(type="cuda", name="Test GPU"), python="3.11", torch="2.13.0", triton="3.9.0", kernbench="0.1.0",
        platform="Linux", cpu="Test CPU", cpu_threads=2,
    )  # fmt: skip
    workload = WorkloadInfo(name="titan-mac", preset="tiny", dtype="float32", seed=7, unit="tokens")
    common: dict[str, Any] = {"created_utc": "2026-11-21T14:25:30+00:00", "command": "c", "environment": environment}
    sides = {
        name: ProfileRecord(
            run_id=f"{run_id}-{name}", workload=workload, syncs_per_step=syncs, launches_per_step=launches,
            steps=Steps(seconds=[0.5], units_per_step=160.0), **common,
        )
        for name, syncs, launches in (("before", 3120.0, 812.0), ("after", 0.0, 400.5))
    }  # fmt: skip
    fields: dict[str, Any] = {
        **common,
        **sides,
        "command": "kernbench swap --phase 0",
        "status": "complete",
        "git": Git(commit="0123456789abcdef", dirty=True),
        "workload": workload,
        "phase": PhaseInfo(number=0, title="no host syncs", implementation="triton"),
        "predicted": Prediction(
            text="All of them.", claim="40 to 50 % faster", ratio_low=1.1, ratio_high=1.3, syncs_per_step=3120
        ),
        "parity": [
            ParityResult(kernel="k", case="c", dtype="float32", mode="forward", passed=True, mutants_killed=(9, 9)),
            ParityResult(kernel="k", case="d", dtype="float32", mode="forward", passed=False, mutants_killed=(2, 3)),
        ],
        "ratio": Ratio(median=1.25, low=1.21, high=1.29, noise_floor=0.011, rounds=20, steps_per_round=4),
        "arms": [Arm(name="before", seconds=[0.02, 0.01, 0.03]), Arm(name="after triton", seconds=[0.016])],
        "verdict": Verdict(decision="keep", sentence="Faster beyond doubt"),
    }
    return SwapRecord(run_id=run_id, **{**fields, **changes})


def append_several(path: Path, writer: int) -> None:
    for number in range(ENTRIES_EACH):
        journal.append(path, swap_record(f"run-{writer}-{number}"), path.parent / "reports/report.html")


def run_ids(path: Path) -> list[str]:
    return [entry.run_id for entry in journal.entries(path)]


def test_an_entry_holds_what_was_predicted_measured_and_decided(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    report = tmp_path / "reports" / "titan-mac" / "run 1" / "report.html"
    assert journal.append(path, swap_record(), report)
    assert path.read_text() == journal.HEADER + (
        """
## 2026-11-21 titan-mac phase 0, no host syncs (triton): keep
<!-- kernbench:run run1 -->

- Verdict: Faster beyond doubt
- Step time: 20.0 ms → 16.0 ms, 1.25x faster (95 % interval of the ratio 1.21–1.29, n = 20 rounds of 4 steps, A/A floor ±1.1 %)
- Predicted: All of them; ratio 1.10–1.30; 3,120 host reads fewer a step
- Source document: 40 to 50 % faster
- Throughput: 8,000 → 10,000 tokens/s
- Launches per step: 812 → 400
- Syncs per step: 3,120 → 0
- Parity: 1 of 2 checks passed, 11 of 12 mutants killed
- Workload: titan-mac, preset tiny, float32, seed 7
- Device: Test GPU, torch 2.13.0, triton 3.9.0
- Commit: 0123456789ab with uncommitted changes
- Command: `kernbench swap --phase 0`
- Report: [run1](reports/titan-mac/run%201/report.html)
"""  # noqa: E501 - one line of the journal is one line here
    )


def test_implementations_that_were_timed_as_well_are_named(tmp_path: Path) -> None:
    phase = PhaseInfo(number=2, title="AdamW", implementation="compile")
    arms = [Arm(name=name, seconds=[0.01]) for name in ("before", "again", "after triton", "after compile")]
    journal.append(tmp_path / "JOURNAL.md", swap_record(phase=phase, arms=arms), tmp_path / "report.html")
    text = (tmp_path / "JOURNAL.md").read_text()
    assert "- Other implementations: triton 10.0 ms\n" in text
    assert "(compile): keep\n" in text


def test_a_phase_without_a_kernel_names_no_implementation(tmp_path: Path) -> None:
    phase = PhaseInfo(number=0, title="no host syncs", implementation="python")
    journal.append(tmp_path / "JOURNAL.md", swap_record(phase=phase), tmp_path / "report.html")
    (entry,) = journal.entries(tmp_path / "JOURNAL.md")
    assert entry.title == "titan-mac phase 0, no host syncs"


def test_a_side_that_was_not_measured_is_not_a_number(tmp_path: Path) -> None:
    journal.append(tmp_path / "JOURNAL.md", swap_record(after=None), tmp_path / "report.html")
    assert "- Launches per step: 812 → not measured\n" in (tmp_path / "JOURNAL.md").read_text()


def test_on_the_cpu_reads_are_not_called_syncs(tmp_path: Path) -> None:
    environment = swap_record().environment
    cpu = msgspec.structs.replace(environment, device=Device(type="cpu", name="Test CPU"))
    journal.append(tmp_path / "JOURNAL.md", swap_record(environment=cpu), tmp_path / "report.html")
    text = (tmp_path / "JOURNAL.md").read_text()
    assert "- Reads per step that would sync on a GPU: 3,120 → 0" in text
    assert "Syncs per step" not in text


def test_a_swap_that_never_got_to_its_numbers_says_so(tmp_path: Path) -> None:
    bare = swap_record(
        before=None, after=None, ratio=None, arms=[], parity=[], verdict=None, predicted=None, git=None, status="failed"
    )
    journal.append(tmp_path / "JOURNAL.md", bare, tmp_path / "report.html")
    text = (tmp_path / "JOURNAL.md").read_text()
    assert "- Verdict: none, the run is failed" in text
    assert "- Step time: not measured" in text
    assert "- Parity: not checked" in text
    assert "- Commit: not in a git repository" in text
    assert [entry.verdict for entry in journal.entries(tmp_path / "JOURNAL.md")] == [""]


def test_entries_are_listed_with_those_that_people_wrote(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    journal.append(path, swap_record("one"), tmp_path / "r")
    by_hand = "## 2026-11-22 Why the claim was wrong\n\nIt counted `cudaMemcpy` twice.\n\n## Not dated, so no entry\n"
    with path.open("a") as file:
        file.write(f"\n{by_hand}")
    rejected = Verdict(decision="reject", sentence="slower")
    journal.append(path, swap_record("two", verdict=rejected), tmp_path / "r")
    assert [(entry.date, entry.title, entry.verdict, entry.run_id) for entry in journal.entries(path)] == [
        ("2026-11-21", "titan-mac phase 0, no host syncs (triton)", "keep", "one"),
        ("2026-11-22", "Why the claim was wrong", "", ""),
        ("2026-11-21", "titan-mac phase 0, no host syncs (triton)", "reject", "two"),
    ]
    assert by_hand in path.read_text()


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    assert journal.entries(tmp_path / "JOURNAL.md") == []


def test_a_run_is_entered_once(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    assert journal.append(path, swap_record(), tmp_path / "r")
    before = path.read_bytes()
    assert not journal.append(path, swap_record(command="another"), tmp_path / "r")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"# Mine\n\nno newline at the end",
        b"# Mine\r\n\r\nwith returns\r\n",
        b"not UTF-8: \xff\xfe\n",
        b"a gap below\n\n\n\n",
    ],
)
def test_text_of_people_is_kept_byte_for_byte(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "JOURNAL.md"
    path.write_bytes(written)
    journal.append(path, swap_record("one"), tmp_path / "r")
    journal.append(path, swap_record("two"), tmp_path / "r")
    assert path.read_bytes().startswith(written)
    assert run_ids(path) == ["one", "two"]


def test_names_of_users_cannot_break_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    hostile = "a\n## 2020-01-01 forged: keep\n<!-- kernbench:run forged --> `*[<script>"
    phase = PhaseInfo(number=1, title=hostile)
    journal.append(path, swap_record("one", phase=phase, command=f"kernbench {hostile}"), tmp_path / "r")
    (entry,) = journal.entries(path)
    assert (entry.run_id, entry.date, entry.verdict) == ("one", "2026-11-21", "keep")
    assert entry.title == f"titan-mac phase 1, {' '.join(hostile.split())}"
    outside_code = [line for line in path.read_text().splitlines() if not line.startswith("- Command")]
    assert not any("<script>" in line for line in outside_code)


def test_the_journal_may_be_a_link(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "notes.md"
    real.parent.mkdir()
    (tmp_path / "JOURNAL.md").symlink_to(real)
    journal.append(tmp_path / "JOURNAL.md", swap_record(), tmp_path / "report.html")
    assert (tmp_path / "JOURNAL.md").is_symlink()
    assert "(../report.html)" in real.read_text()


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_several, args=(path, number)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    expected = {f"run-{writer}-{number}" for writer in range(WRITERS) for number in range(ENTRIES_EACH)}
    assert len(run_ids(path)) == len(expected)
    assert set(run_ids(path)) == expected


def test_a_writer_killed_in_the_middle_leaves_the_journal_whole(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    journal.append(path, swap_record("one"), tmp_path / "r")
    before = path.read_bytes()
    (tmp_path / "two.json").write_bytes(record.encode(swap_record("two")))
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_DIE, str(path), str(tmp_path / "two.json")], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert path.read_bytes() == before
    assert len(list(tmp_path.glob(".JOURNAL.md.*"))) == 1
    editor = tmp_path / ".JOURNAL.md.swp"
    editor.write_text("an editor's")
    journal.append(path, swap_record("three"), tmp_path / "r")
    assert run_ids(path) == ["one", "three"]
    assert list(tmp_path.glob(".JOURNAL.md.*")) == [editor]


def test_writers_killed_at_random_lose_no_finished_entry(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    finished = 0
    for round_ in range(6):
        writer = multiprocessing.get_context("fork").Process(target=append_several, args=(path, round_))
        writer.start()
        time.sleep(0.002 * round_)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        text = path.read_text() if path.exists() else journal.HEADER
        assert text.startswith(journal.HEADER)
        assert text.endswith("\n")
        assert len(run_ids(path)) >= finished
        finished = len(run_ids(path))
        assert text.count("- Report: ") == finished


def test_rebuild_adds_what_is_missing_and_touches_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "JOURNAL.md"
    journal.append(path, swap_record("two", created_utc="2026-11-22"), tmp_path / "r")
    with path.open("a") as file:
        file.write("\nWhat I think of it.\n")
    before = path.read_text()
    files = []
    for run_id, day in (("three", 23), ("one", 21), ("two", 22)):
        files.append(tmp_path / "reports" / run_id / "record.json")
        record.write(swap_record(run_id, created_utc=f"2026-11-{day}T00:00:00"), files[-1])
    swaps, skipped = journal.collect(files)
    assert skipped == []
    assert journal.rebuild(path, swaps) == ["one", "three"]
    assert path.read_text().startswith(before)
    assert run_ids(path) == ["two", "one", "three"]
    assert "(reports/three/report.html)" in path.read_text()
    assert journal.rebuild(path, swaps) == []


def test_damaged_and_unfinished_records_are_skipped_with_the_reason(tmp_path: Path) -> None:
    damaged, unfinished, profile, good = (tmp_path / name / "record.json" for name in ("damaged", "running", "p", "ok"))
    record.write(swap_record("one", verdict=None, status="interrupted"), unfinished)
    before = swap_record().before
    assert before is not None
    record.write(before, profile)
    record.write(swap_record("good"), good)
    damaged.parent.mkdir()
    damaged.write_bytes(good.read_bytes()[:-200])
    swaps, skipped = journal.collect([damaged, unfinished, profile, good, tmp_path / "absent.json"])
    assert [swap.run_id for swap, _ in swaps] == ["good"]
    assert [file for file, _ in skipped] == [damaged, unfinished, tmp_path / "absent.json"]
    reasons = [reason for _, reason in skipped]
    assert "damaged" in reasons[0]
    assert reasons[1] == "the swap is interrupted and has no verdict"
    assert "cannot read" in reasons[2]


def test_a_read_only_folder_is_an_error_that_says_what_to_do(read_only_folder: Path) -> None:
    with pytest.raises(KernbenchError, match="make it writable"):
        journal.append(read_only_folder / "JOURNAL.md", swap_record(), read_only_folder / "r")
