"""How the products of the memory MLP are cut into programs, by size and by how numbers are multiplied.

Shapes: N rows, D width of keys, H hidden width, M width of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _rows
from ._blocks import blocks_in


class Tiles(NamedTuple):
    """How a matrix product is cut into programs: a tile's rows, columns and inner width, warps, and stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def fitted(self, itemsize: int, shared_bytes: int) -> Tiles:
        """The same with as many stages as a block has memory for."""
        stage = (self.rows + self.columns) * self.inner * itemsize
        return self._replace(stages=max(1, min(self.stages, shared_bytes // stage)))


class Plan(NamedTuple):
    """Tiles of the four products, and the rows that one program adds up for a weight's gradient, of so many programs.

    With ``turned``, what the products of the backward pass add up over lies next to each other in all operands. The
    tensor cores take TF32 in no other way, and to turn tile by tile, as Triton does, costs more than to do it once.
    """

    hidden: Tiles
    error: Tiles
    outer: Tiles
    inner: Tiles
    length: int = 0
    turned: bool = False
    programs: int = 128


class Method(NamedTuple):
    """How the products of a call are taken."""

    plan: Plan
    precision: str


_HALF, _LONG, _DEEP = Tiles(64, 128, 64, 4, 3), Tiles(128, 128, 64, 4, 3), Tiles(64, 128, 128, 4, 4)
_SHORT, _FAST, _FAST_BACK = Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 32, 4, 4), Tiles(128, 128, 32, 4, 3)
_FAST_WIDE = Tiles(128, 128, 32, 8, 4)
_EXACT, _EXACT_LONG, _EXACT_BACK = Tiles(128, 64, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 32, 4, 4)
FEW_ROWS = 4096
"""Up to so many rows the first plan of a pair is taken, beyond them the second."""
PLANS = {
    "bfloat16": (
        Plan(_HALF, _HALF, _HALF, _HALF),
        # In the larger tile the error's kernel spills registers.
        Plan(_LONG, _HALF, _HALF, _DEEP),
    ),
    "tf32": (
        Plan(_SHORT, _SHORT, _SHORT, _SHORT, turned=True, programs=256),
        Plan(_FAST, _FAST, _FAST_BACK, _FAST_WIDE, turned=True),
    ),
    "tf32x3": (
        Plan(_EXACT, _EXACT, _EXACT, _EXACT),
        Plan(_EXACT_LONG, _EXACT_LONG, _EXACT, _EXACT_BACK, programs=256),
    ),
}
"""For rows 512 wide on a Hopper GPU, by the time of a whole update in a CUDA graph, one tile after the other exchanged.
None spills registers, which `kernbench bench --compile-only` checks: an outer one of (128, 64, 32, 4, 4) in three
products is faster by 6 to 13 %, but does. With 256 programs two share a multiprocessor."""
_LOADED = Tiles(32, 128, 32, 4, 1)
"""Around the library's products, which leave numbers to load, to compute with and to store."""
_AWKWARD = Tiles(32, 32, 32, 4, 2)
"""For widths that no access of 16 bytes divides: every number has a place of its own in a register then."""
_ALIGNED = 16
_OLDER = Tiles(64, 64, 32, 4, 3)
HOPPER_SHARED_BYTES = 232448
"""That a block can have from an H100 on. Before, both operands of a product go through registers, and those of three
products in TF32 do not fit them in larger tiles."""
LEAST_LENGTH = 256

_SMALLEST, _LARGEST = Tiles(32, 32, 32, 4, 1), Tiles(128, 128, 128, 4, 1)
INTERPRETED = Plan(_SMALLEST, _SMALLEST, _SMALLEST, _SMALLEST, 48)
"""Small enough that small cases have several of everything."""
_INTERPRETED_WHOLE = Plan(_LARGEST, _LARGEST, _LARGEST, _LARGEST, 512)
_INTERPRETED_MOST = 80


def launch(kernel: Any, programs: int, arguments: Sequence[Any], tiles: Tiles | None = None, **constants: Any) -> None:
    """``programs`` of a kernel, which starts before the one in front has ended where the GPU can do that."""
    overlap = _rows.overlaps()
    options = _rows.overlapping(overlap)
    if tiles is not None:
        options |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    kernel[(programs,)](*arguments, **constants, OVERLAP=overlap, **options)


LIBRARY = "library"
"""A precision: products by torch's own library, which rounds every sum to the nearest float32."""


def precision(dtype: torch.dtype, *, allowed: bool | None = None, nearest: bool = False) -> str:
    """How float32 numbers are multiplied: in TF32 where that is ``allowed``, if not said otherwise by torch's setting.

    That is the one for CUDA, in either of its interfaces. Else in three products in TF32, which err by half an ulp more
    than one in float32; but tensor cores cut off what a sum cannot hold, so that results are too small by four ulp
    together, which a sum over rows does not average out. Where that shows, ``nearest`` asks for the library.
    """
    if dtype != torch.float32:
        return "ieee"
    if allowed is None:
        chosen = torch.backends.cuda.matmul.fp32_precision
        if chosen == "none":
            chosen = torch.backends.fp32_precision  # type: ignore[attr-defined]
        allowed = chosen == "tf32"
    return "tf32" if allowed else LIBRARY if nearest else "tf32x3"


def method_for(key: Tensor, value: Tensor, hidden_width: int, chosen: str | None = None) -> Method:
    """The method for keys [N, D] and values [N, M], in the ``chosen`` precision or in that of torch's setting."""
    widths = (key.shape[1], hidden_width, value.shape[1])
    return _method(key.shape[0], widths, key.dtype, chosen or precision(key.dtype), _shared_bytes())


@lru_cache(maxsize=256)
def _method(rows: int, widths: tuple[int, int, int], dtype: torch.dtype, precision: str, shared_bytes: int) -> Method:
    if _rows.INTERPRETED.value:
        plan = INTERPRETED if max(rows, *widths) <= _INTERPRETED_MOST else _INTERPRETED_WHOLE
        if precision == LIBRARY:
            plan = plan._replace(length=rows)
        return Method(plan._replace(turned=precision == "tf32"), precision)
    if precision == LIBRARY:
        return Method(Plan(_LOADED, _LOADED, _LOADED, _LOADED, length=rows), precision)
    short, long = PLANS[precision if dtype == torch.float32 else "bfloat16"]
    plan = short if rows <= FEW_ROWS else long
    if precision == "tf32x3" and shared_bytes < HOPPER_SHARED_BYTES:
        plan = Plan(_OLDER, _OLDER, _OLDER, _OLDER)
    if any(width % _ALIGNED for width in widths):
        plan = Plan(_AWKWARD, _AWKWARD, _AWKWARD, _AWKWARD, turned=plan.turned)
    hidden, error, outer, inner = (
        one.fitted(dtype.itemsize, shared_bytes) for one in (plan.hidden, plan.error, plan.outer, plan.inner)
    )
    return Method(
        plan._replace(hidden=hidden, error=error, outer=outer, inner=inner, length=_length(rows, widths, plan)),
        precision,
    )


def _length(rows: int, widths: tuple[int, int, int], plan: Plan) -> int:
    """Rows that one program adds up for a weight's gradient, so that there are about as many as planned."""
    width, hidden_width, _ = widths
    tiles = blocks_in(hidden_width, plan.inner.rows) * blocks_in(width, plan.inner.columns)
    parts = max(1, min(plan.programs // tiles, blocks_in(rows, LEAST_LENGTH)))
    step = max(plan.inner.inner, plan.outer.inner)
    return blocks_in(blocks_in(rows, parts), step) * step


def _shared_bytes() -> int:
    """What a block can have on the device that Triton launches on."""
    if _rows.INTERPRETED.value:
        return 0
    return _shared_bytes_of(triton.runtime.driver.active.get_current_device())


@cache
def _shared_bytes_of(device: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])
