"""Device tables of tensor addresses, so that one launch walks over many tensors.

A kernel needs the address of every tensor it touches. Tensors that stay (parameters, optimizer state) form a ``Group``,
checked and laid out once; those that may be allocated anew on every step (gradients) only choose one of its ``Table``s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

KEPT_GROUPS = 64
KEPT_TABLES = 4
SPARES = 32
"""Captures that may follow each other: a step that comes in so many forms has a graph for each of them."""
TENSOR_BITS = 24
"""A chunk is ``block << TENSOR_BITS | tensor``, so that a program finds its work with a single 8-byte load."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched over blocks: elements and warps per program."""

    block: int
    warps: int


@dataclass(frozen=True, eq=False)
class Part:
    """The blocks of all tensors of one dtype: int64 [blocks], entries as in :func:`chunk_map`."""

    dtype: torch.dtype
    launch: Launch
    chunks: Tensor


@dataclass(eq=False)
class Table:
    """Addresses as the device sees them, valid for launches on one stream.

    Attributes:
        rows: int64 [tensors, resident columns + 2]: resident addresses, element count, address of the moving tensor.
        scratch: float32 [tensors, 4], for per-tensor factors that one kernel leaves to the next.
        staging: pinned memory that a captured copy reads at every replay; None outside of a capture.
    """

    moving: tuple[int, ...]
    stream: int
    rows: Tensor
    scratch: Tensor
    staging: Tensor | None = None


@dataclass(eq=False)
class Group:
    """Tensors that are updated together, recognised by their addresses for as long as all of them live."""

    resident: tuple[int, ...]
    device: torch.device
    rows: Tensor
    parts: list[Part]
    expired: bool = False
    tables: list[Table] = field(default_factory=list)
    spares: list[Tensor] = field(default_factory=list)
    references: list[weakref.ref[Tensor]] = field(default_factory=list)

    def table(self, moving: Sequence[Tensor], check: Callable[[], None]) -> Table:
        """The table for these moving tensors; built, after ``check``, if they are not where they were in a recent call.

        In a CUDA graph capture a table that has to be built is copied at every replay from memory kept for that graph.

        Raises:
            RuntimeError: more new tables inside captures than memory was kept for, with no call outside in between.
        """
        addresses = addresses_of(moving)
        cuda = self.device.type == "cuda"
        capturing = cuda and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(self.device).cuda_stream if cuda else 0
        for table in self.tables:
            # Another stream may still be uploading, unless it is a capture: that begins with a synchronisation.
            if (table.stream == stream or capturing) and table.moving == addresses:
                if capturing:
                    _in_graphs.append((self, table))
                else:
                    self.reserve()
                return table
        check()
        return self._captured_table(addresses, stream) if capturing else self._uploaded_table(addresses, stream)

    def _uploaded_table(self, addresses: tuple[int, ...], stream: int) -> Table:
        self.rows[:, -1] = torch.tensor(addresses)
        table = Table(addresses, stream, upload(self.rows, self.device), self._scratch())
        self.tables = [table, *self.tables[: KEPT_TABLES - 1]]
        self.reserve()
        return table

    def _captured_table(self, addresses: tuple[int, ...], stream: int) -> Table:
        if not self.spares:
            raise RuntimeError(
                f"more than {SPARES // 2} CUDA graphs were captured in a row, each with gradients at new addresses; "
                "call the kernel once outside of a capture in between"
            )
        # The captured copy reads this memory at every replay, and pinned memory cannot be allocated while capturing.
        staging = self.spares.pop()
        self.rows[:, -1] = torch.tensor(addresses)
        staging.copy_(self.rows)
        rows = torch.empty_like(staging, device=self.device).copy_(staging, non_blocking=True)
        table = Table(addresses, stream, rows, self._scratch(), staging)
        _in_graphs.append((self, table))
        return table

    def reserve(self) -> None:
        """Have pinned memory ready for the next captures, at least half as many as ``SPARES``."""
        missing = SPARES - len(self.spares)
        if missing > SPARES // 2 and self.device.type == "cuda":
            self.spares += torch.empty(missing, *self.rows.shape, dtype=self.rows.dtype, pin_memory=True)

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """Expire with the first tensor that dies: another one, of another size or dtype, may then get its address."""
        self.references = [weakref.ref(tensor, self._expire) for tensor in tensors]

    def _expire(self, _: weakref.ref[Tensor]) -> None:
        self.expired = True

    def _scratch(self) -> Tensor:
        return torch.empty(len(self.rows), 4, dtype=torch.float32, device=self.device)


_groups: list[Group] = []
_in_graphs: list[tuple[Group, Table]] = []  # a CUDA graph does not say when it dies, so what it reads is kept


def group_of(
    columns: Sequence[Sequence[Tensor]], check: Callable[[], None], launch_for: Callable[[int], Launch]
) -> Group:
    """The group of these resident tensors, column by column; a new one is checked, then laid out by the first column.

    Tensors of one dtype share a launch, and ``launch_for`` says which, given their elements. Laying out waits for the
    device once, so that a launch on any stream finds the chunks.

    Raises:
        RuntimeError: the group is new, and a CUDA graph is being captured.
    """
    tensors = list(chain.from_iterable(columns))
    resident = addresses_of(tensors)
    for group in _groups:
        if group.resident == resident and not group.expired:
            return group
    check()
    first = columns[0]
    device = first[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("these tensors are new to the kernel; call it once outside of the CUDA graph capture first")
    counts = torch.tensor([tensor.numel() for tensor in first])
    rows = torch.stack([*torch.tensor(resident).view(len(columns), -1), counts, torch.zeros_like(counts)], dim=1)
    parts = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in first):
        sizes = [tensor.numel() if tensor.dtype == dtype else 0 for tensor in first]
        launch = launch_for(sum(sizes))
        parts.append(Part(dtype, launch, chunk_map(sizes, launch.block).to(device)))
    group = Group(resident, device, rows, [part for part in parts if len(part.chunks)])
    group.watch(tensors)
    _groups[:] = [group, *(other for other in _groups if not other.expired)][:KEPT_GROUPS]
    return group


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The addresses of the first elements; the fastest way from Python, at some 50 ns a tensor."""
    return tuple(map(Tensor.data_ptr, tensors))


def chunk_map(sizes: Sequence[int], block: int) -> Tensor:
    """One entry per block of each tensor, int64: ``block << TENSOR_BITS | tensor``."""
    counts = (torch.tensor(sizes) + (block - 1)) // block
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return (torch.arange(len(owners)) - starts) << TENSOR_BITS | owners


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``, without a host sync: torch keeps the pinned memory until the stream has read it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    index: int | None = None,
) -> None:
    """Raises ValueError unless the tensor, the one at ``index`` in a list ``name``, is contiguous and as said."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        which = name if index is None else f"{name} number {index}"
        raise ValueError(f"{which} must be contiguous, {dtype} {tuple(shape)} on {device}; it is {described(tensor)}")


def check_each(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
    """:func:`check` of each tensor against its counterpart in ``like``, but for the dtype if one is given."""
    for index, (tensor, other) in enumerate(zip(tensors, like, strict=True)):
        check(name, tensor, other.shape, dtype or other.dtype, other.device, index)


def described(tensor: Tensor) -> str:
    """Dtype, shape, layout and device in words."""
    layout = "contiguous" if tensor.is_contiguous() else f"strided {tensor.stride()}"
    return f"{layout}, {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
