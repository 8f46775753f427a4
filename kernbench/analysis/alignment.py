"""Matrix products on kernels for unaligned rows: the sizes that bring them there, and what aligned rows would save.

Tensor cores are fed 16 bytes at a time, so the fast kernels take only matrices whose rows all start at a multiple of
that. Libraries keep slower kernels for the others, and say in a kernel's name at which elements a row may start.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from kernbench.analysis import opnames
from kernbench.analysis.attribution import places
from kernbench.analysis.intervals import grouped
from kernbench.analysis.launches import SHORT_NS
from kernbench.analysis.opwork import Tensor, Work
from kernbench.analysis.shapes import owners, works
from kernbench.analysis.windows import on_main_device
from kernbench.record import LineLog, SourceLine
from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import KERNEL, Trace

# CUTLASS names a kernel by the type of its sums (s: float, h: half, i: integer), the shape of one instruction, the
# operands' type unless it is that of the sums, the tile, which operands are transposed, and the alignment in elements.
# Left out are names off the tensor cores ("simt") and of doubles and complex numbers (d, z), whose kernels are all
# "align1", and TensorRT's ("aligna2"), which takes such a kernel wherever it measured that to be faster.
_NAME = re.compile(
    r"\bcutlass\w*?_tensorop_(?:[a-z]+\d+_)?(?P<sums>[shi])\d+(?:x\d+)*(?:bf16|f16|tf32)?gemm(?:_[a-z]+)*"
    r"(?:_(?P<type>bf16|f16|tf32|f32|s8|u8|e4m3|e5m2))?_\w*?(?P<first>[nt])(?P<second>[nt])[nt]?_align(?P<at>\d+)(?!\d)"
)
_TYPE_OF_SUMS = {"s": "f32", "h": "f16"}
# Elements in 16 bytes.
_FULL = {"bf16": 8, "f16": 8, "tf32": 4, "f32": 4, "s8": 16, "u8": 16, "e4m3": 16, "e5m2": 16}
_OFF_TENSOR_CORES = re.compile(r".*(simt|ffma|sgemm|gemv|gemmSN)")
_PRODUCTS = opnames.PRODUCT | opnames.ADDED_PRODUCT
# Tensor cores do this much in microseconds: a smaller product's time is that of its start and of reading memory, so its
# rate tells nothing of a large one's, nor the other way round.
_LEAST_FLOPS = 1e9


@dataclass(frozen=True)
class Unaligned:
    """The products that the same sizes bring to kernels for unaligned rows.

    ``sizes`` are no multiple of ``full`` elements, which are 16 bytes; empty where no shapes tell. ``seconds`` is what
    a step would win at most: against the rate of aligned products if ``compared``, else all the time they take.
    ``count`` is products a step. ``kernel``, ``op``, ``source`` and ``operands`` are those of the costliest one.
    """

    sizes: tuple[int, ...]
    full: int
    seconds: float
    count: float
    compared: bool
    kernel: str
    op: str
    source: SourceLine | None
    operands: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Kernel:
    """What a name tells. Its operands are BLAS's, by columns: the first of them is the product's right matrix."""

    name: str
    full: int
    right_transposed: bool
    left_transposed: bool


@dataclass(frozen=True)
class _Product:
    left: Tensor
    right: Tensor
    work: Work

    def sizes_at_fault(self, kernel: _Kernel) -> tuple[int, ...]:
        """The row lengths of both matrices as stored, and of the result, that are no multiple of full alignment."""
        (rows, inner), columns = self.left.dims[-2:], self.right.dims[-1]
        lengths = {
            columns,
            inner if kernel.right_transposed else columns,
            rows if kernel.left_transposed else inner,
        }
        return tuple(sorted((length for length in lengths if length % kernel.full), reverse=True))


def unaligned(trace: Trace, lines: LineLog | None) -> list[Unaligned]:
    """Products by the sizes at fault, the costliest first.

    A library may choose a kernel for unaligned rows for small products with aligned ones too. So a product counts only
    if it is large and such a size is known, or, where no shapes are recorded, if its kernel is not short.
    """
    device, steps = trace.device, len(trace.counted)
    used = np.unique(device.name).tolist()
    kernels = {number: kernel for number in used if (kernel := _unaligned(trace.names[number])) is not None}
    counted = on_main_device(trace) & trace.in_counted(device.step) & (device.kind == KERNEL)
    slow = counted & np.isin(device.name, list(kernels))
    rows = np.flatnonzero(slow)
    if not len(rows):
        return []
    owner = np.full(len(device), -1, np.int64)
    launched = np.flatnonzero(counted & (device.op >= 0))
    owner[launched] = owners(trace, device.op[launched])
    kind, products = _products(trace, owner)
    rates = _rates(trace, owner, kind, products, slow)
    where = places(trace, lines)
    # The operator around a launch, else the call itself; appended entries answer for neither.
    site = np.where(device.op >= 0, device.op, device.call)[rows]
    operator, place, line = (np.append(column, -1)[site] for column in (trace.host.name, where.op, where.line))
    keys, position = grouped(device.name[rows], kind[rows], operator, place, line)
    spent = np.bincount(position, weights=(device.end_ns - device.start_ns)[rows]) / steps
    calls = np.bincount(position) / steps
    found: dict[tuple[object, ...], list[Unaligned]] = defaultdict(list)
    for number, (name, of, called, op, on) in enumerate(keys):
        kernel = kernels[name]
        whole = Unaligned(
            sizes=(),
            full=kernel.full,
            seconds=float(spent[number]) / 1e9,
            count=float(calls[number]),
            compared=False,
            kernel=kernel.name,
            op=where.op_name(op),
            source=where.source(on),
        )
        if of >= 0:
            one = _told_by_shapes(whole, kernel, products.get(of), rates)
        else:
            one = _told_by_name(whole, trace.names[called] if called >= 0 else "")
        if one is not None:
            found[one.sizes, one.full, one.compared].append(one)
    return sorted(map(together, found.values()), key=lambda group: -group.seconds)


def together(found: Iterable[Unaligned]) -> Unaligned:
    """Several as one, which must agree in alignment and in how they are compared; the sizes that cost most first."""
    ordered = sorted(found, key=lambda one: -one.seconds)
    return replace(
        ordered[0],
        sizes=tuple(dict.fromkeys(size for one in ordered for size in one.sizes)),
        seconds=sum(one.seconds for one in ordered),
        count=sum(one.count for one in ordered),
    )


def _unaligned(name: str) -> _Kernel | None:
    """What the name of a kernel for rows of less than full alignment tells; None for any other kernel."""
    found = _NAME.search(name)
    if found is None:
        return None
    full = _FULL.get(found["type"] or _TYPE_OF_SUMS.get(found["sums"], ""), 0)
    if int(found["at"]) >= full:
        return None
    return _Kernel(found[0], full, found["first"] == "t", found["second"] == "t")


def _products(trace: Trace, owner: Ints) -> tuple[Ints, dict[int, _Product]]:
    """For each device row the kind (name and shapes) of its operator, -1 where unknown, and the products among them."""
    known = np.flatnonzero(owner >= 0)
    operators, position = np.unique(owner[known], return_inverse=True)
    shaped = works(trace, operators)
    kind = np.full(len(owner), -1, np.int64)
    kind[known] = shaped.kind[operators][position]
    products = {}
    for number, row in zip(*np.unique(shaped.kind[operators], return_index=True), strict=True):
        name, work, given = trace.names[trace.host.name[operators[row]]], shaped.works[number], shaped.inputs[number]
        if name not in _PRODUCTS or work is None:
            continue
        added = name in opnames.ADDED_PRODUCT
        left, right = given[added : added + 2]
        if left is not None and right is not None and min(len(left.dims), len(right.dims)) > 1:
            products[int(number)] = _Product(left, right, work)
    return kind, products


def _rates(trace: Trace, owner: Ints, kind: Ints, products: Mapping[int, _Product], slow: Bools) -> dict[str, float]:
    """The most flops per second that large aligned products on tensor cores reach in this trace, by type.

    The mean of all calls with the same shapes: a single call may be short by chance.
    """
    device, count = trace.device, int(kind.max(initial=-1)) + 1
    known = np.flatnonzero(kind >= 0)
    spent = np.bincount(kind[known], weights=(device.end_ns - device.start_ns)[known], minlength=count) / 1e9
    _, first = np.unique(owner[known], return_index=True)
    calls = np.bincount(kind[known][first], minlength=count)
    other = set(np.unique(kind[slow | trace.named(_OFF_TENSOR_CORES)[device.name]]).tolist())
    rates: dict[str, float] = {}
    for number, product in products.items():
        flops, dtype = product.work.flops, product.work.dtype
        if number not in other and flops >= _LEAST_FLOPS and spent[number]:
            rates[dtype] = max(rates.get(dtype, 0.0), flops * float(calls[number] / spent[number]))
    return rates


def _told_by_name(found: Unaligned, operator: str) -> Unaligned | None:
    """The same; None where a library may have been free to choose, or a convolution's channels are at fault."""
    free = found.seconds < SHORT_NS * found.count / 1e9
    return None if free or "conv" in operator else found


def _told_by_shapes(
    found: Unaligned, kernel: _Kernel, product: _Product | None, rates: Mapping[str, float]
) -> Unaligned | None:
    """With the sizes and the saving that shapes tell; None where no size is at fault, or the product is small."""
    if product is None or product.work.flops < _LEAST_FLOPS:
        return None
    sizes, rate = product.sizes_at_fault(kernel), rates.get(product.work.dtype)
    if not sizes:
        return None
    needed = product.work.flops * found.count / rate if rate else 0.0
    return replace(
        found,
        sizes=sizes,
        seconds=max(found.seconds - needed, 0.0),
        compared=rate is not None,
        operands=(product.left.dims, product.right.dims),
    )
