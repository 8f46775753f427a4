"""The timeline's bars: as many as can be told apart, and waits with their line."""

from __future__ import annotations

from pathlib import Path

import pytest
from kineto_builder import KinetoBuilder

from kernbench.analysis import timeline
from kernbench.record import HostRead, LineLog, SourceLine
from kernbench.traces import trace

LINE = SourceLine(file="model.py", line=7, text="if norm > limit:", function="step")


def many_kernels(folder: Path, kernels: int) -> trace.Trace:
    builder = KinetoBuilder()
    builder.step(0, 0, 20 * kernels + 100)
    for index in range(kernels):
        builder.launch(f"kernel_{index}", 20 * index + 1, 20 * index + 5, 20 * index + 15)
    return trace.load(builder.write(folder / "trace.json"))


def test_every_kernel_has_its_bar_where_there_is_room(tmp_path: Path) -> None:
    spans = timeline.timeline(many_kernels(tmp_path, 500))
    kernels = [span for span in spans if span.kind == "kernel"]
    assert [span.name for span in kernels] == [f"kernel_{index}" for index in range(500)]
    assert kernels[3].start_seconds == pytest.approx(65e-6)
    assert kernels[3].duration_seconds == pytest.approx(10e-6)


def test_short_neighbours_share_a_bar_and_no_time_is_lost(tmp_path: Path) -> None:
    loaded = many_kernels(tmp_path, 500)
    spans = timeline.timeline(loaded, max_spans=60)
    assert len(spans) <= 60
    kernels = [span for span in spans if span.kind == "kernel"]
    counts = [int(span.name.split(" … ")[1].split()[0]) if " … " in span.name else 1 for span in kernels]
    assert sum(counts) == 500
    ends = [span.start_seconds + span.duration_seconds for span in kernels]
    assert ends[-1] == pytest.approx(9995e-6)
    assert all(stop <= after.start_seconds for stop, after in zip(ends, kernels[1:], strict=False))


def test_a_wait_names_its_line_and_nothing_else_does(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 1000)
    builder.launch("work", 10, 20, 300)
    builder.op("aten::item", 40, 320)
    builder.call("cudaStreamSynchronize", 50, 310)
    builder.launch("more", 400, 410, 500)
    loaded = trace.load(builder.write(tmp_path / "trace.json"))
    read = HostRead(step=0, line=0, op="aten::item", form="if", host_tensor=False, real=True)
    spans = timeline.timeline(loaded, LineLog(steps=1, lines=[LINE], reads=[read]))
    assert [(span.kind, span.source) for span in spans if span.source is not None] == [("sync", LINE)]
    assert {span.source for span in timeline.timeline(loaded)} == {None}, "nothing is made up without a log"
