"""The quicker interpreter computes what Triton's own does, and patches its language once for a launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from kernbench import interpreting


@triton.jit
def _scaled(x, factor):  # type: ignore[no-untyped-def]
    return x * factor


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_kernel(x, y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * count + offsets, mask=offsets < count, other=float("-inf"))
    for _ in range(3):
        values = _scaled(values, 0.5)
    shifted = tl.exp(values - tl.max(values))
    tl.store(y + tl.program_id(0) * count + offsets, shifted / tl.sum(shifted), mask=offsets < count)


def softmax() -> torch.Tensor:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    _softmax_kernel[(4,)](x, y, 7, BLOCK=8)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _every_kind_kernel(x, y, places, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    loaded = tl.load(x + offsets, mask=offsets < count, other=0.5)
    halves = loaded.to(tl.float16) * 2
    wrapped = (offsets + 2147483647) * 3 - columns  # overflows, as it does on a GPU
    product = tl.dot(loaded, tl.trans(loaded), input_precision="ieee") + tl.zeros((ROWS, ROWS), tl.float32)
    total = tl.sum(product, axis=1) + tl.cumsum(tl.max(loaded, axis=1), axis=0)
    mixed = tl.where(wrapped > 0, halves.to(tl.float32), total[:, None] / 3.0) + tl.sum(
        loaded.to(tl.bfloat16).to(tl.float32)
    )
    tl.store(y + offsets, mixed, mask=offsets < count)
    tl.store(places + offsets, (wrapped >> 1) ^ (wrapped.to(tl.uint32) % 7).to(tl.int32))


def every_kind() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    y, places = torch.zeros_like(x), torch.zeros(16, 32, dtype=torch.int32)
    _every_kind_kernel[(1,)](x, y, places, 500, ROWS=16, COLUMNS=32)
    return y, places


def as_it_ships(patch: pytest.MonkeyPatch) -> None:
    """Take back all that was replaced."""
    semantic, core = interpreter.TritonSemantic, tl.core
    for owner, name in [
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (semantic, "binary_op_sanitize_overflow_impl"),
        (semantic, "broadcast_impl_value"),
        (core.block_type, "__init__"),
        (core.tensor, "__init__"),
        (core.dtype, "__eq__"),
    ]:
        patch.setattr(owner, name, getattr(owner, name).__wrapped__)


def test_the_result_is_that_of_the_interpreter_as_it_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, (numbers, places) = softmax(), every_kind()
    as_it_ships(monkeypatch)
    assert torch.equal(quick, softmax())
    torch.testing.assert_close(quick.sum(1), torch.ones(4))
    expected, expected_places = every_kind()
    assert torch.equal(numbers, expected)
    assert torch.equal(places, expected_places)
    assert len(set(places.flatten().tolist())) > 1 and float(numbers.std()) > 0


def test_types_and_tensors_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = tl.pointer_type(tl.float16)
    made = [(element, shape) for element in (tl.float32, tl.int1, pointer) for shape in ([4], [2, 8], [8, 2], [1])]

    def described() -> list[tuple[object, ...]]:
        kinds = [tl.block_type(*one) for one in made for _ in range(2)]
        kinds += [kind.with_element_ty(tl.int64) for kind in kinds]
        tensors = [tl.tensor(None, kind) for kind in (*kinds, tl.float32, pointer)]
        return [
            (one.name, list(one.shape), one.numel, one.scalar.name, one.mangle(), vars(one).keys()) for one in kinds
        ] + [
            (str(one), [size.value for size in one.shape], one.numel.value, one.dtype.name, vars(one).keys())
            for one in tensors
        ]

    quick = described()
    for wrong in ([3], [], [1.0], [2**21]):
        with pytest.raises((TypeError, ValueError)):
            tl.block_type(tl.float32, wrong)
    with pytest.raises(AssertionError):
        tl.block_type(tl.float32, (4,))
    kinds = [tl.float32, tl.int32, tl.constexpr(tl.float32), pointer, tl.block_type(tl.float32, [4]), 3]
    equal = [bool(one == other) for one in kinds for other in kinds]
    as_it_ships(monkeypatch)
    assert quick == described()
    assert equal == [bool(one == other) for one in kinds for other in kinds]


@triton.jit
def _incremented_kernel(x, by):  # type: ignore[no-untyped-def]
    tl.store(x, tl.load(x) + by)


def test_an_overflow_is_found_where_one_debugs(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    x = torch.tensor([2**31 - 1], dtype=torch.int32)
    _incremented_kernel[(1,)](x, 1)
    assert x.item() == -(2**31)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    with pytest.raises(interpreter.InterpreterError, match="overflow detected"):
        _incremented_kernel[(1,)](x, -1)


def test_blocks_that_do_not_fit_are_refused_and_others_broadcast() -> None:
    semantic = interpreter.interpreter_semantic
    column, row, other = (semantic.full(shape, 2, tl.int32) for shape in ([4, 1], [1, 8], [2, 8]))
    left, right = semantic.broadcast_impl_value(column, row)
    assert (left.type.name, right.type.name) == ("<['4', '8'], int32>",) * 2
    assert left.handle.data.shape == right.handle.data.shape == (4, 8)
    assert semantic.broadcast_impl_value(row, row) == (row, row)
    with pytest.raises(ValueError, match="incompatible dimensions"):
        semantic.broadcast_impl_value(left, other)


def test_the_language_is_patched_once_for_a_launch_and_restored_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax()
    patched: list[str] = []
    original = interpreter._patch_lang.__wrapped__

    def counted(function: Any) -> Any:
        patched.append(function.__name__)
        return original(function)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    interpreting.quicken()
    assert tl.core.is_builtin(tl.load)
    softmax()
    assert patched == ["_softmax_kernel"], "not for three calls of a helper and two reductions in each of four programs"
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.__add__)


def test_a_language_that_was_changed_in_between_is_patched_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        expected = softmax()
    original, called = tl.exp, []

    @tl.core.builtin  # type: ignore[untyped-decorator]
    def counted(*values: Any, **options: Any) -> Any:
        called.append(options["_semantic"])
        return original(*values, **options)

    monkeypatch.setattr(tl, "exp", counted)
    assert torch.equal(softmax(), expected)
    assert len(called) == 4
    assert tl.exp is counted


def test_numpy_types_are_those_of_the_interpreter() -> None:
    kinds = [tl.int1, tl.bfloat16, tl.float32, tl.uint64, tl.pointer_type(tl.float16), tl.block_type(tl.int8, [4])]
    for _ in range(2):
        found = [interpreter._get_np_dtype(kind) for kind in kinds]
        assert found == [interpreter._get_np_dtype.__wrapped__(kind) for kind in kinds]
    assert found[1] == np.dtype(np.uint16)


def test_to_ask_twice_changes_nothing() -> None:
    def found() -> tuple[object, ...]:
        return interpreter._patch_lang, interpreter._get_np_dtype, tl.tensor.__init__, tl.block_type.__init__

    before = found()
    interpreting.quicken()
    assert found() == before
