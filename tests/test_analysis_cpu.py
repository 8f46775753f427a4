"""Analyses of CPU traces: real ones recorded here, and logs of the line pass written by hand."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kineto_builder import KinetoBuilder
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench.analysis import breakdown, families, hotspots, idle, launches, stalls, timeline
from kernbench.analysis.attribution import line_of_rows
from kernbench.record import HostRead, LineLog, SourceLine
from kernbench.traces import trace

STEPS = 3


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 256)
        self.norm = torch.nn.LayerNorm(256)
        self.second = torch.nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden = self.norm(hidden)
        hidden = torch.tanh(hidden)
        output: torch.Tensor = self.second(hidden)
        return output


def make_step() -> Callable[[], None]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(128, 64)

    def step() -> None:
        with record_function("kernbench.phase1:forward"):
            output = model(batch)
        loss = output.pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


class Lines(TorchDispatchMode):
    """The smallest line pass: for every dispatched operator, the line in this file that was executing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.op_lines: dict[str, list[int]] = {}
        self.lines: list[SourceLine] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != __file__:
            frame = frame.f_back  # type: ignore[assignment]
        text = Path(__file__).read_text().splitlines()[frame.f_lineno - 1].strip()
        place = SourceLine(file=Path(__file__).name, line=frame.f_lineno, text=text)
        if place not in self.lines:
            self.lines.append(place)
        name = func._schema.name
        if not name.startswith("profiler::"):
            self.op_lines.setdefault(name, []).append(self.lines.index(place))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> trace.Trace:
    step = make_step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(STEPS):
            with record_function(f"kernbench.step#{number}"):
                step()
    path = tmp_path_factory.mktemp("recorded") / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    return trace.load(path)


@pytest.fixture(scope="module")
def log() -> LineLog:
    step = make_step()
    with Lines() as lines:
        step()
    return LineLog(steps=1, lines=lines.lines, op_lines=lines.op_lines)


def test_a_recorded_trace_has_its_steps(recorded: trace.Trace) -> None:
    assert recorded.steps.number.tolist() == [0, 1, 2]
    assert recorded.counted.tolist() == [0, 1, 2]
    assert not recorded.on_gpu


def test_hotspots_are_operators_with_exact_lines(recorded: trace.Trace, log: LineLog) -> None:
    found = {hotspot.name: hotspot for hotspot in hotspots.hotspots(recorded, log, limit=1000)}
    sources = {name: hotspot.source.text for name, hotspot in found.items() if hotspot.source}
    assert sources["aten::native_layer_norm"] == "hidden = self.norm(hidden)"
    assert sources["aten::tanh"] == "hidden = torch.tanh(hidden)"
    assert sources["aten::tanh_backward"] == "hidden = torch.tanh(hidden)", "through the sequence number"
    assert sources["aten::native_layer_norm_backward"] == "hidden = self.norm(hidden)"
    assert sources["aten::addcdiv_"] == "optimizer.step()"
    linear_layers = {"hidden = self.first(x)", "output: torch.Tensor = self.second(hidden)"}
    assert {sources["aten::addmm"], sources["aten::linear"]} <= linear_layers, "a wrapper has the line of what it wraps"
    assert found["aten::addmm"].op == "aten::linear"
    assert found["aten::addmm"].calls_per_step == 2
    assert found["aten::addmm"].phase == 1
    assert found["aten::tanh_backward"].phase == 1, "backward belongs to the phase of its forward"
    assert found["aten::addcdiv_"].phase is None
    assert found["aten::addmm"].kind == "op"


def test_every_call_of_an_operator_is_told_apart(recorded: trace.Trace, log: LineLog) -> None:
    """Two linear layers on two lines: each call of addmm has its own, in every step."""
    line = line_of_rows(recorded, log)
    rows = recorded.host.name == recorded.names.index("aten::addmm")
    texts = [log.lines[index].text for index in line[rows].tolist()]
    assert texts == ["hidden = self.first(x)", "output: torch.Tensor = self.second(hidden)"] * STEPS


def test_hotspots_are_sorted_and_shares_are_of_the_step(recorded: trace.Trace) -> None:
    found = hotspots.hotspots(recorded, None, limit=1000)
    times = [hotspot.self_seconds_per_step for hotspot in found]
    assert times == sorted(times, reverse=True)
    assert 0.05 < sum(hotspot.share for hotspot in found) <= 1
    assert all(hotspot.source is None for hotspot in found)


def test_breakdown_adds_up_to_the_step(recorded: trace.Trace) -> None:
    parts = breakdown.breakdown(recorded, 1e-3)
    assert sum(part.seconds_per_step for part in parts) == pytest.approx(1e-3, rel=1e-12)
    causes = {part.cause for part in parts}
    assert {"matrix product", "normalisation and softmax", "optimizer", breakdown.OVERHEAD} <= causes
    assert all(re.search(r"profiled step \d+\.\d\d x the unprofiled one", part.description) for part in parts)


def test_what_needs_a_device_is_none_on_a_cpu(recorded: trace.Trace) -> None:
    assert idle.idle(recorded) is None
    found = launches.launches(recorded)
    assert found.kernels_per_step == 0
    assert found.median_seconds is None


def test_timeline_of_a_cpu_is_its_host_track(recorded: trace.Trace) -> None:
    spans = timeline.timeline(recorded)
    assert {(span.track, span.kind) for span in spans} == {("host", "op")}
    assert any("aten::linear" in span.name for span in spans)


def test_launches_on_a_cpu_count_innermost_computing_operators(tmp_path: Path) -> None:
    builder = KinetoBuilder()
    builder.step(0, 0, 100)
    builder.op("aten::linear", 0, 20)
    builder.op("aten::t", 1, 4)
    builder.op("aten::transpose", 2, 3)
    builder.op("aten::addmm", 5, 15)
    builder.op("aten::to", 21, 22)
    builder.op("aten::to", 23, 29)
    builder.op("aten::_to_copy", 24, 28)
    builder.op("aten::empty_strided", 25, 26)
    builder.op("aten::copy_", 26, 27)
    builder.op("aten::_foreach_add_", 30, 40)
    builder.op("aten::add_", 31, 33)
    builder.op("aten::add_", 34, 36)
    builder.op("autograd::engine::evaluate_function: MulBackward0", 41, 60)
    builder.op("MulBackward0", 42, 59)
    builder.op("aten::mul", 43, 50)
    builder.op("mine::fused", 61, 70)
    loaded = trace.load(builder.write(tmp_path / "leaves.json"))
    assert launches.launches(loaded).per_step == 5, "addmm, copy_, the foreach operator, mul and the custom operator"


def test_operators_and_kernels_have_families() -> None:
    operators = {
        "aten::addmm": families.MATMUL,
        "aten::convolution_backward": families.MATMUL,
        "aten::_scaled_dot_product_flash_attention_for_cpu": families.ATTENTION,
        "aten::_softmax": families.NORMALISATION,
        "aten::native_layer_norm_backward": families.NORMALISATION,
        "aten::mean": families.REDUCTION,
        "aten::maximum": families.ELEMENTWISE,
        "aten::normal_": families.ELEMENTWISE,
        "aten::mul": families.ELEMENTWISE,
        "aten::index_select": families.INDEXING,
        "aten::embedding_dense_backward": families.INDEXING,
        "aten::copy_": families.COPIES,
        "aten::as_strided": families.VIEWS,
        "detach": families.VIEWS,
        "AddmmBackward0": families.ENGINE,
        "torch::autograd::AccumulateGrad": families.ENGINE,
        "mine::rope": families.OTHER,
    }
    assert {name: families.of_operator(name) for name in operators} == operators
    kernels = {
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64": families.MATMUL,
        "nvjet_hsh_128x256_64x4": families.MATMUL,
        "void pytorch_flash::flash_fwd_kernel<...>": families.ATTENTION,
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": families.COMMUNICATION,
        "void at::native::vectorized_elementwise_kernel<4, {lambda(float)#1}>": families.ELEMENTWISE,
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": families.REDUCTION,
        "triton_poi_fused_add_convert_0": families.ELEMENTWISE,
        "fused_adamw_kernel": families.OPTIMIZER,
        "unheard_of": families.OTHER,
    }
    assert {name: families.of_kernel(name) for name in kernels} == kernels


def cpu_log() -> LineLog:
    lines = [
        SourceLine(file="model.py", line=10, text="loss.item()", function="step"),
        SourceLine(file="model.py", line=20, text="if mask.any():", function="step"),
        SourceLine(file="data.py", line=5, text="length.item()"),
    ]
    reads = []
    for step in (0, 1):
        reads += [HostRead(step=step, line=0, op="aten::item", form="item", host_tensor=False, real=False)]
        reads += [
            HostRead(step=step, line=1, op="aten::is_nonzero", form="if", host_tensor=False, real=False, phase=2)
        ] * 3
        reads += [HostRead(step=step, line=2, op="aten::item", form="item", host_tensor=True, real=False)] * 2
    return LineLog(steps=2, lines=lines, reads=reads)


def test_reads_on_a_cpu_would_sync_unless_the_tensor_is_the_hosts() -> None:
    found = stalls.stalls(None, cpu_log())
    assert [(stall.file, stall.line, stall.klass, stall.count_per_step) for stall in found] == [
        ("model.py", 20, "would-sync", 3),
        ("data.py", 5, "cpu-tensor", 2),
        ("model.py", 10, "would-sync", 1),
    ]
    assert [(stall.phase, stall.function, stall.real) for stall in found] == [
        (2, "step", False),
        (None, "", False),
        (None, "step", False),
    ]
    assert all(stall.wait_seconds_per_step is None for stall in found)


def test_totals_of_reads(recorded: trace.Trace) -> None:
    assert stalls.syncs_per_step(cpu_log()) == 4
    assert stalls.cpu_reads_per_step(cpu_log()) == 2
    assert stalls.stalls(recorded, LineLog(steps=1)) == []
    assert stalls.syncs_per_step(LineLog(steps=0)) == 0
