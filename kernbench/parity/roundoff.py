"""Rounding made visible: every arithmetic result moved at random, by a share that the caller chooses.

Run on float64 inputs, a function then shows what roundings inside of it do to its result, whatever the inputs are: the
gradient of something constant is exactly zero for all inputs, and yet a right kernel returns some ulp of its terms.

Source: Parker, Monte Carlo arithmetic, 1997 (random rounding of results).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = frozenset({"_to_copy", "copy_", "clone", "detach", "fill_", "zero_", "neg", "abs", "where", "_foreach_copy_"})
"""Operators that move numbers and round none, at least none in float64."""


FUSED = frozenset({"native_layer_norm", "native_group_norm", "_softmax", "_log_softmax"})
"""Operators that torch counts among the basic ones, although they round on the way."""


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators that round on the way, written in basic ones: their own result may be all cancellation."""
    # Imported here because it takes a quarter of a second, and few checks come this far.
    from torch._decomp import core_aten_decompositions, decomposition_table

    core: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    overloads = {key: value for key, value in decomposition_table.items() if isinstance(key, torch._ops.OpOverload)}
    fused = {key: value for key, value in overloads.items() if key.overloadpacket.__name__ in FUSED}
    return core | fused


class Roundoff(TorchDispatchMode):
    """In here each floating result of an operator is multiplied by ``1 + share * u``, u uniform in [-1, 1]."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share = share
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch._dynamo, two seconds, to keep it out of a mode that no compiled code enters.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written_out = _decompositions().get(func)
        if written_out is not None:
            with self:
                return written_out(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in EXACT:
            return result
        written = [item.alias_info is None or item.alias_info.is_write for item in func._schema.returns]
        results = result if isinstance(result, tuple | list) else (result,)
        # One entry of the schema stands for a whole list of tensors.
        marks = written if len(written) == len(results) else [all(written)] * len(results)
        for tensor, fresh in zip(results, marks, strict=True):
            if fresh and isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._move(tensor)
        return result

    def _move(self, tensor: Tensor) -> None:
        shifts = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        tensor.mul_(1 + self.share * shifts.to(tensor.device))
