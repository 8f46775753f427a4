"""Records survive the disk: round trips, atomic writes, and damaged files told in one sentence."""

import json
from pathlib import Path

import pytest

from kernbench import record, runfolder
from kernbench.progress import Silent

ENVIRONMENT = record.Environment(
    device=record.Device(type="cpu", name="test"),
    python="3.11",
    torch="2",
    triton="3",
    kernbench="0",
    platform="linux",
    cpu="cpu",
    cpu_threads=2,
)
INFO = record.WorkloadInfo(name="toy", preset="one", dtype="float32", seed=0, unit="items")


def profile_record(**fields):
    return record.ProfileRecord(
        run_id="r",
        created_utc="2026-01-01T00:00:00+00:00",
        command="kernbench",
        environment=ENVIRONMENT,
        workload=INFO,
        **fields,
    )


def test_round_trip_of_every_kind(tmp_path):
    profile = profile_record(
        stalls=[
            record.Stall(
                file="a.py",
                line=3,
                source="x.item()",
                op="aten::item",
                count_per_step=2,
                klass="would-sync",
                real=False,
            )
        ]
    )
    header = {"run_id": "r", "created_utc": "t", "command": "c", "environment": ENVIRONMENT}
    records = [
        profile,
        record.SwapRecord(**header, workload=INFO, phase=record.PhaseInfo(number=0, title="t"), before=profile),
        record.ParityRecord(**header),
        record.BenchRecord(**header),
        record.CompareRecord(**header, before=profile, after=profile),
    ]
    for number, item in enumerate(records):
        path = tmp_path / f"{number}.json"
        record.write(item, path)
        assert record.read(path) == item
        assert json.loads(path.read_text())["kind"] == record.kind(item)


def test_contract_of_the_file(tmp_path):
    record.write(profile_record(), tmp_path / "record.json")
    top = json.loads((tmp_path / "record.json").read_text())
    assert top["schema"] == 1
    for key in ("kind", "run_id", "created_utc", "command", "git", "environment", "workload", "steps", "throughput",
                "hotspots", "stalls", "launches_per_step", "idle", "overhead"):  # fmt: skip
        assert key in top


def test_class_is_the_key_of_a_stall():
    stall = record.Stall(file="a", line=1, source="s", op="o", count_per_step=1, klass="drain", real=True)
    assert record.to_builtins(stall)["class"] == "drain"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ('{"schema": 1, "kind": "nonsense"}', "damaged"),
        ('{"schema": 99, "kind": "profile"}', "upgrade kernbench"),
        ('{"schema": 1, "kind": "profile", "run_id": 5}', "damaged"),
    ],
)
def test_damaged_record_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(record.RecordError, match=reason) as caught:
        record.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_record(tmp_path):
    with pytest.raises(record.RecordError, match="cannot read"):
        record.read(tmp_path / "record.json")


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    record.write(profile_record(), path)
    old = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        record.write(profile_record(warnings=["new"]), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_behind_the_last_step_of_a_write_is_the_interrupt(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    replace = Path.replace

    def interrupted(self, target):
        replace(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.write(profile_record(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert record.read(path).run_id == "r"


def test_an_interrupt_while_a_finished_stage_is_written_ends_the_run_interrupted(tmp_path, monkeypatch):
    run = runfolder.Run(tmp_path, profile_record(), Silent())
    replace = Path.replace

    def interrupted_once(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        replace(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted_once)
    with pytest.raises(KeyboardInterrupt) as caught, run.stage("time"):
        pass
    assert caught.value.__notes__ == ["kernbench report r shows what was finished"]
    found = record.read(run.record_path)
    assert found.status == "interrupted"
    assert [(stage.name, stage.status) for stage in found.stages] == [("time", "done")]
