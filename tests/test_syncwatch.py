"""The watcher against programs whose every line says what it must find.

A line of a program under test ends in ``#: operator form side`` once for each read that it makes, side being
``device`` or ``host``; a line without that comment must not be found at all.
"""

import copy
import inspect
import threading
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from kernbench.capture import line_pass
from kernbench.record import LineLog
from kernbench.watching.sourcelines import SourceTable
from kernbench.watching.syncwatch import SyncWatch, current_phase

DEVICE = torch.device("cpu:0")
Reads = Counter[tuple[int, str, str, str]]


class Program:
    """A workload made of two functions: ``build() -> state`` and ``step(state, index)``."""

    units_per_step = 1.0

    def __init__(self, build: Any, step: Any) -> None:
        self.state = build()
        self._step = step

    def step(self, index: int) -> Any:
        return self._step(self.state, index)

    def state_dict(self) -> Any:
        return {}


def watch(build: Any, step: Any, *, warmup: int = 1, count: int = 1) -> LineLog:
    return line_pass(lambda: Program(build, step), warmup=warmup, count=count, device=DEVICE)


def found(log: LineLog) -> Reads:
    return Counter(
        (log.lines[read.line].line, read.op, read.form, "host" if read.host_tensor else "device") for read in log.reads
    )


def expected(*functions: Any) -> Reads:
    """What the comments of these functions promise."""
    reads: Reads = Counter()
    for function in functions:
        lines, first = inspect.getsourcelines(function)
        for number, text in enumerate(lines, first):
            for promise in text.split("#: ")[1:]:
                operator, form, side = promise.split()
                reads[number, operator, form, side] += 1
    return reads


def check(build: Any, step: Any, *others: Any) -> LineLog:
    log = watch(build, step)
    assert found(log) == expected(step, *others)
    return log


def tensors() -> Any:
    return {
        "x": torch.randn(4, 4, device=DEVICE),
        "v": torch.tensor([1, 2], device=DEVICE),
        "s": torch.ones((), dtype=torch.long, device=DEVICE),
        "mask": torch.ones(4, 4, device=DEVICE) > 0,
        "hx": torch.randn(4, 4),
        "hv": torch.tensor([1, 2]),
        "hs": torch.tensor(1),
    }


def test_scalar_reads() -> None:
    def step(t: Any, index: int) -> None:
        s, hs, x = t["s"], t["hs"], t["x"]
        s.item()  #: aten::item item device
        float(s)  #: aten::item float device
        int(s)  #: aten::item int device
        complex(s)  #: aten::item complex device
        if s:  #: aten::is_nonzero if device
            pass
        while not s:  #: aten::is_nonzero if device
            pass
        bool(s)  #: aten::is_nonzero if device
        if torch.isnan(x).any() or torch.isinf(x).any():  #: aten::is_nonzero if device #: aten::is_nonzero if device
            pass
        [1, 2, 3][s]  #: aten::item index device
        range(s)  #: aten::item index device
        x[s]  #: aten::item index device
        x[:s]  #: aten::item index device
        max(s, s)  #: aten::is_nonzero if device
        assert 1 in t["v"]  #: aten::item in device
        s.sum().mul(2).add(hs).item()  #: aten::item item device
        hs.item()  #: aten::item item host
        float(hs)  #: aten::item float host
        bool(hs)  #: aten::is_nonzero if host
        hs.add(1).item()  #: aten::item item host

    check(tensors, step)


def test_reads_of_whole_tensors() -> None:
    def step(t: Any, index: int) -> None:
        x, v, hv = t["x"], t["v"], t["hv"]
        v.tolist()  #: aten::tolist tolist device
        hv.tolist()  #: aten::tolist tolist host
        str(x)  #: Tensor.__repr__ print device
        repr(hv)  #: Tensor.__repr__ print host
        f"{x.sum()}"  #: aten::item format device
        f"{x}"  #: Tensor.__format__ format device
        print(x, end="")  #: Tensor.__repr__ print device
        x.numpy()  #: Tensor.numpy numpy device
        np.asarray(v)  #: Tensor.__array__ numpy device
        hv.numpy()
        np.asarray(hv)
        torch.equal(v, v + 1)  #: aten::equal equal device
        torch.equal(v, x)
        torch.equal(hv, hv)  #: aten::equal equal host
        torch.allclose(x, x)  #: aten::allclose allclose device

    check(tensors, step)


def test_results_whose_size_depends_on_values() -> None:
    def step(t: Any, index: int) -> None:
        x, v, mask, hx, hv = t["x"], t["v"], t["mask"], t["hx"], t["hv"]
        x.nonzero()  #: aten::nonzero nonzero device
        torch.nonzero(x, as_tuple=True)  #: aten::nonzero nonzero device
        torch.where(mask)  #: aten::where where device
        torch.where(mask, x, 0.0)
        torch.argwhere(x)  #: aten::argwhere argwhere device
        x[mask]  #: aten::index mask device
        x[v]
        x[mask] = 0.5
        x[mask] = torch.ones(16, device=x.device)  #: aten::index_put_ mask device
        x[v] = 2.0
        x[0] = 2.0
        x.masked_fill(mask, 0.0)
        torch.masked_select(x, mask)  #: aten::masked_select masked_select device
        torch.unique(v)  #: aten::_unique2 unique device
        torch.unique(x, dim=0)  #: aten::unique_dim unique device
        torch.repeat_interleave(v, v)  #: aten::repeat_interleave repeat_interleave device
        torch.repeat_interleave(v, v, output_size=3)
        torch.repeat_interleave(v, 2)
        torch.bincount(v)  #: aten::bincount bincount device
        torch.nn.functional.one_hot(v)  #: aten::item one_hot device
        torch.nn.functional.one_hot(v, 5)
        hx.nonzero(), hx[hx > 0], torch.unique(hv), torch.where(hx > 0), hx.masked_select(hx > 0)

    check(tensors, step)


def test_copies_between_host_and_device() -> None:
    def step(t: Any, index: int) -> None:
        x, hx, hv = t["x"], t["hx"], t["hv"]
        x.cpu()  #: aten::_to_copy copy device
        x.to("cpu")  #: aten::_to_copy copy device
        x.to(torch.device("cpu"), torch.float64)  #: aten::_to_copy copy device
        x.to(hx)  #: aten::_to_copy copy device
        x.to("cpu", non_blocking=True)
        x.cpu().sum().item()  #: aten::_to_copy copy device #: aten::item item host
        hx.to(DEVICE)  #: aten::_to_copy copy device
        hx.to(x)  #: aten::_to_copy copy device
        hx.to("cpu:0", non_blocking=True).sum().item()  #: aten::item item device
        hx.cpu(), hx.to("cpu"), hx.to(torch.float64), x.to(DEVICE), x.to(x.device, torch.float64), x.double()
        torch.tensor([1.0, 2.0], device=DEVICE)  #: aten::_to_copy copy device
        torch.as_tensor(np.ones(2), device=DEVICE)  #: aten::_to_copy copy device
        torch.from_numpy(np.ones(2)).to(DEVICE)  #: aten::_to_copy copy device
        x.new_tensor([1.0])  #: aten::_to_copy copy device
        torch.tensor([x.sum(), x.sum()])  #: aten::item tensor device #: aten::item tensor device
        x.copy_(hx)  #: aten::copy_ copy device
        x.copy_(hx, non_blocking=True)
        hx.copy_(x)  #: aten::copy_ copy device
        x[hv]  #: aten::index copy device
        x[[0, 1]]  #: aten::index copy device
        torch.full((2,), 1.0, device=DEVICE), torch.arange(3, device=DEVICE), torch.zeros(2, device=DEVICE)

    check(tensors, step)


def test_linalg_error_checks() -> None:
    def step(t: Any, index: int) -> None:
        eye = torch.eye(2, device=t["x"].device)
        torch.linalg.inv(eye)  #: aten::linalg_inv linalg device
        torch.linalg.cholesky(eye)  #: aten::linalg_cholesky linalg device
        torch.linalg.cholesky_ex(eye)
        torch.linalg.eigh(eye)  #: aten::_linalg_eigh linalg device
        torch.linalg.inv(torch.eye(2))

    check(tensors, step)


def test_sides_follow_views_in_place_operations_and_factories() -> None:
    def step(t: Any, index: int) -> None:
        x, hx = t["x"], t["hx"]
        x.view(-1)[:1].item()  #: aten::item item device
        x.detach().data.sum().item()  #: aten::item item device
        x.add_(hx[0, 0])
        x.sum().item()  #: aten::item item device
        hx.mul_(2).sum().item()  #: aten::item item host
        torch.zeros_like(x).sum().item()  #: aten::item item device
        torch.zeros_like(hx).sum().item()  #: aten::item item host
        x.new_zeros(1).item()  #: aten::item item device
        torch.zeros(1, device=x.device).item()  #: aten::item item device
        torch.zeros_like(x, device="cpu").sum().item()  #: aten::item item host
        torch.rand(1).item()  #: aten::item item host
        (torch.tensor(2.0) * x.sum()).item()  #: aten::item item device
        copy.deepcopy(x).sum().item()  #: aten::item item device
        copy.deepcopy(hx).sum().item()  #: aten::item item host
        torch.stack([x.sum(), x.max()])[0].item()  #: aten::item item device
        torch._foreach_norm([x])[0].item()  #: aten::item item device
        torch.func.vmap(torch.sum)(x)[0].item()  #: aten::item item device
        torch.func.grad(lambda a: (a * a).sum())(x)[0, 0].item()  #: aten::item item device
        with torch.device(DEVICE):
            torch.ones(1).item()  #: aten::item item device

    check(tensors, step)


def test_a_new_storage_does_not_take_a_dead_ones_mark() -> None:
    def step(t: Any, index: int) -> None:
        for _ in range(200):
            torch.zeros(64, device=DEVICE)
            torch.zeros(64)[0].item()

    log = watch(tensors, step)
    assert [read.host_tensor for read in log.reads] == [True] * 200


@pytest.mark.parametrize("moved", [False, True])
def test_training_step(moved: Any) -> None:
    """Modules born on the device or moved there; AdamW reads its step counters, which are host tensors."""

    def build() -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, device=None if moved else DEVICE), torch.nn.ReLU())
        model = model.to(DEVICE) if moved else model
        return model, torch.optim.AdamW(model.parameters(), foreach=False), torch.randn(2, 4, device=DEVICE)

    def step(t: Any, index: int) -> None:
        model, optimizer, x = t
        loss = model(x).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm > 2:  #: aten::is_nonzero if device
            pass
        optimizer.step()  #: aten::item item host #: aten::item item host
        optimizer.zero_grad()
        next(model.parameters()).sum().item()  #: aten::item item device
        loss.item()  #: aten::item item device

    check(build, step)


def test_what_training_code_commonly_calls_makes_no_false_reads() -> None:
    def build() -> Any:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=DEVICE)
        recurrent = torch.nn.LSTM(8, 8, batch_first=True).to(DEVICE)
        both = torch.nn.ModuleList([layer, recurrent])
        optimizer = torch.optim.SGD(both.parameters(), momentum=0.9, foreach=True)
        return layer, recurrent, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step(t: Any, index: int) -> None:
        layer, recurrent, optimizer, schedule = t
        x = torch.randn(2, 3, 8).to(DEVICE)  #: aten::_to_copy copy device
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        h = torch.utils.checkpoint.checkpoint(recurrent, h.float(), use_reentrant=False)[0]
        torch.nn.functional.cross_entropy(h.flatten(0, 1), torch.arange(6, device=x.device)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        h.topk(2), h.sort(), torch.einsum("bij,bij->b", h, h)
        h.sum().item()  #: aten::item item device

    check(build, step)


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:
        gradient.tolist()  #: aten::tolist tolist device
        gradient.cpu()  #: aten::_to_copy copy device
        torch.zeros(1, device=gradient.device).item()  #: aten::item item device
        return gradient * 2


def test_custom_backward_is_watched() -> None:
    def build() -> Any:
        return torch.ones(3, device=DEVICE, requires_grad=True)

    def step(w: Any, index: int) -> None:
        Reading.apply(w).sum().backward()  # type: ignore[no-untyped-call]
        w.grad.sum().item()  #: aten::item item device

    check(build, step, Reading.backward)

    def differentiate(w: Any, index: int) -> None:
        (gradient,) = torch.autograd.grad(Reading.apply(w).sum(), w)  # type: ignore[no-untyped-call]
        gradient.sum().item()  #: aten::item item device

    check(build, differentiate, Reading.backward)


@torch.library.custom_op("kernbench_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > -1e9:  #: aten::is_nonzero if device
        x.tolist()  #: aten::tolist tolist device
    torch.tensor([1.0], device=x.device)  #: aten::_to_copy copy device
    torch.tensor(1.0).item()  #: aten::item item host
    return x * 2


@torch.library.custom_op("kernbench_test::double_", mutates_args=("x",))
def double_(x: torch.Tensor) -> None:
    x.mul_(2).sum().item()  #: aten::item item device


def test_bodies_of_custom_operators_are_watched() -> None:
    def step(t: Any, index: int) -> None:
        doubled(t["x"]).sum().item()  #: aten::item item device
        version = t["x"]._version
        double_(t["x"])
        assert t["x"]._version > version

    check(tensors, step, doubled._init_fn, double_._init_fn)


def test_composite_operators_under_inference_mode() -> None:
    def build() -> Any:
        return torch.nn.Linear(4, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE), torch.ones(2)

    def step(t: Any, index: int) -> None:
        model, x, host = t
        with torch.inference_mode():
            y = model(x)
            y.sum().item()  #: aten::item item device
            if (y > 1e9).any():  #: aten::is_nonzero if device
                pass
            torch.where(y > 0)  #: aten::where where device
            torch.einsum("ij,ij->", y, y).item()  #: aten::item item device
            host.sum().item()  #: aten::item item host

    check(build, step)


def test_each_steady_step_is_recorded_and_warmup_is_not() -> None:
    def step(t: Any, index: int) -> None:
        t["s"].item()

    log = watch(tensors, step, warmup=3, count=4)
    assert log.steps == 4
    assert [read.step for read in log.reads] == [3, 4, 5, 6]
    assert not any(read.real for read in log.reads)
    assert log.step_seconds is not None and log.step_seconds > 0


def test_lines_name_file_text_and_function() -> None:
    def step(t: Any, index: int) -> None:
        t["s"].item()

    (line,) = watch(tensors, step).lines[-1:]
    assert line.file == "tests/test_syncwatch.py"
    assert line.text == 't["s"].item()'
    assert line.function.endswith("test_lines_name_file_text_and_function.<locals>.step")


def test_operators_of_the_last_step_have_lines_in_call_order() -> None:
    def step(t: Any, index: int) -> None:
        w = t["x"].requires_grad_()
        loss = (w @ w).sum()
        loss.backward()
        if loss.isfinite():
            loss.sin()

    log = watch(tensors, step, count=2)
    start = inspect.getsourcelines(step)[1]
    numbers = {name: [log.lines[index].line - start for index in lines] for name, lines in log.op_lines.items()}
    assert numbers["aten::mm"] == [2, 3, 3]
    assert numbers["aten::sin"] == [5]
    assert numbers["aten::item"] == numbers["aten::_local_scalar_dense"] == numbers["aten::is_nonzero"] == [4]
    assert not any(name.startswith("profiler::") for name in log.op_lines)


def test_phase_of_a_read() -> None:
    def step(t: Any, index: int) -> None:
        token = current_phase.set(3)
        t["s"].item()
        current_phase.reset(token)
        t["s"].item()

    assert [read.phase for read in watch(tensors, step).reads] == [3, None]


class Doubling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_other_modes_may_be_nested() -> None:
    def step(t: Any, index: int) -> None:
        with Doubling(), FlopCounterMode(display=False), torch.device("meta"):  # type: ignore[no-untyped-call]
            t["s"].item()  #: aten::item item device
            t["x"].cpu()  #: aten::_to_copy copy device

    check(tensors, step)


def test_other_threads_are_not_watched() -> None:
    def step(t: Any, index: int) -> None:
        thread = threading.Thread(target=lambda: t["hs"].item())
        thread.start()
        thread.join()

    assert watch(tensors, step).reads == []


def global_state() -> Any:
    return (
        list(_get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        list(_get_current_dispatch_mode_stack()),
        getattr(torch.autograd, "_engine_run_backward"),  # noqa: B009 (private, so mypy does not know it)
        warnings.showwarning,
        list(warnings.filters),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("failing", ["build", "step", "nothing"])
def test_global_state_is_restored(failing: Any) -> None:
    def build() -> Any:
        if failing == "build":
            raise KeyError("in build")
        return tensors()

    def step(t: Any, index: int) -> None:
        t["s"].item()
        if failing == "step":
            raise KeyError("in step")

    before = global_state()
    if failing == "nothing":
        watch(build, step)
    else:
        with pytest.raises(KeyError, match=f"in {failing}"):
            watch(build, step)
    assert global_state() == before
    assert torch.zeros(1, device=DEVICE).device == torch.device("cpu")


def test_compiled_functions_still_compile_after_the_watch() -> None:
    """One call under a dispatch mode would switch their compilation off for good."""
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph

    doubled = torch.compile(lambda x: (x * 2).sum(), backend=backend)

    def step(t: Any, index: int) -> None:
        doubled(t["x"]).item()  #: aten::item item device

    check(tensors, step)
    assert calls == []
    doubled(torch.ones(2))
    assert calls == ["compiled"]


def test_values_are_those_of_an_unwatched_run() -> None:
    def run() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters())
        losses = []
        for _ in range(3):
            loss = model(torch.randn(2, 4).to(DEVICE)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [parameter.detach().clone() for parameter in model.parameters()]

    plain_losses, plain = run()
    with SyncWatch(SourceTable(), marker=DEVICE):
        losses, watched = run()
    assert losses == plain_losses
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
