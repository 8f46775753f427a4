"""The most likely code, its embedding, and the running sum of embeddings of a frame, in one launch.

    code = forced[position, group] where there is one, and it is not negative, else argmax(logits)
    codes[position, group] = code,  row = embedding[code],  y = total + row

Every program finds the code itself, from logits in the L2 cache, and copies its columns of the row. Of equal logits the
first counts, and NaN is larger than any number, as for torch.argmax. A forced code does not save the search, so that a
frame with forced codes takes as long as one without.

Cast order: the sum is rounded once.

Source: torch.argmax, torch.nn.functional.embedding.
Shapes: V vocabulary, N codes that have an embedding, H width, M positions, G codes of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Values

from . import _choice, _decode, _rows
from ._blocks import blocks_in

LARGEST_BLOCK = 4096
"""Logits that a program compares at once: 32 registers a thread of 128."""
MOST_CODES = 2**30
"""Ids are counted in 32 bits, a block beyond the end included."""


class Blocks(NamedTuple):
    """How the row is cut into programs; numbers only, so that an operator can take it.

    Attributes:
        columns: of the row that a program copies; a power of two.
        warps: of a program.
        overlap: of :mod:`_decode`, ``PLAIN``, ``LATE`` or ``EARLY``.
    """

    columns: int
    warps: int
    overlap: int = _decode.EARLY


DEFAULT = Blocks(256, 4)
CONFIGURATIONS = tuple(Blocks(columns, warps) for columns in (128, 256, 512, 1024, 2048) for warps in (2, 4, 8))
"""What is worth measuring on a GPU, for 2048 logits and rows of 1024 and 2048."""


def decode_code_embedding_reference(
    logits: Tensor, embedding: Tensor, total: Tensor, codes: Tensor, position: Tensor, group: int,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch; arguments as in :func:`decode_code_embedding`."""
    code = logits.argmax(-1, keepdim=True)
    if forced is not None:
        given = forced[:, group].index_select(0, position)
        code = torch.where(given < 0, code, given)
    codes[:, group].index_copy_(0, position, code)
    row = embedding.index_select(0, code)[0]
    return row, total + row


@triton.jit(do_not_specialize=["count", "width", "places", "groups", "group"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, embedding, total, codes, forced, position, row, y, count, width, places, groups, group,
    FORCED: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program handles COLUMNS of row and y [width]; grid is width over that, rounded up."""
    _decode.started(OVERLAP)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    _decode.wait(OVERLAP)
    place = tl.load(position).to(tl.int64)
    in_table = (place >= 0) & (place < places)
    place = place * groups + group
    carried = tl.load(total + column, mask=mask, other=0.0).to(tl.float32)
    best = tl.full([BLOCK], -0x8000000000000000, tl.int64)
    for start in range(0, count, BLOCK):
        id = start + tl.arange(0, BLOCK)
        inside = id < count
        x = tl.load(logits + id, mask=inside, other=0.0).to(tl.float32)
        best = tl.maximum(best, _choice.with_id(_choice.order(x, inside), id))
    code = _choice.id_of(tl.max(best, 0))
    if FORCED:
        given = tl.load(forced + place, mask=in_table, other=-1)
        code = tl.where(given < 0, code, given)
    found = tl.load(embedding + code * width + column, mask=mask, other=0.0)
    DTYPE: tl.constexpr = y.dtype.element_ty
    tl.store(row + column, found, mask=mask)
    tl.store(y + column, _decode.round_to(carried + found.to(tl.float32), DTYPE).to(DTYPE), mask=mask)
    tl.store(codes + place, code, mask=in_table & (tl.program_id(0) == 0))


def decode_code_embedding(
    logits: Tensor, embedding: Tensor, total: Tensor, codes: Tensor, position: Tensor, group: int,
    forced: Tensor | None = None, *, blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The embedding [H] of a frame's next code, and ``total`` with it, [H]; the code goes to ``codes``. All contiguous.

    Args:
        logits: [V], of the dtype of the embedding.
        embedding: [N, H], at least as many rows as logits.
        total: [H].
        codes: [M, G] int64.
        position: [1] int64, from 0 to M - 1.
        group: from 0 to G - 1.
        forced: [M, G] int64, each less than N; a negative one forces nothing.
        blocks: a :class:`Blocks`, to measure others than the default.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    call = _OPERATOR if _rows.watched() else _launch
    row, y = call(logits, embedding, total, codes, position, group, forced, blocks)
    return row, y


def _launch(
    logits: Tensor, embedding: Tensor, total: Tensor, codes: Tensor, position: Tensor, group: int,
    forced: Tensor | None = None, blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count, width = logits.numel(), total.numel()
    _decode.check(
        "decode_code_embedding", total,
        {
            "logits": (logits, (count,)), "embedding": (embedding, (embedding.shape[0], width)),
            "total": (total, (width,)),
        },
    )  # fmt: skip
    if not count <= embedding.shape[0] < MOST_CODES:
        raise ValueError(
            f"decode_code_embedding takes an embedding for each of {count} codes, fewer than {MOST_CODES}; it has "
            f"{embedding.shape[0]} rows"
        )
    tables = {"codes": codes} if forced is None else {"codes": codes, "forced": forced}
    _decode.check_tables("decode_code_embedding", total.device, tables, position, group)
    plan = _plan(count, width, forced is not None, tuple(blocks) if blocks else None)
    row, y = torch.empty_like(total), torch.empty_like(total)
    _decode.launch(
        _kernel, plan, total.device,
        logits, embedding, total, codes, codes if forced is None else forced, position, row, y, count, width,
        codes.shape[0], codes.shape[1], group,
    )  # fmt: skip
    return row, y


@lru_cache(maxsize=1024)
def _plan(count: int, width: int, forced: bool, blocks: tuple[int, ...] | None) -> _decode.Plan:
    chosen = Blocks(*blocks) if blocks else DEFAULT
    columns = min(chosen.columns, triton.next_power_of_2(width))
    block = min(LARGEST_BLOCK, triton.next_power_of_2(count))
    return _decode.Plan(blocks_in(width, columns), (forced, block, columns), chosen.warps, chosen.overlap)


_OPERATOR = _decode.register(
    "decode_code_embedding(Tensor logits, Tensor embedding, Tensor total, Tensor(a!) codes, Tensor position, "
    "int group, Tensor? forced=None, int[]? blocks=None) -> (Tensor, Tensor)",
    _launch,
    lambda logits, embedding, total, codes, position, group, forced=None, blocks=None: (
        torch.empty_like(total),
        torch.empty_like(total),
    ),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Logits with a few ties in the shorter dtypes, rows of an embedding, and codes of a few positions."""
    generator = torch.Generator(device).manual_seed(seed)
    codes, width, places, groups = case["codes"], case["width"], case["places"], case["groups"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def integers(least: int, most: int) -> Tensor:
        return torch.randint(least, most, (places, groups), device=device, generator=generator)

    return {
        "logits": normal(codes).to(dtype),
        "embedding": normal(codes, width).to(dtype),
        "total": normal(width).to(dtype),
        "codes": integers(0, codes),
        "position": torch.tensor([places - 1], device=device),
        "group": groups // 2,
        # Half of them force nothing.
        "forced": integers(-codes, codes) if case["forced"] else None,
    }


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """A comparison a logit and a sum a column; the logits, one row and the total are read."""
    codes, width = case["codes"], case["width"]
    return Cost(
        flops=float(codes + width),
        bytes_read=float(dtype.itemsize * (codes + 2 * width) + 8 + 8 * case["forced"]),
        bytes_written=float(dtype.itemsize * 2 * width + 8),
    )


SPEC = KernelSpec(
    name="decode_code_embedding",
    reference=decode_code_embedding_reference,
    optimized=decode_code_embedding,
    make_inputs=make_inputs,
    cases=(
        Case("one", codes=1, width=1, places=1, groups=1, forced=0),
        Case("ragged", codes=129, width=301, places=3, groups=4, forced=0),
        Case("forced", codes=200, width=256, places=5, groups=2, forced=1),
        Case("many codes", codes=9001, width=20, places=2, groups=3, forced=0),
        Case("predictor of 0.6B", large=True, codes=2048, width=1024, places=1024, groups=16, forced=1),
        Case("predictor of 1.7B", large=True, codes=2048, width=2048, places=1024, groups=16, forced=1),
        Case("text vocabulary", large=True, codes=151936, width=2048, places=1024, groups=16, forced=0),
    ),
    tolerance=_decode.TOLERANCE,
    cost=cost,
    mutates=("codes",),
    sizes={
        "codes": Sizes(least=1, most=5000, block=LARGEST_BLOCK),
        "width": Sizes(least=1, most=600, block=DEFAULT.columns),
        "places": Sizes(least=1, most=4),
        "groups": Sizes(least=1, most=4),
        "forced": Sizes(most=1),
    },
    values={name: Values(nonfinite=True) for name in ("logits", "embedding", "total")},
    source="torch.argmax, torch.nn.functional.embedding",
)
