"""The GPU's side of the watch: matching and merging on synthetic data here, the real thing under the marker gpu."""

import _thread
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernbench.record import HostRead
from kernbench.watching import cudasync
from kernbench.watching.cudasync import DEVICE, EVENT, STREAM, Report, RuntimeCall, RuntimeWatch, match_waits, merge
from kernbench.watching.sourcelines import SourceTable


def event(
    name: Any, start: Any, duration: Any, *, thread: Any = 7, category: Any = "cuda_runtime", phase: Any = "X"
) -> Any:
    return {"ph": phase, "cat": category, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": thread}


def step(index: int, start: Any, duration: Any) -> Any:
    return event(f"kernbench.step#{index}", start, duration, category="user_annotation")


def test_runtime_calls_of_the_steps_and_thread_alone() -> None:
    events = [
        event("cudaDeviceSynchronize", 5, 1),
        event("cudaStreamSynchronize", 150, 4),
        step(3, 10, 100),
        step(4, 120, 100),
        event("cudaMemcpyAsync", 20, 30),
        event("cudaStreamSynchronize", 50, 5),
        event("cudaLaunchKernel", 60, 2),
        event("cudaStreamSynchronize", 70, 10),
        event("cudaStreamSynchronize", 80, 10, thread=8),
        event("cuStreamSynchronize", 81, 3, category="cuda_driver"),
        event("cudaEventSynchronize", 190, 2),
        event("Stream Sync", 70, 10, category="cuda_sync"),
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 7, "args": {}},
        event("cudaDeviceSynchronize", 230, 1),
    ]
    calls = cudasync.runtime_calls(events)
    assert [(call.step, call.call) for call in calls] == [(3, STREAM), (3, STREAM), (4, STREAM), (4, EVENT)]
    assert [call.seconds for call in calls] == pytest.approx([35e-6, 10e-6, 4e-6, 2e-6])


def test_runtime_calls_of_autograd_are_the_steps_own() -> None:
    """The copy before a wait is the one of the same thread."""
    events = [
        step(0, 0, 100),
        event("autograd::engine::evaluate_function: MyBackward", 5, 60, thread=9, category="cpu_op"),
        event("cudaMemcpyAsync", 10, 4, thread=9),
        event("cudaLaunchKernel", 15, 2),
        event("cudaStreamSynchronize", 20, 6, thread=9),
        event("cudaStreamSynchronize", 30, 7, thread=11),
    ]
    assert [call.seconds for call in cudasync.runtime_calls(events)] == pytest.approx([10e-6])


def test_runtime_names_of_rocm() -> None:
    events = [step(0, 0, 100), event("hipMemcpyWithStream", 10, 5), event("hipDeviceSynchronize", 20, 6)]
    assert [call.call for call in cudasync.runtime_calls(events)] == [STREAM, DEVICE]


def test_waits_are_matched_by_order_within_kind_and_step() -> None:
    reports = [Report(0, 1, STREAM, 1), Report(0, 2, DEVICE, 2), Report(0, 3, STREAM, 3), Report(1, 1, STREAM, 4)]
    calls = [
        RuntimeCall(0, STREAM, 1.0),
        RuntimeCall(0, STREAM, 2.0),
        RuntimeCall(0, DEVICE, 3.0),
        RuntimeCall(1, STREAM, 4.0),
    ]
    assert match_waits(reports, calls) == ({1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0}, [])


def test_threads_beside_the_steps_take_nobodys_wait() -> None:
    beside = Report(0, 5, STREAM, 1, thread="loader")
    reports = [beside, Report(0, 1, STREAM, 2)]
    assert match_waits(reports, [RuntimeCall(0, STREAM, 2.0)]) == ({2: 2.0}, [])
    merged, unseen = merge(reports, {2: 2.0}, [named(1, 1), named(1, 5)], shift=1)
    rows = [(read.line, read.op, read.thread, read.wait_seconds) for read in merged]
    assert rows == [(5, STREAM, "loader", None), (1, "aten::item", "", 2.0)]
    assert unseen == {}


def test_waits_of_one_print_add_up() -> None:
    reports = [Report(0, 1, STREAM, 1), Report(0, 1, STREAM, 1), Report(0, 2, STREAM, 2)]
    calls = [RuntimeCall(0, STREAM, seconds) for seconds in (1.0, 2.0, 4.0)]
    assert match_waits(reports, calls) == ({1: 3.0, 2: 4.0}, [])


def test_no_wait_is_guessed_where_the_numbers_differ() -> None:
    reports = [Report(0, 1, STREAM, 1), Report(0, 2, DEVICE, 2), Report(1, 1, STREAM, 3)]
    calls = [RuntimeCall(0, STREAM, 1.0), RuntimeCall(0, STREAM, 2.0), RuntimeCall(0, DEVICE, 3.0)]
    waits, notes = match_waits(reports, calls)
    assert waits == {1: None, 2: 3.0, 3: None}
    assert notes == [
        "step 0: cudaStreamSynchronize was reported 1 times but traced 2 times; its waits are left out",
        "step 1: cudaStreamSynchronize was reported 1 times but traced 0 times; its waits are left out",
    ]


def named(at: Any, line: Any, op: Any = "aten::item", form: Any = "item", *, host: Any = False) -> Any:
    return HostRead(step=at, line=line, op=op, form=form, host_tensor=host, real=False)


def test_merge_names_real_reads_and_keeps_reads_of_host_tensors() -> None:
    reports = [
        Report(0, 1, STREAM, 1),
        Report(0, 1, STREAM, 2),
        Report(0, 2, DEVICE, 3, explicit="torch.cuda.synchronize", phase=2),
        Report(0, 4, STREAM, 4),
        Report(1, 1, STREAM, 5),
        Report(1, 1, STREAM, 6),
    ]
    both = [("aten::is_nonzero", "if"), ("aten::item", "item")]
    reads = [named(at, 1, op, form) for at in (2, 3) for op, form in both]
    reads += [named(2, 3, host=True), named(3, 3, host=True), named(2, 9), named(3, 9)]
    merged, unseen = merge(reports, {1: 0.5, 2: None, 3: 0.25, 4: 0.1, 5: 1.0, 6: 2.0}, reads, shift=2)
    rows = [
        (read.step, read.line, read.op, read.form, read.host_tensor, read.real, read.wait_seconds) for read in merged
    ]
    assert rows == [
        (0, 1, "aten::is_nonzero", "if", False, True, 0.5),
        (0, 1, "aten::item", "item", False, True, None),
        (0, 2, "torch.cuda.synchronize", "synchronize", False, True, 0.25),
        (0, 4, STREAM, "synchronize", False, True, 0.1),
        (0, 3, "aten::item", "item", True, False, None),
        (1, 1, "aten::is_nonzero", "if", False, True, 1.0),
        (1, 1, "aten::item", "item", False, True, 2.0),
        (1, 3, "aten::item", "item", True, False, None),
    ]
    assert merged[2].phase == 2
    assert unseen == {9: 2}


def test_merge_takes_the_commonest_name_where_counts_differ() -> None:
    reads = [named(1, 1, "aten::nonzero", "nonzero"), named(1, 1), named(1, 1)]
    merged, unseen = merge([Report(0, 1, STREAM, 1)], {1: 1.0}, reads, shift=1)
    assert [(read.op, read.form) for read in merged] == [("aten::item", "item")]
    assert unseen == {}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runtime that warns as torch does, so that the hook and the wrapped calls run without a GPU."""
    mode = SimpleNamespace(value=0)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode.value)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda value: setattr(mode, "value", value))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda self: synchronising_call(), raising=False)
    return mode


def synchronising_call() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", UserWarning, stacklevel=2)


def test_hook_reports_lines_and_passes_other_warnings_on(fake_cuda: Any) -> None:
    passed = []
    sources = SourceTable()
    watch = RuntimeWatch(sources)
    before = (warnings.showwarning, list(warnings.filters), torch.cuda.synchronize, torch.cuda.Stream.synchronize)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *details, **_: passed.append(str(details[0]))
        with watch.watching():
            assert fake_cuda.value == "warn"
            synchronising_call()
            watch.begin_step(5)
            for _ in range(2):
                synchronising_call()
            warnings.warn("something else", UserWarning, stacklevel=1)
            torch.cuda.synchronize()
            torch.cuda.Stream.synchronize(None)  # type: ignore[arg-type]
            watch.end_step()
            torch.cuda.synchronize()
    assert fake_cuda.value == 0
    assert passed == ["something else"]
    assert [(report.step, report.call, report.explicit) for report in watch.reports] == [
        (5, STREAM, ""),
        (5, STREAM, ""),
        (5, DEVICE, "torch.cuda.synchronize"),
        (5, STREAM, "torch.cuda.Stream.synchronize"),
    ]
    assert len({report.group for report in watch.reports}) == 4
    assert before == (
        warnings.showwarning,
        list(warnings.filters),
        torch.cuda.synchronize,
        torch.cuda.Stream.synchronize,
    )


def test_all_reports_of_one_print_form_one_group(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rendering(tensor: Any, *, tensor_contents: Any = None) -> Any:
        synchronising_call()
        synchronising_call()
        return "tensor"

    monkeypatch.setattr(torch._tensor_str, "_str", rendering)
    watch = RuntimeWatch(SourceTable())
    with watch.watching():
        watch.begin_step(0)
        for _ in range(2):
            str(torch.ones(1))
        watch.end_step()
    assert [report.group for report in watch.reports] == [1, 1, 2, 2]


def test_threads_are_told_apart(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's reads carry its name and its own line, also while the steps' thread stands in ``synchronize``."""
    watch = RuntimeWatch(SourceTable())

    def work() -> None:
        synchronising_call()

    def from_elsewhere(device: Any = None) -> None:
        worker = threading.Thread(target=work, name="loader")
        worker.start()
        worker.join()

    monkeypatch.setattr(torch.cuda, "synchronize", from_elsewhere)
    with watch.watching():
        watch.begin_step(0)
        torch.cuda.synchronize()
        synchronising_call()
        watch.end_step()
    found = [(report.thread, report.explicit, watch.sources.lines[report.line].function) for report in watch.reports]
    assert found == [
        ("", "torch.cuda.synchronize", "test_threads_are_told_apart"),
        ("loader", "", "synchronising_call"),
        ("", "", "synchronising_call"),
    ]
    assert len({report.group for report in watch.reports}) == 3


def test_a_hook_in_the_engines_thread_works_for_the_step(fake_cuda: Any) -> None:
    watch = RuntimeWatch(SourceTable())

    def _engine_run_backward() -> None:
        done = threading.Event()

        def hook() -> None:
            synchronising_call()
            done.set()

        # Python knows nothing of threads that it did not start, as of those of the engine.
        _thread.start_new_thread(hook, ())
        assert done.wait(10)

    with watch.watching():
        watch.begin_step(0)
        _engine_run_backward()
        watch.end_step()
    assert [report.thread for report in watch.reports] == [""]


def test_state_is_restored_when_a_step_raises(fake_cuda: Any) -> None:
    original = torch.cuda.synchronize
    with pytest.raises(KeyError), RuntimeWatch(SourceTable()).watching():
        raise KeyError
    assert torch.cuda.synchronize is original
    assert fake_cuda.value == 0


def test_no_line_of_the_program() -> None:
    sources = SourceTable()
    assert sources.locate(None) == -1
    assert sources.lines[sources.nowhere()].line == 0
    assert sources.locate(sys._getframe()) != -1
