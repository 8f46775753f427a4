"""The conditions a kernel is called under: guard bands and poison, a watch over what it tampers with, layouts."""

import sys
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, empty

from kernbench.parity import compare, conditions, integrity, layouts

LIBRARY = torch.library.Library("kernbench_conditions", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("fill(Tensor x, Tensor(a!)[] outs) -> Tensor")  # type: ignore[no-untyped-call]


def fill(x: Tensor, outs: list[Tensor]) -> Tensor:
    outs[0].copy_(x)
    out = empty(x.shape)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)
    return out


LIBRARY.impl("fill", fill, "CPU")  # type: ignore[no-untyped-call]


@torch.library.custom_op("kernbench_conditions::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return empty(x.shape)


def twice_backward(ctx: Any, gradient: Tensor) -> Tensor:
    out = empty(gradient.shape)
    out.as_strided((1,), (1,), out.storage_offset() - 2).fill_(1.0)
    return out


twice.register_autograd(twice_backward, setup_context=lambda ctx, inputs, output: None)


class Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return empty(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return empty(gradient.shape)


def test_what_is_allocated_uninitialized_is_nan_or_the_largest_integer_however_it_was_imported() -> None:
    with conditions.guarded() as guard:
        like = torch.zeros(3, 4)
        made = [
            *(empty(3), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2, 2), (1, 2))),
            *(torch.empty_permuted((2, 3), (1, 0)), like.new_empty_strided((2,), (3,)), torch.empty(())),
            *(torch.empty(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        ]
        whole = [torch.empty(2, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)]
        pair, flags = torch.empty(2, dtype=torch.complex64), torch.empty(2, dtype=torch.bool)
    assert all(bool(tensor.isnan().all()) for tensor in made)
    assert all(tensor.tolist() == [torch.iinfo(tensor.dtype).max] * 2 for tensor in whole)
    assert bool(torch.view_as_real(pair).isnan().all())
    assert flags.tolist() == [True, True]
    assert guard.reason == ""


def test_what_is_allocated_with_a_value_keeps_it() -> None:
    with conditions.guarded() as guard:
        like = torch.empty(2)
        made = [torch.zeros(2), torch.full((2,), 3.0), torch.ones_like(like), like.new_full((2,), 4.0)]
    assert [tensor.tolist() for tensor in made] == [[0.0, 0.0], [3.0, 3.0], [1.0, 1.0], [4.0, 4.0]]
    assert len(guard.allocated) == 5


def test_copies_lie_between_bands_too_unless_autograd_derived_them() -> None:
    x = torch.ones(3, 4)
    with conditions.guarded() as guard:
        copies = [x.clone(), torch.clone(x), x.t().contiguous()]
        assert x.contiguous() is x
        derived = torch.ones(3, requires_grad=True).clone()
    assert all(copy.storage_offset() for copy in copies)
    assert [allocation.tensor.shape for allocation in guard.allocated] == [(3, 4), (3, 4), (4, 3), (3,)]
    assert derived.grad_fn is not None


def test_inference_mode_allocates_as_elsewhere() -> None:
    with conditions.guarded() as guard, torch.inference_mode():
        out = torch.empty(3).fill_(1.0)
    assert out.tolist() == [1.0] * 3
    assert guard.reason == ""


def test_strides_alignment_and_autograd_are_as_without_a_guard() -> None:
    with conditions.guarded():
        image = torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)
        like = torch.empty_like(image)
        column = torch.empty_like(torch.zeros(3, 4).t())
        leaf = torch.empty(3, requires_grad=True)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert like.stride() == image.stride()
    assert column.stride() == (1, 4)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not image._is_view()
    assert image.data_ptr() % 64 == torch.empty(2, 3, 4, 5).data_ptr() % 64


def test_what_cannot_lie_between_bands_is_left_as_it_is() -> None:
    out = torch.ones(3)
    with conditions.guarded() as guard:
        assert torch.zeros(3, out=out) is out
        later = torch.empty(0)
        torch.add(torch.ones(5), 1.0, out=later)
        assert torch.empty(2, device="meta").is_meta
        assert torch.empty(2, layout=torch.sparse_coo).is_sparse
    assert later.tolist() == [2.0] * 5
    assert [allocation.tensor.shape for allocation in guard.allocated] == [(5,)]
    assert guard.reason == ""


@pytest.mark.parametrize(
    ("first", "count", "words"),
    [
        (10, 1, "writes 4 bytes past the end of a tensor it allocated, (2, 5) float32"),
        (12, 3, "writes 20 bytes past the end of"),
        (-1, 1, "writes 4 bytes before the start of"),
        (-7, 2, "writes 28 bytes before the start of"),
    ],
)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_write_outside_of_an_allocation_is_said_with_its_distance(
    first: int, count: int, words: str, value: float
) -> None:
    with conditions.guarded() as guard:
        scratch = torch.empty(2, 5)
        scratch.as_strided((count,), (1,), scratch.storage_offset() + first).fill_(value)
    assert guard.reason.startswith(words)


def test_a_guard_reaches_into_custom_operators() -> None:
    with conditions.guarded() as guard:
        target = torch.zeros(3)
        out = torch.ops.kernbench_conditions.fill(torch.ones(3), [target])
    assert target.tolist() == [1.0] * 3
    assert bool(out.isnan().all())
    assert guard.reason.startswith("writes 4 bytes past the end")
    with conditions.guarded():
        assert bool(torch.ops.kernbench_conditions.fill.default(torch.ones(3), [target]).isnan().all())
        assert bool(twice(torch.ones(3)).isnan().all())


@pytest.mark.parametrize("how", ["grad", "backward", "method"])
def test_a_guard_reaches_into_the_backward_pass(how: str) -> None:
    x = torch.ones(3, requires_grad=True)
    with conditions.guarded():
        loss = Unwritten.apply(x).sum()  # type: ignore[no-untyped-call]
        if how == "grad":
            x.grad = torch.autograd.grad(loss, x)[0]
        else:
            torch.autograd.backward(loss) if how == "backward" else loss.backward()
    assert x.grad is not None
    assert bool(x.grad.isnan().all())
    with conditions.guarded() as guard:
        torch.autograd.grad(twice(x).sum(), x)
    assert guard.reason.startswith("writes 8 bytes before the start")


def test_compiled_code_is_left_alone() -> None:
    graph = torch.compile(lambda x: torch.empty_like(x).fill_(2.0) + x, backend="eager")
    with conditions.guarded() as guard:
        assert graph(torch.ones(3)).tolist() == [3.0] * 3
    assert guard.reason == ""


def test_nothing_is_guarded_afterwards() -> None:
    with conditions.guarded():
        pass
    assert torch.empty(3).storage_offset() == 0


def test_allocations_below_python_are_filled_and_the_settings_put_back() -> None:
    before = integrity._deterministic(), filled_below()
    with conditions.guarded(below_python=True):
        assert bool(torch.Tensor(1000).isnan().all())
    assert before == (integrity._deterministic(), filled_below())


def filled_below() -> bool:
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def test_inputs_lie_between_bands_and_a_write_names_the_tensor() -> None:
    x, rows = torch.ones(3, 4), [torch.arange(5), torch.zeros(2, dtype=torch.bool)]
    embedded = conditions.Embedded()
    laid = embedded.embed({"x": x, "rows": rows, "eps": 1e-5})
    assert laid["eps"] == 1e-5
    assert torch.equal(laid["x"], x)
    assert laid["x"].data_ptr() % 16
    assert embedded.reason == ""
    row = laid["rows"][0]
    row.as_strided((2,), (1,), row.storage_offset() + 6).fill_(9)
    assert embedded.reason == "writes 24 bytes past the end of rows[0]"


def replace_clock() -> None:
    time.perf_counter = lambda: 0.0


def replace_event() -> None:
    setattr(torch.cuda.Event, "elapsed_time", lambda *_: 1e-3)  # noqa: B010 - an assignment is refused by mypy


def replace_method() -> None:
    setattr(Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))  # noqa: B010 - as above


def replace_code() -> None:
    compare.judge.__code__ = (lambda name, actual, eager, oracle, rule: None).__code__


def replace_ours() -> None:
    setattr(compare, "judge", lambda *_: None)  # noqa: B010 - as above


def hide_builtin() -> None:
    setattr(compare, "max", lambda *_, **__: 0.0)  # noqa: B010 - as above


def loosen() -> None:
    compare.CHUNK = 1


@pytest.mark.parametrize(
    ("tamper", "name"),
    [
        (replace_clock, "time.perf_counter"),
        (replace_event, "torch.cuda.Event.elapsed_time"),
        (lambda: setattr(torch.cuda, "synchronize", lambda *_: None), "torch.cuda.synchronize"),
        (lambda: setattr(torch.testing, "assert_close", lambda *_, **__: None), "torch.testing.assert_close"),
        (lambda: setattr(torch, "equal", lambda *_: True), "torch.equal"),
        (lambda: setattr(torch, "allclose", lambda *_: True), "torch.allclose"),
        (replace_method, "torch.Tensor.isfinite"),
        (replace_code, "kernbench.parity.compare.judge"),
        (replace_ours, "kernbench.parity.compare.judge"),
        (hide_builtin, "kernbench.parity.compare.max"),
        (loosen, "kernbench.parity.compare.CHUNK"),
        (lambda: setattr(compare.Judged, "excess", 0.0), "kernbench.parity.compare.Judged.excess"),
    ],
)
def test_a_replaced_function_is_named_and_put_back(tamper: Callable[[], None], name: str) -> None:
    originals = (time.perf_counter, torch.equal, Tensor.isfinite, compare.judge, compare.judge.__code__, compare.CHUNK)
    with integrity.watched() as watch:
        tamper()
    assert watch.reason == f"replaces {name} while it runs"
    assert originals == (
        *(time.perf_counter, torch.equal, Tensor.isfinite),
        *(compare.judge, compare.judge.__code__, compare.CHUNK),
    )
    assert isinstance(compare.Judged.excess, property)
    assert not hasattr(compare, "max")
    with integrity.watched() as again:
        pass
    assert again.reason == ""


@pytest.mark.parametrize(
    ("change", "name", "read"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "the default dtype", torch.get_default_dtype),
        (lambda: torch.set_default_device("meta"), "the default device", torch.get_default_device),
        (
            lambda: torch.set_float32_matmul_precision("medium"),
            "the float32 matmul precision",
            torch.get_float32_matmul_precision,
        ),
        (
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
            "the float32 matmul precision",
            lambda: torch.backends.cuda.matmul.fp32_precision,
        ),
        (lambda: torch._C._set_grad_enabled(False), "whether gradients are recorded", torch.is_grad_enabled),
        (
            lambda: torch.use_deterministic_algorithms(True),
            "whether algorithms are deterministic",
            torch.are_deterministic_algorithms_enabled,
        ),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "the number of threads", torch.get_num_threads),
        (lambda: torch.rand(1), "the state of the random generator", torch.initial_seed),
        (lambda: torch.manual_seed(7), "the state of the random generator", torch.initial_seed),
    ],
)
def test_a_changed_setting_is_named_and_put_back(
    change: Callable[[], object], name: str, read: Callable[[], object]
) -> None:
    before = read()
    with integrity.watched() as watch:
        change()
    assert name in watch.reason
    assert "leaves " in watch.reason
    assert read() == before
    with integrity.watched() as again:
        pass
    assert again.reason == ""


def test_the_same_random_numbers_follow_a_kernel_that_draws_some() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with integrity.watched():
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_what_a_raising_kernel_replaced_is_put_back_too() -> None:
    original = torch.equal
    with pytest.raises(RuntimeError, match="out of memory"), integrity.watched():
        torch.equal = lambda *_: True
        raise RuntimeError("out of memory")
    assert torch.equal is original


def test_a_mode_that_a_kernel_leaves_behind_is_removed() -> None:
    with integrity.watched() as watch, conditions.guarded():
        conditions.Guard().__enter__()  # type: ignore[no-untyped-call]
    assert "modes override" in watch.reason
    assert torch.empty(3).storage_offset() == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_every_layout_keeps_shape_dtype_and_numbers_and_says_nothing_of_gradients(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].view(shape) % 2).to(dtype)
    laid = layouts.LAYOUTS[layout](tensor)
    assert (laid.shape, laid.dtype, laid.requires_grad) == (tensor.shape, tensor.dtype, False)
    expected = tensor[:1].expand(shape) if layout == "expanded" and shape and shape[0] else tensor
    assert torch.equal(laid, expected)
    if laid.numel():
        assert laid.data_ptr() != tensor.data_ptr()


def test_layouts_are_what_their_names_say() -> None:
    x = torch.arange(12.0).view(3, 4)
    laid = {name: lay(x) for name, lay in layouts.LAYOUTS.items()}
    assert laid["contiguous"].is_contiguous()
    assert laid["strided"].stride() == (8, 2)
    assert laid["transposed"].stride() == (1, 3)
    assert laid["expanded"].stride() == (0, 1)
    assert laid["offset"].is_contiguous()
    assert laid["offset"].data_ptr() % 16
    around = laid["offset"].as_strided((2 * layouts.BAND + 12,), (1,), 0)
    assert int(around.isnan().sum()) == 2 * layouts.BAND


def test_the_watch_names_functions_of_ours_that_exist() -> None:
    """A rename must not leave a hole: what the comparisons are made of is a plain function of a watched module."""
    assert isinstance(compare.judge, FunctionType)
    snapshot = next(found for found in integrity._snapshots() if found.name == "kernbench.parity.compare")
    assert compare.judge in snapshot.values
    assert compare.judge in snapshot.functions


def test_what_was_found_once_is_looked_at_again_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter may change; what stands in its place before the next call is watched then, if it is a function."""
    monkeypatch.setattr(compare, "counter", 0, raising=False)
    with integrity.watched() as watch:
        vars(compare)["counter"] += 1
    assert watch.reason == ""
    assert integrity._snapshots() == integrity._snapshots()
    monkeypatch.setattr(compare, "counter", len)
    monkeypatch.setattr(compare, "judge", compare.measure)
    with integrity.watched() as watch:
        replace_ours()
        vars(compare)["counter"] = max
    assert watch.replaced == ["kernbench.parity.compare.judge", "kernbench.parity.compare.counter"]
    assert vars(compare)["counter"] is len
    assert vars(compare)["judge"] is compare.measure


def test_a_value_that_may_change_is_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.ones(3)
    monkeypatch.setattr(compare, "cache", kept, raising=False)
    held = sys.getrefcount(kept)
    with integrity.watched():
        pass
    assert sys.getrefcount(kept) == held
