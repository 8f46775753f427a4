"""Experts that merge, split and are reset, in one launch over all of their tensors and optimizer states, in place.

A move overwrites expert ``child`` by a copy of expert ``parent``, one move after the other. A merge first lets the
parent take its share of the child:

    parent = w parent + (1 - w) child;   child = parent + noise * normal, or half of it, or zero, or one

Two codes say what happens to a tensor: what the parent takes (``KEPT``, ``SHARED``, ``ENZYME``, ``AVERAGED``), and
what the child becomes (``COPIED``, ``NOISY``, ``EMPTIED``, ``HALVED``, ``RESTED``, ``ERASED``, ``TURNED``). Who moves
is data on the device, so that nobody has to read a decision, and experts that do not move are not touched.

One program handles a block of elements of one tensor for all moves, because a move may start from what an earlier one
left. Blocks of different tensors take turns, so that those with noise, which compute, run beside those that only copy.

Cast order: float32 throughout, every product and sum rounded on its own as by eager, so that all but the noise is equal
to it bit for bit. The noise of element n of an expert is word n mod 4 of Philox block n div 4; the i-th tensor with
noise draws under the move's seed + i.

Source: specification of bio-nanochat, section 7; kernel plan, phase 4.
Shapes: E experts, M moves, N tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernbench.spec import KernelSpec, Sizes, Tolerance, Values

from . import _expert_cases, _pointer_table, _rows
from ._expert_codes import (
    CHILD,
    COLUMNS,
    COPIED,
    EMPTIED,
    ENZYME,
    ENZYME_SHARE,
    ERASED,
    HALVED,
    KEPT,
    KIND,
    MERGE,
    NOISY,
    PARENT,
    RESTED,
    SEED,
    SHARED,
    TURNED,
)

TENSOR_BITS = _pointer_table.TENSOR_BITS
# One warp a program: with more of them each waits in every move for the slowest of its loads.
BLOCK, WARPS = 256, 1
MOST_TURNED = 1024
KEPT_TABLES = 32
LEAST_NORM = 1e-12
NUMBERS_DRAWN = 4
"""By one block of Philox."""


@torch.no_grad()
def expert_moves_reference(
    tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float], moves: Tensor, shares: Tensor
) -> None:
    """In plain PyTorch, tensor by tensor and move by move, without a read; arguments as in :func:`expert_moves`."""
    stream = 0
    for tensor, take, become, noise in zip(tensors, takes, becomes, noises, strict=True):
        drawn = None
        if become in (NOISY.value, TURNED.value):
            drawn = noise * _expert_cases.normal(tensor[0], moves[:, SEED.value] + stream)
            stream += 1
        for at, (move, share) in enumerate(zip(moves, shares, strict=True)):
            _move_reference(tensor, take, become, move, share, None if drawn is None else drawn[at])


def _move_reference(tensor: Tensor, take: int, become: int, move: Tensor, share: Tensor, drawn: Tensor | None) -> None:
    kind, parent_at, child_at = move[KIND.value], move[PARENT.value].view(1), move[CHILD.value].view(1)
    parent, child = tensor.index_select(0, parent_at)[0], tensor.index_select(0, child_at)[0]
    if take != KEPT.value:
        fixed = ENZYME_SHARE.value if take == ENZYME.value else 0.5
        own = share.double() if take == SHARED.value else torch.full_like(share, fixed, dtype=torch.float64)
        mixed = parent * own.to(tensor.dtype) + (1 - own).to(tensor.dtype) * child
        parent = torch.where(kind == MERGE.value, mixed, parent)
        tensor.index_copy_(0, parent_at, parent.unsqueeze(0))
    if become == ERASED.value:
        tensor.copy_(torch.where(kind > 0, 0, tensor))
    else:
        made = torch.where(kind > 0, _child_reference(parent, become, drawn), child)
        tensor.index_copy_(0, child_at, made.unsqueeze(0))


def _child_reference(parent: Tensor, become: int, drawn: Tensor | None) -> Tensor:
    if drawn is not None and become == NOISY.value:
        return parent + drawn
    if drawn is not None:
        return functional.normalize(parent + drawn - (drawn * parent).sum() * parent, dim=0, eps=LEAST_NORM)
    if become == HALVED.value:
        return parent * 0.5
    if become == COPIED.value:
        return parent
    return torch.full_like(parent, 1.0 if become == RESTED.value else 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _normal(seed, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers [BLOCK] of an expert's elements from start on, a multiple of 4."""
    n0, n1, n2, n3 = tl.randn4x(seed, (start // 4).to(tl.int64) + tl.arange(0, BLOCK // 4))
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def _weights(share, take):  # type: ignore[no-untyped-def]
    """What the parent keeps of itself and takes of the child, float32, each rounded once from float64."""
    own = tl.where(take == ENZYME, tl.full([], ENZYME_SHARE, tl.float64), tl.full([], 0.5, tl.float64))
    own = tl.where(take == SHARED, share.to(tl.float64), own)
    return own.to(tl.float32), (1.0 - own).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    tensor, row, start, offsets, mask, take, become, stream, noise, moves, shares, count, experts,
    SIZE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """All moves of one tensor [experts, row] at elements start + offsets [SIZE] of an expert, where mask allows it."""
    first = tensor + start
    for at in range(count):
        move = moves + at * COLUMNS
        kind = tl.load(move + KIND)
        if kind > 0:
            parent = tl.multiple_of(first + tl.load(move + PARENT) * row, ALIGN)
            child = tl.multiple_of(first + tl.load(move + CHILD) * row, ALIGN)
            merging = (kind == MERGE) & (take != KEPT)
            value = tl.zeros([SIZE], tl.float32)
            if merging | (become == COPIED) | (become == NOISY) | (become == HALVED):
                value = tl.load(parent + offsets, mask=mask)
            if merging:
                own, taken = _weights(tl.load(shares + at), take)
                value = value * own + tl.load(child + offsets, mask=mask) * taken
                tl.store(parent + offsets, value, mask=mask)
            if become == NOISY:
                value += noise * _normal(tl.load(move + SEED) + stream, start, SIZE)
            elif become == HALVED:
                value *= 0.5
            elif become == RESTED:
                value = tl.full([SIZE], 1.0, tl.float32)
            elif (become == EMPTIED) | (become == ERASED):
                value = tl.zeros([SIZE], tl.float32)
            if become == ERASED:
                for expert in range(experts):
                    tl.store(tl.multiple_of(first + expert * row, ALIGN) + offsets, value, mask=mask)
            else:
                tl.store(child + offsets, value, mask=mask)
            # A later move may start from what this one left, and another thread may be the one to load it.
            tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _turn(tensor, row, stream, noise, moves, count, LEAST: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """All moves of a tensor [experts, row] of unit vectors, row at most SIZE: children look a little another way."""
    offsets = tl.arange(0, SIZE)
    mask = offsets < row
    for at in range(count):
        move = moves + at * COLUMNS
        if tl.load(move + KIND) > 0:
            parent = tl.load(tensor + tl.load(move + PARENT) * row + offsets, mask=mask, other=0.0)
            drawn = tl.where(mask, _normal(tl.load(move + SEED) + stream, row * 0, SIZE), 0.0)
            turned = parent + noise * (drawn - tl.sum(drawn * parent, 0) * parent)
            norm = tl.sqrt_rn(tl.sum(turned * turned, 0))
            made = turned / tl.maximum(norm, LEAST)
            tl.store(tensor + tl.load(move + CHILD) * row + offsets, made, mask=mask)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "experts"])  # type: ignore[untyped-decorator]
def _moves_kernel(  # type: ignore[no-untyped-def]
    chunks, table, noises, moves, shares, count, experts,
    TENSOR_BITS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program handles one block of every expert's part of one tensor, for all moves [count, 4]; grid is chunks [C].

    Table [N, 5] has the tensors' addresses, elements of an expert, two codes and the stream of noise, whose deviations
    are noises [N]. A whole block of aligned experts takes four elements a thread and access; another one takes one, in
    a loop. A vector that is turned has at most VECTOR elements.
    """
    chunk = tl.load(chunks + tl.program_id(0))
    number = chunk & ((1 << TENSOR_BITS) - 1)
    start = (chunk >> TENSOR_BITS) * BLOCK
    entry = table + number * 5
    address = tl.load(entry)
    row = tl.load(entry + 1)
    take = tl.load(entry + 2)
    become = tl.load(entry + 3)
    stream = tl.load(entry + 4)
    noise = tl.load(noises + number)
    tensor = address.to(tl.pointer_type(tl.float32))
    if become == TURNED:
        _turn(tensor, row, stream, noise, moves, count, LEAST, VECTOR)
    elif ((address & 15) == 0) & (row % 4 == 0) & (start + BLOCK <= row):
        _move(
            tensor, row, start, tl.arange(0, BLOCK), None, take, become, stream, noise, moves, shares, count, experts,
            BLOCK, 16,
        )  # fmt: skip
    else:
        for first in range(0, BLOCK, TURN):
            offsets = tl.arange(0, TURN)
            _move(
                tensor, row, start + first, offsets, start + first + offsets < row, take, become, stream, noise,
                moves, shares, count, experts, TURN, 4,
            )  # fmt: skip


class _Layout(NamedTuple):
    """What a launch over certain tensors reads: chunks [C], table [N, 5] and noises [N]; and VECTOR."""

    chunks: Tensor
    table: Tensor
    noises: Tensor
    vector: int


_layouts: OrderedDict[tuple[object, ...], _Layout] = OrderedDict()


def expert_moves(
    tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float], moves: Tensor, shares: Tensor
) -> None:
    """Make the moves, in place, in their order; no host sync. Tables of addresses are laid out once for equal tensors.

    Args:
        tensors: N tensors [E, ...], float32, contiguous, on one device, none of which lies on another.
        takes: for each what a merging parent takes: ``KEPT`` nothing, ``SHARED`` what the move's share leaves,
            ``ENZYME`` a tenth, ``AVERAGED`` half.
        becomes: for each what a child becomes: ``COPIED`` from the parent, ``NOISY`` with noise added, ``HALVED``,
            ``EMPTIED`` zero, ``RESTED`` one, ``ERASED`` zero for all experts, ``TURNED`` a unit vector [E, Z] near the
            parent's, of at most 1024 elements.
        noises: for each the standard deviation of its noise.
        moves: [M, 4], int64, contiguous: kind (0 none, 1 merge, 2 split, 3 reset), parent, child, seed.
        shares: what the parent of each merge keeps of itself, [M], float64, or float32.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device, or the lists differ in length.
    """
    if _rows.watched():
        torch.ops.kernbench.expert_moves.default(tensors, takes, becomes, noises, moves, shares)
    else:
        _launch(tensors, takes, becomes, noises, moves, shares)


def _launch(
    tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float], moves: Tensor, shares: Tensor
) -> None:
    _check(tensors, takes, becomes, noises, moves, shares)
    if not tensors or not len(moves):
        return
    with _rows.on_device(moves):
        layout = _layout_of(tensors, takes, becomes, noises)
        if not len(layout.chunks):
            return
        # Fused products and sums would round once where eager rounds twice.
        _moves_kernel[(len(layout.chunks),)](
            layout.chunks, layout.table, layout.noises, moves, shares, len(moves), tensors[0].shape[0], TENSOR_BITS,
            LEAST_NORM, BLOCK, BLOCK if _rows.INTERPRETED.value else 32 * WARPS, layout.vector, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    torch.autograd.graph.increment_version(tensors)


def _check(
    tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float], moves: Tensor, shares: Tensor
) -> None:
    if not len(tensors) == len(takes) == len(becomes) == len(noises):
        raise ValueError(
            f"expert_moves got {len(tensors)} tensors, {len(takes)} takes, {len(becomes)} becomes and {len(noises)} "
            "noises; give one of each per tensor"
        )
    _pointer_table.check("moves", moves, (len(moves), COLUMNS.value), torch.int64, moves.device)
    _pointer_table.check(
        "shares", shares, (len(moves),), torch.float32 if shares.dtype == torch.float32 else torch.float64, moves.device
    )
    for index, (tensor, become) in enumerate(zip(tensors, becomes, strict=True)):
        shape = (tensors[0].shape[0], *tensor.shape[1:]) if tensor.dim() and tensors[0].dim() else (0,)
        _pointer_table.check("tensors", tensor, shape, torch.float32, moves.device, index)
        if become == TURNED.value and (tensor.dim() != 2 or tensor.shape[1] > MOST_TURNED):
            raise ValueError(f"expert_moves turns vectors [E, Z] of at most {MOST_TURNED}; number {index} is {shape}")


def _layout_of(tensors: list[Tensor], takes: list[int], becomes: list[int], noises: list[float]) -> _Layout:
    """The layout for these tensors; its key says all that it depends on, so it may outlive them."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    rows = [tensor[0].numel() if len(tensor) else 0 for tensor in tensors]
    codes = (tuple(rows), tuple(takes), tuple(becomes), tuple(noises))
    key = (device, stream, _pointer_table.addresses_of(tensors), codes)
    if key not in _layouts:
        chunks = _chunks([0 if not row else 1 if become == TURNED.value else triton.cdiv(row, BLOCK)
                          for row, become in zip(rows, becomes, strict=True)])  # fmt: skip
        drawn = [become in (NOISY.value, TURNED.value) for become in becomes]
        streams = [sum(drawn[:index]) for index in range(len(drawn))]
        table = torch.tensor([_pointer_table.addresses_of(tensors), rows, takes, becomes, streams]).T.contiguous()
        deviations = torch.tensor(noises, dtype=torch.float32)
        turned = [row for row, become in zip(rows, becomes, strict=True) if become == TURNED.value]
        vector = triton.next_power_of_2(max([NUMBERS_DRAWN, *turned]))
        _layouts[key] = _Layout(
            _pointer_table.upload(chunks, device), _pointer_table.upload(table, device),
            _pointer_table.upload(deviations, device), vector,
        )  # fmt: skip
        while len(_layouts) > KEPT_TABLES:
            _layouts.popitem(last=False)
    _layouts.move_to_end(key)
    return _layouts[key]


def _chunks(blocks: list[int]) -> Tensor:
    """One entry per block of each tensor, ``block << TENSOR_BITS | tensor``, [C]; all tensors end together."""
    counts = torch.tensor(blocks)
    owners = torch.repeat_interleave(torch.arange(len(blocks)), counts)
    block = torch.arange(len(owners)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    order = ((block + 1) / counts[owners]).argsort(stable=True)
    return (block << TENSOR_BITS | owners)[order]


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "expert_moves(Tensor(a!)[] tensors, int[] takes, int[] becomes, float[] noises, Tensor moves, Tensor shares) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("expert_moves", _implementation, _key)  # type: ignore[no-untyped-call]

SPEC = KernelSpec(
    name="expert_moves",
    reference=expert_moves_reference,
    optimized=expert_moves,
    make_inputs=_expert_cases.make_inputs,
    cases=_expert_cases.CASES,
    tolerance={"float32": Tolerance()},
    cost=_expert_cases.cost,
    mutates=("tensors",),
    sizes={
        "experts": Sizes(least=2, most=9),
        "inputs": Sizes(least=1, most=36),
        "outputs": Sizes(least=1, most=36),
        "moves": Sizes(most=3),
        "inherit": Sizes(most=1),
    },
    values={"shares": Values(least=0.0, most=1.0, fixed=True)},
    peers={"by index": _expert_cases.by_index},
    source="bio-nanochat, section 7; kernel plan, phase 4",
)
