"""Traced steps, on the CPU here and on a GPU under the marker gpu."""

import gc
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kernbench import capture
from kernbench.errors import KernbenchError
from kernbench.traces import trace

CPU = torch.device("cpu:0")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


class Multiply:
    """Multiplies matrices; reads one value in each step."""

    units_per_step = 1.0

    def __init__(self, device: Any = CPU) -> None:
        self.x = torch.ones(32, 32, device=device)
        self.seen: list[int] = []

    def step(self, index: int) -> Any:
        self.seen.append(index)
        return (self.x @ self.x).sum().item()

    def state_dict(self) -> Any:
        return {}


def events_of(path: Any) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_each_step_is_annotated(tmp_path: Path) -> None:
    built, path = Multiply(), tmp_path / "run" / "trace.json.gz"
    seconds = capture.trace_steps(built, first=5, count=3, device=CPU, path=path)
    assert built.seen == [5, 5, 6, 7], "the first one ran once before, for the profiler's sake"
    assert len(seconds) == 3
    assert all(value > 0 for value in seconds)
    events = events_of(path)
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in names if name.startswith("kernbench")] == [
        f"kernbench.step#{index}" for index in (5, 6, 7)
    ]
    whole = trace.load(path)
    assert [int((whole.host.step == step).sum()) > 0 for step in (-1, 0, 1, 2)] == [True] * 4
    counts = [
        int((whole.host.name[whole.host.step == step] == whole.names.index("aten::mm")).sum()) for step in range(3)
    ]
    assert counts == [1, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["trace.json.gz"]


def test_detailed_steps_need_no_step_before_them(tmp_path: Path) -> None:
    built = Multiply()
    capture.trace_steps(built, first=5, count=2, device=CPU, path=tmp_path / "trace.json.gz", details=True)
    assert built.seen == [5, 6]


def test_no_garbage_is_collected_while_steps_are_traced(tmp_path: Path) -> None:
    class Asking(Multiply):
        def step(self, index: int) -> Any:
            collecting.append(gc.isenabled())

    collecting: list[bool] = []
    capture.trace_steps(Asking(), first=0, count=2, device=CPU, path=tmp_path / "trace.json.gz")
    assert collecting == [False] * 3
    assert gc.isenabled()


def test_a_failing_step_leaves_no_file_and_raises_its_own_error(tmp_path: Path) -> None:
    class Failing(Multiply):
        def step(self, index: int) -> None:
            raise KeyError("from the workload")

    with pytest.raises(KeyError, match="from the workload"):
        capture.trace_steps(Failing(), first=0, count=1, device=CPU, path=tmp_path / "trace.json.gz")
    assert list(tmp_path.iterdir()) == []
    assert capture.trace_steps(Multiply(), first=0, count=1, device=CPU, path=tmp_path / "trace.json.gz")


def test_trimmed_trace_of_real_steps(tmp_path: Path) -> None:
    full, small = tmp_path / "full.json.gz", tmp_path / "small.json.gz"
    capture.trace_steps(Multiply(), first=0, count=3, device=CPU, path=full)
    capture.trim(full, small)
    events = events_of(small)
    assert [event["name"] for event in events if event.get("cat") == "user_annotation"] == ["kernbench.step#2"]
    assert sum(event["name"] == "aten::mm" for event in events) == 1
    capture.trim(full, small, steps=2)
    assert sum(event["name"] == "aten::mm" for event in events_of(small)) == 2


def test_a_trimmed_trace_keeps_stacks_and_memory(tmp_path: Path) -> None:
    full, small = tmp_path / "full.json", tmp_path / "small.json.gz"
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True, profile_memory=True
    ) as profiler:
        for index in range(3):
            with torch.profiler.record_function(f"kernbench.step#{index}"):
                Multiply().step(index)
    profiler.export_chrome_trace(str(full))
    capture.trim(full, small)
    whole, kept = trace.load(full), trace.load(small)
    assert kept.info.stacks
    assert kept.info.memory_events
    rows = {
        name: [one.sources[index] for index in one.source[one.host.name == one.names.index("aten::mm")].tolist()]
        for name, one in (("whole", whole), ("kept", kept))
    }
    assert rows["kept"] == rows["whole"][-1:]


def complete(category: Any, name: Any, start: Any, duration: Any, *, correlation: Any = None) -> Any:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 1,
        "tid": 1,
        "args": arguments,
    }


def test_trim_keeps_device_work_that_runs_after_its_step(tmp_path: Path) -> None:
    flow = {"ph": "s", "cat": "ac2g", "name": "ac2g", "pid": 1, "tid": 1}
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "python"}},
        complete("Trace", "PyTorch Profiler (0)", 0, 500),
        complete("user_annotation", "kernbench.step#0", 0, 100),
        complete("cuda_runtime", "cudaLaunchKernel", 50, 5, correlation=1),
        complete("user_annotation", "kernbench.step#1", 100, 100),
        complete("python_function", "step", 100, 90),
        complete("python_function", "main", -50, 900),
        complete("python_function", "earlier", 10, 20),
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 20, "args": {"Bytes": 8}},
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 120, "args": {"Bytes": 8}},
        complete("cuda_runtime", "cudaLaunchKernel", 150, 5, correlation=2),
        complete("kernel", "late, of step 0", 160, 10, correlation=1),
        complete("kernel", "of step 1", 230, 10, correlation=2),
        complete("gpu_user_annotation", "kernbench.step#1", 160, 10),
        {**flow, "id": 1, "ts": 50},
        {**flow, "id": 2, "ts": 150},
        {"ph": "i", "name": "Record Window End", "ts": 500, "pid": 1, "tid": 1},
    ]
    source, target = tmp_path / "trace.json", tmp_path / "small.json.gz"
    source.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    capture.trim(source, target)
    kept = events_of(target)
    assert [(event["name"], event.get("ts")) for event in kept] == [
        ("process_name", None),
        ("kernbench.step#1", 100),
        ("step", 100),
        ("main", -50),
        ("[memory]", 120),
        ("cudaLaunchKernel", 150),
        ("of step 1", 230),
        ("kernbench.step#1", 160),
        ("ac2g", 150),
    ]
    assert json.loads(gzip.decompress(target.read_bytes()))["schemaVersion"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"\x1f\x8bbroken", "cannot read"),
        (gzip.compress(b'{"traceEvents": [' * 50, mtime=0)[:-9], "cannot read"),
        (b"[]", "no Kineto trace"),
        (b'{"traceEvents": []}', "no step of kernbench"),
    ],
    ids=["empty", "gzip header only", "gzip cut off", "list", "no step"],
)
def test_trim_of_damaged_input(tmp_path: Path, content: Any, message: Any) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(content)
    with pytest.raises(KernbenchError, match=message):
        capture.trim(path, tmp_path / "small.json.gz")
    assert not (tmp_path / "small.json.gz").exists()


def test_trim_of_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(KernbenchError, match="cannot read"):
        capture.trim(tmp_path / "absent.json.gz", tmp_path / "small.json.gz")


class TestOnGpu:
    pytestmark = gpu
    device = torch.device("cuda", 0)

    def program(self, *lines: Any) -> Any:
        """A workload whose step runs these statements, each on a line of its own, and the number of its first line."""
        test = self

        class Program:
            units_per_step = 1.0

            def __init__(self) -> None:
                self.x = torch.randn(64, 64, device=test.device)
                self.mask = self.x > 0
                self.index = torch.ones((), dtype=torch.long, device=test.device)
                self.host = torch.tensor(1.0)

            def step(self, index: int) -> None:
                for line in lines:
                    line(self)

            def state_dict(self) -> Any:
                return {}

        return Program

    def test_trace_holds_kernels_and_sync_events(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.json.gz"
        capture.trace_steps(Multiply(self.device), first=0, count=2, device=self.device, path=path)
        categories = {event.get("cat") for event in events_of(path)}
        assert {"kernel", "cuda_runtime", "cuda_sync", "user_annotation", "cpu_op"} <= categories

    @pytest.mark.parametrize(
        ("line", "operator", "form"),
        [
            (lambda p: p.index.item(), "aten::item", "item"),
            (lambda p: float(p.index), "aten::item", "float"),
            (lambda p: bool((p.x > 0).any()), "aten::is_nonzero", "if"),
            (lambda p: p.index.view(1).tolist(), "aten::tolist", "tolist"),
            (lambda p: p.x[p.mask], "aten::index", "mask"),
            (lambda p: p.x.nonzero(), "aten::nonzero", "nonzero"),
            (lambda p: torch.where(p.mask), "aten::where", "where"),
            (lambda p: p.x.masked_select(p.mask), "aten::masked_select", "masked_select"),
            (lambda p: p.x.cpu(), "aten::_to_copy", "copy"),
            (lambda p: torch.tensor([1.0, 2.0], device=p.x.device), "aten::_to_copy", "copy"),
            (lambda p: p.host.to(p.x.device), "aten::_to_copy", "copy"),
            (lambda p: torch.equal(p.x, p.x + 1), "aten::equal", "equal"),
            (lambda p: torch.cuda.synchronize(), "torch.cuda.synchronize", "synchronize"),
            (lambda p: torch.cuda.current_stream().synchronize(), "torch.cuda.Stream.synchronize", "synchronize"),
            (lambda p: str(p.x), "Tensor.__repr__", "print"),
        ],
    )
    def test_each_form_is_one_real_read_with_its_wait(self, line: Any, operator: Any, form: Any) -> None:
        log = capture.line_pass(self.program(line), warmup=2, count=3, device=self.device)
        assert [(read.op, read.form, read.real, read.host_tensor) for read in log.reads] == [
            (operator, form, True, False)
        ] * 3
        assert {log.lines[read.line].file for read in log.reads} == {"tests/test_capture.py"}
        assert all(read.wait_seconds is not None and read.wait_seconds >= 0 for read in log.reads), log.notes

    @pytest.mark.parametrize(
        "line",
        [
            lambda p: p.x.__setitem__(p.mask, 0.0),
            lambda p: p.x.to("cpu", non_blocking=True),
            lambda p: p.x.masked_fill(p.mask, 0.0),
            lambda p: torch.where(p.mask, p.x, 0.0),
            lambda p: torch.zeros(3, device=p.x.device).add_(p.host),
        ],
    )
    def test_what_does_not_synchronise_is_not_reported(self, line: Any) -> None:
        log = capture.line_pass(self.program(line), warmup=2, count=2, device=self.device)
        assert log.reads == []

    def test_reads_of_host_tensors_are_no_stalls(self) -> None:
        log = capture.line_pass(self.program(lambda p: p.host.item()), warmup=1, count=2, device=self.device)
        assert [(read.host_tensor, read.real, read.step) for read in log.reads] == [(True, False, 1), (True, False, 2)]

    def test_reads_of_another_thread_carry_its_name(self) -> None:
        def beside(program: Any) -> None:
            worker = threading.Thread(target=lambda: [program.index.item() for _ in range(2)], name="loader")
            worker.start()
            worker.join()

        log = capture.line_pass(self.program(beside, lambda p: p.index.item()), warmup=1, count=2, device=self.device)
        found = [(read.step, read.thread, read.real) for read in log.reads]
        assert found == [(1, "loader", True)] * 2 + [(1, "", True)] + [(2, "loader", True)] * 2 + [(2, "", True)]
        own = [read for read in log.reads if not read.thread]
        assert all(read.op == "aten::item" and read.wait_seconds is not None for read in own), log.notes

    def test_a_hook_in_backward_reads_for_the_step(self) -> None:
        def read(gradient: torch.Tensor) -> None:
            gradient.sum().item()

        def backward(program: Any) -> None:
            x = program.x.clone().requires_grad_()
            x.register_hook(read)
            x.sum().backward()

        log = capture.line_pass(self.program(backward), warmup=1, count=2, device=self.device)
        assert [(read.step, read.thread, read.real) for read in log.reads] == [(1, "", True), (2, "", True)]
        assert all(read.wait_seconds is not None for read in log.reads), log.notes

    def test_debug_mode_and_wrapped_calls_are_restored(self) -> None:
        before = (torch.cuda.get_sync_debug_mode(), torch.cuda.synchronize, torch.cuda.Event.synchronize)

        def fail(program: Any) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            capture.line_pass(self.program(fail), warmup=0, count=1, device=self.device)
        assert before == (torch.cuda.get_sync_debug_mode(), torch.cuda.synchronize, torch.cuda.Event.synchronize)
