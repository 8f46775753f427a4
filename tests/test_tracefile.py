"""Traces in pieces: cut anywhere, compressed, decoded by two processes, in dialects old and new."""

import gzip
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kineto_builder import KinetoBuilder

from kernbench.errors import KernbenchError
from kernbench.traces import decodehelper, kineto, trace, tracefile

Writer = Callable[[dict[str, Any]], bytes]
KINETO = {"indent": 2}
COMPACT = {"separators": (",", ":")}


def document() -> dict[str, Any]:
    """Some hundred events with what looks like boundaries between events but is none."""
    builder = KinetoBuilder()
    for number in range(150):
        builder.op('aten::"},{"' if number % 7 == 0 else f"aten::op{number % 5}", number * 10, number * 10 + 9)
        builder.launch("kernel}, {", number * 10 + 1, number * 10 + 3, number * 10 + 8)
        builder.events[-1]["args"]["parts"] = [{"a": 1}, {"b": [{"c": 2}, {}]}]
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA Test"}, {"id": 1, "name": "Other"}],
        "traceEvents": builder.events,
        "distributedInfo": {"rank": 5, "world_size": 6, "pg_config": [{"ranks": [0]}, {"ranks": [1]}]},
        "memoryProfile": [{"x": 1}, {"y": 2}],
    }


def same(one: kineto.Tables, other: kineto.Tables) -> bool:
    """Whether two readings agree in all but the order in which they number names."""
    return all(
        [one.names[index] for index in first.name] == [other.names[index] for index in second.name]
        and np.array_equal(first.start_ns, second.start_ns)
        and np.array_equal(first.end_ns, second.end_ns)
        and all(np.array_equal(first.numbers[key], second.numbers[key]) for key in first.numbers)
        for first, second in ((one.ops, other.ops), (one.calls, other.calls), (one.device, other.device))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> kineto.Tables:
    path = tmp_path_factory.mktemp("whole") / "whole.json"
    path.write_text(json.dumps(document()))
    return kineto.read(path)


@pytest.mark.parametrize("window", [16, 100, 500, 5_000, 50_000])
@pytest.mark.parametrize("layout", [KINETO, COMPACT, {}], ids=["indented", "compact", "default"])
def test_pieces_of_any_size_give_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables, window: int, layout: dict[str, Any]
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document(), **layout))
    monkeypatch.setattr(tracefile, "WINDOW", window)
    monkeypatch.setattr(tracefile, "_COMPRESSED_READ", window // 3)
    found = kineto.read(path)
    assert same(found, whole)
    assert found.events == 451
    assert found.distributed["rank"] == 5, "the metadata after the events"
    assert found.device_properties[0]["name"] == "NVIDIA Test", "and before them"


def test_what_looks_just_like_the_next_event_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        {"ph": "X", "cat": "cpu_op", "name": f"op{number}", "ts": number, "dur": 1,
         "args": {"inner": [{"name": "a"}, {"ph": "X", "cat": "cpu_op", "name": "no event", "ts": 1}] * 20}}
        for number in range(40)
    ]  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    for window in (100, 1500, 20_000):
        monkeypatch.setattr(tracefile, "WINDOW", window)
        assert kineto.read(path).names == [f"op{number}" for number in range(40)]


def test_a_file_is_decoded_in_pieces_and_not_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = KinetoBuilder()
    for number in range(500):
        builder.op("aten::add", number, number + 1)
    path = builder.write(tmp_path / "plain.json.gz")
    monkeypatch.setattr(tracefile, "WINDOW", 4096)
    pieces: list[int] = []
    tracefile.read(path, pieces.append, len)
    assert sum(pieces) == 501
    assert len(pieces) > 10
    assert max(pieces) < 100


def test_members_of_a_gzip_file_follow_each_other(tmp_path: Path, whole: kineto.Tables) -> None:
    text = json.dumps(document()).encode()
    path = tmp_path / "members.json.gz"
    path.write_bytes(gzip.compress(text[:5000]) + gzip.compress(b"") + gzip.compress(text[5000:]) + bytes(600))
    assert same(kineto.read(path), whole)
    path.write_bytes(gzip.compress(text) + b"something else")
    with pytest.raises(KernbenchError, match="damaged"):
        kineto.read(path)


def test_text_that_fills_the_window_exactly_is_no_cut_off_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(document()).encode()
    path = tmp_path / "exact.json.gz"
    path.write_bytes(gzip.compress(text))
    for parts in (1, 2, 4):
        monkeypatch.setattr(tracefile, "WINDOW", len(text) // parts)
        assert kineto.read(path).events == 451


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_helper_process_decodes_the_latter_part_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables, compress: bool, bare: bool
) -> None:
    path = tmp_path / "large.json"
    found = document()
    text = json.dumps(found["traceEvents"] if bare else found).encode()
    path.write_bytes(gzip.compress(text) if compress else text)
    helped = use_helper(monkeypatch)
    tables = kineto.read(path)
    assert tables.events == 451
    assert tables.names == whole.names
    assert bare or same(tables, whole)
    assert len(helped) == 1 and 100 < helped[0] < 351, "events that came from the helper"


def test_the_helper_may_begin_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(document()))
    helped = use_helper(monkeypatch)
    size = path.stat().st_size
    for split in (1, 60, size // 3, size - 2000, size - 1, 2 * size):
        monkeypatch.setattr(decodehelper, "_split", lambda *_, at=split: at)
        assert same(kineto.read(path), whole), split
    assert len(helped) >= 1


def test_a_helper_that_took_something_else_for_an_event_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = [{"ph": "X", "cat": "cpu_op", "name": "no event", "ts": number} for number in range(40)]
    events = [
        {"ph": "X", "cat": "cpu_op", "name": f"op{number}", "ts": number, "dur": 1, "args": {"inner": inner}}
        for number in range(40)
    ]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"traceEvents": events}))
    use_helper(monkeypatch)
    assert kineto.read(path).names == [f"op{number}" for number in range(40)]


def test_a_helper_that_dies_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables
) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(document()))
    helped = use_helper(monkeypatch)
    part = decodehelper.Helper.part

    def killed(self: decodehelper.Helper) -> decodehelper.Part | None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return part(self)

    monkeypatch.setattr(decodehelper.Helper, "part", killed)
    assert same(kineto.read(path), whole)
    assert helped == []


def test_a_helper_that_cannot_start_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables
) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(document()))
    helped = use_helper(monkeypatch)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    assert same(kineto.read(path), whole)
    assert helped == []


def test_a_helper_that_was_prepared_is_the_one_that_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: kineto.Tables
) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(document()))
    helped = use_helper(monkeypatch)
    monkeypatch.setattr(decodehelper, "_HEAD_START_IF_PREPARED", 0)
    decodehelper.prepare(tmp_path / "absent.json")
    monkeypatch.setattr(decodehelper, "_SMALLEST", path.stat().st_size)
    decodehelper.prepare(path)
    assert decodehelper._prepared == {}, "neither an absent file nor a small one needs it"
    monkeypatch.setattr(decodehelper, "_SMALLEST", 0)
    decodehelper.prepare(path)
    assert list(decodehelper._prepared) == [path]
    monkeypatch.setattr(decodehelper, "Helper", None)
    assert same(kineto.read(path), whole)
    assert len(helped) == 1
    assert decodehelper._prepared == {}


def test_damage_in_the_helpers_part_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(document())
    path = tmp_path / "large.json"
    use_helper(monkeypatch)
    for at in range(2000, len(text) - 2000, 4001):
        path.write_text(text[:at] + '"ts": [' + text[at:])
        with pytest.raises(KernbenchError, match="no JSON|no Kineto trace"):
            kineto.read(path)


def use_helper(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small pieces, and a helper whatever the file's size; returns how many events came from it, one number a file."""
    monkeypatch.setattr(tracefile, "WINDOW", 3000)
    monkeypatch.setattr(tracefile, "_COMPRESSED_READ", 500)
    monkeypatch.setattr(decodehelper, "_HEAD_START", 0)
    monkeypatch.setattr(decodehelper, "_SMALLEST", 0)
    monkeypatch.setattr(decodehelper, "_SMALLEST_COMPRESSED", 500)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    received: list[int] = []
    part = decodehelper.Helper.part

    def counted(self: decodehelper.Helper) -> decodehelper.Part | None:
        found = part(self)
        if found is not None:
            received.append(sum(piece.events for piece in found.pieces))
        return found

    monkeypatch.setattr(decodehelper.Helper, "part", counted)
    return received


def test_memory_grows_with_the_columns_and_not_with_the_text(tmp_path: Path) -> None:
    """Decoded structures of 40,000 events are some 20 MB; a piece of 200 kB needs far less."""
    import tracemalloc

    builder = KinetoBuilder()
    for number in range(40_000):
        builder.op("aten::add", number, number + 1)
    path = builder.write(tmp_path / "many.json")
    del builder
    pytest.MonkeyPatch().setattr(tracefile, "WINDOW", 1 << 17)
    tracemalloc.start()
    tables = kineto.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tables.ops) == 40_000
    assert peak < 12e6


# --- dialects ---------------------------------------------------------------------------------------------------------


def test_the_dialect_of_pytorch_before_1_11(tmp_path: Path) -> None:
    common = {"ph": "X", "pid": 1, "tid": "main"}
    events = [
        {**common, "cat": "Operator", "name": "aten::mm", "ts": 1, "dur": 20, "args": {"Sequence number": 4}},
        {**common, "cat": "Runtime", "name": "cudaLaunchKernel", "ts": 3, "dur": 4, "args": {"correlation": 9}},
        {**common, "cat": "Kernel", "name": "gemm", "pid": 0, "tid": "stream 7", "ts": 15, "dur": 5,
         "args": {"correlation": 9, "stream": 7, "device": 0, "external id": 2}},
        {**common, "cat": "Memcpy", "name": "Memcpy HtoD", "pid": 0, "tid": "stream 7", "ts": 21, "dur": 1,
         "args": {"correlation": 9, "stream": 7, "device": 0, "bytes": 16}},
    ]  # fmt: skip
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"traceEvents": events}))
    loaded = trace.load(path)
    assert loaded.device.kind.tolist() == [trace.KERNEL, trace.COPY]
    assert loaded.device.op.tolist() == [0, 0]
    assert loaded.device.bytes.tolist() == [-1, 16]


@pytest.mark.parametrize(
    ("category", "launch", "number"),
    [("async_gpu", "cudaLaunchKernel", 77), ("ac2g", "hipLaunchKernel", "77"), ("ac2g", "cuLaunchKernel", 77.0)],
)
def test_flows_tell_the_launch_where_no_correlation_is_recorded(
    tmp_path: Path, category: str, launch: str, number: Any
) -> None:
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1, "dur": 20},
        {"ph": "X", "cat": "cuda_runtime", "name": launch, "pid": 1, "tid": 1, "ts": 3, "dur": 4},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 15, "dur": 5, "args": {"stream": 7}},
        {"ph": "X", "cat": "kernel", "name": "orphan", "pid": 0, "tid": 7, "ts": 25, "dur": 5, "args": {"stream": 7}},
        {"ph": "s", "cat": category, "id": number, "pid": 1, "tid": 1, "ts": 3, "name": category},
        {"ph": "f", "cat": category, "id": number, "pid": 0, "tid": 7, "ts": 15, "name": category, "bp": "e"},
        {"ph": "s", "cat": "fwdbwd", "id": 5, "pid": 1, "tid": 1, "ts": 3, "name": "fwdbwd"},
    ]
    path = tmp_path / "flows.json"
    path.write_text(json.dumps({"traceEvents": events}))
    loaded = trace.load(path)
    assert loaded.device.op.tolist() == [0, -1]
    assert loaded.device.call.tolist() == [1, -1]


def test_rocm_records_sizes_with_the_call_and_streams_as_handles(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "cuda_runtime", "name": "hipMemcpyWithStream", "pid": 1, "tid": 1, "ts": 3, "dur": 30,
         "args": {"stream": "0x0", "correlation": 117, "size": "2560", "kind": "1"}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Host -> Device)", "pid": 2, "tid": 0, "ts": 9, "dur": 20,
         "args": {"device": 2, "stream": 0, "correlation": 117, "kind": "HtoD"}},
    ]  # fmt: skip
    path = tmp_path / "rocm.json"
    path.write_text(json.dumps({"traceEvents": events}))
    loaded = trace.load(path)
    assert loaded.device.bytes.tolist() == [2560]
    assert loaded.info.vendor == "amd"
    assert len(loaded.sync_calls) == 1


@pytest.mark.parametrize("value", [2**64 - 1, -(2**70), "0x1f", "", None, 1e300, "9" * 50])
def test_numbers_that_fit_no_column_are_unknown(tmp_path: Path, value: Any) -> None:
    builder = KinetoBuilder()
    builder.launch("kernel", 1, 5, 9)
    builder.events[-1]["args"]["stream"] = value
    loaded = trace.load(builder.write(tmp_path / "odd.json"))
    assert loaded.device.stream.tolist() == [-1]
    assert loaded.device.call.tolist() == [0]
