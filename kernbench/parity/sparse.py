"""Tensors of billions of elements that cost nothing until they are touched, and what each address belongs to.

Every tensor lies alone in the middle of reserved address space, so that a wrong address almost surely hits a void and
never a neighbour. Memory that nothing wrote to reads as zeros.
"""

from __future__ import annotations

import itertools
import math
import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's mmap does not name."""
VOID_BYTES = 2**34
"""As far as a wrapped 32-bit offset of 8-byte elements leads."""
SMALL_VOID_BYTES = 2**26
WIDE_VOIDS = 1000
"""So many tensors get wide voids; with more of them the 47 bits of address space would run out."""
VAST_BYTES = 2**27
"""Tensors up to here are computed for real."""


class Unreal(Exception):  # noqa: N818 - it says that something cannot be done here, not that it is wrong
    """Something needs the contents of a tensor that has none; the message says what."""


@dataclass
class Region:
    """The bytes that may be accessed for one tensor, inside the address space reserved for it."""

    start: int
    bytes: int
    itemsize: int
    name: str
    space: tuple[int, int]
    keep: Tensor

    @property
    def elements(self) -> int:
        return self.bytes // self.itemsize


@dataclass
class Memory:
    """All tensors that a kernel may touch. They live as long as this does."""

    regions: list[Region] = field(default_factory=list)
    _sorted: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None

    def tensor(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, name: str = "") -> Tensor:
        """A tensor of zeros, alone in its address space.

        Raises:
            Unreal: the system gives no address space for it.
        """
        count = _span(shape, stride)
        void = VOID_BYTES if len(self.regions) < WIDE_VOIDS else SMALL_VOID_BYTES
        size = max(count, 1) * dtype.itemsize
        # Pages around the tensor stay whole, so that its end may lie anywhere in its last page.
        length = void + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + void
        try:
            space = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except (OSError, OverflowError) as error:
            raise Unreal(f"the system gives no {length / 1e9:.0f} GB of address space ({error})") from None
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            space.madvise(mmap.MADV_NOHUGEPAGE)
        flat = torch.frombuffer(space, dtype=dtype, count=max(count, 1), offset=void)
        start = flat.data_ptr()
        around = (start - void, start - void + length)
        self._add(Region(start, count * dtype.itemsize, dtype.itemsize, name, around, flat))
        return flat.as_strided(tuple(shape), tuple(stride)).detach()

    def place(self, tensor: Tensor, name: str = "") -> Tensor:
        """The tensor itself if it lies in here, else a copy with its strides; named either way."""
        tensor = tensor.detach()
        region = self._region_of(tensor)
        if region is not None:
            region.name = region.name or name
            return tensor
        placed = self.tensor(tensor.shape, tensor.stride(), tensor.dtype, name)
        count = _span(tensor.shape, tensor.stride())
        if count:
            placed.as_strided((count,), (1,)).copy_(tensor.as_strided((count,), (1,)))
        return placed

    def know(self, tensor: Tensor, name: str = "") -> None:
        """Allow access to a tensor that lies elsewhere, and name it if it has no name yet."""
        region = self._region_of(tensor)
        if region is not None:
            region.name = region.name or name
            return
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size:
            self._add(Region(start, size, tensor.element_size(), name, (start, start + size), tensor.detach()))

    def holds(self, tensor: Tensor) -> bool:
        return self._region_of(tensor) is not None

    def _add(self, region: Region) -> None:
        self.regions.append(region)
        self._sorted = None

    def _region_of(self, tensor: Tensor) -> Region | None:
        start = tensor.untyped_storage().data_ptr()
        return next((region for region in reversed(self.regions) if region.start == start), None) if start else None

    def _bounds(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        if self._sorted is None:
            self.regions.sort(key=lambda region: region.start)
            starts = [region.start for region in self.regions]
            ends = [region.start + region.bytes for region in self.regions]
            self._sorted = np.array(starts, np.uint64), np.array(ends, np.uint64)
        return self._sorted

    def touch(self, addresses: NDArray[np.uint64], width: int) -> int | None:
        """The first of these addresses at which ``width`` bytes are not all inside one tensor; None if all are."""
        starts, ends = self._bounds()
        if not len(starts):
            return int(addresses[0])
        index = np.searchsorted(starts, addresses, side="right")
        wrong = (index == 0) | (addresses > ends[index - 1] - np.uint64(width))
        return int(addresses[wrong][0]) if wrong.any() else None

    def nearest(self, address: int) -> Region | None:
        """The tensor in whose address space an address lies, else the one that ends or begins nearest to it."""
        self._bounds()
        inside = [region for region in self.regions if region.space[0] <= address < region.space[1]]
        return min(
            inside or self.regions,
            key=lambda region: max(region.start - address, address - region.start - region.bytes),
            default=None,
        )

    def last_at_most(self, address: int) -> Region | None:
        """The tensor that holds the largest address up to this one."""
        self._bounds()
        index = bisect_right(self.regions, address, key=lambda region: region.start)
        return self.regions[index - 1] if index else None


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, gaps included."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


ALLOCATE = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})
FILL = frozenset({"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"})
KEEP_ZEROS = ALLOCATE | frozenset(
    {"zeros", "zeros_like", "new_zeros", "clone", "_to_copy", "copy_", "zero_", "cat", "stack", "repeat"}
)
"""What makes zeros of zeros, so that a vast integer tensor after it is what it would be."""
RANDOM = frozenset({"rand", "randn", "randint"})
RANDOM_LIKE = frozenset({"rand_like", "randn_like"})
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class SparseTorch(TorchDispatchMode):
    """Makes torch allocate in a :class:`Memory`, and leaves out arithmetic on vast tensors: their results are zeros.

    Addresses seldom depend on floating-point numbers, so results of vast floating or boolean tensors are left zero.
    Vast integers may be indices; where they would not be zero, :class:`Unreal` is raised, and kept in ``refused``.

    Attributes:
        keep: let kernels use whatever small tensors are computed in here.
        far: drawn indices reach the end of their range.
    """

    def __init__(
        self, memory: Memory, *, keep: bool, far: bool = False, vast_bytes: float = VAST_BYTES,
        poll: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self.keep = keep
        self.far = far
        self.vast_bytes = vast_bytes
        self.poll = poll
        self.refused = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip its compiler, torch would import it, which takes longer than the whole check."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.poll()
        if func.namespace not in ("aten", "prims", "prim"):
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name == "_unsafe_view":
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        vast = any(map(self._is_vast, given))
        if not vast and (func._schema.is_mutable or _most_elements(func, given, args, kwargs) * 8 <= self.vast_bytes):
            return self._small(func, name, args, kwargs)
        shapes = None if func._schema.is_mutable else _on_meta(func, args, kwargs)
        made = [leaf for leaf in tree_leaves(shapes) if isinstance(leaf, Tensor)]
        if vast or any(map(self._is_vast, made)):
            return self._vast(func, name, args, kwargs, shapes)
        return self._small(func, name, args, kwargs)

    def _is_vast(self, tensor: Tensor) -> bool:
        return tensor.numel() * tensor.element_size() > self.vast_bytes

    def _small(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if name in ALLOCATE | FILL:
            return self.memory.place(result)
        if self.far and name == "randint" and result.numel():
            most = _argument(func, args, kwargs, "high") - 1
            result.view(-1)[(result.numel() - 1) % 2 :: 2] = most
        if self.keep and not func._schema.is_mutable:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.memory.know(leaf)
        return result

    def _vast(self, func: Any, name: str, args: Any, kwargs: Any, shapes: Any) -> Any:
        if func._schema.is_mutable:
            target = args[0] if name.endswith("_") else kwargs.get("out")
            if not isinstance(target, Tensor) or not self._may_stay_zero(target, func, name, args, kwargs):
                self._refuse(name)
            return target
        if shapes is None:
            self._refuse(name)

        def made(shape: Tensor) -> Tensor:
            if not self._may_stay_zero(shape, func, name, args, kwargs):
                self._refuse(name)
            return self.memory.tensor(shape.shape, shape.stride(), shape.dtype)

        return tree_map_only(Tensor, made, shapes)

    def _may_stay_zero(self, tensor: Tensor, func: Any, name: str, args: Any, kwargs: Any) -> bool:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or name in KEEP_ZEROS:
            return True
        return name == "randint" and int(_argument(func, args, kwargs, "low") or 0) <= 0

    def _refuse(self, name: str) -> None:
        self.refused = f"it needs what {name} makes of a tensor with more than {self.vast_bytes / 1e6:.0f} MB"
        raise Unreal(self.refused)


def _most_elements(func: Any, given: Sequence[Tensor], args: Any, kwargs: Any) -> float:
    """An upper bound for the elements of what an operator gives, found without asking it."""
    size = _argument(func, args, kwargs, "size")
    if isinstance(size, Sequence):
        return float(math.prod(size))
    if func._schema.name == "aten::arange":
        start, step = (_argument(func, args, kwargs, name) for name in ("start", "step"))
        return float(_argument(func, args, kwargs, "end") - (start or 0)) / (step or 1)
    if func._schema.name == "aten::index_select":
        source, dim, index = args
        return float(source.numel() * index.numel() / max(1, source.shape[dim] if source.dim() else 1))
    if given and _is_pointwise(func):
        return math.prod(_broadcast(given))
    sizes = [argument.name for argument in func._schema.arguments if "SymInt" in str(argument.type)]
    if not given or any(_argument(func, args, kwargs, name) is not None for name in sizes):
        return math.inf
    return math.prod(max(1, tensor.numel()) for tensor in given)


def _is_pointwise(func: Any) -> bool:
    # The bitwise operators lack the tag.
    return torch.Tag.pointwise in func.tags or func._schema.name.startswith("aten::__")


def _broadcast(given: Sequence[Tensor]) -> list[int]:
    aligned = itertools.zip_longest(*(reversed(tensor.shape) for tensor in given), fillvalue=1)
    return [next((size for size in sizes if size != 1), 1) for sizes in aligned][::-1]


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator would give, as tensors without memory; None where that depends on the contents."""
    size, dtype = _argument(func, args, kwargs, "size"), kwargs.get("dtype")
    name = func._schema.name.partition("::")[2]
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # Torch answers for these in Python, and imports its compiler to do so: that takes longer than the whole check.
    if isinstance(size, Sequence) and name in RANDOM:
        return torch.empty(size, dtype=dtype or (torch.int64 if name == "randint" else None), device="meta")
    if name in RANDOM_LIKE:
        return torch.empty_like(args[0], dtype=dtype, device="meta")
    if given and _is_pointwise(func):
        return _pointwise_on_meta(func, given, args, kwargs)
    kwargs = {**kwargs, **{name: None for name in ("generator", "pin_memory") if name in kwargs}}
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    args, kwargs = tree_map_only(
        Tensor, lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"),
        (args, kwargs),
    )  # fmt: skip
    try:
        return func(*args, **kwargs)
    except Exception:  # noqa: BLE001 - an operator that has no shapes to tell of is computed, or refused with words
        return None


def _pointwise_on_meta(func: Any, given: Sequence[Tensor], args: Any, kwargs: Any) -> Tensor:
    """The dtype is that of the same operator on single elements; the layout that of an operand of the same shape."""
    single = tree_map_only(Tensor, lambda tensor: torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype), (args, kwargs))
    dtype = func(*single[0], **single[1]).dtype
    shape = _broadcast(given)
    like = next((tensor for tensor in given if list(tensor.shape) == shape), None)
    if like is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_like(like, dtype=dtype, device="meta")


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """An operator's argument by name; None if it has none of that name."""
    if name in kwargs:
        return kwargs[name]
    names = [argument.name for argument in func._schema.arguments]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None
