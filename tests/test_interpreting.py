"""The quicker interpreter computes what Triton's own does, and patches its language once for a launch."""

from __future__ import annotations

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


def test_the_result_is_that_of_the_interpreter_as_it_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = softmax()
    for name in ("_patch_lang", "_get_np_dtype"):
        monkeypatch.setattr(interpreter, name, getattr(interpreter, name).__wrapped__)
    assert torch.equal(quick, softmax())
    torch.testing.assert_close(quick.sum(1), torch.ones(4))


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


def test_numpy_types_are_those_of_the_interpreter() -> None:
    kinds = [tl.int1, tl.bfloat16, tl.float32, tl.uint64, tl.pointer_type(tl.float16), tl.block_type(tl.int8, [4])]
    for _ in range(2):
        found = [interpreter._get_np_dtype(kind) for kind in kinds]
        assert found == [interpreter._get_np_dtype.__wrapped__(kind) for kind in kinds]
    assert found[1] == np.dtype(np.uint16)


def test_to_ask_twice_changes_nothing() -> None:
    before = interpreter._patch_lang, interpreter._get_np_dtype
    interpreting.quicken()
    assert (interpreter._patch_lang, interpreter._get_np_dtype) == before
