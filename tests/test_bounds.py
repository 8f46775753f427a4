"""Indices out of bounds are found before an operator meets them, where a GPU would stop for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate_specs import spec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench.parity import bounds, trials
from kernbench.parity.operators import operator_of
from kernbench.spec import Case, Inputs

TABLE = torch.arange(12.0).view(4, 3)


class Checking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks every call."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bounds.check(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(
    ("use", "size"),
    [
        (lambda index: TABLE.gather(0, index.view(-1, 1)), 4),
        (lambda index: TABLE.gather(1, index.view(1, -1)), 3),
        (lambda index: torch.zeros(4, 3).scatter(0, index.view(-1, 1), 1.0), 4),
        (lambda index: torch.zeros(4, 3).scatter_add_(0, index.view(-1, 1), torch.ones(len(index), 1)), 4),
        (lambda index: TABLE.index_select(-1, index), 3),
        (lambda index: TABLE.clone().index_add_(0, index, torch.ones(len(index), 3)), 4),
        (lambda index: TABLE.clone().index_copy_(0, index, torch.ones(len(index), 3)), 4),
        (lambda index: TABLE.clone().index_fill_(0, index, 1.0), 4),
        (lambda index: TABLE[:, index], 3),
        (lambda index: TABLE[TABLE[:, 0] >= 0, index[:1]], 3),
        (lambda index: TABLE.clone().index_put_((index,), torch.zeros(3)), 4),
        (lambda index: TABLE.take(index), 12),
        (lambda index: torch.nn.functional.embedding(index, TABLE), 4),
    ],
)
def test_the_last_index_passes_and_the_one_after_it_does_not(use: Callable[[Tensor], Tensor], size: int) -> None:
    with Checking():  # type: ignore[no-untyped-call]
        use(rows(size - 1, 0))
        with pytest.raises(IndexError, match=rf"takes an index from .* to {size} where there are {size}"):
            use(rows(size, 0))


def test_a_negative_index_counts_from_the_end_where_the_operator_says_so() -> None:
    with Checking():  # type: ignore[no-untyped-call]
        TABLE[rows(-4)]
        with pytest.raises(IndexError, match="from -1 to -1 where there are 4"):
            TABLE.index_select(0, rows(-1))
        with pytest.raises(IndexError, match="from -5 to -5"):
            TABLE[rows(-5)]


def test_masks_empty_indices_and_scalars_pass() -> None:
    with Checking():  # type: ignore[no-untyped-call]
        TABLE[TABLE > 3]
        TABLE.index_select(0, rows())
        torch.tensor(3.0).index_select(0, rows(0))


def test_a_wrong_kernel_stops_before_its_wrong_index_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row before the first one is out of bounds: the kernel that forgets the bound is given up, not run."""
    check, stopped = bounds.check, []

    def noting(function: Any, args: Any, kwargs: Any) -> None:
        try:
            check(function, args, kwargs)
        except IndexError:
            stopped.append(operator_of(function))
            raise

    def reference(x: Tensor) -> Tensor:
        return x.index_select(0, (torch.arange(len(x)) - 1).clamp(min=0))

    def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return {"x": TABLE.to(dtype)}

    monkeypatch.setattr(bounds, "check", noting)
    declared = spec("own", reference, lambda x: reference(x), make_inputs)
    trial = next(trials.of(declared, declared.cases, torch.float32, torch.device("cpu"), 0))
    outcomes = [trial.rejects(alteration) for alteration in trial.tape.alterations(0)]
    assert None in outcomes
    assert set(stopped) == {"index_select"}
